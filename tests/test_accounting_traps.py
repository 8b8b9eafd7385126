"""Known ways to get privacy accounting wrong, each held off by name; and JAX-Privacy's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian

from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise.accounting import composition
from rootnoise.accounting import monte_carlo as estimate
from rootnoise.accounting.balls_in_bins import Bins, bin_gram
from rootnoise.accounting.composition import Losses
from rootnoise.accounting.subsampled import losses
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, MinSeparation
from rootnoise.participation.samplers import CyclicPoissonSampler, MinSepPoissonSampler
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import prefix_sum

PUBLISHED = json.loads((Path(__file__).parent / "reference/jax_privacy.json").read_text())[
    "epsilons"
]


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_jax_privacy_agrees(case):
    q = case["batch_size"] * case["groups"] / case["n_examples"]
    who = CyclicPoisson(case["groups"], q)
    cost = accounting.privacy_cost(who, case["n_steps"], case["noise_multiplier"], case["delta"])
    assert cost.epsilon == pytest.approx(case["epsilon"], rel=1.5e-3)


def test_independent_noise_with_many_participations_is_not_of_sensitivity_one():
    split = factorize(prefix_sum(100), FixedCycle(10, 10), "identity")
    found = sensitivity(split.strategy, FixedCycle(10, 10))
    assert found.value == pytest.approx(math.sqrt(10))
    mechanism = Mechanism.calibrate(split, FixedCycle(10, 10), epsilon=1.0, delta=1e-5)
    # What one step adds is noise of deviation sigma sqrt(10), ten of which compose to sigma.
    composed = get_epsilon_gaussian(mechanism.noise_std / math.sqrt(10), 1e-5)
    assert composed == pytest.approx(1.0, rel=1e-6)


def test_columns_that_overlap_count_their_cross_terms():
    """p > b: sqrt(k) |c| would be too small, and so would an accountant that adds squares."""
    c = Toeplitz(np.array([1.0, 0.5, 0.375, 0.3125, 0.27, 0.24]), 12)
    squares = math.sqrt(4 * float(np.square(c.coefficients).sum()))
    for who in (FixedCycle(3, 4), MinSeparation(3, 4)):
        assert sensitivity(c, who).value > 1.1 * squares
    gram = bin_gram(c, 3)
    assert gram[0, 0] == pytest.approx(sensitivity(c, FixedCycle(3, 4)).value ** 2)
    assert gram[0, 1] > 0.5 * gram[0, 0]  # and bins are not told apart by their own columns alone
    apart = Bins(np.diag(np.diag(gram)))
    assert Bins(gram).mean_norm2 > 2 * apart.mean_norm2


def test_sensitivity_is_a_root_and_not_its_square():
    c = Toeplitz(np.array([3.0, 4.0]), 10)
    assert sensitivity(c, FixedCycle(5, 2)).value == pytest.approx(5 * math.sqrt(2))
    mechanism = Mechanism.calibrate(
        factorize(prefix_sum(10), FixedCycle(5, 2), "identity"),
        FixedCycle(5, 2),
        noise_multiplier=1.0,
        delta=1e-5,
        clip_norm=7.0,
    )
    assert mechanism.noise_std == pytest.approx(7 * math.sqrt(2))
    # Bins are compared in units of sens, once: the worst bin has norm 1 / sigma.
    who = BallsInBins(5, 2)
    gram = bin_gram(c, 5) / sensitivity(c, who).value ** 2
    assert gram.max() == pytest.approx(1)


def test_noise_is_on_the_sum_and_not_on_the_mean():
    """False-alarm rate 1e-8: the deviation of 40,000 draws is known to 0.35 %, six times over."""
    who = FixedCycle(4, 2)
    split = factorize(prefix_sum(8), who, "identity")
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=2.0, delta=1e-5, clip_norm=3.0)
    found = float(NoiseStream(mechanism, 40_000, Key.from_seed(0)).next().std())
    expected = 2.0 * 3.0 * math.sqrt(2)
    assert abs(found / expected - 1) < 0.021
    assert abs(found / (expected / 100) - 1) > 1  # that of a mean over a batch of 100


def test_the_sampling_rate_is_that_of_the_data_and_not_of_the_number_of_batches():
    """1 / ceil(N / B) is less than B / N wherever B does not divide N."""
    n_examples, batch = 1050, 100
    sampler = CyclicPoissonSampler(n_examples, batch, n_steps=11)
    assert sampler.participation.probability == batch / n_examples
    assert sampler.participation.probability > 1 / 11
    assert MinSepPoissonSampler(n_examples, batch, 11, min_sep=4).participation.rate == (
        pytest.approx(batch / n_examples, rel=1e-12)
    )
    right = accounting.privacy_cost(sampler.participation, 11, 1.0, 1e-5)
    wrong = accounting.privacy_cost(CyclicPoisson(1, 1 / 11), 11, 1.0, 1e-5)
    assert wrong.epsilon < right.epsilon


def test_bands_beyond_the_groups_are_not_amplified_silently():
    who, c = CyclicPoisson(3, 0.1), Toeplitz(np.ones(4), 12)
    with pytest.raises(RootnoiseError, match=r"^bands must be in \[1, groups=3\] .*, got 4$"):
        sensitivity(c, who)


def test_digits_of_shown_numbers_by_hand():
    """The private side of six and of nine digits; noise is forgiven 1e-12 of itself, no more."""
    assert accounting.round_up(2.0000001) == "2.00001"
    assert accounting.round_up(1.5) == "1.5"
    assert accounting.round_down(0.12345678999) == "0.123456789"
    for part, shown in ((0.0, "0.3"), (0.98e-12, "0.3"), (1.02e-12, "0.299999999")):
        assert accounting.round_down(0.3 * (1 - part)) == shown


def test_every_step_pays_for_what_its_losses_may_be_off_by():
    masses = np.array([0.2689, 0, 0, 0, 0.7311])
    plain, off = (Losses(0.5, -2, masses, 0.0, excess).epsilon(3, 1e-9) for excess in (0.0, 0.1))
    assert off == pytest.approx(plain + 3 * 0.1, rel=1e-12)


@pytest.mark.parametrize("error", [1.0, 0.0])
def test_errors_of_the_transform_are_paid_for(monkeypatch, error):
    """Where the transform says nothing, epsilon is that of its error, of tails and of rounding."""
    rounds, delta = 5, 1e-16
    one = losses(1.0, 0.1, 4e-4, -60.0, add=False)
    used = one.masses > 0
    grid = one.width * (one.first + np.flatnonzero(used))
    tilted = composition._Tilted.at_delta(grid, one.masses[used], rounds, delta)
    theta, goal = tilted.theta, math.log(delta)
    x = one.width * np.arange(10**5)
    square = float(np.sum((-np.expm1(-x) * np.exp(-theta * x)) ** 2))
    monkeypatch.setattr(composition, "_power", lambda r, n: (np.zeros(r.size), error))
    found = tilted.epsilon(one.width, delta)

    def epsilon(total):
        return (rounds * tilted.kappa + math.log(total) - goal) / theta

    assert square > 2
    least = error * math.sqrt(square) + 3 * composition.TAIL
    most = error * math.sqrt(1.01 * square + 1) + 9 * composition.TAIL
    assert 0 < epsilon(least) + 1e-4 * (error == 0) < found < epsilon(most) + 1e-5


def test_roots_near_zero_and_parts_of_a_block():
    falling = estimate._root(lambda e: math.exp(-10 * e), 0.5)
    assert falling == pytest.approx(math.log(2) / 10, abs=1e-5)
    assert math.exp(-10 * falling) <= 0.5
    asked = []

    def draw(n):
        asked.append(n)
        return np.zeros(n), np.zeros(n)

    estimate._drawn(draw, 10, 4)
    assert asked == [4, 4, 2]


@pytest.mark.parametrize(("sigma", "q", "width"), [(1.0, 0.01, 1e-2), (3.0, 0.1, 1e-3)])
@pytest.mark.parametrize("add", [False, True])
def test_masses_of_a_step_are_raised_by_what_rounding_may_have_taken(sigma, q, width, add):
    one = losses(sigma, q, width, -100.0, add=add)
    raised = math.fsum([*one.masses.tolist(), -1.0]) / composition.UNIT
    reach = math.sqrt(200) + (0 if add else 1 / sigma)
    assert 4 * reach**2 + 64 < raised + 8 < 4 * reach**2 + 500  # a sum is off by few units


def test_two_groups_are_not_called_independent_noise():
    for groups, words in ((1, "for independent noise"), (2, "for strategies of at most 2 bands")):
        cost = accounting.privacy_cost(CyclicPoisson(groups, 0.1), 4, 1.0, 1e-5)
        assert cost.method.endswith(words)
