"""The auditor's second routes agree with the first and with brute force, and refute wrong ones."""

import math
from dataclasses import replace
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest

import oracle
from rootnoise.accounting import privacy_cost
from rootnoise.auditing import recompute
from rootnoise.auditing.recompute import Range
from rootnoise.causal import Dense, Toeplitz
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    SingleParticipation,
)
from rootnoise.workload import SGD, prefix_sum

PARTICIPATIONS = [
    SingleParticipation(),
    FixedCycle(6, 4),
    MinSeparation(7, 3),
    CyclicPoisson(8, 0.25),
]


def mechanism(name, participation, n=24, bands=5, sigma=1.5):
    keywords = {} if name in ("identity", "square-root", "blt") else {"bands": bands}
    factorization = factorize(SGD(n, 0.9), participation, name, **keywords)
    return Mechanism.calibrate(factorization, participation, noise_multiplier=sigma, delta=1e-5)


CASES = [
    (name, p)
    for name in ("identity", "bsr", "bisr", "blt", "square-root", "banded")
    for p in PARTICIPATIONS
    if not (isinstance(p, CyclicPoisson) and name in ("bisr", "blt", "square-root"))
]


@pytest.mark.parametrize(("name", "participation"), CASES, ids=str)
def test_the_sensitivity_of_the_claim_lies_in_the_auditors_range(name, participation):
    m = mechanism(name, participation)
    found = recompute.sensitivity_range(m)
    assert found.holds(m.sensitivity.value, 1e-9)
    assert found.low <= found.high * (1 + 1e-12)
    # The engine's strategy is the claimed one, and a value 1 % too small is refuted.
    np.testing.assert_allclose(recompute.strategy_of(m), m.strategy.dense(), atol=1e-9)
    if m.sensitivity.exact:
        assert not found.holds(m.sensitivity.value * 0.99, 1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("participation", PARTICIPATIONS[1:3])
def test_the_range_holds_the_brute_force_sensitivity(seed, participation):
    # Strategies with signs: the truth lies between the two ends.
    rng = np.random.default_rng(seed)
    n = 12
    p = FixedCycle(4, 3) if isinstance(participation, FixedCycle) else MinSeparation(4, 3)
    c = np.tril(rng.normal(size=(n, n))) + 3 * np.eye(n)
    m = Mechanism("dense", prefix_sum(n), p, Dense(c), 1.0, 1e-5)
    found = recompute.sensitivity_range(m)
    fixed = isinstance(p, FixedCycle)
    truth = max(f(c, 4, 3, fixed) for f in (oracle.sensitivity_by_ascent, oracle.sensitivity))
    most = oracle.sensitivity_at_most(c, 4, 3, fixed)
    assert found.low <= truth * (1 + 1e-9) <= most * (1 + 2e-9)
    assert found.high == pytest.approx(most, rel=1e-9)


def test_p_above_b_counted_as_p_at_most_b_is_refuted():
    # 8 bands under a separation of 3: the columns of a person overlap, and the sum of their squared
    # norms forgets the cross terms.
    m = mechanism("bsr", MinSeparation(3, 5), bands=8)
    columns = np.sort(np.square(m.strategy.column_norms()))[::-1]
    forgotten = math.sqrt(columns[: 5 * 3 : 3].sum())
    assert forgotten < 0.8 * m.sensitivity.value
    assert not recompute.sensitivity_range(m).holds(forgotten, 1e-9)


def test_too_many_patterns_are_searched_by_ascent(monkeypatch):
    m = mechanism("bsr", MinSeparation(3, 5), bands=8)
    exact = recompute.sensitivity_range(m)
    monkeypatch.setattr(recompute, "PATTERNS", 10)
    found = recompute.sensitivity_range(m)
    assert found.method == "ascent over patterns: a lower bound"
    assert found.low == pytest.approx(exact.low)
    assert found.high == math.inf


@pytest.mark.parametrize("participation", PARTICIPATIONS[:3])
def test_long_runs_are_searched_without_a_gram_matrix(monkeypatch, participation):
    m = mechanism("bsr", participation)
    exact = recompute.sensitivity_range(m)
    monkeypatch.setattr(recompute, "DENSE", 23)
    found = recompute.sensitivity_range(m)
    assert found.low == pytest.approx(exact.low)
    assert found.high == math.inf
    # An engine that runs another map is found out.
    other = SimpleNamespace(**{k: getattr(m, k) for k in ("participation", "n_steps", "strategy")})
    other.noising = Toeplitz(np.array([1.0, 0.1]), 24)
    assert math.isinf(recompute.sensitivity_range(other).low)


def test_streaming_by_blocks_is_the_map():
    m = mechanism("blt", FixedCycle(6, 4))
    x = np.random.default_rng(0).normal(size=(24, 3))
    for size in (1, 7, 24):
        np.testing.assert_allclose(recompute.streamed(m.noising, x, size), m.noising.apply(x))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.7306316348, 30.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_integration_agrees_with_the_analytic_gaussian(sigma, delta):
    cost = privacy_cost(SingleParticipation(), 9, sigma, delta)
    m = SimpleNamespace(
        noise_multiplier=sigma, participation=SingleParticipation(), n_steps=9, trials=None
    )
    (found,) = recompute.epsilon_ranges(m, {delta: cost.epsilon})
    assert found.low == pytest.approx(cost.epsilon, rel=1e-8)
    assert found.holds(cost.epsilon, 1e-8)
    assert not found.holds(cost.epsilon * (1 - 1e-6), 1e-8)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.73, 20.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-9])
