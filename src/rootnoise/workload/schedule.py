"""SGD whose settings change from step to step: learning-rate schedules, as PyTorch runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from rootnoise._check import Array, RootnoiseError, integer, one_of, real, set_fields, vector
from rootnoise.causal import CausalMatrix, Diagonal, Product
from rootnoise.causal.momentum import Descent
from rootnoise.workload.base import WORKLOADS, Workload
from rootnoise.workload.toeplitz import SGD, ToeplitzWorkload

# The learning rate at the end of a schedule by default, relative to its peak.
FINAL = {"cosine": 0.0, "linear": 0.0, "exponential": 0.01, "step": 0.01}


@WORKLOADS.add("scheduled-sgd")
@dataclass(frozen=True, eq=False)
class ScheduledSGD(Workload):
    """SGD with a learning rate for every step, as torch.optim.SGD runs it; A is not Toeplitz.

        m_t = beta_t m_{t-1} + (1 - tau)(g_t + w theta_{t-1}),   undampened in the first step,
        theta_t = alpha_t theta_{t-1} - lr_t m_t,                or looking ahead with Nesterov.

    The learning rate multiplies the momentum, not the gradient: without any decay A = P diag(lr) M,
    with M the filter of the momentum and P the prefix sums. A maps the gradients to how far the
    parameters have moved *down*. Toeplitz strategies take the root of a `neighbour`.

    Args:
        learning_rates: lr >= 0, shape (n,); a step of 0 only gathers momentum.
        momentum: beta in [0, 1), one number or shape (n,).
        dampening: tau in [0, 1), the part of a gradient that the momentum leaves out; 0 without any
            momentum, as in PyTorch.
        weight_decay: w >= 0, the part of the parameters that is added to the gradient (L2).
        nesterov: whether to look ahead.
        decay: alpha in [0, 1], the factor on the parameters (decoupled), one number or shape (n,).

    Raises:
        RootnoiseError: a value outside its range, no learning rate above 0, or nesterov together
            with dampening.

    >>> ScheduledSGD([1.0, 0.5, 0.25], momentum=0.5).matrix.dense()
    array([[1.    , 0.    , 0.    ],
           [1.25  , 0.5   , 0.    ],
           [1.3125, 0.625 , 0.25  ]])
    """

    learning_rates: ArrayLike
    momentum: ArrayLike = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    decay: ArrayLike = 1.0

    def __post_init__(self) -> None:
        tau = real("dampening", self.dampening, at_least=0, below=1)
        if self.nesterov and tau:
            raise RootnoiseError(f"dampening must be 0 with nesterov, got {tau}")
        tau *= bool(np.any(self.momentum))
        rates = vector("learning_rates", self.learning_rates)
        if not rates.any():
            raise RootnoiseError(f"learning_rates must not all be 0.0, got {rates.size} of them")
        # With the momentum in units of 1 - tau, dampening is a factor on the learning rate.
        chi = rates * (1 - tau)
        steps = Descent(chi, self.momentum, self.weight_decay, self.decay, self.nesterov)
        set_fields(
            self,
            learning_rates=rates,
            momentum=steps.momentum,
            dampening=tau,
            weight_decay=steps.weight_decay,
            nesterov=steps.nesterov,
            decay=steps.decay,
            n_steps=rates.size,
            _descent=steps,
        )

    @cached_property
    def matrix(self) -> CausalMatrix:
        descent: Descent = self.__dict__["_descent"]
        if not self.dampening:
            return descent
        undampened = np.ones(self.n_steps)
        undampened[0] /= 1 - self.dampening
        return Product(descent, Diagonal(undampened))

    @cached_property
    def neighbour(self) -> Workload:
        """The Toeplitz workload of the mean settings, up to a factor."""
        n, w = self.n_steps, self.weight_decay
        settings = self.learning_rates, self.momentum, self.decay
        rate, beta, alpha = (float(np.mean(np.asarray(x))) for x in settings)
        rate *= 1 - self.dampening
        roots = sgd_roots(rate, beta, w, alpha)
        if roots and not self.nesterov:
            return SGD(n, momentum=roots[1], decay=roots[0])
        return ToeplitzWorkload(Descent(np.full(n, rate), beta, w, alpha, self.nesterov).column(0))

    def square_root(self, size: int) -> Array:
        """Return the coefficients of the neighbour's root."""
        return self.neighbour.square_root(size)

    @property
    def root_is_exact(self) -> bool:
        return False

    def _contracted(self, contraction: float) -> Workload:
        # A step of gradient descent contracts in proportion to its rate.
        rates = np.asarray(self.learning_rates)
        pull = np.exp(-contraction * rates / rates.sum())
        return replace(self, decay=np.asarray(self.decay) * pull)


def sgd_roots(
    learning_rate: float, momentum: float, weight_decay: float, decay: float = 1.0
) -> tuple[float, float] | None:
    """Return the (alpha, beta) that SGD with weight decay through its momentum amounts to.

    They are the roots of z^2 - (decay + momentum - learning_rate weight_decay) z + decay momentum,
    and None where these are complex or not positive: then no `SGD` has the same iterates.

    >>> sgd_roots(0.1, 0.9, 0.0)
    (1.0, 0.9)
    >>> alpha, beta = sgd_roots(0.1, 0.9, 1e-3)
    >>> round(alpha, 9), round(beta, 9)
    (0.998990825, 0.900909175)
    """
    if not weight_decay:
        return max(decay, momentum), min(decay, momentum)
    total, product = decay + momentum - learning_rate * weight_decay, decay * momentum
    square = total**2 - 4 * product
    if total <= 0 or square < 0:
        return None
    alpha = min((total + square**0.5) / 2, 1.0)  # never above 1, except by rounding
    return alpha, product / alpha


def learning_rates(
    schedule: str, n_steps: int, warmup: int = 0, final: float | None = None
) -> Array:
    """Return the learning rate of every step relative to its peak, shape (n_steps,).

    After `warmup` steps that rise evenly, with u in [0, 1) the part of the others that is over and
    f = `final`, the schedules are those of torch.optim.lr_scheduler:

    - cosine: f + (1 - f) (1 + cos(pi u)) / 2, CosineAnnealingLR;
    - linear: 1 - (1 - f) u, LinearLR;
    - exponential: f^u, ExponentialLR;
    - step: 1, f^(1/2), f for a third each, StepLR.

    Args:
        schedule: its name.
        n_steps: steps n.
        warmup: steps before the peak, less than n; step t has the rate (t + 1) / (warmup + 1).
        final: f in [0, 1], above 0 for exponential and step (default: 0, or 0.01 for these two).

    Raises:
        RootnoiseError: another name, or a value outside its range.

    >>> learning_rates("linear", n_steps=6, warmup=2)
    array([0.33333333, 0.66666667, 1. , 0.75 , 0.5 , 0.25 ])
    """
    one_of("schedule", schedule, FINAL)
    n = integer("n_steps", n_steps, 1)
    w = integer("warmup", warmup, 0, n - 1, high_name="n_steps-1")
    f = FINAL[schedule] if final is None else real("final", final, at_least=0, at_most=1)
    if schedule in ("exponential", "step"):
        real("final", f, above=0, at_most=1)
    u = np.arange(n - w) / (n - w)
    rates = {
        "cosine": f + (1 - f) * (1 + np.cos(np.pi * u)) / 2,
        "linear": 1 - (1 - f) * u,
        "exponential": f**u,
        "step": f ** (np.floor(3 * u) / 2),
    }[schedule]
    return np.concatenate([np.arange(1, w + 1) / (w + 1), rates])
