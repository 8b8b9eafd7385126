"""One contract for every causal map: sequences, streaming, norms and files agree with dense."""

from __future__ import annotations

import numpy as np
import pytest

from rootnoise import RootnoiseError, causal
from rootnoise.causal import Dense, Diagonal, Inverse, Product, Toeplitz, series, streamed_norms
from rootnoise.causal.banded import Banded
from rootnoise.causal.base import MAPS as KNOWN
from rootnoise.workload import prefix_sum

N = 20
BANDED = Toeplitz(series.sgd_power(1, 0.9, 0.5, 6), N)
FULL = Toeplitz(series.sgd_power(0.99, 0.3, 0.5, N), N)
# No random numbers at import: they would depend on what was imported before.
WAVES = np.sin(np.add.outer(np.arange(N) ** 2, 7 * np.arange(N)))  # in no order
SCALES = Diagonal(1.25 + 0.75 * WAVES[0])
LOWER = Dense(np.tril(WAVES) + 4 * np.eye(N))
FREE = Banded((0.6 + 0.4 * WAVES[:4]) * np.array([[3], [1], [1], [1]]))
NARROW = Dense(np.tril(LOWER.entries) - np.tril(LOWER.entries, -3))

MAPS = {
    "banded": BANDED,
    "full": FULL,
    "single": Toeplitz(np.array([2.0]), N),
    "diagonal": SCALES,
    "dense": LOWER,
    "narrow": NARROW,
    "free bands": FREE,
    "inverse of free bands": FREE.inverse(),
    "inverse of banded": BANDED.inverse(),
    "inverse of dense": LOWER.inverse(),
    "inverse of diagonal": SCALES.inverse(),
    "scaled": Product(BANDED, SCALES),
    "inverse of scaled": Product(BANDED, SCALES).inverse(),
    "toeplitz product": Product(FULL, BANDED.inverse()),
    "nested": Product(Product(SCALES, BANDED), NARROW).inverse(),
}
each_map = pytest.mark.parametrize("m", MAPS.values(), ids=MAPS.keys())


@each_map
def test_apply_and_solve_are_the_dense_ones(m):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(N, 3))
    dense = m.dense()
    assert dense.shape == (N, N)
    assert not np.triu(dense, 1).any()
    np.testing.assert_allclose(m.apply(x), dense @ x, atol=1e-12)
    np.testing.assert_allclose(m.solve(x), np.linalg.solve(dense, x), atol=1e-11)
    np.testing.assert_allclose(m.apply(x[:, 0]), dense @ x[:, 0], atol=1e-12)
    np.testing.assert_allclose(m.solve(x[:, 0]), np.linalg.solve(dense, x[:, 0]), atol=1e-11)
    np.testing.assert_allclose(m.inverse().dense(), np.linalg.inv(dense), atol=1e-11)


@each_map
@pytest.mark.parametrize("block", [1, 3, 32])
def test_weighted_sums_of_rows(m, block, monkeypatch):
    """Streamed in blocks of any length, or column by column where the state is large."""
    monkeypatch.setattr(streamed_norms, "LEAST_STEPS", block)
    weights = np.random.default_rng(6).normal(size=N)
    expected = weights @ m.dense()
    np.testing.assert_allclose(m.weighted_rows(weights), expected, atol=1e-12)
    np.testing.assert_allclose(streamed_norms.weighted_rows(m, weights), expected, atol=1e-11)


@each_map
def test_columns_norms_and_bands(m):
    dense = m.dense()
    for j in (0, 7, N - 1):
        np.testing.assert_allclose(m.column(j), dense[:, j], atol=1e-13)
    np.testing.assert_allclose(m.column_norms(), np.linalg.norm(dense, axis=0), rtol=1e-12)
    np.testing.assert_allclose(m.row_norms(), np.linalg.norm(dense, axis=1), rtol=1e-12)
    assert not np.tril(dense, -m.bands).any()
    if m.is_toeplitz:
        expected = np.zeros(N)
        expected[: m.coefficients.size] = m.coefficients
        np.testing.assert_allclose(dense[:, 0], expected, atol=1e-13)
    else:
        assert m.coefficients is None


