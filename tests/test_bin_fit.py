"""Which chains bound the bins of a strategy, against products, samples and known cases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain_cases import gram_of
from rootnoise import accounting
from rootnoise.accounting import MonteCarlo, bin_bounds, bin_fit, run
from rootnoise.accounting.balls_in_bins import bin_gram
from rootnoise.accounting.bin_bounds import bounds
from rootnoise.accounting.bin_chain import Chain
from rootnoise.accounting.bin_fit import chains_above, chains_below
from rootnoise.accounting.run import ATTEMPTS, CLOSE, _Search
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize
from rootnoise.participation import BallsInBins, FixedCycle
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import SGD, prefix_sum


@given(st.integers(8, 30), st.integers(1, 4), st.integers(2, 12), st.floats(0.2, 6))
@settings(max_examples=30)
def test_chains_lie_entrywise_on_their_side(b, epochs, bands, epsilon):
    who = BallsInBins(b, epochs)
    n = b * epochs
    gram = bin_gram(factorize(prefix_sum(n), who, "bsr", bands=min(bands, n)).strategy, b)
    for chain in chains_above(gram, epsilon):
        assert chain.still == 0
        larger = gram_of(chain) * (1 + 1e-9) + 1e-12
        for start in range(b):  # every row of so many neighbours in the circle
            i = (start + np.arange(chain.bins)) % b
            assert np.all(gram[np.ix_(i, i)] <= larger)
    for found in chains_below(gram, epsilon):
        assert found.bins == b
        assert np.all(gram_of(found) <= gram * (1 + 1e-9) + 1e-12)


def test_two_bands_are_a_chain_of_their_own():
    """Each mean takes of two Z, and has the product of two bands with the next, no more."""
    gram = np.eye(12) + 0.4 * (np.eye(12, k=1) + np.eye(12, k=-1))
    ring = gram.copy()
    ring[0, -1] = ring[-1, 0] = 0.4
    np.testing.assert_allclose(gram_of(chains_below(ring, 1.0)[0]), gram, atol=1e-6)
    blocks = chains_above(ring, 1.0)[1]
    np.testing.assert_allclose(gram_of(blocks), gram[:11, :11], atol=2e-3)


def test_bins_without_neighbours_or_gaps_are_left_to_other_bounds():
    assert chains_above(np.eye(5), 1.0) == []
    assert [chain.bins for chain in chains_above(np.eye(3) + 1, 1.0)] == [2, 2]
    assert chains_above(np.eye(2) + 1, 1.0) == []
    assert chains_above(np.ones((5, 5)), 1.0) == []
    assert chains_below(np.eye(1), 1.0) == []
    assert chains_below(np.eye(3) - 0.1, 1.0) == []
    assert chains_below(np.eye(3), 1.0) == []


def test_products_of_blocks_are_those_at_their_distance():
    """And what is seen around a mean is the mean over those of a block, without itself."""
    one, across = bin_fit._wanted(np.arange(6.0), 3)
    u = np.arange(3)
    assert np.array_equal(one, np.abs(u - u[:, None]))
    assert np.array_equal(across, [[3, 4, 5], [2, 3, 4], [1, 2, 3]])
    loads = np.array([0.3, 0.7, 0.9, 0.6])  # tails, then heads
    gram = gram_of(Chain(6, (0.9, 0.6), (0.3, 0.7), (0.0, 0.0), 0.0))
    seen = np.expm1(gram / 1.5 * 4.0 - gram**2 / 3.0)
    np.fill_diagonal(seen, 0.0)
    assert bin_fit._around(loads, 1.5, 4.0) == pytest.approx(seen[2:4].sum(axis=1).mean())


def test_two_means_are_a_chain_from_below():
    gram = np.array([[1.0, 0.5], [0.5, 1.0]])
    (chain,) = chains_below(gram, 1.0)
    np.testing.assert_allclose(gram_of(chain), gram, atol=1e-6)
    inside, across = bin_fit.shared(bin_fit._loads_below(np.array([1.0, 0.5]), 1.0, 5.0)[1])
    assert inside <= 1.0  # not by a billionth more
    assert across <= 0.5


@pytest.mark.filterwarnings("error")
def test_bands_of_zeros_are_no_numbers_of_a_chain():
    """A decay to the power of a distance may be below the least number there is."""
    gram = np.eye(500)
    i = np.arange(500)
    gram[i, (i + 200) % 500] = gram[(i + 200) % 500, i] = 1e-3
    (plain,) = chains_above(gram, 1.0)
    assert plain.heads[0] ** 2 * plain.decay**200 >= 1e-3
    assert chains_above(gram * (gram < 1e-3) + 2.0 * np.eye(500) + (gram == 1e-3) * 0.9, 1.0) == []
    found = bounds(gram / 0.7**2, 1e-5, sizes=bin_bounds.QUICK)
    assert 0 <= found.lower <= found.upper < 2


def test_blocks_below_are_no_longer_than_they_may_be_and_shorter_ones_are_tried():
    """Of means that all overlap, blocks would else be half as long as the run."""
    i = np.arange(150)
    gram = 0.95 ** np.abs(i - i[:, None])
    chains = chains_below(gram, 1.0)
    assert max(len(chain.heads) for chain in chains) == 32
    # Products that fall quickly are seen more by blocks that lack more of the pairs.
    gram = np.eye(200)
    for d in range(1, 16):
        gram += (0.5 / d**0.7) * (np.eye(200, k=d) + np.eye(200, k=-d))
    chains = chains_below(gram, 1.5)
    assert len(chains[0].heads) == 8
    assert len(chains[1].heads) < 8
    for chain in chains:
        assert np.all(gram_of(chain) <= gram * (1 + 1e-9) + 1e-12)


@pytest.mark.parametrize("bands", [2, 4])
def test_correlated_noise_is_bounded_within_ten_per_cent(bands):
    who = BallsInBins(200, 4)
    gram = bin_gram(factorize(prefix_sum(800), who, "bsr", bands=bands).strategy, 200)
    gram /= np.diag(gram).max() * 0.45**2
    found = bounds(gram, 1e-5)
    assert found.lower <= found.upper <= 1.1 * found.lower
    rough = bounds(gram, 1e-5, sizes=bin_bounds.QUICK)
    assert rough.lower <= found.upper <= rough.upper <= 1.05 * found.upper
    assert bin_bounds.above(gram, 1e-5) == found.upper
    assert bin_bounds.below(gram, 1e-5, found.upper) == found.lower


def test_a_certain_bound_near_the_forecast_is_claimed_and_calibrated_to():
    who = BallsInBins(60, 2)
    strategy = factorize(prefix_sum(120), who, "bsr", bands=2).strategy
    few = MonteCarlo(samples=20_000)
    sigma = accounting.noise_multiplier(who, 120, 3.0, 1e-5, strategy=strategy, monte_carlo=few)
    cost = accounting.privacy_cost(who, 120, sigma, 1e-5, strategy=strategy, monte_carlo=few)
    assert cost.monte_carlo is None
    assert "certain" in cost.method
    assert 0.98 * 3 <= cost.epsilon <= 3
    scale = sensitivity(strategy, who).value * sigma
    upper = bin_bounds.above(bin_gram(strategy, 60) / scale**2, 1e-5)
    assert cost.epsilon == pytest.approx(upper, rel=1e-12)  # of the same products, but for rounding


def test_where_certain_bounds_are_far_only_samples_are_searched_with(monkeypatch):
    who, few = BallsInBins(24, 1), MonteCarlo(samples=20_000)
    strategy = factorize(prefix_sum(24), who, "bsr", bands=8).strategy
    looks = []
    above = bin_bounds.above

    def counted(*given):
        looks.append(given)
        return above(*given)

    monkeypatch.setattr(bin_bounds, "above", counted)
    own = {"strategy": strategy, "monte_carlo": few}
    sigma = accounting.noise_multiplier(who, 24, 1.01, 1e-5, **own)
    assert len(looks) == 2  # whether it is near, and what is stated
    cost = accounting.privacy_cost(who, 24, sigma, 1e-5, **own)
    assert cost.monte_carlo == few
    assert 0.9 * 1.01 <= cost.epsilon <= 1.01
    # Where what is stated misses after all, the noise without amplification is taken.
    stated = replace(cost, epsilon=1.02)
    monkeypatch.setattr(run._Run, "cost", lambda *_: stated)
    enough = accounting.noise_multiplier(who, 24, 1.01, 1e-5, **own)
    assert accounting.privacy_cost(FixedCycle(24, 1), 24, enough, 1e-5).epsilon <= 1.01
    assert enough > sigma


def test_a_certain_bound_that_looks_far_is_searched_with_where_it_beats_few_samples():
    """A first look at it may be 1.2 times what it is."""
    who, few = BallsInBins(20, 2), MonteCarlo(samples=1000)
    strategy = factorize(SGD(40, 0.9, 0.999), who, "banded", bands=4).strategy
    own = {"strategy": strategy, "monte_carlo": few}
    sigma = accounting.noise_multiplier(who, 40, 0.15, 1e-3, **own)
    cost = accounting.privacy_cost(who, 40, sigma, 1e-3, **own)
    assert cost.monte_carlo is None
    assert 0.97 * 0.15 <= cost.epsilon <= 0.15


@pytest.mark.parametrize("off", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("power", [0.8, 1.7, 4.0])
@pytest.mark.parametrize("chance", [0.0, 0.004])
def test_a_search_returns_no_noise_that_misses_the_target(off, power, chance):
    """However far the forecast is from the exact figure, whose first trials may miss."""
    rng, tried = np.random.default_rng(0), []
    known: dict[float, float] = {}

    def exact(sigma):
        known.setdefault(sigma, off * sigma**-power * (1 + chance * rng.uniform(-1, 1)))
        return known[sigma]

    search = _Search(2.0, 5.0, lambda *pair: tried.append(pair))
    search.follow(lambda s: s**-power, 0.02, above=0.02)
    forecasts = len(tried)
    assert 1.95 <= tried[-1][0] ** -power <= 2.05
    found = search.follow(exact, CLOSE)
    assert 2 * (1 - CLOSE) <= known[found] <= 2.0
    assert tried[-1] == (found, known[found])
    assert len(tried) <= forecasts + 4


def test_a_search_returns_the_noise_without_amplification_where_no_other_will_do():
    tried: list[float] = []
    search = _Search(2.0, 5.0, lambda sigma, epsilon: tried.append(sigma))
    assert search.follow(lambda sigma: 3.0, CLOSE) == 5.0
    tried.clear()
    search.next = 1.0
    assert search.follow(lambda sigma: 2.02, CLOSE) == 5.0  # always nearly there
    assert len(set(tried)) == len(tried) == ATTEMPTS - 1  # the union bound of samples counts on it
    assert search.follow(lambda sigma: math.inf, CLOSE) == 5.0
    # Nor is a noise taken that an earlier question was content with.
    search.next = 1.0
    assert search.follow(lambda sigma: 1.99 if sigma == 1.0 else 2.1, 0.0) == 1.0


# ---------------------------------------------------------------------- where it must not be wrong


def oracle(gram: np.ndarray, epsilon: float, size: int) -> list[tuple[float, float]]:
    """Return both deltas and their standard errors from tilted mixtures, by bounded weights.

    remove: y from a mixture of N(theta m_i, 1), theta = 1 and what lifts one mean to b e^eps.
    add: y from N(-tau m, 1), tau = 0 and what lowers the mean of the logarithms to -eps.
    """
    b, squares, rng = len(gram), np.diag(gram), np.random.default_rng(0)
    values, vectors = np.linalg.eigh(gram)
    noise = rng.standard_normal((size, b)) @ (vectors * np.sqrt(np.maximum(values, 0))).T
    theta = max(1.0, 0.5 + (math.log(b) + epsilon) / squares.max())
    tau = max(0.0, (epsilon - squares.mean() / 2) / gram.mean())
    tau = min(tau, 20 / math.sqrt(gram.mean()))  # beyond, its exponentials overflow
    found = []
    for tilts, sign in (((1.0, theta), 1), ((0.0, tau), -1)):
        t = rng.choice(tilts, size)[:, None]
        moved = gram[rng.integers(b, size=size)] if sign > 0 else -gram.mean(axis=1)
        u = noise + t * moved
        ratio = np.exp(u - squares / 2).mean(axis=1)
        if sign > 0:
            drawn = [np.exp(s * u - s * s * squares / 2).mean(axis=1) for s in tilts]
        else:
            drawn = [np.exp(-s * u.mean(axis=1) - s * s * gram.mean() / 2) for s in tilts]
        gain = ratio - math.exp(epsilon) if sign > 0 else 1 - math.exp(epsilon) * ratio
        gain = np.maximum(gain, 0) / np.mean(drawn, axis=0)
        found.append((float(gain.mean()), float(gain.std()) / math.sqrt(size)))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_bounds_of_random_means_hold_against_samples(seed):
    """Means with negative entries too: six standard errors, a false alarm in 1e8."""
    rng = np.random.default_rng(seed)
    b, delta = int(rng.integers(2, 7)), float(rng.choice([1e-12, 1e-5, 1e-3, 0.1]))
    means = rng.standard_normal((4, b)) * rng.uniform(0.3, 1, b) * (rng.random((4, b)) < 0.7)
    means[0, 0] = 1.0
    signed, gram = means.T @ means, np.abs(means).T @ np.abs(means)
    scale = gram.max() * rng.uniform(0.4, 2) ** 2
    found = bounds(gram / scale, delta, signed / scale, sizes=bin_bounds.QUICK)
    for products in (gram, signed):
        for value, error in oracle(products / scale, found.upper, 50_000):
            assert value - 6 * error <= delta
    if found.lower > 0:
        assert max(v + 6 * e for v, e in oracle(signed / scale, found.lower, 50_000)) >= delta


def test_no_mean_of_a_chain_is_shorter_than_one_of_those_that_it_bounds():
    """Not by 1e-9 either, where what is left to be alone is dropped."""
    gram = np.eye(6)
    for i in range(6):
        gram[i, (i + 1) % 6] = gram[(i + 1) % 6, i] = 0.02 * (1 - 5e-10)
    plain, blocks = chains_above(gram, 1.0)
    assert plain.alone == (0.0,)
    assert plain.heads[0] ** 2 >= 1 - 1e-15
    assert plain.heads[0] ** 2 * plain.decay >= gram[0, 1]
    for chain in (plain, blocks):
        assert np.diag(gram_of(chain)).min() >= 1 - 1e-15
    # Whose means take all of their length from the Z are longer rather than shorter.
    full = np.eye(9) + 0.5 * (np.eye(9, k=1) + np.eye(9, k=-1))
    full[0, -1] = full[-1, 0] = 0.5
    blocks = chains_above(full, 1.0)[1]
    assert 1 <= np.diag(gram_of(blocks)).max() < 1.01
    assert blocks.alone[0] >= 1e-3
    assert chains_above(4 * full, 1.0)[1].alone[0] >= 4e-3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sigma", [1e-3, 0.02, 0.037, 0.1])
def test_with_hardly_any_noise_epsilon_is_that_without_amplification(sigma):
    who = BallsInBins(10, 2)
    strategy = factorize(prefix_sum(20), who, "bsr", bands=3).strategy
    few = MonteCarlo(samples=1000)
    cost = accounting.privacy_cost(who, 20, sigma, 1e-5, strategy=strategy, monte_carlo=few)
    alone = accounting.gaussian.gaussian_epsilon(sigma, 1e-5)
    assert alone / 2 < cost.epsilon <= alone


def test_strategies_of_equal_magnitudes_share_no_bounds():
    """Their upper bounds are the same, but what is claimed depends on the lower ones as well."""
    who = BallsInBins(4, 2)
    runs = [
        accounting.run._Run.of(who, 8, Toeplitz(np.array([1.0, c]), 8), None) for c in (0.5, -0.5)
    ]
    assert runs[0] != runs[1]
