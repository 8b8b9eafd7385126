"""Sensitivity against brute force over every pattern and every sign, n <= 14."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from rootnoise import RootnoiseError
from rootnoise.causal import Dense, Diagonal, Product, Toeplitz, series
from rootnoise.causal.momentum import Descent
from rootnoise.causal.tree import Tree
from rootnoise.participation import (
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
    SingleParticipation,
    overlaps,
)
from rootnoise.participation import sensitivity as module
from rootnoise.participation.sensitivity import sensitivity

SHAPES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(1, n)).flatmap(
        lambda nb: st.tuples(
            st.just(nb[0]), st.just(nb[1]), st.integers(1, min(4, -(-nb[0] // nb[1])))
        )
    )
)


def who(n, b, k, fixed):
    """Return the participation, for a fixed cycle with all the epochs that n steps have."""
    return FixedCycle(b, -(-n // b)) if fixed else MinSeparation(b, k)


def compare(strategy, n, b, k, fixed, *, exact=None):
    """An exact answer equals brute force; a bound is never below it."""
    value = who(n, b, k, fixed)
    k = -(-n // b) if fixed else k
    found = sensitivity(strategy, value)
    truth = oracle.sensitivity(strategy.dense(), b, k, fixed)
    if exact is not None:
        assert found.exact is exact
    if found.exact:
        assert found.value == pytest.approx(truth, rel=1e-12)
    else:
        assert found.value >= truth * (1 - 1e-12)


@given(SHAPES, st.booleans(), st.floats(0, 0.99), st.floats(0.01, 1), st.integers(1, 12))
def test_square_roots_are_exact(shape, fixed, momentum, decay, bands):
    n, b, k = shape
    if fixed and n // b > 6:
        return  # 2^6 signs are enough
    root = Toeplitz(series.sgd_power(decay, momentum, 0.5, min(bands, n)), n)
    compare(root, n, b, k, fixed, exact=True)


@given(SHAPES, st.booleans(), st.floats(0, 0.99), st.integers(1, 12))
def test_non_decreasing_coefficients_are_exact(shape, fixed, momentum, bands):
    n, b, k = shape
    if fixed and n // b > 6:
        return
    rising = Toeplitz(series.sgd_power(1, momentum, 1.0, min(bands, n)), n)
    compare(rising, n, b, k, fixed, exact=True)


def test_non_decreasing_coefficients_are_exact_at_any_length(monkeypatch):
    monkeypatch.setattr(overlaps, "MEMORY", 0)
    monkeypatch.setattr(module, "PAIRWISE_WORK", 0)
    for bands in (3, 4, 12):
        rising = Toeplitz(series.sgd_power(1, 0.9, 1.0, bands), 12)
        compare(rising, 12, 2, 4, False, exact=True)


@given(SHAPES, st.booleans(), st.integers(0, 999), st.booleans())
def test_random_toeplitz_is_never_under_counted(shape, fixed, seed, signed):
    n, b, k = shape
    if fixed and n // b > 6:
        return
    rng = np.random.default_rng(seed)
    c = rng.uniform(-1 if signed else 0, 1, rng.integers(1, n + 1))
    c[0] = 1
    compare(Toeplitz(c, n), n, b, k, fixed)


@given(SHAPES, st.booleans(), st.integers(0, 999), st.booleans())
def test_random_matrices_are_never_under_counted(shape, fixed, seed, signed):
    n, b, k = shape
    if fixed and n // b > 6:
        return
    rng = np.random.default_rng(seed)
    c = np.tril(rng.uniform(-1 if signed else 0, 1, (n, n))) + np.eye(n)
    compare(Dense(oracle.banded(c, int(rng.integers(1, n + 1)))), n, b, k, fixed)


@given(SHAPES, st.booleans(), st.integers(0, 999))
def test_scaled_columns_are_exact_up_to_the_separation(shape, fixed, seed):
    """Orthogonal columns of different norms: the best pattern is not always the first."""
    n, b, k = shape
    if fixed and n // b > 6:
        return
    rng = np.random.default_rng(seed)
    c = Toeplitz(np.append(1, rng.uniform(-1, 1, rng.integers(0, b))), n)
    compare(Product(c, Diagonal(rng.uniform(0.1, 1, n))), n, b, k, fixed, exact=True)


@pytest.mark.parametrize("gains", [[2, 3, 2.9, 0.1, 2], [2, 3, 2.9, 0.1, 9], [3, 1, 2, 1, 9]])
def test_two_large_columns_that_are_too_near_are_not_both_counted(gains):
    compare(Diagonal(np.sqrt(gains)), 5, 2, 2, False, exact=True)


@pytest.mark.parametrize(
    ("n", "b", "k", "p"), [(7, 1, 4, 7), (7, 1, 4, 3), (9, 2, 3, 7), (9, 2, 5, 9)]
)
def test_each_pair_of_ranks_is_bounded_by_its_own_worst_distance(n, b, k, p):
    c = np.random.default_rng(n + p).uniform(0, 1, p)
    total = 0.0
    for r in range(k):
        held = np.pad(c, (0, n))[: n - r * b]
        total += held @ held
        for g in range(1, k - r):
            total += 2 * max(held[d:] @ held[: held.size - d] for d in range(g * b, held.size))
    assert module._pairwise(c, n, b, k) == pytest.approx(total**0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (MinSeparation(5, 3), "max_participations must be in .*=2., got 3"),
        (FixedCycle(5, 3), "n_steps must be in .* got 10"),
        (CyclicPoisson(11, 0.1), "groups must be in .* got 11"),
        (MinSepPoisson(11, 0.1), "min_sep must be in .* got 11"),
    ],
)
def test_a_participation_that_does_not_fit_is_refused(value, message):
    with pytest.raises(RootnoiseError, match=f"^{message}"):
        sensitivity(Toeplitz(np.ones(1), 10), value)


def test_a_tree_takes_the_bound_of_its_blocks_where_dynamic_programming_takes_too_long(monkeypatch):
    tree, value = Tree(12), MinSeparation(3, 4)
    exact = sensitivity(tree, value)
    assert exact.method == "dynamic programming over the Gram matrix"
    monkeypatch.setattr(overlaps, "MEMORY", 0)
    blocks = sensitivity(tree, value)
    assert blocks.method == "blocks of the tree"
    assert blocks.value >= exact.value * (1 - 1e-12)


def test_vector_contributions_stay_below_the_bound():
    """Signed strategies: contributions in several dimensions reach further than any signs."""
    rng = np.random.default_rng(1)
    c = Toeplitz(np.array([1.0, -0.8, 0.9, -0.4, 0.7, 0.1]), 6)
    bound = sensitivity(c, MinSeparation(1, 3)).value
    reached = 0.0
    for pattern in oracle.patterns(6, 1, 3, False):
        columns = c.dense()[:, pattern]
        for _ in range(200):
            u = rng.normal(size=(len(pattern), 3))
            u /= np.linalg.norm(u, axis=1, keepdims=True)
            reached = max(reached, float(np.linalg.norm(columns @ u)))
    assert 0.5 * bound < reached <= bound


def test_the_pairwise_route_proves_momentum_with_decay_exact():
    """Id A with alpha < 1: the coefficients rise, then fall, and Theorem 2 does not apply."""
    a = series.sgd_power(0.999, 0.9, 1.0, 1000)
    assert a.argmax() not in (0, 999)
    found = sensitivity(Toeplitz(a, 1000), MinSeparation(100, 10))
    assert found.exact
    assert found.method == "every pair of steps is worst when earliest"


def test_the_envelope_is_used_when_pairs_are_too_many(monkeypatch):
    monkeypatch.setattr(overlaps, "MEMORY", 0)  # no dynamic programming, which is exact here
    c = Toeplitz(np.array([1, 0.1, 0.1, 0.9]), 12)
    pairwise = sensitivity(c, MinSeparation(2, 4))
    monkeypatch.setattr(module, "PAIRWISE_WORK", 4 * 12)
    assert sensitivity(c, MinSeparation(2, 4)) == pairwise
    monkeypatch.setattr(module, "PAIRWISE_WORK", 4 * 12 - 1)
    envelope = sensitivity(c, MinSeparation(2, 4))
    assert (pairwise.method, envelope.method) == ("worst pair of steps", "non-increasing envelope")
    assert not envelope.exact
    assert (
        envelope.value > pairwise.value > oracle.sensitivity(c.dense(), 2, 4, False) * (1 - 1e-12)
    )


def test_one_participation_is_the_largest_column():
    c = Toeplitz(np.array([1, -0.5]), 4)
    for value in (SingleParticipation(), MinSeparation(2, 1), FixedCycle(4, 1)):
        found = sensitivity(c, value)
        assert found.exact
        assert found.value == pytest.approx(1.25**0.5)


def test_as_many_bands_as_the_separation_do_not_overlap():
    found = sensitivity(Toeplitz(np.array([1, -0.5, 0.9]), 9), MinSeparation(3, 3))
    assert (found.exact, found.method) == (True, "orthogonal columns")


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_cycles_of_a_gram_matrix_are_those_of_the_dense_one(low, monkeypatch):
    monkeypatch.setattr(overlaps, "MEMORY", 0)
    for seed, (n, b) in enumerate([(10, 3), (12, 4), (7, 1)]):
        c = np.tril(np.random.default_rng(seed).uniform(low, 1, (n, n)), -1) + np.eye(n)
        value = FixedCycle(b, -(-n // b))
        found = sensitivity(Dense(c), value)
        assert found.method == "every cycle of the Gram matrix"
        assert found.exact is (low == 0)
        most = oracle.sensitivity_at_most(c, b, n, True)
        assert found.value == pytest.approx(most, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        (FixedCycle(3, 4), True),
        (FixedCycle(5, 3), True),
        (MinSeparation(3, 4), None),
        (MinSeparation(1, 12), True),
        (MinSeparation(4, 3), None),
        (MinSeparation(3, 2), False),
    ],
)
def test_blocks_of_a_tree_are_those_of_the_dense_one(value, exact, monkeypatch):
    monkeypatch.setattr(overlaps, "MEMORY", 0)
    for estimator in ("full", "naive"):
        tree = Tree(12, estimator)
        found = sensitivity(tree, value)
        assert found.method == "blocks of the tree"
        fixed = isinstance(value, FixedCycle)
        truth = oracle.sensitivity(tree.dense(), value.min_sep, value.max_participations, fixed)
        assert found.value >= truth * (1 - 1e-12)
        if found.exact:
            assert found.value == pytest.approx(truth, rel=1e-12)
        if estimator == "naive":
            assert not found.exact
        elif exact is not None:
            assert found.exact is exact
        else:
            first = np.linalg.norm(tree.dense()[:, :: value.min_sep].sum(axis=1))
            assert found.exact is bool(np.isclose(first, found.value, rtol=1e-12))


def test_identity_with_many_participations_is_not_one():
    assert sensitivity(Toeplitz(np.ones(1), 100), FixedCycle(10, 10)).value == pytest.approx(
        10**0.5
    )


def test_cross_terms_between_participations_count():
    """Bands beyond the separation: more than sqrt(k) times the column norm."""
    c = Toeplitz(np.ones(2), 4)
    assert sensitivity(c, MinSeparation(1, 4)).value > 2 * 2**0.5


def test_cyclic_poisson_needs_bands_within_its_groups():
    c = Toeplitz(np.array([1, 0.5, 0.25]), 9)
    assert sensitivity(c, CyclicPoisson(3, 0.1)).value == pytest.approx(1.3125**0.5)
    with pytest.raises(RootnoiseError, match=r"bands must be in \[1, groups=2\] .*, got 3"):
        sensitivity(c, CyclicPoisson(2, 0.1))


def test_a_million_steps_with_overlap():
    c = Toeplitz(series.sgd_power(1, 0.9, 0.5, 10**6), 10**6)
    found = sensitivity(c, MinSeparation(1000, 1000))
    assert found.exact
    assert found.value > 1000**0.5 * np.linalg.norm(c.coefficients[:1000])


@pytest.mark.parametrize("who", [FixedCycle(4000, 3), MinSeparation(4000, 3)])
def test_long_maps_without_structure_take_the_sum_of_column_norms(who):
    """No n x n array; equal columns in one direction would reach it."""
    exact = sensitivity(Toeplitz(np.ones(12000), 12000), who)
    bound = sensitivity(Descent(np.ones(12000)), who)
    assert exact.exact
    assert not bound.exact
    lengths = np.sqrt([12000.0, 8000.0, 4000.0])
    assert bound.value == pytest.approx(lengths.sum(), rel=1e-9)
    assert bound.value > exact.value