@each_map
@pytest.mark.parametrize("m_steps", [1, 3, 7, N])
def test_streaming_is_the_dense_product(m, m_steps):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(N, 2))
    state, outputs = np.zeros((m.state_size, 2)), []
    for t in range(0, N, m_steps):
        count = min(m_steps, N - t)
        block = m.block(t, count)
        assert block.shape == (count + m.state_size, m.state_size + count)
        result = block @ np.vstack([state, x[t : t + count]])
        outputs.append(result[:count])
        state = result[count:]
    np.testing.assert_allclose(np.vstack(outputs), m.dense() @ x, atol=1e-12)


@each_map
def test_round_trip_through_primitives(m):
    again = causal.from_dict(m.to_dict())
    assert type(again) is type(m)
    np.testing.assert_array_equal(again.dense(), m.dense())


def test_long_maps_use_ffts_and_agree_with_filters(monkeypatch):
    rng = np.random.default_rng(5)
    n = 3 * series.DIRECT
    m = Toeplitz(series.sgd_power(1, 0.9, 0.5, 500), n)
    x = rng.normal(size=(n, 2))
    y = m.apply(x)
    by_filter = m.solve(y)
    monkeypatch.setattr(series, "FILTER_WORK", 0)
    by_fft = m.solve(y)
    for solved in (by_filter, by_fft):
        np.testing.assert_allclose(solved, x, atol=1e-11)
    np.testing.assert_allclose(m.solve(y[:, 0]), x[:, 0], atol=1e-11)


@each_map
def test_diagonals_are_those_of_the_dense_map(m):
    dense = m.dense()
    for rows in (m.by_diagonals(), m.by_diagonals(N)):
        for j, row in enumerate(rows):
            expected = np.pad(np.diagonal(dense, -j), (0, j))
            np.testing.assert_allclose(row, expected, atol=1e-12)
    assert m.by_diagonals().shape == (m.bands, N)


def test_toeplitz_solve_never_builds_a_square_array():
    n = 10**6
    m = Toeplitz(series.sgd_power(1, 0, 0.5, 16), n)
    assert m.solve(m.apply(np.ones(n)))[-1] == pytest.approx(1)


def test_inverse_of_an_inverse_is_the_map():
    assert BANDED.inverse().inverse() is BANDED


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: Toeplitz(np.ones(3), 2), "coefficients must be at most n_steps=2 many, got 3"),
        (lambda: Toeplitz(np.array([0, 1.0]), 2), "must start with a non-zero one, got 0.0"),
        (lambda: Toeplitz(np.array([np.nan]), 2), "coefficients must be finite, got 1 NaN"),
        (lambda: Toeplitz(np.ones(1), 0), "n_steps must be >= 1, got 0"),
        (lambda: Diagonal(np.array([1, 0.0])), "entries must be non-zero, got 0.0 at 1"),
        (lambda: Dense(np.ones((2, 2))), r"lower-triangular \(causal\), got 1 at \(0, 1\)"),
        (lambda: Dense(np.tril(np.ones((2, 2)), -1)), r"invertible, got 0.0 at \(0, 0\)"),
        (lambda: Dense(np.ones((2, 3))), r"matrix must be square, got shape \(2, 3\)"),
        (lambda: Banded(np.ones((3, 2))), "diagonals must be at most n_steps=2 many, got 3"),
        (lambda: Banded([[1.0, 0.0]]), r"invertible, got 0.0 at \(1, 1\)"),
        (lambda: Banded([[1.0, np.nan]]), "diagonals must be finite, got 1 NaN"),
        (lambda: Product(BANDED, Toeplitz(np.ones(1), 3)), "same n_steps, got 20 and 3"),
        (lambda: causal.from_dict({"type": "nothing"}), "matrix must be a known causal map, got"),
        (
            lambda: causal.from_dict({**BANDED.to_dict(), "more": 1}),
            "matrix must be a known causal map, got {'type': 'toeplitz'",
        ),
        (lambda: causal.from_dict([1.0]), r"matrix must be a known causal map, got \[1.0\]"),
        (
            lambda: causal.from_dict({"type": "inverse", "base": 3}),
            "matrix must be a known causal map, got {'type': 'inverse'",
        ),
        (
            lambda: causal.from_dict({"type": "inverse", "base": {"type": "dense"}}),
            "matrix must be a known causal map, got {'type': 'dense'}",
        ),
        (
            lambda: KNOWN.to_dict(prefix_sum(3)),
            r"matrix must be a known causal map, got SGD\(",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


def test_inverse_keeps_its_base_alone():
    inverse = Inverse(BANDED)
    assert (inverse.n_steps, inverse.state_size) == (N, BANDED.bands - 1)
