"""Power series against recurrences in 60 digits, and their algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from rootnoise import RootnoiseError
from rootnoise.causal import series

ROOTS = [(1, 0), (1, 0.9), (0.999, 0.9), (0.9, 0.0), (0.99, 0.99), (0.5, 0.4999999), (0.9, 0.999)]


@pytest.mark.parametrize(("decay", "momentum"), ROOTS)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 0.58])
def test_positive_powers_have_small_relative_error(decay, momentum, exponent):
    size = 3000
    exact = oracle.sgd_power_exact(decay, momentum, exponent, size)
    ours = series.sgd_power(decay, momentum, exponent, size)
    normal = [j for j in range(size) if exact[j] > 1e-300]
    assert max(abs(float(ours[j] / exact[j] - 1)) for j in normal) < 2e-14


@pytest.mark.parametrize(("decay", "momentum"), ROOTS)
@pytest.mark.parametrize("exponent", [-0.5, -1.0, -0.58])
def test_negative_powers_have_small_absolute_error(decay, momentum, exponent):
    exact = oracle.sgd_power_exact(decay, momentum, exponent, 3000)
    ours = series.sgd_power(decay, momentum, exponent, 3000)
    assert max(abs(float(a - b)) for a, b in zip(ours, exact, strict=True)) < 2e-15


def test_ten_million_coefficients_against_random_access():
    """c_j as an arcsine moment, exact to rounding without any recurrence."""
    n, alpha, beta = 10**7, 1.0, 0.9
    ours = series.sgd_power(alpha, beta, 0.5, n)
    for j in (10, 1000, 10**5, n - 1):
        nodes = min(j // 2 + 1, int(40 + 12 * j**0.5))
        angle = (2 * np.arange(1, nodes + 1) - 1) * np.pi / (2 * nodes)
        shrink = (alpha - beta) / alpha * np.sin(angle / 2) ** 2
        exact = alpha**j * np.mean(np.exp(j * np.log1p(-shrink)))
        assert ours[j] == pytest.approx(exact, rel=1e-12)


def test_equal_roots_are_geometric():
    np.testing.assert_allclose(
        series.sgd_power(0.9, 0.9, 0.5, 200), 0.9 ** np.arange(200), rtol=1e-14
    )


# Sizes on both sides of DIRECT and of every choice between filters and FFTs.
SIZES = st.sampled_from([1, 2, 3, 64, 65, 1000, series.DIRECT, series.DIRECT + 1, 5000])


def smooth(seed: int, size: int) -> np.ndarray:
    """Return a random series with a summable tail, so that inverse and root stay bounded."""
    draw = np.random.default_rng(seed).uniform(-1, 1, size)
    a = 0.5 * draw / (1 + np.arange(size)) ** 2
    a[0] = 2.0
    return a


@given(st.integers(0, 99), SIZES, SIZES)
def test_product_of_inverse_is_one(seed, length, size):
    a = smooth(seed, length)
    unit = series.multiply(a, series.invert(a, size), size)
    np.testing.assert_allclose(unit, np.eye(1, size)[0], atol=1e-14)


@given(st.integers(0, 99), SIZES, SIZES)
def test_square_of_root_is_the_series(seed, length, size):
    a = smooth(seed, length)
    root = series.sqrt(a, size)
    padded = np.pad(a[:size], (0, max(0, size - length)))
    np.testing.assert_allclose(series.multiply(root, root, size), padded, atol=1e-14)
    assert root[0] > 0


@given(st.integers(0, 99), SIZES, SIZES, SIZES)
def test_multiply_and_divide_match_the_schoolbook(seed, left, right, size):
    a, b = smooth(seed, left), smooth(seed + 1, right)
    product = np.convolve(a, b)[:size]
    expected = np.pad(product, (0, size - product.size))
    np.testing.assert_allclose(series.multiply(a, b, size), expected, atol=1e-14)
    quotient = series.divide(expected, b, size)
    np.testing.assert_allclose(quotient, np.pad(a[:size], (0, max(0, size - left))), atol=1e-13)


def test_long_division_agrees_with_the_filter(monkeypatch):
    """The same quotient by Newton's iteration and by the recursive filter."""
    n = 3 * series.DIRECT
    a, c = series.sgd_power(1, 0.9, 1, n), series.sgd_power(1, 0.9, 0.5, n)
    by_filter = series.divide(a, c, n)
    monkeypatch.setattr(series, "FILTER_WORK", 0)
    np.testing.assert_allclose(series.divide(a, c, n), by_filter, atol=1e-12)
    np.testing.assert_allclose(by_filter, c, atol=1e-12)


def test_long_root_agrees_with_the_closed_form():
    n = 50_000
    root = series.sqrt(series.sgd_power(1, 0.9, 1, n), n)
    np.testing.assert_allclose(root, series.sgd_power(1, 0.9, 0.5, n), rtol=1e-11)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: series.invert(np.zeros(2), 2), "non-zero coefficient to be inverted, got 0.0"),
        (lambda: series.sqrt(np.zeros(2), 2), "positive coefficient to have a square root, got 0"),
        (lambda: series.sqrt(-np.ones(2), 2), "positive coefficient to have a square root, got -1"),
        (lambda: series.sgd_power(1.1, 0, 1, 2), "decay must be .* <= 1, got 1.1"),
        (lambda: series.sgd_power(1, -0.1, 1, 2), "momentum must be .* >= 0 and <= 1, got -0.1"),
        (lambda: series.sgd_power(1, 0, 1, 0), "size must be >= 1, got 0"),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


def test_checked_drops_trailing_zeros_only():
    assert series.checked([1, 0, 2, 0, 0]).tolist() == [1, 0, 2]
    assert series.checked([0, 0]).tolist() == [0]
