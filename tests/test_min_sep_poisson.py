"""b-min-sep Poisson: likelihood ratios against all patterns, epsilon against other routes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given
from hypothesis import strategies as st

from oracle import lower_toeplitz
from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise.accounting import MonteCarlo, min_sep_patterns
from rootnoise.accounting import monte_carlo as estimate
from rootnoise.accounting.balls_in_bins import Bins, bin_gram
from rootnoise.accounting.min_sep_poisson import Separated, band_rows
from rootnoise.auditing.recompute import _renewal_losses, epsilon_ranges
from rootnoise.bounds.certificate import lower_bound
from rootnoise.causal import Dense, Toeplitz
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    CyclicPoisson,
    MinSepPoisson,
    SingleParticipation,
    from_dict,
    to_dict,
)
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import prefix_sum

FEW = MonteCarlo(samples=40_000)


def patterns(n: int, b: int, p: float) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield every pattern of steps and its probability, by walking through all draws.

    The walk starts b - 1 steps early, from each state with the probability that the long run gives.
    """
    rate = p / (1 + (b - 1) * p)

    def walk(t: int, wait: int, steps: tuple[int, ...], w: float):
        if t == n:
            yield steps, w
        elif wait:
            yield from walk(t + 1, wait - 1, steps, w)
        else:
            yield from walk(t + 1, b - 1, (*steps, t), w * p)
            if p < 1:
                yield from walk(t + 1, 0, steps, w * (1 - p))

    for wait in range(b):
        yield from walk(0, wait, (), rate / p if wait == 0 else rate)


def brute(c: np.ndarray, b: int, p: float, y: np.ndarray, power: float = 1.0) -> float:
    total = 0.0
    for steps, w in patterns(len(c), b, p):
        mean = c[:, steps].sum(axis=1)
        total += w * math.exp(power * (mean @ y - mean @ mean / 2))
    return total


@st.composite
def cases(draw):
    b = draw(st.integers(1, 4))
    n = draw(st.integers(b, 8))
    bands = draw(st.integers(1, b))
    p = draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    c = np.tril(rng.uniform(0.1, 1, (n, n))) - np.tril(rng.uniform(0.1, 1, (n, n)), -bands) * 0
    c = np.tril(c) - np.tril(c, -bands)
    return c, b, p, rng


def made(c: np.ndarray, b: int, p: float) -> Separated:
    # Trailing zero diagonals would widen the bands.
    return Separated(band_rows(Dense(c))[: max(1, b)], b, p)


@given(cases())
def test_everybody_joins_every_step_with_the_same_probability(case):
    c, b, p, _ = case
    total, joins = 0.0, np.zeros(len(c))
    for steps, w in patterns(len(c), b, p):
        total += w
        joins[list(steps)] += w
        assert all(t - s >= b for s, t in pairwise(steps))
    assert total == pytest.approx(1)
    np.testing.assert_allclose(joins, MinSepPoisson(b, p).rate, rtol=1e-12)


@given(cases(), st.sampled_from([1.0, 1.5, 2.0]))
def test_the_recursion_is_the_sum_over_all_patterns(case, power):
    c, b, p, rng = case
    y = rng.normal(size=(len(c), 3)) + 1
    mixture = made(c, b, p)
    log_x = mixture._transposed(y) - mixture.squares[:, None] / 2
    expected = [math.log(brute(c, b, p, column, power)) for column in y.T]
    np.testing.assert_allclose(mixture._log_ratio(power * log_x), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mixture._apply(y), c @ y, rtol=1e-12, atol=1e-12)


@given(cases())
def test_moments_of_the_mean_are_those_of_all_patterns(case):
    c, b, p, _ = case
    found = [(w, c[:, steps].sum(axis=1)) for steps, w in patterns(len(c), b, p)]
    mean = sum(w * m for w, m in found)
    mixture = made(c, b, p)
    assert mixture.mean_norm2 == pytest.approx(mean @ mean)
    assert mixture.mean_square == pytest.approx(sum(w * (m @ m) for w, m in found))


@given(cases(), st.sampled_from([1.0, 1.25, 2.0]))
def test_kappa_is_the_sum_over_all_tuples_of_patterns(case, power):
    c, b, p, _ = case
    found = [(w, c[:, steps].sum(axis=1)) for steps, w in patterns(len(c), b, p)]
    alone = [w * math.exp((power**2 - power) / 2 * (m @ m)) for w, m in found]
    together = sum(
        v * w * math.exp(power**2 * (m @ k))
        for v, (_, m) in zip(alone, found, strict=True)
        for w, (_, k) in zip(alone, found, strict=True)
    )
    mixture = made(c, b, p)
    assert mixture._chain(1, power).log_scale == pytest.approx(math.log(sum(alone)), abs=1e-10)
    assert mixture._chain(2, power).log_scale == pytest.approx(math.log(together), abs=1e-10)


