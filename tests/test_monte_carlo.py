"""Monte Carlo accounting against quadrature, closed forms and its own promises of coverage."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from oracle import lower_toeplitz
from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise.accounting import MonteCarlo, confidence
from rootnoise.accounting import monte_carlo as estimate
from rootnoise.accounting.balls_in_bins import Bins, bin_gram
from rootnoise.accounting.dominating import magnitudes
from rootnoise.accounting.monte_carlo import Tilt
from rootnoise.causal import Dense, Diagonal, Product, Toeplitz
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    SingleParticipation,
)
from rootnoise.workload import prefix_sum

FEW = MonteCarlo(samples=40_000)
GRAMS = {
    "apart": np.diag([1.2, 1.2]),
    "correlated": np.array([[1.0, 0.6], [0.6, 1.5]]),
    "little noise": np.array([[9.0, 2.0], [2.0, 7.0]]),
}


def quadrature(gram: np.ndarray, epsilon: float) -> tuple[float, float]:
    """Integrate both directions over the plane that the two means span, 28 deviations wide."""
    means = np.linalg.cholesky(gram)
    axis = np.linspace(-14, 14, 701)

    def density(mean):
        one, two = norm.pdf(axis - mean[0]), norm.pdf(axis - mean[1])
        return np.outer(one, two) * (axis[1] - axis[0]) ** 2

    q, p = density([0, 0]), (density(means[0]) + density(means[1])) / 2
    e = math.exp(epsilon)
    return float(np.maximum(p - e * q, 0).sum()), float(np.maximum(q - e * p, 0).sum())


def exact_epsilon(gram: np.ndarray, delta: float) -> float:
    def excess(epsilon):
        return math.log(max(*quadrature(gram, epsilon), 1e-300) / delta)

    return float(brentq(excess, 0, 40, xtol=1e-4))


# --------------------------------------------------------------------------------- two bins


@pytest.mark.parametrize("name", GRAMS)
def test_two_bins_agree_with_quadrature_from_the_private_side(name):
    exact = exact_epsilon(GRAMS[name], 1e-5)
    for seed in range(3):
        found = estimate.epsilon(Bins(GRAMS[name]), 1e-5, MonteCarlo(60_000, seed))
        assert exact <= found <= exact * 1.03


@pytest.mark.parametrize("name", ["apart", "correlated"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_tilt_has_the_same_mean_and_keeps_to_its_range(name, order):
    """False-alarm rate 3e-7 each: five standard errors, and one of slack for their estimate."""
    gram = GRAMS[name]
    epsilon = (order - 0.2) * gram.max()  # where a power of order + 0.3 is best for one Gaussian
    removed, added = quadrature(gram, epsilon)
    bins = Bins(gram)
    rng = np.random.default_rng(order)
    tilt = Tilt(order, 1.1, bins._log_scale(order, 1.1))
    for drawn, true in (
        (estimate._remove(bins, rng, 100_000, tilt, 0.1), removed),
        (estimate._add(bins, rng, 100_000, order - 0.7, 0.1), added),
    ):
        x = np.zeros(100_000)
        positive = drawn.positive(epsilon)
        x[: positive.size] = positive
        deviation = x.std() / math.sqrt(x.size)
        assert abs(x.mean() - true) < 6 * deviation
        assert abs(x.mean() - 1.2 * true) > 6 * deviation  # and it can tell
        assert x.max() <= math.exp(drawn.log_range(epsilon)) * (1 + 1e-9)


@pytest.mark.parametrize("b", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("kind", ["apart", "bands", "ring", "dense", "alike", "short"])
def test_noise_has_the_products_of_the_means(b, kind):
    """Exactly, as a product of blocks; and with every normal number where it belongs."""
    i = np.arange(b)
    away = np.abs(i - i[:, None])
    gram = {
        "apart": np.eye(b),
        "bands": np.maximum(0, 1 - away / 5) + np.eye(b),
        "ring": np.maximum(0, 1 - np.minimum(away, b - away) / 3) + np.eye(b),
        "dense": 0.9**away,
        "alike": np.ones((b, b)),  # of rank 1
        "short": np.diag((i < b // 2) * 1.0),  # some means are of length 0
    }[kind]
    bins = Bins(gram)
    factor = np.zeros((b, b))
    for rows, columns, block in bins._factor:
        factor[rows, columns] = block.T
    np.testing.assert_allclose(factor @ factor.T, gram, atol=1e-12)
    z = np.random.default_rng(b).standard_normal((3, b))
    found = bins._noise(np.random.default_rng(b), 3)
    np.testing.assert_allclose(found, z @ factor.T, atol=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("b", [1, 2, 65])
def test_with_hardly_any_noise_samples_overflow_nowhere(b):
    assert estimate.epsilon(Bins(1e4 * np.eye(b)), 1e-5, MonteCarlo(1000)) > 1000


def test_samples_of_one_tilt_tell_of_others():
    """False-alarm rate 1e-8: six standard errors, of samples from either."""
    bins, size = Bins(GRAMS["correlated"]), 100_000
    wide, narrow = (Tilt(2, power, bins._log_scale(2, power)) for power in (1.2, 1.1))
    one = bins.remove(np.random.default_rng(0), size, wide, narrow, wide)
    two = bins.remove(np.random.default_rng(1), size, narrow, narrow)
    np.testing.assert_array_equal(one[1], one[3])
    np.testing.assert_array_equal(two[1], two[2])
    # P(L > 20) under the narrow one: its density over the wide one's is a weight.
    far, near = (one[0] > 3) * np.exp(one[2] - one[1]), (two[0] > 3) * 1.0
    error = math.hypot(far.std(), near.std()) / math.sqrt(size)
    assert abs(far.mean() - near.mean()) < 6 * error
    assert abs(1.1 * far.mean() - near.mean()) > 6 * error  # and it can tell
    pilot = estimate._Pilot.drawn(bins, np.random.default_rng(2), wide, [narrow])
    bound = estimate._remove(bins, np.random.default_rng(3), size, narrow, FEW.failure / 2).bound
    guessed = pilot.epsilon(narrow, 1e-4, MonteCarlo(size))
    assert guessed == pytest.approx(estimate._root(bound, 1e-4), rel=0.03)


def test_the_add_direction_has_as_many_samples_as_a_pilot_asks_for(monkeypatch):
    """As many as the other where it is as likely; few where it is far from deciding."""
    add, sizes = estimate._add, []

    def counted(mixture, rng, size, *rest):
        sizes.append(size)
        return add(mixture, rng, size, *rest)

    monkeypatch.setattr(estimate, "_add", counted)
    estimate.epsilon(Bins(np.array([[1.0]])), 1e-5, FEW)
    assert sizes == [estimate.PILOT, FEW.samples]
    estimate.epsilon(Bins(2.0 * np.eye(40)), 1e-5, FEW)
    assert sizes[2] == estimate.PILOT
    assert 1000 <= sizes[3] <= 8000


def test_patterns_are_drawn_in_proportion_to_their_joint_weights():
    gram = np.array([[1.0, 0.3, 0.0], [0.3, 1.5, 0.7], [0.0, 0.7, 0.8]])
    bins, theta, size = Bins(gram), 1.25, 200_000
    for order in (1, 2, 3):
        weight = np.zeros((3,) * order)
        for index in np.ndindex(*weight.shape):
            mean = theta * np.linalg.cholesky(gram).T[:, index].sum(axis=1)
            alone = sum(theta * gram[i, i] / 2 for i in index)
            weight[index] = math.exp(mean @ mean / 2 - alone) / 3**order
        tilt = Tilt(order, theta, bins._log_scale(order, theta))
        assert tilt.log_scale == pytest.approx(math.log(weight.sum()), rel=1e-12)
        drawn = bins._patterns(rng := np.random.default_rng(0), size, tilt)
        if order == 3:
            drawn.append(bins._third(rng, *drawn))
        counts = np.zeros_like(weight)
        np.add.at(counts, tuple(drawn), 1)
        p = weight / weight.sum()
        # Six deviations in each of at most 27 cells: 5e-8.
        assert np.all(np.abs(counts / size - p) < 6 * np.sqrt(p * (1 - p) / size))


# -------------------------------------------------------------------------- many bins, strategies


def test_one_bin_is_the_unamplified_mechanism():
    for sigma in (0.5, 1.0, 4.0):
        exact = get_epsilon_gaussian(sigma, 1e-5)
        found = estimate.epsilon(Bins(np.array([[sigma**-2]])), 1e-5, FEW)
        assert exact <= found <= exact * 1.02
    strategy = factorize(prefix_sum(12), BallsInBins(1, 12), "bsr", bands=3).strategy
    cost = accounting.privacy_cost(
        BallsInBins(1, 12), 12, 2.0, 1e-5, strategy=strategy, monte_carlo=FEW
    )
    assert cost.epsilon == pytest.approx(get_epsilon_gaussian(2.0, 1e-5), rel=1e-8)
    assert cost.method == "analytic Gaussian, not amplified"
    assert cost.monte_carlo is None


def test_bins_that_are_alike_are_one_bin():
    """The mean over equal bins is that bin: no amplification, whatever their number."""
    exact = get_epsilon_gaussian(1.0, 1e-5)
    assert exact <= estimate.epsilon(Bins(np.ones((5, 5))), 1e-5, FEW) <= exact * 1.02


def test_orthogonal_bins_agree_with_one_dimensional_sums():
    """b independent log-normals: the law of their mean by direct convolution on a fine grid."""
    b, g, delta = 4, 1.5, 1e-5
    width = 5e-3
    z = np.linspace(-9, 9, 200_001)
    x = np.exp(math.sqrt(g) * z - g / 2) / b
    mass = norm.pdf(z) * (z[1] - z[0])
    size = int(1000 / width)
    one = np.zeros(size)
    # Split each mass between two cells, so that its mean is kept.
    place = np.minimum(x / width, size - 2)
    cell = place.astype(int)
    np.add.at(one, cell, mass * (1 - (place - cell)))
    np.add.at(one, cell + 1, mass * (place - cell))
    total = np.fft.irfft(np.fft.rfft(one, 4 * size) ** b, 4 * size)
    ratio = np.arange(4 * size) * width

    def excess(epsilon):
        return float(np.maximum(ratio - math.exp(epsilon), 0) @ total)

    exact = brentq(lambda e: math.log(excess(e) / delta), 2, 5)
    found = estimate.epsilon(Bins(g * np.eye(b)), delta, FEW)
    assert exact * 0.999 <= found <= exact * 1.03


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_the_gram_matrix_is_that_of_the_summed_columns(n, b, seed):
    b = min(b, n)
    c = np.random.default_rng(seed).normal(size=n)
    means = [np.abs(lower_toeplitz(c, n))[:, i::b].sum(axis=1) for i in range(b)]
    expected = np.array(means) @ np.array(means).T
    np.testing.assert_allclose(bin_gram(Toeplitz(c, n), b), expected, rtol=1e-12, atol=1e-12)
    dense = Dense(lower_toeplitz(c, n))
    np.testing.assert_allclose(bin_gram(dense, b), expected, rtol=1e-12, atol=1e-12)


@given(st.floats(-1, 1), st.floats(0.2, 3), st.floats(0.2, 3), st.floats(0, 1), st.floats(0, 3))
def test_a_larger_gram_matrix_hides_less(correlation, first, second, more, epsilon):
    """Kahane's inequality, which lets |C| stand for C: no direction gets a smaller delta."""
    off = correlation * math.sqrt(first * second)
    small = np.array([[first, off], [off, second]]) + 1e-9 * np.eye(2)
    large = small + more * np.array([[0.5, 0.4], [0.4, 0.9]])
    large[0, 1] = large[1, 0] = abs(large[0, 1])
    for less, greater in zip(quadrature(small, epsilon), quadrature(large, epsilon), strict=True):
        assert less <= greater + 1e-9


