"""Certain bounds for balls in bins against quadrature, Monte Carlo, each other and their limits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from rootnoise import accounting
from rootnoise.accounting import MonteCarlo, bin_bounds
from rootnoise.accounting import monte_carlo as estimate
from rootnoise.accounting import random_allocation as allocation
from rootnoise.accounting.balls_in_bins import Bins, bin_gram
from rootnoise.accounting.bin_bounds import bounds
from rootnoise.accounting.random_allocation import SIZES, Allocation, Interval, _Grid
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle
from rootnoise.participation.sensitivity import Sensitivity, sensitivity
from rootnoise.workload import prefix_sum

QUICK = SIZES[:2]


def quadrature(gram: np.ndarray, epsilon: float) -> tuple[float, float]:
    """Integrate both directions over the space that two or three means span."""
    b = len(gram)
    means = np.linalg.cholesky(gram)
    axis = np.linspace(-8, 8, {1: 20_001, 2: 501, 3: 81}[b])
    grid = np.stack(np.meshgrid(*[axis] * b, indexing="ij"))
    weight = np.prod(norm.pdf(grid), axis=0) * (axis[1] - axis[0]) ** b
    logs = np.tensordot(means, grid, 1) - np.diag(gram).reshape(-1, *[1] * b) / 2
    ratio = np.exp(logs).mean(axis=0)
    e = math.exp(epsilon)
    return float((np.maximum(ratio - e, 0) * weight).sum()), float(
        (np.maximum(1 - e * ratio, 0) * weight).sum()
    )


def gram_of(bins: Allocation) -> np.ndarray:
    return bins.own * np.eye(bins.bins) + bins.shared


SMALL = [Allocation(1, 0.8), Allocation(2, 1.2), Allocation(2, 0.7, 0.6), Allocation(3, 0.9)]


# ----------------------------------------------------------------------- one grid, both directions


@pytest.mark.parametrize("bins", SMALL, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_both_directions_hold_quadrature_between_them(bins, epsilon):
    """The laws of one grid, each direction by itself; quadrature is right to 3e-3."""
    grid = _Grid.of(bins, 1e-4, 2**16)
    assert grid is not None
    for exact, mean in zip(
        quadrature(gram_of(bins), epsilon), (grid._removal, grid._addition), strict=True
    ):
        above, error = mean(epsilon, 0.0)
        below = mean(epsilon, grid.slip)[0]
        assert error < 1e-9
        assert exact * (1 - 3e-3) <= above + grid.cut <= exact * 1.01 + 1e-4
        assert 0.8 * exact - 2e-4 <= below <= exact * (1 + 3e-3)


@pytest.mark.parametrize("bins", SMALL, ids=str)
@pytest.mark.parametrize("delta", [1e-2, 1e-3])
def test_epsilon_agrees_with_quadrature(bins, delta):
    gram = gram_of(bins)
    exact = brentq(
        lambda e: math.log(max(*quadrature(gram, e), 1e-300) / delta), 0, 6, xtol=1e-3, rtol=1e-3
    )
    found = bins.epsilon(delta)
    assert found.lower <= exact * (1 + 2e-3)
    assert exact * (1 - 2e-3) <= found.upper
    assert found.upper <= found.lower * 1.01


@pytest.mark.parametrize("bins", [Allocation(2, 1.2), Allocation(2, 0.7, 0.6)], ids=str)
def test_a_coarse_grid_spreads_the_sum_and_the_slip_takes_it_back(bins):
    grid = _Grid.of(bins, 1e-2, 2**6)
    assert grid is not None
    for direction, mean in enumerate((grid._removal, grid._addition)):
        exact = quadrature(gram_of(bins), 0.5)[direction]
        assert mean(0.5, 0.0)[0] > 1.003 * exact
        assert mean(0.5, grid.slip)[0] < 0.997 * exact


def test_both_laws_give_one_mean_of_the_slipped_sum():
    """E_P (S - t - b K)_+ / S is E_Q (S - t - b K)_+ / b."""
    grid = _Grid.of(Allocation(5, 1.0), 1e-3, 2**12)
    assert grid is not None
    s = grid.width * np.arange(grid.added.size)
    for epsilon in (0.2, 1.0):
        gain = np.maximum(s - grid.slip - 5 * math.exp(epsilon), 0) / 5
        assert grid._removal(epsilon, grid.slip)[0] == pytest.approx(gain @ grid.added, rel=1e-8)


@pytest.mark.parametrize("bins", [Allocation(2, 1.2), Allocation(2, 0.7, 0.6)], ids=str)
def test_the_inequality_of_means_bounds_the_add_direction(bins):
    for epsilon in (0.1, 0.5, 1.5):
        exact = quadrature(gram_of(bins), epsilon)[1]
        assert exact * 0.997 <= _Grid.of(bins, 1e-2, 2**10)._geometric(epsilon) <= 2 * exact


def test_one_bin_is_one_gaussian():
    for sigma, delta in ((0.7, 1e-5), (3.0, 1e-4)):
        exact = get_epsilon_gaussian(sigma, delta)
        found = Allocation(1, sigma**-2).epsilon(delta)
        assert exact * 0.99 < found.lower <= exact <= found.upper < exact * 1.01
        # All of the variance may be shared, up to a part.
        found = Allocation(3, 1e-3 * sigma**-2, 0.999 * sigma**-2).epsilon(delta, QUICK)
        assert found.lower <= exact
        assert found.upper >= exact * 0.998


@pytest.mark.parametrize("epsilon", [0.5, 1, 2, 4, 8])
def test_a_thousand_bins_are_known_to_one_percent(epsilon):
    """Independent noise, 10 epochs: the product of any two bins' means is 0."""
    who, n = BallsInBins(1000, 10), 10_000
    strategy = factorize(prefix_sum(n), who, "identity").strategy
    sigma = {0.5: 0.72, 1: 0.638, 2: 0.557, 4: 0.467, 8: 0.364}[epsilon]
    gram = bin_gram(strategy, 1000) / 10 / sigma**2
    found = bounds(gram, 1e-5)
    assert found.upper <= 1.01 * found.lower
    assert found.lower == pytest.approx(epsilon, rel=0.02)


