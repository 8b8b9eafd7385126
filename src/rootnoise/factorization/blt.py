"""Buffered linear Toeplitz strategies (McMahan, Xu & Zhang 2024): a few exponentials for C.

C has the coefficients 1 and sum_i omega_i theta_i^(j-1), j >= 1, so it is the rational function

    C(x) = 1 + sum_i omega_i x / (1 - theta_i x) = prod_i (1 - phi_i x) / (1 - theta_i x),

and C and C^-1 stream with one row a buffer. For omega > 0 poles and zeros interlace, theta_1 >
phi_1 > theta_2 > ..., and sum omega / theta < 1, the condition for all decays phi of C^-1 to be in
(0, 1), says that the last phi is positive. So the search is over all sequences of 2d numbers in
order: of their gaps to 1, and of the logits of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh
from scipy.signal import lfilter
from scipy.special import logit

from rootnoise._check import Array, integer
from rootnoise.causal.buffered import BufferedToeplitz
from rootnoise.factorization.base import Factorization, Progress, Search, register
from rootnoise.factorization.lbfgs import lbfgs
from rootnoise.participation import FixedCycle, MinSeparation, Participation
from rootnoise.workload import SGD, Workload

Numbers = NDArray[Any]  # real, or complex with derivatives in the imaginary parts

# More than enough: at a million steps the seventh gains less than 0.1 %.
MOST = 16
# Without a number given, buffers are added while each gains this part of the error.
GAIN = 1e-3
# Complex-step derivatives: with so small a step they are exact up to rounding.
STEP = 1e-30
# Bounds on the logarithms of the steps between logits: closer pairs cancel, wider ones underflow.
CLOSEST, WIDEST = -12.0, 3.0
# Workloads that stream with at most so much state have a recurrent error.
SMALL = 4
# Buffers with a smaller sum of coefficients are left out.
NEGLIGIBLE = 1e-8
# A start keeps sum omega / theta below this.
SLACK = 0.98


@register("blt")
def blt(
    workload: Workload,
    participation: Participation,
    buffers: int | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C = at most so many buffers of least error; memory is one row a buffer.

    The coefficients are positive and non-increasing, so the sensitivity is exact. Buffers are added
    one at a time; without a number, as long as each gains 0.1 %. Where the workload is SGD the
    search takes seconds for a million steps as for a hundred.

    Raises:
        RootnoiseError: buffers outside [1, 16], or a workload without a Toeplitz neighbour.
    """
    n = workload.n_steps
    most = MOST if buffers is None else integer("buffers", buffers, 1, MOST)
    objective = _Objective(workload.neighbour, participation)

    def build(u: Array) -> Factorization:
        gaps, decays = _gaps(u)
        weights = _weights(gaps)
        kept = weights > NEGLIGIBLE * gaps[0::2]
        strategy = BufferedToeplitz(decays[kept], weights[kept], n)
        return Factorization("blt", workload, strategy)

    search = Search(build, participation, progress)
    best = start = _arcsine(objective, 1)
    search(start)  # first: it may be refused
    for d in range(1, most + 1):
        starts = [_arcsine(objective, d)] + [_grown(objective, best)] * (d > 1)
        ends = [_minimise(objective, u, search) for u in starts]
        end = _best(objective, ends)
        gain = (objective.value(best) - objective.value(end)) / 2
        if d > 1 and gain <= (GAIN if buffers is None else 0.0):
            break
        best, start = end, starts[0]
    search(start)
    search(best)
    return search.best