def test_amplified_is_less_than_not_and_falls_with_noise():
    who = BallsInBins(16, 4)
    strategy = factorize(prefix_sum(64), who, "bsr").strategy
    costs = [
        accounting.privacy_cost(who, 64, s, 1e-5, strategy=strategy, monte_carlo=FEW)
        for s in (0.6, 1.0, 2.0)
    ]
    plain = [accounting.privacy_cost(FixedCycle(16, 4), 64, s, 1e-5) for s in (0.6, 1.0, 2.0)]
    assert all(0.2 * q.epsilon < p.epsilon < q.epsilon for p, q in zip(costs, plain, strict=True))
    assert costs[0].epsilon > costs[1].epsilon > costs[2].epsilon
    assert costs[0].monte_carlo == FEW
    assert "40000 samples from seed 0, too small with probability 1e-06" in costs[0].method
    assert not costs[0].exact
    assert costs[0].mu is None
    assert costs[0].rho is None


def test_calibration_confirms_what_it_returns():
    who = BallsInBins(10, 5)
    strategy = factorize(prefix_sum(50), who, "bsr").strategy
    tried: list[tuple[float, float]] = []
    for epsilon in (0.8, 6.0):
        sigma = accounting.noise_multiplier(
            who,
            50,
            epsilon,
            1e-5,
            strategy=strategy,
            monte_carlo=FEW,
            progress=lambda s, e: tried.append((s, e)),
        )
        cost = accounting.privacy_cost(who, 50, sigma, 1e-5, strategy=strategy, monte_carlo=FEW)
        assert 0.97 * epsilon <= cost.epsilon <= epsilon
        assert tried[-1] == (sigma, cost.epsilon)
        assert sigma < accounting.noise_multiplier(FixedCycle(10, 5), 50, epsilon, 1e-5)