@pytest.mark.parametrize("bins", [Allocation(10, 2.0), Allocation(40, 1.0, 0.5)], ids=str)
def test_the_bound_of_monte_carlo_lies_above_the_lower_one_and_near(bins):
    """The confidence bound fails once in a million."""
    sampled = estimate.epsilon(Bins(gram_of(bins)), 1e-5, MonteCarlo(40_000, seed=3))
    found = bins.epsilon(1e-5)
    assert found.lower <= sampled <= 1.7 * found.upper


@pytest.mark.parametrize("bins", [Allocation(10, 2.0), Allocation(30, 1.0, 0.4)], ids=str)
def test_plain_samples_lie_between(bins):
    """A million samples of L under Q at delta 1e-2: six standard errors, 2e-9 each side."""
    rng = np.random.default_rng(5)
    size, delta = 200_000, 1e-2
    z = math.sqrt(bins.own) * rng.standard_normal((size, bins.bins)) - bins.own / 2
    w = math.sqrt(bins.shared) * rng.standard_normal(size) - bins.shared / 2
    # P instead: the first bin is the one.
    z[:, 0] += bins.own
    ratio = np.exp(w + bins.shared) * np.exp(z).mean(axis=1)
    found = bins.epsilon(delta)
    for epsilon, sign in ((found.lower, 1), (found.upper, -1)):
        x = np.maximum(1 - math.exp(epsilon) / ratio, 0)
        assert sign * (x.mean() - delta) > -6 * x.std() / math.sqrt(size)
        assert abs(x.mean() - 1.3 * delta) > 6 * x.std() / math.sqrt(size)  # and it can tell


