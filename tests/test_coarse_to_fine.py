"""From coarse to fine: starts are feasible, follow real patterns, and are close to the optimum."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootnoise.bounds import certificate, coarse_to_fine, dual
from rootnoise.participation import FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, prefix_sum
from strategies import participations

ONCE = SingleParticipation()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(coarse_to_fine, "WHOLE", 6)


def weight(patterns, factors):
    """Check that every Y_p is a scaled correlation matrix; return the sum of the scales."""
    total = 0.0
    for steps, factor in zip(patterns, factors, strict=True):
        diagonals = np.einsum("gij,gij->gi", factor, factor)
        np.testing.assert_allclose(diagonals, np.tile(diagonals[:, :1], steps.shape[1]))
        total += diagonals[:, 0].sum()
    return total


@settings(max_examples=30)
@given(st.data(), st.integers(1, 60))
def test_starts_are_feasible_and_follow_one_person(data, n):
    who = data.draw(st.one_of(st.just(ONCE), participations(n)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse_to_fine, "WHOLE", 6)
        patterns, start, _ = coarse_to_fine.start(SGD(n, 0.5).matrix.dense(), who)
    for steps in patterns:
        for pattern in steps:
            assert pattern.max() < n
            assert certificate._admissible(np.sort(pattern), who)
    if start is not None:
        assert weight(patterns, start) == pytest.approx(1)
    if not isinstance(who, MinSeparation):  # and they cover all steps
        assert sorted(np.concatenate([p.ravel() for p in patterns])) == list(range(n))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("workload", "who", "loss"),
    [
        (prefix_sum(96), ONCE, 5e-3),
        (SGD(96, 0.9), ONCE, 1e-2),
        (prefix_sum(96), FixedCycle(24, 4), 1e-2),
        (prefix_sum(89), FixedCycle(23, 4), 1e-2),
        (SGD(96, 0.9), MinSeparation(24, 4), 2e-2),
    ],
    ids=str,
)
def test_a_start_is_close_and_no_start_is_above(workload, who, loss):
    a = workload.matrix.dense()
    n = len(a)
    patterns, start, _ = coarse_to_fine.start(a, who)
    assert start is not None
    first = next(dual.ascend(dual.Problem(a[:, :, None], patterns), start)).value
    whole = dual.ascend(dual.Problem(a[:, :, None], dual.patterns(n, who)))
    optimum = max(point.value for point in islice(whole, 40))
    assert 1 - loss < first / optimum < 1 + 1e-9