def test_epsilon_is_rounded_to_the_private_side(sigma, delta):
    # Theorem 8 of Balle & Wang (2018) in 40 digits: a part in 1e10 less would spend more delta.
    with mpmath.workdps(40):
        epsilon = mpmath.mpf(privacy_cost(SingleParticipation(), 9, sigma, delta).epsilon)
        mu = 1 / mpmath.mpf(sigma)
        far, near = mpmath.ncdf(mu / 2 - epsilon / mu), mpmath.ncdf(-mu / 2 - epsilon / mu)
        spent = far - mpmath.exp(epsilon) * near
        assert spent <= delta
        assert spent > delta * (1 - 1e-8)


@pytest.mark.parametrize(
    ("q", "n", "groups", "sigma"), [(0.1, 24, 1, 1.2), (0.5, 24, 3, 2.0), (0.02, 200, 1, 0.7)]
)
def test_convolution_agrees_with_dp_accounting(q, n, groups, sigma):
    p = CyclicPoisson(groups, q)
    claimed = {delta: privacy_cost(p, n, sigma, delta).epsilon for delta in (1e-3, 1e-5, 1e-7)}
    m = SimpleNamespace(noise_multiplier=sigma, participation=p, n_steps=n, trials=None)
    for (_, epsilon), found in zip(
        claimed.items(), recompute.epsilon_ranges(m, claimed), strict=True
    ):
        assert found.low <= epsilon <= found.high
        assert found.high < found.low * 1.05
        assert (found.low + found.high) / 2 == pytest.approx(epsilon, rel=2e-3)


@pytest.mark.parametrize("name", ["identity", "bsr", "square-root"])
def test_balls_in_bins_lie_between_plain_samples_and_no_amplification(name):
    p = BallsInBins(8, 3)
    m = mechanism(name, p, sigma=1.0)
    claimed = {d: replace(m, delta=d).privacy.epsilon for d in (1e-3, 1e-5)}
    for (_, epsilon), found in zip(
        claimed.items(), recompute.epsilon_ranges(m, claimed), strict=True
    ):
        assert found.holds(epsilon, 1e-9)
        assert found.low > 0.75 * epsilon  # the power of the refutation
        assert found.high > 1.1 * epsilon  # amplification is real


def test_a_probability_of_one_is_composition():
    p = CyclicPoisson(1, 1.0)
    exact = privacy_cost(SingleParticipation(), 9, 4.0 / math.sqrt(9), 1e-5).epsilon
    m = SimpleNamespace(noise_multiplier=4.0, participation=p, n_steps=9, trials=None)
    (found,) = recompute.epsilon_ranges(m, {1e-5: exact})
    assert found.low < exact < found.high


def test_no_privacy_at_all_has_no_epsilon():
    grid = np.array([-1.0, 0.0, 1.0])
    assert recompute._smallest(grid, np.array([0.5, 0.0, 0.0]), 0.5, 1e-5) == math.inf
    assert recompute._smallest(grid, np.array([1.0, 0.0, 0.0]), 0.0, 1e-5) == 0.0


def test_the_error_is_that_of_the_dense_matrices():
    m = mechanism("bsr", FixedCycle(6, 4))
    assert recompute.rmse(m) == pytest.approx(m.rmse, rel=1e-12)
    assert recompute.rmse(replace(m, strategy=Toeplitz(np.array([1.0]), 24))) != pytest.approx(
        m.rmse, rel=1e-3
    )


def test_ranges_have_two_ends():
    found = Range(1.0, 2.0, "")
    assert [found.holds(x, 1e-6) for x in (0.999, 1.0, 1.5, 2.0, 2.001)] == [0, 1, 1, 1, 0]
    assert [found.holds(x, 0.0) for x in (0.999, 1.0, 2.0, 2.001)] == [0, 1, 1, 0]


def test_signs_are_aligned_with_the_leading_direction():
    """|C u|^2 of all ones is 0 here, that of the signs of the leading eigenvector 4."""
    assert recompute._aligned(np.array([[1.0, -1.0], [-1.0, 1.0]])) == pytest.approx(4.0)
    assert recompute._aligned(np.ones((3, 3))) == pytest.approx(9.0)
