"""What the papers prove about the error, as functions to hold against measured errors.

All are about SGD workloads A with decay alpha and momentum beta, 0 <= beta < alpha <= 1, and the
rmse at noise multiplier 1. Those for one participation have the form of Kalinin & Lampert (2024,
arXiv 2405.13763), and a proof here, so that no constant rests on a quotation. In the proofs A(x) =
1 / ((1 - alpha x)(1 - beta x)) is the workload as a power series, c its square root, the strategy,
and r_j <= 1 / sqrt(3 j + 1) the coefficients of (1 - x)^(-1/2).
`certificate.lower_bound` is tighter than any lower bound here.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ellipkm1

from rootnoise._check import RootnoiseError, integer
from rootnoise.bounds import dual, nuclear_norm
from rootnoise.causal import series
from rootnoise.participation import Participation
from rootnoise.workload import SGD


def square_root_lower(workload: SGD) -> float:
    """Return a lower bound on the rmse of the square root, one participation.

    It is max(1, (ln(n + 1) - 1) / 4) without decay, and 1 with it: no more than `any_lower`.
    """
    if workload.decay < 1:
        return 1.0
    return max(1.0, (math.log(workload.n_steps + 1) - 1) / 4)


def square_root_upper(workload: SGD) -> float:
    """Return an upper bound on the rmse of the square root, one participation.

    It is (1 + ln n) / (1 - beta)^2 without decay, with it ln(1 / (1 - alpha^2)) / (alpha - beta)^2.

    Proof: the sensitivity of C is |c|_2, and no row of B = C is longer, so that rmse <= |c|_2^2. As
    a product of series, c is the convolution of r_j alpha^j and r_j beta^j, and by Young's
    inequality |c|_2^2 <= S / (1 - beta) with S = sum_j r_j^2 alpha^(2 j), since the second sums to
    (1 - beta)^(-1/2). From r_j^2 <= 1 / (j + 1) follows S <= 1 + ln n for alpha = 1, and
    S <= ln(1 / (1 - alpha^2)) / alpha^2 below, where (alpha - beta)^2 <= alpha^2 (1 - beta).

    Raises:
        RootnoiseError: momentum >= decay.

    >>> square_root_upper(SGD(100))
    5.605170...
    """
    alpha, beta = _roots(workload)
    if alpha == 1:
        return float((1 + np.log(workload.n_steps)) / (1 - beta) ** 2)
    return float(-np.log1p(-(alpha**2)) / (alpha - beta) ** 2)


def square_root_limit(workload: SGD) -> float:
    """Return the limit for many steps, and upper bound, of the rmse of the square root under decay.

    It is sum_j c_j^2 = 2 K(k) / (pi (1 - alpha beta)), K the complete elliptic integral of modulus
    k = (alpha - beta) / (1 - alpha beta), 1 - k^2 = (1 - alpha^2)(1 - beta^2) / (1 - alpha beta)^2.

    Raises:
        RootnoiseError: no decay: the sum diverges.

    >>> square_root_limit(SGD(1, decay=0.999))
    2.861985...
    """
    alpha, beta = _roots(workload)
    if alpha == 1:
        raise RootnoiseError("decay must be < 1 for the error to have a limit, got 1.0")
    rest = (1 - alpha**2) * (1 - beta**2) / (1 - alpha * beta) ** 2
    return float(2 * ellipkm1(rest) / (np.pi * (1 - alpha * beta)))


def any_lower(workload: SGD) -> float:
    """Return a lower bound on the rmse of every factorization, one participation.

    It is max(1, (ln(n + 1) - 1) / pi) without decay, and 1 with it.

    Proof: for A = B C, `rmse >= |B|_F |C|_F / n >= |A|_* / n`, and the nuclear norm is at least
    the trace, n. For prefix sums P it is sum_j 1 / (2 sin((2j - 1) pi / (4n + 2))), j = 1, ..., n,
    hence >= (2n + 1) / pi sum_j 1 / (2j - 1) >= n ln(2n + 1) / pi. Momentum only adds: then
    A = sum_k beta^k S^k P, S the shift, and with P = H U, H = (P P^T)^(1/2), U orthogonal,
    `|A|_* >= tr(A U^T) = sum_k beta^k tr(S^k H)`. The term k = 0 is `|P|_*`, and the others are not
    negative, for no entry of H is: (P P^T)^-1 = a (I - N) is a second difference with N >= 0, and
    (I - N)^(-1/2) is a power series in N with coefficients >= 0.
    """
    if workload.decay < 1:
        return 1.0
    return max(1.0, (math.log(workload.n_steps + 1) - 1) / math.pi)


def repeated_lower(workload: SGD, participation: Participation) -> float:
    """Return a lower bound on the rmse of every factorization, k participations.

    It is max(sqrt(k) |A|_* / n, |A 1_pi| / sqrt(n)). The first weighs all patterns alike; the
    second asks for one person who always gives the same, and is about k / sqrt(3) for prefix sums.
    A partial last cycle counts as what it is.

    Raises:
        RootnoiseError: the participation does not fit n_steps.
    """
    n = workload.n_steps
    participation.validate(n)
    cycles = dual.cycles(n, participation)
    person = np.zeros(n)
    person[cycles[0][0]] = 1.0
    alike = nuclear_norm.nuclear_norm(workload)[0] / np.sqrt(n * sum(len(p) for p in cycles))
    return float(max(alike, np.linalg.norm(workload.matrix.apply(person)) / np.sqrt(n)))


def bsr_growth(workload: SGD, bands: int, participations: int) -> float:
    """Return what the rmse of BSR without decay tends to for n >> p, p at most the separation.

    The coefficients of B tend to b = 1 / ((1 - beta) sum_{j<p} c_j), and the rmse to
    b sqrt(k n sum c_j^2 / 2): the sqrt(n k ln p / p) of Kalinin & Lampert (2024) with its constant.

    Raises:
        RootnoiseError: decay, or bands outside [1, n_steps].
    """
    if workload.decay < 1:
        raise RootnoiseError(f"decay must be 1 for the error to grow, got {workload.decay}")
    p = integer("bands", bands, 1, workload.n_steps, high_name="n_steps")
    k = integer("participations", participations, 1)
    c = series.sgd_power(1.0, workload.momentum, 0.5, p)
    constant = 1 / ((1 - workload.momentum) * c.sum())
    return float(np.sqrt(k * workload.n_steps * (c @ c) / 2) * constant)


def _roots(workload: SGD) -> tuple[float, float]:
    if workload.momentum >= workload.decay:
        raise RootnoiseError(
            f"momentum must be < decay={workload.decay} for this bound, got {workload.momentum}"
        )
    return workload.decay, workload.momentum