class _Objective:
    """2 log rmse as a function of u: the smallest logit, and the logarithms of further steps."""

    def __init__(self, neighbour: Workload, participation: Participation) -> None:
        self.neighbour = neighbour
        self._separation = neighbour.n_steps, 1
        if isinstance(participation, MinSeparation | FixedCycle):
            self._separation = participation.min_sep, participation.max_participations
        small = neighbour.recurrence.state_size <= SMALL
        self._step = neighbour.recurrence.block(0, 1) if small else None
        self._column = neighbour.matrix.column(0)

    def __call__(self, u: Array) -> tuple[float, Array]:
        """Return the value and the gradient."""
        values = self.values(u + 1j * STEP * np.eye(u.size))
        return float(values[0].real), values.imag / STEP

    def value(self, u: Array) -> float:
        """Return the value alone."""
        return float(self.values(u[np.newaxis].astype(complex))[0].real)

    def values(self, u: Numbers) -> Numbers:
        """Return the value at each row; their real parts must be the same."""
        gaps, decays = _gaps(u)
        weights, n = _weights(gaps), self.neighbour.n_steps
        own = gaps[:, 0::2]
        # log theta from its gap, where theta is next to 1; NumPy's complex log1p loses that.
        slow = np.where(own.real < 0.5, own, 0.0)
        near = np.log1p(-slow.real) - 1j * slow.imag / (1 - slow.real)
        logs = np.where(own.real < 0.5, near, np.log(decays))
        square = _sensitivity(own, logs, weights, n, *self._separation)
        if self._step is None:
            error = _filtered_error(self._column, gaps)
        else:
            error = _recurrent_error(self._step, gaps[:, 0::2], weights, n)
        return np.log(square) + np.log(error)


def _gaps(u: Numbers) -> tuple[Numbers, Numbers]:
    """Return the gaps 1 - theta_1 < 1 - phi_1 < 1 - theta_2 < ..., and the theta, of each row."""
    logits = np.cumsum(np.concatenate([u[..., :1], np.exp(u[..., 1:])], axis=-1), axis=-1)
    return 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits[..., 0::2]))


def _weights(gaps: Numbers) -> Numbers:
    """Return omega_i = prod_l (theta_i - phi_l) / prod_{l != i} (theta_i - theta_l)."""
    theta, phi = gaps[..., np.newaxis, 0::2], gaps[..., np.newaxis, 1::2]
    own = gaps[..., 0::2, np.newaxis]
    others = theta - own + np.eye(own.shape[-2])
    return np.asarray(np.prod(phi - own, axis=-1) / np.prod(others, axis=-1))


def _sensitivity(gaps: Numbers, logs: Numbers, weights: Numbers, n: int, b: int, k: int) -> Numbers:
    """Return |sum_{j<k} C[:, jb]|^2 by geometric sums, in O(k d^2).

    Between two participations the buffers S only decay: u steps after one that left them at S, the
    column sum is omega S theta^(u-1), and S' = 1 + theta^b S.
    """
    rounds = np.arange(1, k + 1)[:, np.newaxis]
    logs = logs[:, np.newaxis]
    after = np.expm1(rounds * b * logs) / np.expm1(b * logs)
    response = weights[:, np.newaxis] * after
    at = 1 + (response[:, :-1] * np.exp((b - 1) * logs)).sum(axis=-1)
    pairs = logs + np.swapaxes(logs, 1, 2)
    gap, other = gaps[:, np.newaxis], gaps[:, :, np.newaxis]
    per_step = gap + other - gap * other  # 1 - theta_i theta_l
    full = -np.expm1((b - 1) * pairs) / per_step
    last = -np.expm1((n - (k - 1) * b - 1) * pairs) / per_step
    energy = ((response[:, :-1] @ full) * response[:, :-1]).sum(axis=(1, 2))
    energy += ((response[:, -1:] @ last) * response[:, -1:]).sum(axis=(1, 2))
    return np.asarray(1 + np.square(at).sum(axis=1) + energy)


def _recurrent_error(step: Array, gaps: Numbers, weights: Numbers, n: int) -> Numbers:
    """Return sum_{j<n} (1 - j/n) b_j^2 for the impulse response b of A C^-1, in O((d + s)^3 log n).

    With b_0 = J and b_{j+1} = H F^j G it is a sum of F^j G G^T F^jT. From N terms to 2N,

        W' = W + N P + X W X^T,   P' = P + X P X^T,   X' = X X   (X = F^N, P the plain sum).

    `step` is the block of one step of A, which has s rows of state.
    """
    rows, d = weights.shape
    s = len(step) - 1
    f = np.zeros((rows, s + d, s + d), dtype=complex)
    f[:, :s, :s] = step[1:, :s]
    f[:, :s, s:] = -step[1:, s:] * weights[:, np.newaxis]
    f[:, s:, s:] = np.eye(d) * (1 - gaps)[:, np.newaxis] - weights[:, np.newaxis]
    g = np.append(step[1:, s], np.ones(d))
    h = np.hstack([np.tile(step[0, :s], (rows, 1)), -step[0, s] * weights])[:, np.newaxis]
    q = np.outer(g, g)
    weighted = plain = np.tile(q, (rows, 1, 1)).astype(complex)
    power, terms = f, 1
    for bit in f"{n - 1:b}"[1:]:
        back = np.swapaxes(power, 1, 2)
        weighted = weighted + terms * plain + power @ weighted @ back
        plain = plain + power @ plain @ back
        power, terms = power @ power, 2 * terms
        if bit == "1":
            plain = q + f @ plain @ np.swapaxes(f, 1, 2)
            weighted = weighted + plain
            power, terms = f @ power, terms + 1
    tail = (h @ weighted @ np.swapaxes(h, 1, 2))[:, 0, 0] if n > 1 else 0.0
    return np.asarray(step[0, s] ** 2 + tail / n)


