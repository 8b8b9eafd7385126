"""Overlapping columns against brute force: the worst pattern, its signs, and vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from rootnoise.causal import CausalMatrix, Dense, Diagonal, Product, Toeplitz, series
from rootnoise.participation import FixedCycle, MinSeparation, overlaps
from rootnoise.participation.sensitivity import sensitivity


@st.composite
def cases(draw):
    """Draw n <= 14, the separation, participations that fit, and one of four kinds of strategy."""
    n = draw(st.integers(2, 14))
    b = draw(st.integers(1, n))
    k = draw(st.integers(1, min(4, -(-n // b))))
    p = draw(st.integers(1, n))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    low = draw(st.sampled_from([-1.0, 0.0]))
    c = Toeplitz(np.append(1.0, rng.uniform(low, 1, p - 1)), n)
    strategy: CausalMatrix = c
    match draw(st.sampled_from(["toeplitz", "scaled", "dense", "inverse"])):
        case "scaled":
            strategy = Product(c, Diagonal(rng.uniform(0.3, 1, n)))
        case "dense":
            full = np.tril(rng.uniform(low, 1, (n, n)), -1) + np.eye(n)
            strategy = Dense(oracle.banded(full, p))
        case "inverse":
            strategy = c.inverse()
    return n, b, k, strategy


@settings(max_examples=200)
@given(cases())
def test_diagonals_are_those_of_the_gram_matrix(case):
    n, _, _, strategy = case
    x = strategy.dense().T @ strategy.dense()
    lags = range(strategy.bands)
    for d, diagonal in zip(lags, overlaps.gram_diagonals(strategy, lags), strict=True):
        np.testing.assert_allclose(diagonal[d:], np.diag(x, d), atol=1e-9 * x.max())
        assert not diagonal[:d].any()
    assert not np.triu(x, strategy.bands).any() or strategy.bands == n


@settings(max_examples=300)
@given(cases())
def test_the_worst_pattern_is_found(case):
    _, b, k, strategy = case
    c = strategy.dense()
    found = overlaps.worst_pattern(strategy, b, k)
    assert found is not None
    bound, reached = np.sqrt(found[0]), found[1]
    assert bound == pytest.approx(oracle.sensitivity_at_most(c, b, k, False), rel=1e-9)
    if reached:
        assert bound == pytest.approx(oracle.sensitivity(c, b, k, False), rel=1e-9)


@settings(max_examples=300)
@given(cases())
def test_the_worst_cycle_is_found(case):
    n, b, _, strategy = case
    if n // b > 6:
        return  # 2^6 signs are enough
    c = strategy.dense()
    found = overlaps.worst_cycle(strategy, b)
    assert found is not None
    bound, reached = np.sqrt(found[0]), found[1]
    assert bound == pytest.approx(oracle.sensitivity_at_most(c, b, n, True), rel=1e-9)
    if reached:
        assert bound == pytest.approx(oracle.sensitivity(c, b, n, True), rel=1e-9)


@settings(max_examples=60)
@given(cases(), st.booleans())
def test_no_contributions_reach_further(case, fixed):
    """Signed and vector-valued ones; what is called exact is reached."""
    n, b, k, strategy = case
    if n > 9 or (fixed and n // b > 6):
        return
    value = FixedCycle(b, -(-n // b)) if fixed else MinSeparation(b, k)
    found = sensitivity(strategy, value)
    k = value.max_participations
    c = strategy.dense()
    reached = oracle.sensitivity_by_ascent(c, b, k, fixed)
    assert reached <= found.value * (1 + 1e-9)
    if found.exact:
        assert oracle.sensitivity(c, b, k, fixed) == pytest.approx(found.value, rel=1e-9)


def test_signs_that_cannot_all_be_turned_are_a_bound():
    """Three columns at obtuse angles: vectors reach 3/2, signs 1, and absolute values 3."""
    angles = 2 * np.pi * np.arange(3) / 3
    x = np.cos(angles[:, np.newaxis] - angles) * (1 - 1e-3) + 1e-3 * np.eye(3)
    reverse = np.linalg.cholesky(x[::-1, ::-1]).T[::-1, ::-1]  # lower C with C^T C = X
    found = sensitivity(Dense(reverse), MinSeparation(1, 3))
    assert not found.exact
    assert found.value > oracle.sensitivity_by_ascent(reverse, 1, 3, False) * 1.1


def test_neighbours_alone_always_have_signs():
    """Bands up to 2b with negative entries: exact, and more than the sum of signed products."""
    c = Toeplitz(np.array([1.0, 0.2, -0.9, -0.8]), 12)
    found = sensitivity(c, MinSeparation(2, 4))
    assert found.exact
    assert found.method == "dynamic programming over the Gram matrix"
    assert found.value == pytest.approx(oracle.sensitivity(c.dense(), 2, 4, False), rel=1e-12)
    alike = max(
        np.linalg.norm(c.dense()[:, p].sum(axis=1)) for p in oracle.patterns(12, 2, 4, False)
    )
    assert found.value > 1.1 * alike


def test_a_late_pattern_can_be_the_worst():
    """Non-monotone coefficients: the pair that starts at 1, three steps apart, beats the first."""
    scales = np.ones(9)
    scales[[1, 4]] = 1.5
    c = Product(Toeplitz(np.array([1.0, 0.0, 0.0, 1.0]), 9), Diagonal(scales))
    found = sensitivity(c, MinSeparation(2, 2))
    assert found.exact
    pair = np.linalg.norm(c.dense()[:, [1, 4]].sum(axis=1))
    assert found.value == pytest.approx(pair)


def test_what_takes_too_long_or_too_much_is_bounded(monkeypatch):
    c = Toeplitz(np.array([1.0, 0.1, 0.1, 0.9]), 12)
    for value, method in (
        (MinSeparation(2, 4), "worst pair of steps"),
        (FixedCycle(2, 6), "absolute coefficients"),
    ):
        exact = sensitivity(c, value)
        assert exact.exact
        with monkeypatch.context() as m:
            m.setattr(overlaps, "MEMORY", 0)
            bound = sensitivity(Toeplitz(-c.coefficients, 12), value)
        assert (bound.exact, bound.method) == (False, method)
        assert bound.value >= exact.value


def test_matrices_that_take_too_much_are_bounded_by_rows(monkeypatch):
    rng = np.random.default_rng(2)
    c = Dense(np.tril(rng.uniform(0, 1, (10, 10))) + np.eye(10))
    exact = sensitivity(c, MinSeparation(2, 5))
    monkeypatch.setattr(overlaps, "WORK", 0)
    bound = sensitivity(c, MinSeparation(2, 5))
    assert (exact.exact, bound.exact, bound.method) == (True, False, "rows of the Gram matrix")
    assert bound.value >= exact.value


def test_the_number_of_ages_is_counted_right():
    for b in range(1, 5):
        for oldest in range(-3, 12):
            assert overlaps._count(oldest, b) == len(list(overlaps._ages(oldest, b)))


@pytest.mark.parametrize(
    ("n", "b", "k", "p"), [(10_000, 100, 100, 200), (1000, 10, 100, 30), (1000, 100, 10, 250)]
)
def test_long_runs(n, b, k, p):
    c = series.sgd_power(1, 0, 0.5, p)
    c[p // 2] *= 2  # neither rising nor falling
    found = sensitivity(Toeplitz(c, n), MinSeparation(b, k))
    assert found.exact
    first = np.linalg.norm(Toeplitz(c, n).dense()[:, : k * b : b].sum(axis=1)) if n < 2000 else 0.0
    assert found.value >= first * (1 - 1e-12)