@given(
    st.integers(1, 30),
    st.floats(0.05, 6),
    st.floats(0, 2),
    st.sampled_from([1e-2, 1e-4, 1e-6]),
)
@settings(max_examples=5)
def test_bounds_are_in_order_and_more_bins_hide_more(b, own, shared, delta):
    found = Allocation(b, own, shared).epsilon(delta, QUICK)
    more = Allocation(2 * b, own, shared).epsilon(delta, QUICK)
    closer = Allocation(b, own / 2, shared + own / 2).epsilon(delta, QUICK)
    assert found.lower <= found.upper
    assert more.lower <= found.upper
    assert found.lower <= closer.upper
    assert found.lower <= get_epsilon_gaussian((own + shared) ** -0.5, delta) * (1 + 1e-9)


def test_what_does_not_fit_states_nothing():
    assert Allocation(3, 401.0).epsilon(1e-5) == Interval(0.0, math.inf)
    assert Allocation(3, 0.0).epsilon(1e-5) == Interval(0.0, math.inf)
    assert Allocation(50, 0.01).epsilon(0.5).upper < 1e-11
    assert Interval(1.0, 1.02).tight
    assert not Interval(1.0, 1.03).tight


def test_what_masses_and_positions_are_known_to_is_paid_for(monkeypatch):
    """One part in 10^4 in place of 10^12: 4 b of it on delta, 4 of it on epsilon."""
    bins, delta, size = Allocation(3, 0.9), 1e-3, 2**12
    grid = _Grid.of(bins, delta, size)
    assert grid is not None
    above, below = grid.above(0.5), grid.below(0.5)
    monkeypatch.setattr(allocation, "RELATIVE", 1e-4)
    assert grid.above(0.5) == pytest.approx(above * (1 + 12e-4), rel=1e-6)
    assert grid.below(0.5) < below * (1 - 6e-4)
    grid = _Grid.of(bins, delta, size)
    assert grid is not None
    found = bins.epsilon(delta, (size,))
    assert found.upper == pytest.approx(allocation._crossing(grid.above, delta)[1] + 4e-4, rel=1e-9)
    assert found.lower == pytest.approx(allocation._crossing(grid.below, delta)[0] - 4e-4, rel=1e-9)


def test_delta_is_confirmed_on_both_sides_of_a_root():
    """The 20 roots that are found for these are too small about every other time."""
    for i in range(20):

        def falling(epsilon, rate=1.0 + 0.37 * i):
            return 0.9 * math.exp(-rate * epsilon) / (1 + epsilon) ** 2

        low, high = allocation._crossing(falling, 1e-5)
        assert falling(high) <= 1e-5 < falling(low)
        assert high - low <= 1e-5 * high


# -------------------------------------------------------------------------- the parts of the proof

PAID = {
    ("above", "removed"): ("cut", "lost", "error"),
    ("above", "added"): ("lost", "error"),
    ("below", "removed"): ("lost", "slipped", "error"),
    ("below", "added"): ("cut", "lost", "slipped", "error"),
}


@pytest.mark.parametrize(("side", "law"), PAID)
def test_each_bound_pays_for_each_error_in_either_direction(side, law):
    """The errors are far below what quadrature sees; here one of them is larger by 1e-6."""
    more, epsilon, sign = 1e-6, 0.5, 1 if side == "above" else -1
    grid = _Grid.of(Allocation(2, 1.2), 1e-2, 2**12)
    assert grid is not None
    assert grid._geometric(epsilon) > grid._addition(epsilon, 0.0)[0] + 2e-3  # it decides nothing
    other = {"removed": "added", "added": "removed"}[law]
    mean = {"removed": grid._removal, "added": grid._addition}[law]
    alone = replace(grid, **{other: np.zeros_like(grid.added)})
    free = replace(alone, cut=0.0, lost=0.0, error=0.0, slipped=0.0)
    if side == "above":
        assert free.above(epsilon) == pytest.approx(mean(epsilon, 0.0)[0], rel=1e-6)
    before = getattr(alone, side)(epsilon)
    for name in ("cut", "lost", "slipped", "error"):
        larger = replace(alone, **{name: getattr(alone, name) + more})
        moved = sign * (getattr(larger, side)(epsilon) - before)
        if name not in PAID[side, law]:
            assert moved == 0, name
        elif name == "error":  # times the norm of the integrand, above one here
            assert moved > more, name
        else:
            assert moved >= 0.99 * more, name


