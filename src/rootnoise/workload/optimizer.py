"""The workload of a real torch optimizer: read off its settings and checked, or found by a run.

The only file of the mathematics that imports torch, and only when called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rootnoise._check import Array, RootnoiseError, integer
from rootnoise.causal import Toeplitz, series
from rootnoise.workload.base import Workload
from rootnoise.workload.matrix import MatrixWorkload
from rootnoise.workload.schedule import ScheduledSGD, sgd_roots
from rootnoise.workload.toeplitz import ToeplitzWorkload

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Build = Callable[[int], "tuple[Optimizer, LRScheduler | None]"]

# A known optimizer is checked for these many steps without a scheduler, and for all with one.
CHECKED = 64
# An unknown optimizer that treats steps differently is written out as a matrix up to here.
DENSE = 2048
# Far above the rounding of float64, far below what a nonlinear optimizer is off by.
ROUNDING = 1e-9
# Adam with this epsilon divides by a constant.
FLAT = 1e12
# Settings that choose an implementation, not a map.
FLAGS = {"capturable", "differentiable", "foreach", "fused"}


def from_optimizer(
    optimizer: Optimizer | Callable[[list[Parameter]], Optimizer],
    n_steps: int,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
) -> Workload:
    """Return what a torch optimizer, with its learning-rate scheduler, makes of its gradients.

    SGD comes out whole: momentum, dampening, nesterov, weight decay, maximize. Of Adam and AdamW it
    is the first moment, with bias correction and weight decay; the second moment is *ignored*, as
    if the denominator were 1, for it is no linear map. Any other optimizer is run on test
    gradients, and must turn out linear and elementwise.

    The matrix maps gradients to how far the parameters have moved, learning rates included. Where
    all steps are alike it is a `ToeplitzWorkload`, else `ScheduledSGD`, or for an optimizer of
    another kind a `MatrixWorkload`.

    Args:
        optimizer: one whose settings are read, and which stays as it is; or a function that builds
            one from a list of parameters.
        n_steps: steps n; with a scheduler, or an optimizer of another kind, all of them are run.
        scheduler: a function that builds the scheduler of a given optimizer; one step is one batch.

    Raises:
        RootnoiseError: an optimizer that is not linear, cannot be run on a vector, or treats its
            groups of parameters differently; a scheduler that is no such function, or is missing.

    >>> from functools import partial
    >>> from torch.optim import SGD
    >>> from torch.optim.lr_scheduler import StepLR
    >>> sgd = partial(SGD, lr=1.0, momentum=0.5)
    >>> from_optimizer(sgd, 4).matrix.column(0)
    array([1.   , 1.5  , 1.75 , 1.875])
    >>> halves = partial(StepLR, step_size=1, gamma=0.5)
    >>> from_optimizer(sgd, 4, halves).matrix.column(0)
    array([1.      , 1.25    , 1.3125  , 1.328125])
    """
    import torch

    n = integer("n_steps", n_steps, 1)
    if scheduler is not None and not callable(scheduler):
        raise RootnoiseError(
            "scheduler must be a function that builds one for a given optimizer, "
            f"got {type(scheduler).__name__}"
        )
    build = partial(_build, optimizer, scheduler)
    kind, steps = type(build(1)[0]), n if scheduler is not None else min(n, CHECKED)
    if kind is torch.optim.SGD:
        return _sgd(build, n, steps)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return _adam(build, n, steps)
    return _unknown(build, n, kind.__name__)


def _sgd(build: Build, n: int, steps: int) -> Workload:
    """Read SGD off its settings; a schedule may change learning rate and momentum (OneCycleLR)."""
    gradients = _gradients(steps)
    moved, settings = _run(build, gradients)
    rates, momentum = (_each_step(settings[name], n) for name in ("lr", "momentum"))
    dampening, w, nesterov = (
        _fixed(name, settings[name]) for name in ("dampening", "weight_decay", "nesterov")
    )
    alike = not np.ptp(rates) and not np.ptp(momentum)
    beta = momentum[0] if alike else momentum
    workload = ScheduledSGD(rates, beta, dampening, w, nesterov)
    _check(workload, gradients, moved)
    if not alike or (dampening and beta):
        return workload
    roots = None if nesterov else sgd_roots(rates[0], momentum[0], w)
    if roots is None:
        return ToeplitzWorkload(workload.matrix.column(0))
    return ToeplitzWorkload(rates[0] * series.sgd_power(*roots, exponent=1.0, size=n))


def _adam(build: Build, n: int, steps: int) -> Workload:
    """Take m_t / (1 - beta^t), m_t = beta m_{t-1} + (1 - beta) g_t, as SGD with other rates."""
    import torch

    optimizer = build(1)[0]
    group = optimizer.param_groups[0]
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    w = float(group["weight_decay"])
    gradients = _gradients(steps)
    # Displacements shrink by FLAT, so that L2 decay must grow by it.
    moved, settings = _run(build, gradients, eps=FLAT, weight_decay=w if decoupled else w * FLAT)
    _fixed("weight_decay", settings["weight_decay"])
    beta = float(_fixed("betas", settings["betas"])[0])
    rates = _each_step(settings["lr"], n)
    corrected = rates * (1 - beta) / (1 - beta ** np.arange(1, n + 1))
    workload = (
        ScheduledSGD(corrected, beta, decay=1 - w * rates)
        if decoupled
        else ScheduledSGD(corrected, beta, weight_decay=w)
    )
    _check(workload, gradients, moved * FLAT)
    return workload


def _unknown(build: Build, n: int, name: str) -> Workload:
    """Run an impulse, two random sequences, their sum, and zeros: what is not linear shows."""
    g, h = _gradients(n), _gradients(n)[::-1]
    moved = _run(build, np.hstack([np.eye(n, 1), g, h, g + h, 0 * g]))[0]
    rounding = ROUNDING * np.abs(moved).max()
    off = np.abs([moved[:, 1] + moved[:, 2] - moved[:, 3], moved[:, 4]]).max()
    if not off <= rounding:
        raise RootnoiseError(
            "optimizer must be linear in its gradients, element by element, "
            f"got {name}, whose displacement under a sum of two is off by {off:.1e}"
        )
    moved *= np.sign(moved[0, 0]) or 1.0  # maximized or minimized: the same map up to its sign
    column = moved[:, :1]
    if column[0] and np.abs(Toeplitz(column[:, 0], n).apply(g) - moved[:, 1:2]).max() <= rounding:
        return ToeplitzWorkload(column[:, 0])
    if n > DENSE:
        raise RootnoiseError(
            f"n_steps must be in [1, {DENSE}] for an optimizer whose steps differ and that is not "
            f"torch's SGD, Adam or AdamW, got {n} for {name}"
        )
    rows = _run(build, np.eye(n))[0]
    return MatrixWorkload(rows * (np.sign(rows[0, 0]) or 1.0))


def _build(
    optimizer: Optimizer | Callable[[list[Parameter]], Optimizer],
    scheduler: Callable[[Optimizer], LRScheduler] | None,
    size: int,
) -> tuple[Optimizer, LRScheduler | None]:
    """Return a fresh optimizer of a vector of zeros, and its scheduler."""
    import torch

    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))]
    make: Any = optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        make = partial(type(optimizer), **_settings(optimizer, scheduler is not None))
    try:
        fresh: Optimizer = make(parameters)
    except (TypeError, ValueError) as reason:
        raise RootnoiseError(
            f"optimizer must take a list of 1-D parameters, got {reason}"
        ) from None
    return fresh, None if scheduler is None else scheduler(fresh)


def _settings(optimizer: Optimizer, scheduled: bool) -> dict[str, Any]:
    """Return the settings that all groups of parameters share."""
    import torch

    groups = optimizer.param_groups
    if "initial_lr" in groups[0] and not scheduled:
        raise RootnoiseError("scheduler must be given for an optimizer that has one, got None")
    settings = {name: groups[0][name] for name in optimizer.defaults if name not in FLAGS}
    if type(optimizer) is torch.optim.AdamW:  # a setting of Adam, which it inherits and sets itself
        settings.pop("decoupled_weight_decay", None)
    for name, value in settings.items():
        for group in groups[1:]:
            if group[name] != value:
                raise RootnoiseError(
                    f"{name} must be the same for all parameters, got {value} and {group[name]}"
                )
    # A scheduler that was attached has changed the rate that it started from.
    return settings | {"lr": groups[0].get("initial_lr", groups[0]["lr"])}


def _run(build: Build, gradients: Array, **changes: Any) -> tuple[Array, dict[str, list[Any]]]:
    """Return the displacements under gradients (steps, d), and the settings of every step."""
    import torch

    optimizer, scheduler = build(gradients.shape[1])
    group = optimizer.param_groups[0]
    group.update(changes)
    parameter = group["params"][0]
    settings: dict[str, list[Any]] = {name: [] for name in optimizer.defaults}
    moved = np.empty_like(gradients)
    for t, gradient in enumerate(gradients):
        parameter.grad = torch.tensor(gradient)
        try:
            if scheduler is not None and t:
                scheduler.step()
            optimizer.step()
        except (TypeError, ValueError, RuntimeError) as reason:
            cure = ": take one without, such as SGD or Adam" if "closure" in str(reason) else ""
            raise RootnoiseError(
                f"optimizer and scheduler must step alone, got {reason}{cure}"
            ) from None
        for name, values in settings.items():
            values.append(group[name])
        moved[t] = -parameter.detach().numpy()
    return -moved if group.get("maximize") else moved, settings


def _gradients(n: int) -> Array:
    """Return reproducible test gradients of shape (n, 1)."""
    return np.random.default_rng(0).standard_normal((n, 1))


def _each_step(values: list[Any], n: int) -> Array:
    """Return a setting at all steps, from those that were run."""
    return np.pad(np.array([float(value) for value in values]), (0, n - len(values)), mode="edge")


def _fixed(name: str, values: list[Any]) -> Any:
    for value in values:
        if value != values[0]:
            raise RootnoiseError(f"{name} must not change, got {values[0]} and then {value}")
    return values[0]


def _check(workload: Workload, gradients: Array, moved: Array) -> None:
    """Refuse a formula that is not what the optimizer did."""
    steps = len(gradients)
    padded = np.pad(gradients, ((0, workload.n_steps - steps), (0, 0)))
    off = np.abs(workload.matrix.apply(padded)[:steps] - moved).max()
    if not off <= ROUNDING * np.abs(moved).max():
        raise RootnoiseError(
            f"optimizer must step by its formula, got a way that is off by {off:.1e}"
        )
