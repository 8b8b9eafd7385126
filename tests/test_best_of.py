"""The auditor's route to the epsilon of the best of several trials, beside the claim's."""

from __future__ import annotations

import math

import pytest

from rootnoise.accounting import Trials, privacy_cost, tuned_privacy_cost
from rootnoise.auditing import best_of as module
from rootnoise.auditing import recompute
from rootnoise.auditing.best_of import best_of
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import FixedCycle, SingleParticipation
from rootnoise.workload import SGD

ONCE = SingleParticipation()
CASES = [
    Trials(mean, shape) for mean in (1.01, 10, 1000) for shape in (0.0, 0.5, 1.0, 100.0, math.inf)
]


@pytest.mark.parametrize("trials", CASES, ids=str)
@pytest.mark.parametrize(("sigma", "delta"), [(0.3, 1e-3), (1.0, 1e-5), (4.0, 1e-9), (50.0, 1e-5)])
def test_the_claim_lies_in_the_auditors_range(trials, sigma, delta):
    claimed = tuned_privacy_cost(ONCE, 9, sigma, delta, trials).epsilon
    low, high = best_of(trials, 1 / sigma, delta, recompute._integrated)
    assert low * (1 - 1e-7) <= claimed <= high * (1 + 1e-7)
    if low > 0.1:
        assert high < 1.06 * low


@pytest.mark.parametrize("trials", [t for t in CASES if t.mean > 2], ids=str)
def test_an_epsilon_that_forgets_the_trials_is_below_the_range(trials):
    alone = privacy_cost(ONCE, 9, 1.0, 1e-5).epsilon
    low, _ = best_of(trials, 1.0, 1e-5, recompute._integrated)
    assert alone < 0.9 * low
    fewer = tuned_privacy_cost(ONCE, 9, 1.0, 1e-5, Trials(0.95 * trials.mean, trials.shape))
    assert fewer.epsilon < low * (1 - 1e-6)


@pytest.mark.parametrize("trials", [t for t in CASES if t.shape != math.inf], ids=str)
def test_scipys_number_of_trials_is_ours(trials):
    assert module._gamma(trials) == pytest.approx(trials.gamma, rel=1e-7)


def test_the_ranges_of_a_mechanism_are_those_of_its_trials():
    cycle = FixedCycle(5, 4)
    split = factorize(SGD(20, 0.9), cycle, "bsr")
    for trials in (Trials(7), Trials(7, math.inf)):
        made = Mechanism.calibrate(split, cycle, epsilon=3.0, delta=1e-5, trials=trials)
        [found] = recompute.epsilon_ranges(made, {1e-5: made.epsilon})
        assert found.method == f"number of trials {trials}"
        assert found.holds(made.epsilon, 1e-7)
        assert not found.holds(0.999 * made.epsilon, 1e-7)
        assert not found.holds(1.06 * made.epsilon, 1e-7)