@pytest.mark.parametrize("h", [0.05, 0.7, 3.0])
def test_masses_keep_the_mean_and_are_chords_of_calls(h):
    """The law on a grid has, at its points, the calls of X cut at M: there chords are exact."""
    own, top = 1.3, math.ceil(60 / h)
    masses = allocation._masses(own, h, top)
    x = h * np.arange(top + 1.0)

    def call(level):
        d = (own / 2 - math.log(level)) / math.sqrt(own)
        return norm.cdf(d) - level * norm.cdf(d - math.sqrt(own))

    assert masses.sum() == pytest.approx(1, abs=1e-12)
    for k in {1, 2, top // 3, top // 2}:
        expected = call(k * h) - call(top * h)
        assert np.maximum(x - k * h, 0) @ masses == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert x @ masses == pytest.approx(1 - call(top * h), rel=1e-11)


def test_powers_are_those_of_direct_convolution_within_their_error():
    rng = np.random.default_rng(0)
    p = rng.random(20) ** 4
    p /= p.sum()
    biased = p * np.arange(20)
    for b in (1, 2, 5):
        plain = [np.ones(1)]
        for _ in range(b):
            plain.append(np.convolve(plain[-1], p))
        added, removed, error = allocation._powers(p, biased, b, 128)
        other = np.convolve(plain[b - 1], biased)
        assert np.linalg.norm(added[: plain[b].size] - plain[b]) <= error < 1e-12
        assert np.linalg.norm(removed[: other.size] - other) <= error


def test_what_lies_outside_the_window_is_bounded():
    own, b, h = 1.0, 4, 0.05
    masses = allocation._masses(own, h, 400)
    law = masses
    for _ in range(b - 1):
        law = np.convolve(law, masses)
    x = h * np.arange(law.size)
    for window in (10.0, 20.0, 40.0):
        outside = law[x >= window].sum()
        biased = (x * law)[x >= window].sum() / b  # under P
        assert max(outside, biased) <= allocation._beyond(masses, h, b, window)
    assert allocation._beyond(masses, h, b, 60.0) < 1e-3


def test_the_slip_of_the_lower_bound_covers_the_spread():
    """E (R - t)_+ / b for 3 bins, R at its widest: each term +-h / 2."""
    grid = _Grid.of(Allocation(3, 1.0), 1e-5, 2**14)
    assert grid is not None
    h, t = grid.width, grid.slip
    widest = [(3 - 2 * k) * h / 2 for k in range(4)]
    expected = sum(math.comb(3, k) * max(r - t, 0) for k, r in enumerate(widest)) / 8 / 3
    assert expected <= grid.slipped <= 1e-3 * 1e-5 * h
    assert 2 * t**2 / (3 * h**2) == pytest.approx(math.log(1e8), rel=1e-9)


# --------------------------------------------------------------------------------- any Gram matrix


@given(st.integers(2, 3), st.integers(0, 10**6), st.sampled_from([1e-2, 1e-3]))
@settings(max_examples=6)
def test_any_gram_matrix_of_few_bins_agrees_with_quadrature(b, seed, delta):
    means = np.random.default_rng(seed).uniform(0.05, 0.9, (b, b))
    gram = means @ means.T + 0.05 * np.eye(b)
    found = bounds(gram, delta, sizes=QUICK)
    low, high = max(*quadrature(gram, found.lower)), max(*quadrature(gram, found.upper))
    assert low >= delta * (1 - 5e-3) or found.lower == 0
    assert high <= delta * (1 + 5e-3)


@pytest.mark.parametrize("bands", [2, 4, 16])
def test_correlated_noise_lies_between_and_monte_carlo_does_too(bands):
    who, n = BallsInBins(32, 4), 128
    strategy = factorize(prefix_sum(n), who, "bsr", bands=bands).strategy
    gram = bin_gram(strategy, 32) / strategy.column(0).dot(strategy.column(0)) / 4
    sampled = estimate.epsilon(Bins(gram / 0.7**2), 1e-4, MonteCarlo(40_000, seed=1))
    found = bounds(gram / 0.7**2, 1e-4)
    assert found.lower <= sampled
    assert sampled <= 1.05 * found.upper  # where the samples are good
    assert found.upper < get_epsilon_gaussian(0.7, 1e-4)


def test_spaced_bins_are_compared_with_the_closest_left():
    gram = np.array([[4.0, 2, 1, 2], [2, 4, 2, 1], [1, 2, 5, 2], [2, 1, 2, 4]])
    assert bin_bounds._spaced(gram) == [Allocation(4, 3.0, 2.0), Allocation(2, 4.0, 1.0)]
    # Runs of one, and of two.
    assert bin_bounds._merged(gram) == [Allocation(4, 3.0, 1.0), Allocation(2, 1.0, 1.0)]
    assert bin_bounds._merged(np.array([[2.0, 1], [1, 2]])) == [Allocation(2, 1.0, 1.0)]
    uneven = np.diag([1.0, 2.0, 3.0])
    assert bin_bounds._spaced(uneven) == [Allocation(3, 3.0)]
    assert bin_bounds._merged(uneven) == [Allocation(3, 1.0)]
    # The first and the last are neighbours in the circle.
    ring = np.eye(6) + 0.3 * (np.eye(6, k=5) + np.eye(6, k=-5))
    assert bin_bounds._spaced(ring)[:2] == [Allocation(6, 0.7, 0.3), Allocation(3, 1.0)]


def test_bins_so_far_apart_are_as_many_as_fit_into_the_circle():
    """Of 5, two are 2 apart, whichever is the first: not three."""
    gram = np.eye(5) + 0.3 * (np.eye(5, k=1) + np.eye(5, k=-1))
    assert bin_bounds._spaced(gram) == [Allocation(5, 0.7, 0.3), Allocation(2, 1.0)]


def test_the_longest_mean_alone_is_a_lower_bound():
    gram = np.diag([1.0, 9.0])
    found = bin_bounds._alone(gram, 1e-3)
    exact = brentq(lambda e: math.log(quadrature(gram, e)[0] / 1e-3), 1, 15)
    assert exact * 0.9 < found <= exact
    assert bin_bounds._alone(gram, 0.5) == 0


def test_negative_entries_are_bounded_from_below_by_what_a_person_attains():
    c = Toeplitz(np.array([1.0, -0.6]), 8)
    gram, signed = bin_gram(c, 4), bin_gram(c, 4, signed=True)
    means = c.dense()[:, :4] + c.dense()[:, 4:]
    np.testing.assert_allclose(signed, means.T @ means, atol=1e-12)
    found = bounds(gram, 1e-3, signed)
    assert found.lower < bounds(gram, 1e-3).lower
    assert found.upper == bounds(gram, 1e-3).upper


# --------------------------------------------------------------------------------------- the claim


def test_independent_noise_needs_no_samples():
    who = BallsInBins(20, 3)
    strategy = factorize(prefix_sum(60), who, "identity").strategy
    few, many = MonteCarlo(samples=1000), MonteCarlo(samples=40_000)
    one, other = (
        accounting.privacy_cost(who, 60, 1.0, 1e-5, strategy=strategy, monte_carlo=m)
        for m in (few, many)
    )
    assert one == other
    assert one.monte_carlo is None
    assert one.method == "certain upper bound for balls-in-bins, by sums of log-normals"
    expected = Allocation(20, 1.0).epsilon(1e-5)
    assert expected.lower <= one.epsilon == pytest.approx(expected.upper, rel=1e-6)
    sigma = accounting.noise_multiplier(who, 60, 1.0, 1e-5, strategy=strategy)
    cost = accounting.privacy_cost(who, 60, sigma, 1e-5, strategy=strategy)
    assert 0.98 <= cost.epsilon <= 1.0
    assert cost.monte_carlo is None


def test_the_lesser_of_both_bounds_is_claimed():
    who = BallsInBins(24, 2)
    for bands, sigma, samples, certain in ((2, 2.0, 1000, True), (16, 0.6, 40_000, False)):
        strategy = factorize(prefix_sum(48), who, "bsr", bands=bands).strategy
        sampled = MonteCarlo(samples=samples)
        cost = accounting.privacy_cost(who, 48, sigma, 1e-5, strategy=strategy, monte_carlo=sampled)
        assert (cost.monte_carlo is None) == certain
        assert ("certain" in cost.method) == certain
        assert cost.lower_bound is not None
        assert 0 < cost.lower_bound <= cost.epsilon


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 1e4])
@pytest.mark.parametrize("bands", [1, 2, 6])
def test_the_lower_bound_is_that_of_somebodys_data_and_below_what_is_claimed(sigma, bands):
    who = BallsInBins(12, 2)
    c = factorize(prefix_sum(24), who, "bsr", bands=bands).strategy
    few = MonteCarlo(samples=1000, failure=1e-9)
    cost = accounting.privacy_cost(who, 24, sigma, 1e-3, strategy=c, monte_carlo=few)
    square = sensitivity(c, who).value ** 2 * sigma**2
    gram, signed = (bin_gram(c, 12, signed=x) / square for x in (False, True))
    found = bounds(gram, 1e-3, signed).lower
    assert cost.lower_bound == (pytest.approx(found, rel=1e-9) if found else None)
    assert found <= cost.epsilon


