"""Participations: what they refuse, what they say, and their files."""

from __future__ import annotations

import numpy as np
import pytest

from rootnoise import RootnoiseError, participation
from rootnoise.participation import (
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
    SingleParticipation,
)

ALL: list[participation.Participation] = [
    SingleParticipation(),
    MinSeparation(5, 3),
    FixedCycle(5, 3),
    CyclicPoisson(4, 0.25),
]


@pytest.mark.parametrize("value", ALL)
def test_round_trip(value):
    assert participation.from_dict(participation.to_dict(value)) == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (ALL[0], "at most one step each"),
        (ALL[1], "at most 3 steps each, at least 5 apart"),
        (ALL[2], "one step in each of 3 epochs, exactly 5 apart"),
        (ALL[3], "independently with probability 0.25 at one step in 4"),
        (CyclicPoisson(1, 0.5), "independently with probability 0.5 at every step"),
    ],
)
def test_in_words(value, words):
    assert str(value) == words


@pytest.mark.parametrize("n", [11, 12, 15])
def test_good_step_counts_pass(n):
    for value in ALL:
        value.validate(n)


def test_probabilities_are_kept_as_floats():
    for value in (CyclicPoisson(1, 1), MinSepPoisson(1, np.float32(0.5))):
        assert type(value.probability) is float


def test_rounds_of_a_group():
    assert [CyclicPoisson(4, 0.1).rounds(n) for n in (4, 5, 8, 9)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: MinSeparation(0, 1), "min_sep must be >= 1, got 0"),
        (lambda: MinSeparation(1, 0), "max_participations must be >= 1, got 0"),
        (lambda: FixedCycle(0, 1), "period must be >= 1, got 0"),
        (lambda: FixedCycle(1, 1.5), "epochs must be an integer, got 1.5"),
        (lambda: CyclicPoisson(0, 0.5), "groups must be >= 1, got 0"),
        (lambda: CyclicPoisson(1, 0), "probability must be a finite number > 0 and <= 1, got 0.0"),
        (lambda: CyclicPoisson(1, 1.1), "probability must be a finite number > 0 and <= 1"),
        (
            lambda: MinSeparation(5, 3).validate(10),
            r"max_participations must be in \[1, ceil\(n_steps/min_sep\)=2\], got 3",
        ),
        (
            lambda: FixedCycle(5, 3).validate(10),
            r"n_steps must be in \[11, period\*epochs=15\] for 3 epochs of 5 steps, got 10",
        ),
        (lambda: FixedCycle(5, 3).validate(16), "n_steps must be in .*, got 16"),
        (lambda: CyclicPoisson(4, 0.1).validate(3), r"groups must be in \[1, n_steps=3\], got 4"),
        (lambda: participation.from_dict({"type": "often"}), "participation must be of a known"),
        (
            lambda: participation.from_dict({"type": "min-sep", "min_sep": 2}),
            "participation must be of a known type, got {'type': 'min-sep'",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


def test_one_epoch_is_told_in_the_singular():
    assert f"{FixedCycle(period=9, epochs=1)}" == "one step of the one epoch"
    assert f"{FixedCycle(period=9, epochs=2)}" == "one step in each of 2 epochs, exactly 9 apart"
