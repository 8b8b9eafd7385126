"""Lower bounds on the error of EVERY factorization, and certificates that anyone can check.

A certificate is a pair (R, Q) with Y = R R^T in the participation body and |Q|_2 <= 1: weak duality
(`dual.py`) makes <Q, A R> / sqrt(n) a lower bound on the rmse of every A = B C. `check` needs
matrix products alone and shares nothing with the solver. Beyond `Effort.size` steps the bound comes
without a witness, from a smaller problem (`long_runs.py`) or a nuclear norm (`nuclear_norm.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from threadpoolctl import threadpool_limits

from rootnoise._check import Array, RootnoiseError
from rootnoise.bounds import coarse_to_fine, dual, long_runs, nuclear_norm
from rootnoise.participation import FixedCycle, Participation, PoissonSampling, SingleParticipation
from rootnoise.workload import Workload

EPS = float(np.finfo(np.float64).eps)
# Relative rounding error allowed for bounds without a witness: 40 times what was seen (n <= 1e8).
SAFETY = 1e-9


OBJECTIVES = ("rmse", "max")


class Effort(StrEnum):
    """How hard to try: the steps of the largest dense problem, and when to stop."""

    FAST = "fast"
    TIGHT = "tight"

    @property
    def size(self) -> int:
        """Steps: an iteration takes 0.4 s at 1024 and 3 s at 2048 on one core."""
        return 1024 if self is Effort.FAST else 2048

    @property
    def gain(self) -> float:
        """Relative gain of three iterations below which to stop."""
        return 3e-4 if self is Effort.FAST else 1e-5

    @property
    def iterations(self) -> int:
        """Iterations after which to stop anyway."""
        return 25 if self is Effort.FAST else 100


@dataclass(frozen=True, eq=False)
class Witness:
    """What proves a bound.

    Attributes:
        r: R of shape (n, m), with Y = R R^T.
        q: Q of shape (n, m).
        owner: the pattern that each column of R belongs to, shape (m,).
        weights: w >= 0 of every step, shape (n,), for the error of the worst step.
    """

    r: Array
    q: Array
    owner: NDArray[np.intp]
    weights: Array | None = None


@dataclass(frozen=True, eq=False)
class Certificate:
    """A lower bound on the error of every factorization of one workload under one participation.

    Attributes:
        value: the bound.
        method: how it was found.
        witness: for `check`; None beyond the size of a dense problem.
        objective: what is bounded, "rmse" or "max" (`max_error`).
    """

    value: float
    method: str
    witness: Witness | None = None
    objective: str = "rmse"

    def gap(self, error: float) -> float:
        """Return error / bound - 1: no factorization can be better by more than this."""
        return error / self.value - 1


def lower_bound(
    workload: Workload,
    participation: Participation,
    effort: Effort | str = Effort.FAST,
    objective: str = "rmse",
) -> Certificate:
    """Return a lower bound on the error of every factorization, from any step count in seconds.

    Args:
        workload: what is computed.
        participation: who may take part when. Poisson sampling counts as one participation,
            as in `sensitivity`; of a minimal separation some patterns stand for all.
        effort: "fast" (solved whole up to 1024 steps, then by 512 rows) or "tight" (twice as many).
        objective: "rmse", or "max" for `max_error`, the error of the worst step. It is at least the
            rmse, and bounded by that alone beyond the size of a dense problem.

    Raises:
        RootnoiseError: another effort or objective, or a participation that does not fit n_steps.

    >>> from rootnoise.participation import FixedCycle
    >>> from rootnoise.workload import prefix_sum
    >>> round(lower_bound(prefix_sum(64), FixedCycle(period=16, epochs=4)).value, 3)
    4.408
    """
    n = workload.n_steps
    participation.validate(n)
    try:
        effort = Effort(effort)
    except ValueError:
        known = " or ".join(e.value for e in Effort)
        raise RootnoiseError(f"effort must be {known}, got {effort!r}") from None
    if objective not in OBJECTIVES:
        raise RootnoiseError(f"objective must be {' or '.join(OBJECTIVES)}, got {objective!r}")
    # Eigenproblems of a few hundred rows gain nothing from a second BLAS thread, and where other
    # work keeps the cores busy they lose a factor of ten to it.
    with threadpool_limits(limits=1, user_api="blas"):
        if n <= effort.size:
            return _dense(workload, participation, effort, objective)
        return replace(_long(workload, participation, effort), objective=objective)


def _long(workload: Workload, participation: Participation, effort: Effort) -> Certificate:
    """Return the best bound on the rmse, and so on the worst error, without a dense problem."""
    n = workload.n_steps
    bounds = [_nuclear(workload, participation), _pattern(workload, participation)]
    problem = long_runs.compress(workload, participation, effort.size // 2)
    if problem is not None:
        value = max(point.value for point in _ascent(problem, effort))
        method = f"dual compressed from {n} to {problem.a.shape[0]} dimensions"
        bounds.append(Certificate(_scaled(value, n), method))
    return max(bounds, key=lambda bound: bound.value)


def check(certificate: Certificate, workload: Workload, participation: Participation) -> float:
    """Return the bound that the witness of a certificate proves, with products alone.

    It is <Q, A R> / sqrt(n w q), rounding on the safe side. The weight w of Y = R R^T is the sum of
    the largest diagonal entries of its patterns; and |Q|_2^2 <= q = 1 + |Q Q^T - 1|_F. For the
    worst step, the rows of A are scaled to the roots of the witness's weights, whose sum is n then.

    Raises:
        RootnoiseError: no witness, one of the wrong shape, or a pattern that no person may follow.
    """
    participation.validate(workload.n_steps)
    n, a = workload.n_steps, workload.matrix.dense()
    if certificate.witness is None:
        raise RootnoiseError(f"certificate must hold a witness, got method {certificate.method!r}")
    r, q, owner = certificate.witness.r, certificate.witness.q, certificate.witness.owner
    if r.ndim != 2 or len(r) != n or q.shape != r.shape or owner.shape != r.shape[1:]:
        raise RootnoiseError(
            f"witness must have R and Q of {n} rows and an owner for each column, "
            f"got {r.shape}, {q.shape} and {owner.shape}"
        )
    if certificate.objective != "rmse":
        a = a * np.sqrt(_row_weights(certificate.witness.weights, n))[:, None]
    weight = 0.0
    for pattern in np.unique(owner):
        own = r[:, owner == pattern]
        steps = np.flatnonzero(own.any(axis=1))
        if not _admissible(steps, participation):
            raise RootnoiseError(
                f"witness must link only steps of one person ({participation}), got {steps}"
            )
        weight += float(np.square(own).sum(axis=1).max())
    wide = q if r.shape[1] >= n else q.T
    defect = float(np.linalg.norm(wide @ wide.T - np.eye(len(wide))))
    # A sum of m products is off by at most m eps times the sum of their magnitudes (Higham 2002).
    rounding = 2 * float(sum(r.shape)) * EPS
    length = float(np.linalg.norm(q))
    lost = rounding * length * float(np.linalg.norm(np.abs(a) @ np.abs(r)))
    norm = 1 + defect + rounding * length**2
    proved = max(0.0, float(np.vdot(q, a @ r)) - lost)
    return proved / math.sqrt(n * weight * (1 + rounding) * norm)


def _dense(
    workload: Workload, participation: Participation, effort: Effort, objective: str
) -> Certificate:
    """Return the optimised certificate with its witness."""
    a = workload.matrix.dense()
    n = len(a)
    worst = objective == "max"
    patterns, start, weights = coarse_to_fine.start(a, participation, worst)
    problem = dual.Problem(a[:, :, None], patterns, worst=worst)
    best = max(_ascent(problem, effort, start, weights), key=lambda point: point.value)
    patterns, factors = coarse_to_fine.heaviest(patterns, best.factors)
    r = dual.scatter(factors, patterns, n).toarray()
    sizes = np.concatenate([np.full(len(p), p.shape[1]) for p in patterns])
    owner = np.repeat(np.arange(sizes.size), sizes)
    if worst:
        a = a * np.sqrt(best.weights)[:, None]
    rows, triangle = linalg.qr((a @ r).T, mode="economic")
    left, _, right = linalg.svd(triangle.T, full_matrices=False)
    witness = Witness(r, left @ right @ rows.T, owner, best.weights if worst else None)
    certificate = Certificate(0.0, "optimised dual", witness, objective)
    return replace(certificate, value=check(certificate, workload, participation))


def _ascent(
    problem: dual.Problem,
    effort: Effort,
    start: dual.Factors | None = None,
    weights: Array | None = None,
) -> list[dual.Point]:
    """Return the points of the ascent up to where it has stopped gaining."""
    points: list[dual.Point] = []
    # From a good start one step without a gain is enough to stop.
    idle = 3 if start is None or effort is Effort.TIGHT else 1
    for point in islice(dual.ascend(problem, start, weights), effort.iterations):
        points.append(point)
        before = max((p.value for p in points[:-idle]), default=0.0)
        if before and max(p.value for p in points[-idle:]) <= before * (1 + effort.gain):
            break
    return points


def _nuclear(workload: Workload, participation: Participation) -> Certificate:
    """Return |A|_* / sqrt(n g): equal weights on g disjoint patterns, no correlation."""
    norm, method = nuclear_norm.nuclear_norm(workload)
    g = sum(len(p) for p in dual.cycles(workload.n_steps, participation))
    return Certificate(_scaled(norm, workload.n_steps * g), f"nuclear norm ({method})")


def _pattern(workload: Workload, participation: Participation) -> Certificate:
    """Return |A 1_pi| / sqrt(n) for the first pattern pi: one person who always gives the same."""
    n = workload.n_steps
    person = np.zeros(n)
    person[dual.cycles(n, participation)[0][0]] = 1.0
    length = float(np.linalg.norm(workload.matrix.apply(person)))
    return Certificate(_scaled(length, n), "one constant pattern")


def _scaled(value: float, n: int) -> float:
    return value * (1 - SAFETY) / math.sqrt(n)


def _row_weights(weights: Array | None, n: int) -> Array:
    """Return the weights of a witness, scaled to a sum of n or a little less."""
    if weights is None or weights.shape != (n,) or not np.all(weights >= 0) or not weights.any():
        raise RootnoiseError(
            f"witness must have a weight >= 0 of every one of {n} steps for the worst of them, "
            f"got {weights!s:.40}"
        )
    return weights * float(n * (1 - 2 * n * EPS) / weights.sum())


def _admissible(steps: NDArray[np.intp], participation: Participation) -> bool:
    """Whether one person may take part in all of `steps`."""
    if isinstance(participation, SingleParticipation | PoissonSampling):
        return steps.size == 1
    if steps.size > participation.max_participations:
        return False
    gaps = np.diff(steps)
    if isinstance(participation, FixedCycle):
        return not np.any(gaps % participation.period)
    return not np.any(gaps < participation.min_sep)