def test_patterns_are_drawn_in_proportion_to_their_weights_together():
    """Six deviations in each of at most 500 cells: 1e-6."""
    c = lower_toeplitz(np.array([0.9, 0.5, 0.3]), 7)
    b, p, power, size = 3, 0.4, 1.5, 200_000
    mixture = made(c, b, p)
    found = [(steps, w, c[:, steps].sum(axis=1)) for steps, w in patterns(7, b, p)]
    for order in (1, 2):
        weights: dict[tuple[int, ...], float] = {}
        for steps, w, m in found:
            for other, v, k in found if order == 2 else [((), 1.0, np.zeros(7))]:
                weight = (
                    w * v * math.exp((power**2 - power) / 2 * (m @ m + k @ k) + power**2 * (m @ k))
                )
                counts = tuple(int(t in steps) + int(t in other) for t in range(7))
                weights[counts] = weights.get(counts, 0.0) + weight
        drawn = mixture._chain(order, power).draw(np.random.default_rng(order), size)
        keys, hits = np.unique(drawn.T.astype(int), axis=0, return_counts=True)
        seen = {tuple(map(int, key)): int(hit) for key, hit in zip(keys, hits, strict=True)}
        assert seen.keys() <= weights.keys()
        total = sum(weights.values())
        for counts, weight in weights.items():
            q = weight / total
            assert abs(seen.get(counts, 0) / size - q) < 6 * math.sqrt(q * (1 - q) / size)


# ----------------------------------------------------------------------------------- other routes


@pytest.mark.parametrize(("n", "q", "sigma"), [(10, 0.1, 1.0), (50, 0.1, 2.0), (200, 0.02, 1.0)])
def test_separation_one_is_poisson_sampling(n, q, sigma):
    """Against the privacy loss distribution of DP-SGD; false-alarm rate 1e-8 each way."""
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=1e-3
    ).self_compose(n)
    epsilon = loss.get_epsilon_for_delta(1e-5)
    mixture = Separated(np.full((1, n), 1 / sigma), 1, q)
    tilt = min(estimate._near(mixture, 1e-5), key=lambda tilt: tilt.log_range(epsilon))
    drawn = estimate._remove(mixture, np.random.default_rng(0), 60_000, tilt, 1e-6)
    x = np.zeros(60_000)
    positive = drawn.positive(epsilon)
    x[: positive.size] = positive
    deviation = x.std() / math.sqrt(x.size)
    assert deviation < 0.17e-5
    assert abs(x.mean() - 1e-5) < 6 * deviation
    assert x.max() <= math.exp(tilt.log_range(epsilon))
    who, c = MinSepPoisson(1, q), Toeplitz(np.ones(1), n)
    cost = accounting.privacy_cost(who, n, sigma, 1e-5, strategy=c, monte_carlo=FEW)
    assert epsilon <= cost.epsilon <= 1.4 * epsilon  # few samples leave slack, privately
    assert "Monte Carlo of min-sep-poisson" in cost.method


def test_probability_one_is_balls_in_bins():
    n, b, sigma = 40, 8, 1.2
    c = Toeplitz(np.array([1.0, 0.5, 0.375, 0.3125]), n)
    bins = estimate.epsilon(Bins(bin_gram(c, b) / sigma**2), 1e-5, FEW)
    separated = estimate.epsilon(Separated(band_rows(c) / sigma, b, 1.0), 1e-5, FEW)
    assert separated == pytest.approx(bins, rel=0.02)


@pytest.mark.parametrize("n", [1, 12])
def test_separation_and_probability_one_is_composition(n):
    sigma = 2.0
    exact = get_epsilon_gaussian(sigma / math.sqrt(n), 1e-5)
    found = estimate.epsilon(Separated(np.full((1, n), 1 / sigma), 1, 1.0), 1e-5, FEW)
    assert exact <= found <= exact * 1.02
    who, c = MinSepPoisson(1, 1.0), Toeplitz(np.ones(1), n)
    cost = accounting.privacy_cost(who, n, sigma, 1e-5, strategy=c, monte_carlo=FEW)
    assert cost.epsilon == pytest.approx(exact, rel=1e-8)
    assert cost.method == "analytic Gaussian, not amplified"