def test_too_few_samples_cost_noise_and_not_privacy():
    who, few = BallsInBins(10, 5), MonteCarlo(samples=1000)
    strategy = factorize(prefix_sum(50), who, "bsr").strategy
    sigma = accounting.noise_multiplier(who, 50, 1.0, 1e-9, strategy=strategy, monte_carlo=few)
    cost = accounting.privacy_cost(who, 50, sigma, 1e-9, strategy=strategy, monte_carlo=few)
    assert cost.epsilon <= 1.0
    better = accounting.noise_multiplier(who, 50, 1.0, 1e-9, strategy=strategy, monte_carlo=FEW)
    assert better < sigma


def test_long_strategies_must_be_toeplitz_or_scaled_so():
    short = Toeplitz(np.array([1.0, 0.5]), 10_000)
    message = (
        "n_steps must be at most 8192 where steps are random and the strategy is neither Toeplitz "
        "nor scaled so, got 10000"
    )
    with pytest.raises(RootnoiseError, match=f"^{message}$"):
        magnitudes(Product(short, Product(Diagonal(np.ones(10_000)), short)))


def test_magnitudes_of_scaled_strategies_are_scaled_magnitudes():
    """On either side, of any sign, and at any length: the dense matrix says so for short ones."""
    rng = np.random.default_rng(0)
    short = Toeplitz(np.array([1.0, -0.5, 0.2]), 7)
    first, last = Diagonal(rng.standard_normal(7)), Diagonal(rng.standard_normal(7))
    for scaled in (Product(short, last), Product(first, short), Product(first, last), first):
        found = magnitudes(scaled)
        assert not isinstance(found, Dense)
        np.testing.assert_allclose(found.dense(), np.abs(scaled.dense()), atol=1e-15)
    both = Product(Product(first, short), last)
    np.testing.assert_allclose(magnitudes(both).dense(), np.abs(both.dense()), atol=1e-15)
    plain = Toeplitz(np.array([1.0, 0.5]), 10_000)
    half = Product(plain, Diagonal(np.full(10_000, -0.5)))
    np.testing.assert_allclose(bin_gram(half, 10), bin_gram(plain, 10) / 4, rtol=1e-12)


