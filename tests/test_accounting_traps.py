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
from rootnoise.accounting.balls_in_bins import Bins, bin_gram
from rootnoise.batches.samplers import CyclicPoissonSampler, MinSepPoissonSampler
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, MinSeparation
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
