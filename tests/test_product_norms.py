"""Norms of Toeplitz x diagonal x Toeplitz maps without an n x n array, against dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from rootnoise import causal
from rootnoise.causal import Dense, Diagonal, Product, Toeplitz, product, product_norms, series
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


@pytest.mark.parametrize("n", [1, 2, 3, 60])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("contraction", [0.0, 12.0, 50.0])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_schedules_that_forget(n, momentum, contraction, nesterov, scaled):
    """A momentum optimizer with rates and decays of its own at every step, before any noise."""
    rng = np.random.default_rng(n)
    rates = rng.uniform(0.1, 1, n)
    work = ScheduledSGD(rates, momentum, nesterov=nesterov).contracted(contraction)
    m = series.invert(series.sgd_power(1.0, 0.3, 0.5, min(4, n)), n)
    g = rng.uniform(0.5, 2, n) if scaled else np.ones(n)
    noising = Product(Diagonal(g), Toeplitz(m, n)) if scaled else Toeplitz(m, n)
    a = work.matrix.dense()
    whole = Product(work.matrix, noising)
    expected = np.linalg.norm(a * g @ oracle.lower_toeplitz(m, n), axis=1)
    np.testing.assert_allclose(whole.row_norms(), expected, rtol=1e-8)
    known = product._row_norms(causal.chain(whole))
    if n > 3:
        nothing_to_divide_by = contraction == 50
        assert (known is None) == (nothing_to_divide_by or (scaled and nesterov and momentum > 0))
    if known is not None:
        np.testing.assert_allclose(known, expected, rtol=1e-8)
    found = product.decaying(causal.chain(whole))
    if found is not None:
        blocks = np.arange(n) * 5 // n
        blocks = np.unique(blocks, return_inverse=True)[1]
        noise = oracle.lower_toeplitz(m, n)
        pairs = (a.T @ a) * (noise @ noise.T) * np.outer(g, g)
        belongs = np.eye(blocks[-1] + 1)[blocks]
        sums = product_norms.block_sums_after_decay(*found, blocks)
        exact = belongs.T @ pairs @ belongs
        np.testing.assert_allclose(sums, exact, atol=1e-10 * np.abs(exact).max())


@pytest.mark.parametrize(("n", "size"), [(300, 4), (300, 300), (3000, 4), (3000, 3000)])
def test_whichever_way_is_quicker_row_norms_are_the_same(monkeypatch, n, size):
    work = ScheduledSGD(np.linspace(1, 0.1, n), 0.9).contracted(12)
    noising = Toeplitz(work.square_root(size), n).inverse()
    both = []
    for pays in (False, True):
        monkeypatch.setattr(Product, "_formula_pays", lambda *_, pays=pays: pays)
        both.append(Product(work.matrix, noising).row_norms())
    np.testing.assert_allclose(both[0], both[1], rtol=1e-8)