def test_a_mechanism_knows_its_strategy():
    who = BallsInBins(4, 2)
    bsr = factorize(prefix_sum(8), who, "bsr")
    mechanism = Mechanism.calibrate(bsr, who, noise_multiplier=1.0, delta=1e-5)
    assert mechanism.sensitivity == bsr.sensitivity(FixedCycle(4, 2))
    assert mechanism.epsilon < accounting.privacy_cost(FixedCycle(4, 2), 8, 1.0, 1e-5).epsilon
    again = Mechanism.from_dict(mechanism.to_dict())
    assert again.epsilon == pytest.approx(mechanism.epsilon, rel=1e-9)
    assert "added to or removed from the data set" in mechanism.claim()
    assert "from a first step drawn at random" in mechanism.claim()


# ------------------------------------------------------------------------------ confidence bounds


def test_bounds_cover_the_mean_as_often_as_promised():
    """Rare large samples, 4000 trials at failure 0.1: six deviations are 0.03."""
    rng = np.random.default_rng(0)
    for p, size in ((0.001, 300), (0.05, 200), (0.5, 50)):
        missed = 0
        for _ in range(4000):
            x = (rng.random(size) < p) * rng.random(size)
            missed += confidence.upper(x.mean(), x @ x / size, size, 1.0, 0.1) < p / 2
        assert missed / 4000 < 0.1 + 0.03


