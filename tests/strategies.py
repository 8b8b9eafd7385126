"""Hypothesis strategies for the values that everything takes."""

from __future__ import annotations

from hypothesis import strategies as st

from rootnoise.participation import FixedCycle, MinSeparation


@st.composite
def participations(draw, n):
    """A minimal separation or a fixed cycle that fits n steps; its last cycle may be partial."""
    b = draw(st.integers(1, n))
    most = -(-n // b)
    if draw(st.booleans()):
        return MinSeparation(b, draw(st.integers(1, most)))
    return FixedCycle(b, most)
