"""Norms of Toeplitz x diagonal x Toeplitz maps without an n x n array, against dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from rootnoise import causal
from rootnoise.causal import Dense, Diagonal, Product, Toeplitz, product_norms, series
from rootnoise.workload import SGD, ScheduledSGD


def oscillating(n):
    """Two complex poles: momentum with much weight decay."""
    return np.real((0.8 + 0.3j) ** np.arange(1, n + 1) / 0.3j)


SHAPES = {
    "prefix sums": np.ones,
    "momentum": lambda n: series.sgd_power(1.0, 0.9, 1.0, n),
    "decay": lambda n: 3 * series.sgd_power(0.999, 0.9, 1.0, n),
    "equal roots": lambda n: series.sgd_power(0.9, 0.9, 1.0, n),
    "close roots": lambda n: series.sgd_power(1.0, 0.999, 1.0, n),
    "identity": lambda n: -2.0 * (np.arange(n) == 0),
    "complex roots": oscillating,
    "no short recurrence": lambda n: 1 / (1 + np.arange(n)) ** 0.5,
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_inverse = pytest.mark.parametrize(
    ("p", "exponent"), [(1, 0.5), (4, 0.5), (20, -0.5), (150, 0.5)], ids=str
)


@each_shape
@each_inverse
@pytest.mark.parametrize("n", [1, 2, 3, 150])
def test_row_norms_and_block_sums(shape, p, exponent, n):
    rng = np.random.default_rng(0)
    a = shape(n)
    m = series.invert(series.sgd_power(1.0, 0.3, exponent, min(p, n)), n)
    g = rng.uniform(0.5, 2, n) * rng.choice([-1, 1], n)
    left, right = oracle.lower_toeplitz(a, n), oracle.lower_toeplitz(m, n)
    norms = product_norms.row_norms(a, g, m)
    if norms is None:
        assert shape is SHAPES["no short recurrence"]
        assert n > 3
    else:
        np.testing.assert_allclose(norms, np.linalg.norm(left * g @ right, axis=1), rtol=1e-10)
    blocks = np.unique(np.sort(rng.integers(0, 7, n)), return_inverse=True)[1]
    pairs = (left.T @ left) * (right @ right.T) * np.outer(g, g)
    belongs = np.eye(blocks[-1] + 1)[blocks]
    expected = belongs.T @ pairs @ belongs
    sums = product_norms.block_sums(a, g, m, blocks)
    np.testing.assert_allclose(sums, expected, atol=1e-11 * np.abs(expected).max())


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(3, 300))
def test_poles_are_found_up_to_the_rounding_of_the_coefficients(alpha, beta, n):
    a = series.sgd_power(alpha, beta, 1.0, n)
    found = product_norms.poles(a)
    np.testing.assert_allclose(sum(found), alpha + beta, atol=1e-12)
    np.testing.assert_allclose(np.prod(found), alpha * beta, atol=1e-12)


def test_close_poles_keep_their_digits():
    found = product_norms.poles(series.sgd_power(1.0, 0.999, 1.0, 100_000))
    assert found is not None
    assert found[0] == 1.0


def test_more_than_two_poles_are_refused():
    assert product_norms.poles(series.sgd_power(1.0, 0.9, 1.5, 30)) is None


def test_constant_factors_are_the_toeplitz_case_at_a_hundred_thousand_steps():
    n = 100_000
    a, c = series.sgd_power(1.0, 0.9, 1.0, n), series.sgd_power(1.0, 0.9, 0.5, 100)
    b = series.divide(a, c, n)
    norms = product_norms.row_norms(a, np.full(n, 0.5), series.invert(c, n))
    np.testing.assert_allclose(norms, 0.5 * np.sqrt(np.cumsum(b**2)), rtol=1e-10)


@pytest.mark.parametrize(
    "work",
    [
        SGD(40, 0.9, 0.99),
        ScheduledSGD(np.linspace(1, 0.1, 40), momentum=0.8, weight_decay=0.1, nesterov=True),
    ],
    ids=["steady", "scheduled"],
)
def test_streamed_and_toeplitz_diagonals_are_those_of_the_gram_matrix(work):
    gram = work.matrix.dense().T @ work.matrix.dense()
    streamed = list(product_norms.streamed_gram(work.recurrence))
    assert len(streamed) == 40
    for lag, diagonal in enumerate(streamed):
        np.testing.assert_allclose(diagonal, np.diag(gram, -lag), rtol=1e-12)
    if work.matrix.is_toeplitz:
        for lag, diagonal in enumerate(product_norms.toeplitz_gram(work.matrix.column(0))):
            np.testing.assert_allclose(diagonal, np.diag(gram, -lag), rtol=1e-12)


def products():
    rng = np.random.default_rng(0)
    n = 30
    t = Toeplitz(series.sgd_power(1.0, 0.9, 1.0, n), n)
    s = Toeplitz(series.sgd_power(1.0, 0.9, 0.5, 5), n)
    other = Toeplitz(1 / (1 + np.arange(n)) ** 0.5, n)
    d, e = (Diagonal(rng.uniform(0.5, 2, n)) for _ in range(2))
    scaled = Product(s, d)
    return [
        scaled,
        Product(d, s),
        Product(d, e),
        Product(t, s.inverse()),
        Product(t, scaled.inverse()),
        Product(Product(t, e), scaled.inverse()),
        Product(Product(e, t), Product(d, Product(s, e))),
        Product(other, scaled.inverse()),
        Product(scaled, Product(e, t)),
        Product(scaled, scaled),
        Product(Dense(t.dense()), d),
    ]


@pytest.mark.parametrize("product", products(), ids=str)
def test_norms_of_products(product):
    dense = product.dense()
    np.testing.assert_allclose(product.row_norms(), np.linalg.norm(dense, axis=1), rtol=1e-11)
    np.testing.assert_allclose(product.column_norms(), np.linalg.norm(dense, axis=0), rtol=1e-11)


def test_scaled_decoders_of_a_million_steps_have_no_square_array(monkeypatch):
    monkeypatch.setattr(causal.CausalMatrix, "dense", None)
    n = 1_000_000
    strategy = Product(
        Toeplitz(series.sgd_power(1.0, 0.0, 0.5, 20), n), Diagonal(1 + np.arange(n) / n)
    )
    assert strategy.column_norms().shape == (n,)
    norms = Product(SGD(n).matrix, strategy.inverse()).row_norms()
    assert norms.shape == (n,)
    assert np.all(np.diff(norms) > 0)
