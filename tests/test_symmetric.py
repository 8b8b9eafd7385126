"""Symmetric workloads: dense oracles, what is optimal, every refusal, and the ablation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm, toeplitz

import oracle
from rootnoise._check import RootnoiseError
from rootnoise.factorization.dense import reverse_cholesky
from rootnoise.factorization.symmetric import OfflineFactorization, ablation, offline_factorization

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**32 - 1)


def definite(n, seed):
    """Queries of Gaussian weights, W^T W, with eigenvalues at least 1/2."""
    w = np.random.default_rng(seed).normal(size=(n, n))
    return w.T @ w + np.eye(n) / 2


def correlation(n, rho=0.5):
    """Return rho^|i - j|: definite, with a constant diagonal."""
    return toeplitz(rho ** np.arange(n))


def banded(matrix, p):
    i, j = np.indices(matrix.shape)
    return np.where(abs(i - j) < p, matrix, 0.0)


@given(SIZES, SEEDS)
def test_whole_root(n, seed):
    a = definite(n, seed)
    made = offline_factorization(a)
    np.testing.assert_allclose(made.strategy, sqrtm(a), atol=1e-10 * np.abs(a).max())
    np.testing.assert_allclose(made.decoder @ made.strategy, a, atol=1e-12 * np.abs(a).max())
    diagonal = np.diag(a)
    assert made.sensitivity == pytest.approx(diagonal.max() ** 0.5)
    assert made.rmse == pytest.approx((diagonal.max() * diagonal.mean()) ** 0.5)
    assert made.max_error == pytest.approx(diagonal.max())
    assert made.lower_bound == pytest.approx(np.linalg.norm(a, "nuc") / n)
    assert made.rmse >= made.lower_bound * (1 - 1e-12)


@given(SIZES, SEEDS, st.data())
def test_bands(n, seed, data):
    p = data.draw(st.integers(1, n))
    a = correlation(n) * (d := np.random.default_rng(seed).uniform(1, 2, n)) * d[:, None]
    made = offline_factorization(a, p)
    expected = banded(sqrtm(a), p)
    np.testing.assert_allclose(made.strategy, expected, atol=1e-10)
    np.testing.assert_allclose(made.decoder, a @ np.linalg.inv(expected), atol=1e-8)
    np.testing.assert_allclose(made.decoder @ made.strategy, a, atol=1e-12)
    once = oracle.sensitivity(made.strategy, n, 1, fixed=False)
    assert made.sensitivity == pytest.approx(once, rel=1e-12)
    assert made.rmse >= made.lower_bound * (1 - 1e-12)


@given(SIZES, SEEDS)
def test_causality_costs_nothing(n, seed):
    a = definite(n, seed)
    made = offline_factorization(a)
    causal = made.causal()
    np.testing.assert_array_equal(causal.strategy, np.tril(causal.strategy))
    np.testing.assert_allclose(causal.strategy, reverse_cholesky(a), atol=1e-10)
    np.testing.assert_allclose(causal.decoder @ causal.strategy, a, atol=1e-10)
    for name in ("sensitivity", "rmse", "max_error", "lower_bound"):
        assert getattr(causal, name) == pytest.approx(getattr(made, name), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_optimal_where_the_diagonal_is_constant(n):
    made = offline_factorization(correlation(n))
    assert made.rmse == pytest.approx(made.lower_bound, rel=1e-12)


@given(st.integers(2, 12), SEEDS)
def test_no_optimum_of_a_definite_workload_elsewhere(n, seed):
    a = definite(n, seed)
    made = offline_factorization(a)
    scale = np.diag(a) ** -1e-3
    better = OfflineFactorization(made.strategy * scale, a / scale @ np.linalg.inv(made.strategy))
    np.testing.assert_allclose(better.decoder @ better.strategy, a, atol=1e-9 * a.max())
    assert better.rmse < made.rmse
    assert made.rmse > made.lower_bound


def test_a_singular_workload_may_have_its_optimum_with_any_diagonal():
    # Any B C = diag(1, 0) has |B| >= 1 / |first column of C|, so that rmse >= 1 / sqrt(2).
    made = offline_factorization(np.diag([1.0, 0.0]))
    assert made.rmse == pytest.approx(0.5**0.5)
    assert made.lower_bound == 0.5


@given(st.integers(2, 12), SEEDS)
def test_singular(n, seed):
    w = np.random.default_rng(seed).normal(size=(n // 2, n))
    made = offline_factorization(w.T @ w)
    np.testing.assert_allclose(made.decoder @ made.strategy, w.T @ w, atol=1e-12 * n * n)
    causal = made.causal()
    np.testing.assert_array_equal(causal.strategy, np.tril(causal.strategy))
    np.testing.assert_allclose(causal.decoder @ causal.strategy, w.T @ w, atol=1e-12 * n * n)
    assert causal.rmse == pytest.approx(made.rmse)


def test_bands_of_a_singular_workload():
    # What C forgets A may forget too: zero rows, or here 1 1 1 ... with its band of two.
    for a in (np.pad(correlation(3), (0, 2)), np.ones((5, 5))):
        made = offline_factorization(a, 2)
        assert np.linalg.matrix_rank(made.strategy) < 5
        np.testing.assert_allclose(made.decoder @ made.strategy, a, atol=1e-13)


def test_a_singular_band():
    # det of the band = 1 - 2 s^2 = 0, while the root has determinant 1/4.
    s = 0.5**0.5
    root = np.array([[1, s, 0.5], [s, 1, s], [0.5, s, 1]])
    message = r"^bands must leave an invertible strategy, got a singular C for bands=2$"
    with pytest.raises(RootnoiseError, match=message):
        offline_factorization(root @ root, 2)


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (
            [[1.0, 0.0], [1.0, 1.0]],
            "symmetric to be factorized offline, got a lower-triangular one",
        ),
        (
            [[1.0, 2.0], [0.5, 1.0]],
            r"lower-triangular or symmetric positive semi-definite, "
            r"got 2 at \(0, 1\) and 0.5 at \(1, 0\)$",
        ),
        (
            [[1.0, 2.0], [2.0, 1.0]],
            "lower-triangular or symmetric positive semi-definite, got the eigenvalue -1$",
        ),
        ([[1.0, 1 + 1e-9], [1 + 1e-9, 1.0]], ".*semi-definite, got the eigenvalue -1e-09$"),
        ([[0.0]], "non-zero, got zeros only$"),
        ([[1.0, 0.0]], r"square, got shape \(1, 2\)$"),
        ([[float("nan")]], "finite, got 1 NaN"),
    ],
)
def test_refused_workloads(workload, message):
    with pytest.raises(RootnoiseError, match="^workload must be " + message) as caught:
        offline_factorization(workload)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bands", [0, 3])
def test_refused_bands(bands):
    with pytest.raises(RootnoiseError, match=rf"^bands must be in \[1, n=2\], got {bands}$"):
        offline_factorization(np.eye(2), bands)


def test_rounding_is_no_reason_to_refuse():
    a = correlation(50, 0.9) @ correlation(50, 0.9)
    a[0, 1] *= 1 + 1e-15
    assert (a != a.T).any()
    offline_factorization(a)
    offline_factorization(np.ones((50, 50)))  # its least eigenvalues come out below zero


def test_ablation():
    rows = {row.label: row for row in ablation(correlation(64, 0.9), bands=[1, 4, 8, 16, 65])}
    relative = {label: row.relative for label, row in rows.items() if row.relative is not None}
    refused = {label: row.refused for label, row in rows.items() if row.refused is not None}
    assert relative == pytest.approx(
        {  # as in docs/factorizations.md
            "whole root": 1,
            "causal": 1,
            "1 bands": 3.54,
            "4 bands": 1.416,
            "8 bands": 1.093,
            "16 bands": 1.008,
            "least eigenvalue 0": 0.947,
            "least eigenvalue 0, 1 bands": 3.845,
            "least eigenvalue 0, 4 bands": 2.336,
            "least eigenvalue 0, 8 bands": 1.315,
            "least eigenvalue 0, 16 bands": 0.966,
        },
        abs=1e-3,
    )
    rule = "workload must be lower-triangular or symmetric positive semi-definite, got "
    value = refused.pop("least eigenvalue below 0")
    assert value.startswith(rule + "the eigenvalue -")
    assert refused == {
        "65 bands": "bands must be in [1, n=64], got 65",
        "half the upper triangle": rule + "0.45 at (0, 1) and 1.35 at (1, 0)",
        "no upper triangle": "workload must be symmetric to be factorized offline, "
        "got a lower-triangular one: use MatrixWorkload",
        "least eigenvalue 0, 65 bands": "bands must be in [1, n=64], got 65",
    }


@given(st.integers(2, 12), SEEDS)
def test_ablation_of_any_workload(n, seed):
    *rows, last = ablation(definite(n, seed), bands=[1])
    for row in rows:
        assert (row.refused is None) == (row.rmse is not None) == (row.relative is not None)
    assert sum(row.refused is not None for row in rows) == 2
    assert "got the eigenvalue -" in str(last.refused)


def test_ablation_refuses_what_the_factorization_refuses():
    with pytest.raises(RootnoiseError, match=r"got the eigenvalue -1$"):
        ablation(-np.eye(2))