def _filtered_error(a: Array, gaps: Numbers) -> Numbers:
    """Return the same for any coefficients a, in O(n d): each pole and zero is a filter."""
    n = a.size
    left = 1 - np.arange(n) / n
    decays = 1 - gaps[0].real
    response = a
    for theta, phi in zip(decays[0::2], decays[1::2], strict=True):
        response = lfilter([1.0, -theta], [1.0, -phi], response)
    # d b / d theta_i = -x b / (1 - theta_i x), and with the other sign for phi_i.
    slopes = [
        (-1) ** i * 2 * (left * response) @ lfilter([0.0, 1.0], [1.0, -decay], response)
        for i, decay in enumerate(decays)
    ]
    return np.asarray(left @ response**2 + (gaps - gaps[0].real) @ np.array(slopes))


def _arcsine(objective: _Objective, d: int) -> Array:
    """Return d buffers from a quadrature of c_j = E[xi^j], xi with an arcsine law on [beta, alpha].

    With xi = alpha - (alpha - beta) sin^2(angle / 2) and angle = pi e^-y, Gauss's nodes in y crowd
    where xi^j lives longest; how far out they reach is chosen by the error.
    """
    neighbour = objective.neighbour
    roots = (neighbour.decay, neighbour.momentum) if isinstance(neighbour, SGD) else (1.0, 0.0)
    nodes, masses = np.polynomial.legendre.leggauss(d)
    tries = []
    for reach in np.linspace(1, np.log(np.pi * np.sqrt(neighbour.n_steps)) + 2, 8):
        y = reach * (1 + nodes) / 2
        mass = reach / 2 * masses * np.exp(-y)
        gaps = 1 - max(roots) + abs(roots[0] - roots[1]) * np.sin(np.pi / 2 * np.exp(-y)) ** 2
        tries.append(_logits(gaps, mass * min(1, SLACK / mass.sum()) * (1 - gaps)))
    return _best(objective, tries)


def _grown(objective: _Objective, u: Array) -> Array:
    """Return u with one more buffer, light, where it helps most."""
    gaps, decays = _gaps(u)
    weights = _weights(gaps)
    room = (1 - (weights / decays).sum()) / 10
    tries = [
        _logits(np.append(gaps[0::2], gap), np.append(weights, room * (1 - gap)))
        for gap in np.geomspace(0.5 / objective.neighbour.n_steps, 0.9, 24)
    ]
    return _best(objective, tries)


def _logits(gaps: Array, weights: Array) -> Array:
    """Return the u of these buffers, whose zeros are the eigenvalues of diag(theta) - omega 1^T."""
    root = np.sqrt(weights.clip(0))  # one that counts for nothing may round below
    ordered = np.empty(2 * gaps.size)
    ordered[0::2] = np.sort(gaps)
    ordered[1::2] = eigvalsh(np.diag(gaps) + np.outer(root, root))
    logits = logit(ordered)
    steps = np.diff(logits).clip(np.exp(CLOSEST), np.exp(WIDEST))
    return np.append(logits[0], np.log(steps))


def _minimise(objective: _Objective, start: Array, search: Search) -> Array:
    """Return where L-BFGS from `start` ends."""
    bounds = [(-40.0, 40.0)] + [(CLOSEST, WIDEST)] * (start.size - 1)
    return lbfgs(
        objective, start, ftol=1e-11, gtol=1e-8, bounds=bounds, report=search.report_objective
    )


def _best(objective: _Objective, tries: list[Array]) -> Array:
    return min(tries, key=objective.value)
