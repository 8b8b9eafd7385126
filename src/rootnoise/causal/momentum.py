"""The map of a momentum optimizer whose settings may change at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import lapack

from rootnoise._check import Array, RootnoiseError, real, set_fields, vector
from rootnoise.causal.base import MAPS, CausalMatrix
from rootnoise.causal.elementary import Diagonal, Toeplitz

# Products of decays below this are not divided by: what an FFT rounds, relative to the largest
# factor of a step, would show in the smallest.
FADED = 1e-6


@MAPS.add("descent")
@dataclass(frozen=True, eq=False)
class Descent(CausalMatrix):
    """From gradients g to x, how far the parameters have moved down, by a state of m and x.

        m_t = beta_t m_{t-1} + e_t,          e_t = g_t - w x_{t-1},
        x_t = alpha_t x_{t-1} + chi_t u_t,   u_t = m_t, or with Nesterov e_t + beta_t m_t.

    Where a learning rate is 0 the map has no inverse, but still applies and streams.

    Args:
        learning_rates: chi >= 0, shape (n,).
        momentum: beta in [0, 1), one number or shape (n,).
        weight_decay: w >= 0, the part of the parameters that is added to the gradient.
        decay: alpha in [0, 1], the factor on the parameters, one number or shape (n,).
        nesterov: whether to look ahead.

    Raises:
        RootnoiseError: a value out of range, or with neither one entry nor n.

    >>> Descent([1.0, 0.5, 0.0]).dense()
    array([[1. , 0. , 0. ],
           [1. , 0.5, 0. ],
           [1. , 0.5, 0. ]])
    """

    learning_rates: ArrayLike
    momentum: ArrayLike = 0.0
    weight_decay: float = 0.0
    decay: ArrayLike = 1.0
    nesterov: bool = False
    n_steps: int = field(init=False)
    _chi: Array = field(init=False, repr=False)
    _beta: Array = field(init=False, repr=False)
    _alpha: Array = field(init=False, repr=False)

    is_toeplitz = False
    state_size = 2

    def __post_init__(self) -> None:
        rates = vector("learning_rates", self.learning_rates)
        n = rates.size
        set_fields(
            self,
            n_steps=n,
            _chi=_each_step("learning_rates", rates, n),
            _beta=_each_step("momentum", self.momentum, n, below=1),
            _alpha=_each_step("decay", self.decay, n, at_most=1),
            learning_rates=rates,
            momentum=np.asarray(self.momentum, dtype=np.float64),
            weight_decay=real("weight_decay", self.weight_decay, at_least=0),
            decay=np.asarray(self.decay, dtype=np.float64),
            nesterov=bool(self.nesterov),
        )

    @property
    def sgd(self) -> tuple[float, float] | None:
        """Momentum and decay, where learning rates are 1 and nothing else is set."""
        plain = np.all(self._chi == 1) and not (self.weight_decay or self.nesterov)
        if not plain or np.ndim(self.momentum) or np.ndim(self.decay):
            return None
        return float(self._beta[0]), float(self._alpha[0])

    @property
    def factors(self) -> tuple[CausalMatrix, ...]:
        """Diagonal and Toeplitz maps whose product this is; itself alone where none are known.

        With one momentum, no weight decay and phi_t = alpha_1 ... alpha_t, it filters gradients to
        u, and x_t / phi_t = x_{t-1} / phi_{t-1} + (chi_t / phi_t) u_t.
        """
        n, beta = self.n_steps, self._beta[0]
        kept = np.cumprod(np.append(1.0, self._alpha[1:]))
        known = kept[-1] >= FADED and self._chi.all() and np.all(self._beta == beta)
        if self.weight_decay or not known:
            return (self,)
        powers = beta ** np.arange(n)
        if self.nesterov:  # u_t = g_t + beta m_t
            powers *= beta
            powers[0] += 1
        sums, gains = Toeplitz(np.ones(n), n), Diagonal(self._chi / kept)
        return Diagonal(kept), sums, gains, Toeplitz(powers, n)

    @property
    def bands(self) -> int:
        return self.n_steps

    def apply(self, x: Array) -> Array:
        g = x.reshape(self.n_steps, -1)
        return self._run(0, np.zeros((2, g.shape[1])), g)[0].reshape(x.shape)

    def solve(self, y: Array) -> Array:
        self._refuse_zero_rates()
        x = y.reshape(self.n_steps, -1)
        before = np.zeros_like(x)
        before[1:] = x[:-1]
        m = (x - self._alpha[:, np.newaxis] * before) / self._chi[:, np.newaxis]
        past = np.zeros_like(m)
        if self.nesterov:  # (1 + beta_t) m_t - beta_t m_{t-1} = u_t
            bands = np.ones((2, self.n_steps), order="F")
            bands[1, :-1] = -self._beta[1:] / (1 + self._beta[1:])
            m = _substitute(bands, m / (1 + self._beta[:, np.newaxis]))
        past[1:] = m[:-1]
        g = m - self._beta[:, np.newaxis] * past + self.weight_decay * before
        return np.asarray(g.reshape(y.shape))

    def block(self, t: int, m: int) -> Array:
        unit = np.eye(2 + m)
        return np.vstack(self._run(t, unit[:2], unit[2:]))

    def inverse(self) -> CausalMatrix:
        self._refuse_zero_rates()
        return super().inverse()

    def _run(self, t: int, state: Array, g: Array) -> tuple[Array, Array]:
        """Return x at steps t, t + 1, ... of the gradients g, shape (m, c), and the state then."""
        steps = slice(t, t + len(g))
        chi, beta, alpha = self._chi[steps], self._beta[steps], self._alpha[steps]
        w = self.weight_decay
        ahead = chi * self.nesterov
        keep = alpha - w * ahead  # the factor of x_{t-1} in x_t, m_t held fixed
        # The unknowns m_t, x_t, m_{t+1}, ... in turn: two sub-diagonals below ones.
        bands = np.ones((3, 2 * len(g)), order="F")
        bands[1, 0::2], bands[1, 1::2] = -chi * (beta if self.nesterov else 1.0), w
        bands[2, 0:-2:2], bands[2, 1:-2:2] = -beta[1:], -keep[1:]
        known = np.empty((2 * len(g), g.shape[1]), order="F")
        known[0::2], known[1::2] = g, ahead[:, np.newaxis] * g
        known[0] += beta[0] * state[0] - w * state[1]
        known[1] += keep[0] * state[1]
        solved = _substitute(bands, known)
        return solved[1::2], solved[-2:]

    def _refuse_zero_rates(self) -> None:
        if not self._chi.all():
            raise RootnoiseError(
                "learning_rates must be non-zero for the workload to have an inverse, "
                f"got 0.0 at step {np.argmin(self._chi)}"
            )


def _each_step(
    name: str, value: ArrayLike, n: int, *, below: float | None = None, at_most: float | None = None
) -> Array:
    """Return one value >= 0 a step."""
    values = vector(name, np.atleast_1d(np.asarray(value)))
    if values.size not in (1, n):
        raise RootnoiseError(f"{name} must be one number or n_steps={n} many, got {values.size}")
    for extreme in (values.min(), values.max()):
        real(name, extreme, at_least=0, below=below, at_most=at_most)
    return np.broadcast_to(values, n)


def _substitute(bands: Array, known: Array) -> Array:
    """Solve a unit lower-triangular banded system, one column a right-hand side."""
    solved: Array = lapack.dtbtrs(bands, known, uplo="L", diag="U")[0]
    return solved