def test_a_failed_confidence_bound_is_not_claimed(monkeypatch):
    """One below the lower bound is one of the few that fail."""
    who = BallsInBins(24, 2)
    c = factorize(prefix_sum(48), who, "bsr", bands=2).strategy
    few = MonteCarlo(samples=1000, seed=77)
    monkeypatch.setattr(estimate, "epsilon", lambda *_: 1e-3)
    monkeypatch.setattr("rootnoise.accounting.run._Run.settled", lambda *_: False)
    cost = accounting.privacy_cost(who, 48, 0.61, 1e-5, strategy=c, monte_carlo=few)
    assert cost.lower_bound is not None
    assert cost.epsilon == cost.lower_bound > 0.1


def test_a_lower_bound_is_stated_where_one_is_known(monkeypatch):
    cycle, poisson = FixedCycle(4, 3), CyclicPoisson(1, 0.25)
    exact = accounting.privacy_cost(cycle, 12, 2.0, 1e-5)
    assert exact.lower_bound == exact.epsilon
    assert accounting.privacy_cost(poisson, 12, 2.0, 1e-5).lower_bound is None
    alternating = Toeplitz(np.array([1.0, -0.6, 0.3, -0.5, 0.2]), 12)
    made = Mechanism("own", prefix_sum(12), cycle, alternating, 2.0, 1e-5)
    assert made.privacy.lower_bound == (made.epsilon if made.sensitivity.exact else None)
    looser = Sensitivity(3.0, False, "a bound")
    monkeypatch.setattr("rootnoise.mechanism.sensitivity", lambda *_: looser)
    bounded = Mechanism("own", prefix_sum(12), cycle, alternating, 2.0, 1e-5)
    assert bounded.privacy.lower_bound is None


def test_what_is_claimed_is_of_magnitudes_at_its_noise():
    """Steps that a person may flip count as if they added up; 1000 samples say less."""
    who, c = BallsInBins(4, 2), Toeplitz(np.array([1.0, -0.6]), 8)
    square = sensitivity(c, who).value ** 2
    gram, signed = (bin_gram(c, 4, signed=x) / square / 4**2 for x in (False, True))
    few = MonteCarlo(samples=1000, failure=1e-9)
    cost = accounting.privacy_cost(who, 8, 4.0, 1e-6, strategy=c, monte_carlo=few)
    assert cost.epsilon == bounds(gram, 1e-6, signed).upper
    assert cost.epsilon > 1.2 * bounds(signed, 1e-6).upper