def test_bounds_close_in_on_the_mean_and_reject_a_wrong_scale():
    rng = np.random.default_rng(1)
    x = rng.random(100_000) ** 4
    bound = confidence.upper(x.mean(), x @ x / x.size, x.size, 1.0, 1e-6)
    assert 0.2 < bound < 0.21
    assert confidence.upper(x.mean() / 2, x @ x / x.size / 4, x.size, 1.0, 1e-6) < 0.2


def test_no_hits_in_many_samples_leave_a_small_range():
    """(1 - m)^size = failure / 2 is the exact bound then."""
    bound = confidence.upper(0.0, 0.0, 1000, 0.01, 1e-6)
    assert bound == pytest.approx(0.01 * (1 - (0.5e-6) ** (1 / 1000)), rel=1e-6)
    assert confidence.upper(0.01, 1e-4, 1000, 0.01, 1e-6) >= 0.01
    assert confidence.upper(0.0, 0.0, 1000, 0.0, 1e-6) == 0.0


# ------------------------------------------------------------------------------ zCDP, GDP, refusals


@pytest.mark.parametrize("who", [SingleParticipation(), MinSeparation(3, 2), FixedCycle(4, 2)])
def test_rho_and_mu_say_the_same_as_sigma(who):
    cost = accounting.privacy_cost(who, 8, 2.0, 1e-5)
    assert cost.mu == 0.5
    assert cost.rho == 0.125
    assert accounting.noise_multiplier_for(who, mu=cost.mu) == 2.0
    assert accounting.noise_multiplier_for(who, rho=cost.rho) == 2.0
    # mu-GDP is the Gaussian mechanism: its trade-off at epsilon gives delta (Dong et al., 2022).
    delta = norm.cdf(-cost.epsilon / 0.5 + 0.25) - math.exp(cost.epsilon) * norm.cdf(
        -cost.epsilon / 0.5 - 0.25
    )
    assert delta == pytest.approx(1e-5, rel=1e-6)
    # zCDP converts to no less than the exact epsilon (Bun & Steinke, 2016).
    assert cost.rho + 2 * math.sqrt(cost.rho * math.log(1e5)) >= cost.epsilon


@given(st.floats(1e-3, 1e3))
def test_calibration_to_mu_is_on_the_private_side(mu):
    sigma = accounting.noise_multiplier_for(SingleParticipation(), mu=mu)
    assert mu * (1 - 1e-12) <= 1 / sigma <= mu


STRATEGY = Toeplitz(np.ones(1), 8)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: accounting.privacy_cost(BallsInBins(4, 2), 8, 1, 1e-5),
            "strategy must be given for participation balls-in-bins",
        ),
        (
            lambda: accounting.noise_multiplier(BallsInBins(4, 2), 7, 1, 1e-5, strategy=STRATEGY),
            "strategy must have n_steps=7, got 8",
        ),
        (lambda: MonteCarlo(samples=999), "samples must be >= 1000, got 999"),
        (lambda: MonteCarlo(seed=-1), "seed must be >= 0, got -1"),
        (lambda: MonteCarlo(failure=0), "failure must be a finite number > 0 and <= 0.5, got 0.0"),
        (
            lambda: accounting.noise_multiplier_for(CyclicPoisson(1, 0.5), mu=1),
            "participation must not be random for mu and rho, got cyclic-poisson",
        ),
        (
            lambda: accounting.noise_multiplier_for(SingleParticipation()),
            "give exactly one of mu and rho, got mu=None, rho=None",
        ),
        (
            lambda: accounting.noise_multiplier_for(SingleParticipation(), mu=0),
            "mu must be a finite number > 0, got 0.0",
        ),
        (
            lambda: accounting.noise_multiplier_for(SingleParticipation(), rho=-1),
            "rho must be a finite number > 0, got -1.0",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=f"^{re.escape(line)}$"):
        call()
