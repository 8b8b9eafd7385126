"""Power series, i.e. first columns of lower-triangular Toeplitz matrices: product, inverse, root.

A lower-triangular Toeplitz matrix is a power series in the shift, so its product, inverse and
square root are those of the series: O(n log n) by FFT, never an n x n array. Everything is float64.

FFT results have an *absolute* error of about 1e-15 of the largest coefficient; `sgd_power` and
every routine up to `DIRECT` coefficients run on recurrences instead, whose error is relative to
each coefficient.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import fft, signal
from scipy.linalg import blas

from rootnoise._check import Array, RootnoiseError, integer, real, vector

# Recurrences up to here: 2048 coefficients of a square root take 6 ms, and are right to 1e-14
# relative.
DIRECT = 2048
# A recursive filter costs (terms x size) multiply-adds at 1 ns each; past this the FFT is faster.
FILTER_WORK = 2**26


def multiply(left: Array, right: Array, size: int) -> Array:
    """Return the first `size` coefficients of the product of two series.

    >>> multiply(np.ones(3), np.array([1.0, -1.0]), 4)
    array([ 1.,  0.,  0., -1.])
    """
    left, right = left[:size], right[:size]
    if min(left.size, right.size) <= 64:
        product = np.convolve(left, right)[:size]
    else:
        length = fft.next_fast_len(min(left.size + right.size - 1, 2 * size), real=True)
        product = fft.irfft(fft.rfft(left, length) * fft.rfft(right, length), length)[:size]
    return np.pad(product, (0, max(0, size - product.size)))


def invert(series: Array, size: int) -> Array:
    """Return the first `size` coefficients of 1 / series (Newton's iteration, Kung 1974).

    Raises:
        RootnoiseError: the first coefficient is zero.

    >>> invert(np.array([1.0, -0.5]), 4)
    array([1.   , 0.5  , 0.25 , 0.125])
    """
    return divide(np.ones(1), series, size)


def divide(numerator: Array, denominator: Array, size: int) -> Array:
    """Return the first `size` coefficients of numerator / denominator.

    A short denominator runs as a recursive filter, a long one by Newton's iteration and one
    product.

    Raises:
        RootnoiseError: the first coefficient of the denominator is zero.
    """
    if denominator[0] == 0:
        raise RootnoiseError(
            "series must start with a non-zero coefficient to be inverted, got 0.0"
        )
    denominator = denominator[:size]
    if size <= DIRECT or denominator.size * size <= FILTER_WORK:
        padded = np.pad(numerator[:size], (0, max(0, size - numerator.size)))
        return np.asarray(signal.lfilter([1.0], denominator, padded))
    inverse = divide(np.ones(1), denominator, DIRECT)
    while inverse.size < size:
        length = min(2 * inverse.size, size)
        correction = -multiply(denominator, inverse, length)
        correction[0] += 2.0
        inverse = multiply(inverse, correction, length)
    return multiply(numerator, inverse, size)


def sqrt(series: Array, size: int) -> Array:
    """Return the first `size` coefficients of the square root with a positive first coefficient.

    Newton's iteration on the inverse root, h <- h (3 - a h^2) / 2, doubling the length each time.

    Raises:
        RootnoiseError: the first coefficient is not positive.

    >>> sqrt(np.ones(4), 4)
    array([1.    , 0.5   , 0.375 , 0.3125])
    """
    if not series[0] > 0:
        raise RootnoiseError(
            f"series must start with a positive coefficient to have a square root, got {series[0]}"
        )
    a = np.pad(series[:size], (0, max(0, size - series.size)))
    root = np.zeros(min(size, DIRECT))
    root[0] = np.sqrt(a[0])
    for j in range(1, root.size):
        root[j] = (a[j] - root[1:j] @ root[j - 1 : 0 : -1]) / (2 * root[0])
    if size <= DIRECT:
        return root
    inverse = invert(root, DIRECT)
    while inverse.size < size:
        length = min(2 * inverse.size, size)
        correction = -multiply(a, multiply(inverse, inverse, length), length)
        correction[0] += 3.0
        inverse = multiply(inverse, correction / 2, length)
    root = multiply(a, inverse, size)
    # One step c <- c + h (a - c^2) / 2 (Karp & Markstein 1997): from 5e-12 to 7e-15 at n = 1e6.
    return root + multiply(inverse, (a - multiply(root, root, size)) / 2, size)


def power(series: Array, exponent: float, size: int) -> Array:
    """Return the first `size` coefficients of series^exponent, in O(size^2) (J. C. P. Miller).

    Raises:
        RootnoiseError: the first coefficient is not positive.

    >>> power(np.ones(4), -1.0, 4)
    array([ 1., -1.,  0.,  0.])
    """
    if not series[0] > 0:
        raise RootnoiseError(
            f"series must start with a positive coefficient to have powers, got {series[0]}"
        )
    a = np.pad(series[:size], (0, max(0, size - series.size))) / series[0]
    # From a c' = exponent a' c: j c_j = sum_{i=1}^{j} ((exponent + 1) i - j) a_i c_{j-i}
    weighted = (exponent + 1) * np.arange(size) * a
    c = np.zeros(size)
    c[0] = series[0] ** exponent
    for j in range(1, size):
        c[j] = weighted[1 : j + 1] @ c[j - 1 :: -1] / j - a[1 : j + 1] @ c[j - 1 :: -1]
    return c


def sgd_power(decay: float, momentum: float, exponent: float, size: int) -> Array:
    """Return the coefficients of ((1 - alpha x)(1 - beta x))^(-exponent), in O(size).

    Exponent 1 is the workload of SGD with momentum beta and decay alpha, 1/2 its square root
    (Kalinin & Lampert 2024, Theorem 1). With e = (1 - alpha x) c and lambda the exponent,

        j e_j = (j - 2 + 2 lambda) beta e_{j-1} - (1 - lambda)(alpha - beta) c_{j-1},
        c_j = alpha c_{j-1} + e_j,

    which never subtracts two nearly equal roots, as the textbook three-term recurrence does: for
    exponents >= 0 the relative error stays below 1e-14 for every 0 <= beta <= alpha <= 1, alpha =
    beta included; for negative ones the absolute error does.

    Raises:
        RootnoiseError: a root is outside [0, 1], or size < 1.

    >>> sgd_power(1.0, 0.0, 0.5, 4)
    array([1.    , 0.5   , 0.375 , 0.3125])
    """
    n = integer("size", size, 1)
    roots = (
        real("decay", decay, at_least=0, at_most=1),
        real("momentum", momentum, at_least=0, at_most=1),
    )
    alpha, beta = max(roots), min(roots)  # the series is symmetric in its two roots
    # Both recurrences at once are a lower-triangular system with two sub-diagonals in the unknowns
    # e_0, c_0, e_1, c_1, ...: BLAS runs its forward substitution, at 0.27 us a coefficient.
    j = np.arange(1, n, dtype=np.float64)
    bands = np.zeros((3, 2 * n), order="F")
    bands[0] = 1.0
    bands[1, 1:-1:2] = (1 - exponent) * (alpha - beta) / j
    bands[2, 0:-2:2] = -(j - 2 + 2 * exponent) * beta / j
    bands[1, 2::2] = -1.0
    bands[2, 1:-2:2] = -alpha
    unknowns = np.zeros(2 * n)
    unknowns[:2] = 1.0
    solved = blas.dtbsv(2, bands, unknowns, lower=1, diag=1, overwrite_x=1)
    return np.ascontiguousarray(solved[1::2])


def checked(coefficients: ArrayLike) -> Array:
    """Return a read-only float64 copy of finite `coefficients`, trailing zeros dropped."""
    series = vector("coefficients", coefficients)
    last = np.flatnonzero(series)
    return series[: last[-1] + 1] if last.size else series[:1]