def test_it_beats_cyclic_poisson_at_the_same_batch_size():
    n, b, rate, sigma = 120, 12, 0.02, 1.0
    who = MinSepPoisson(b, rate / (1 - (b - 1) * rate))
    assert who.rate == pytest.approx(rate)
    strategy = factorize(prefix_sum(n), who, "bsr").strategy
    assert strategy.bands == b
    found = accounting.privacy_cost(who, n, sigma, 1e-5, strategy=strategy, monte_carlo=FEW)
    cyclic = accounting.privacy_cost(CyclicPoisson(b, rate * b), n, sigma, 1e-5)
    assert found.epsilon < cyclic.epsilon


def test_many_steps_do_not_overflow():
    mixture = Separated(np.full((1, 3000), 1 / 0.7), 1, 0.5)
    log_x = mixture._log_x(np.random.default_rng(0), np.ones((3000, 4)))
    assert log_x.sum(axis=0).min() > 1000
    assert np.isfinite(mixture._log_ratio(log_x)).all()
    with pytest.raises(FloatingPointError, match=r"^likelihood ratios overflow$"):
        mixture._log_ratio(log_x + 1000)
    tilted = min_sep_patterns.pairs(mixture.squares, mixture._overlaps, 1, 0.5, 24.0)
    assert not math.isfinite(tilted.log_scale)


def test_hopelessly_little_noise_is_one_gaussian():
    who, c = MinSepPoisson(1, 0.5), Toeplitz(np.ones(1), 4)
    cost = accounting.privacy_cost(who, 4, 0.02, 1e-5, strategy=c, monte_carlo=FEW)
    assert cost.method == "analytic Gaussian, not amplified"
    assert cost.epsilon == pytest.approx(get_epsilon_gaussian(0.01, 1e-5), rel=1e-8)


def test_calibration_confirms_what_it_returns():
    who = MinSepPoisson(6, 0.1)
    strategy = factorize(prefix_sum(24), who, "bsr").strategy
    sigma = accounting.noise_multiplier(who, 24, 2.0, 1e-5, strategy=strategy, monte_carlo=FEW)
    cost = accounting.privacy_cost(who, 24, sigma, 1e-5, strategy=strategy, monte_carlo=FEW)
    assert 1.94 <= cost.epsilon <= 2.0


def test_the_audit_bounds_it_from_below_by_a_recursion_forwards_in_time():
    who = MinSepPoisson(5, 0.3)
    mechanism = Mechanism.calibrate(
        factorize(prefix_sum(20), who, "bsr"), who, noise_multiplier=0.8, delta=1e-5
    )
    [found] = epsilon_ranges(mechanism, {1e-5: mechanism.epsilon})
    assert 0.6 * mechanism.epsilon < found.low <= mechanism.epsilon <= found.high
    losses = _renewal_losses(mechanism, who)
    # E_P exp(-loss) = 1; six deviations.
    inverse = np.exp(-losses)
    assert abs(inverse.mean() - 1) < 6 * inverse.std() / math.sqrt(losses.size)


# ------------------------------------------------------------------------------- as a value


def test_it_counts_one_participation_like_the_other_poisson_sampling():
    who = MinSepPoisson(4, 0.3)
    assert from_dict(to_dict(who)) == who
    split = factorize(prefix_sum(16), who, "bsr")
    assert split.strategy.bands == 4
    found = sensitivity(split.strategy, who)
    assert found == sensitivity(split.strategy, SingleParticipation())
    assert lower_bound(prefix_sum(16), who).value == pytest.approx(
        lower_bound(prefix_sum(16), SingleParticipation()).value
    )
    assert factorize(prefix_sum(16), who, "dense").strategy.bands <= 4
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=1.5, delta=1e-5)
    assert "column norm" in mechanism.claim()
    assert "that is at least 4 after the last one" in mechanism.claim()
    assert mechanism.gap() > 0


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: MinSepPoisson(0, 0.5), "min_sep must be >= 1, got 0"),
        (
            lambda: MinSepPoisson(2, 1.5),
            "probability must be a finite number > 0 and <= 1, got 1.5",
        ),
        (lambda: MinSepPoisson(5, 0.5).validate(4), "min_sep must be in [1, n_steps=4], got 5"),
        (
            lambda: sensitivity(Toeplitz(np.ones(4), 8), MinSepPoisson(3, 0.5)),
            "bands must be in [1, min_sep=3] under min-sep Poisson sampling, got 4",
        ),
        (
            lambda: accounting.privacy_cost(MinSepPoisson(3, 0.5), 8, 1, 1e-5),
            "strategy must be given for participation min-sep-poisson",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=f"^{re.escape(line)}$"):
        call()
