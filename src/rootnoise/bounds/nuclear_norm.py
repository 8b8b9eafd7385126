"""The nuclear norm of a workload, the sum of its singular values, from below at any length.

It bounds every factorization that is private for one participation: rmse >= |A|_* / n.
"""

from __future__ import annotations

import numpy as np
from scipy import fft

from rootnoise._check import Array
from rootnoise.causal import Toeplitz
from rootnoise.workload import SGD, Workload

# A singular value decomposition of this size takes 0.4 s on one core.
DENSE = 1024
# Gauss-Legendre nodes on each octave of the integral: 8 leave 1e-10 of it.
NODES = 8
# The integral is cut below the least singular value, and far above the largest, by these factors.
HEAD, TAIL = 2.0**-10, 2.0**10


def nuclear_norm(workload: Workload) -> tuple[float, str]:
    """Return a lower bound on |A|_* and the name of its method, in O(log n) for SGD.

    >>> nuclear_norm(SGD(10**6))[0] / 10**6
    5.099513...
    """
    n, a = workload.n_steps, workload.matrix
    if isinstance(workload, SGD):
        if workload.momentum == 0 and workload.decay == 1:
            return prefix_sum(n), "closed form"
        return sgd(n, workload.momentum, workload.decay), "log-determinant integral"
    if n <= DENSE:
        return float(np.linalg.svd(a.dense(), compute_uv=False).sum()), "singular values"
    if a.coefficients is not None:
        return circulant(Toeplitz(a.coefficients, n)), "circulant"
    return 0.0, "none"


def prefix_sum(n_steps: int) -> float:
    """Return |A|_* of prefix sums, with singular values 1 / (2 sin((2j - 1) pi / (4n + 2)))."""
    j = np.arange(1, n_steps + 1)
    return float((0.5 / np.sin((2 * j - 1) * np.pi / (4 * n_steps + 2))).sum())


def sgd(n_steps: int, momentum: float, decay: float) -> float:
    """Return |A|_* of SGD with momentum and decay from below, to 9 digits, in O(log n).

    For every sigma > 0, integral_0^inf log(1 + sigma^2 / t^2) dt = pi sigma, hence

        |A|_* = (1 / pi) integral_0^inf log det(I + A^T A / t^2) dt.

    All even derivatives of log(1 + sigma^2 / t^2) in t are positive: with z = t + i sigma the one
    of order 2m is 2 (2m - 1)! (t^-2m - Re z^-2m), and |z| >= t. So Gauss rules err to the low side.
    So do log det(A^T A / t^2) = -2n log t for small t, and T times the logarithm at T beyond T.
    """
    n, alpha, beta = n_steps, decay, momentum
    # |A^-1| <= (1 + alpha)(1 + beta) <= 4, and |A| <= the sum of its coefficients.
    low = HEAD / 4
    high = TAIL / (max(1 - alpha, 1 / n) * max(1 - beta, 1 / n))
    edges = np.geomspace(low, high, 1 + int(np.ceil(np.log2(high / low))))
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half = np.diff(edges)[:, None] / 2
    t = (edges[:-1, None] + half * (1 + nodes)).ravel()
    logs = _log_det(n, alpha, beta, np.append(t, high))
    inside = logs[:-1] @ (half * weights).ravel()
    return float(2 * n * low * (1 - np.log(low)) + inside + high * logs[-1]) / np.pi


def circulant(matrix: Toeplitz) -> float:
    """Return <Q, A> <= |A|_* for the best Q cut out of a circulant matrix of spectral norm 1.

    With s_j = (n - j) a_j it is the mean of |DFT(s)|, whose phases are the eigenvalues; O(n log n).
    """
    n, a = matrix.n_steps, matrix.leading
    length = fft.next_fast_len(2 * n, real=True)
    spectrum = np.abs(fft.rfft(np.arange(n, n - a.size, -1) * a, length))
    ends = spectrum[0] + (spectrum[-1] if length % 2 == 0 else 0.0)
    return float(2 * spectrum.sum() - ends) / length


def _log_det(n: int, alpha: float, beta: float, t: Array) -> Array:
    """Return log det(I + A^T A / t^2) for every t, doubling the number of steps.

    A stretch of steps is a map from a state of two numbers, known by its transition Phi and two
    covariances: G of the state that it leaves behind and H, the information on the state before,
    both given noisy outputs (Kalman). Stretches compose without a subtraction (Redheffer).
    """
    one = _stretch(alpha, beta, t)
    zero = np.zeros((1, 2, 2))
    total = (zero + np.eye(2), zero, zero, np.zeros(1))
    for digit in reversed(f"{n:b}"):
        if digit == "1":
            total = _compose(total, one)
        one = _compose(one, one)
    return total[3]


Stretch = tuple[Array, Array, Array, Array]


def _stretch(alpha: float, beta: float, t: Array) -> Stretch:
    """Return Phi, G, H and the log-determinant of one step m' = beta m + u, y' = alpha y + m'."""
    f = np.array([[alpha, beta], [0.0, beta]])
    g, h, d = np.ones((2, 1)), f[:1], 1.0
    s = (t * t)[:, None, None]
    return (
        f - g @ h * d / (s + d * d),
        g @ g.T * s / (s + d * d),
        h.T @ h / (s + d * d),
        np.log1p(d * d / (t * t)),
    )


def _compose(first: Stretch, then: Stretch) -> Stretch:
    """Return the stretch that runs `first`, then `then`."""
    phi1, g1, h1, log1 = first
    phi2, g2, h2, log2 = then
    k = g1 @ h2
    det = k[:, 0, 0] * k[:, 1, 1] - k[:, 0, 1] * k[:, 1, 0]
    inverse = np.linalg.inv(np.eye(2) + k)
    transposed = (0, 2, 1)
    return (
        phi2 @ inverse @ phi1,
        g2 + phi2 @ inverse @ g1 @ phi2.transpose(transposed),
        h1 + phi1.transpose(transposed) @ h2 @ inverse @ phi1,
        log1 + log2 + np.log1p(k[:, 0, 0] + k[:, 1, 1] + det),
    )
