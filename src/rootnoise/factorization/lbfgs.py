"""L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995; SciPy's), as the factorizations use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, minimize

from rootnoise._check import Array

ValueAndGradient = tuple[float, Array]
Bound = tuple[float | None, float | None]

# What an objective is where it overflows, so that the line search steps back.
OVERFLOW = 1e4


def lbfgs(
    objective: Callable[[Array], ValueAndGradient],
    start: Array,
    *,
    ftol: float,
    gtol: float,
    most: int = 300,
    memory: int = 20,
    bounds: Sequence[Bound] | None = None,
    report: Callable[[float], None] | None = None,
) -> Array:
    """Return where the search from `start` ends.

    Args:
        objective: value and gradient at a point.
        start: the first point; returned as it is if it has no coordinates.
        ftol: relative gain of an iteration at which to stop.
        gtol: largest entry of the gradient at which to stop.
        most: iterations. Smooth problems take 10 to 200; kinks would take thousands.
        memory: past iterations that approximate the Hessian.
        bounds: of each coordinate.
        report: called with the value after each iteration.
    """

    def guarded(x: Array) -> ValueAndGradient:
        with np.errstate(all="ignore"):
            value, gradient = objective(x)
        if np.isfinite(value) and np.all(np.isfinite(gradient)):
            return value, gradient
        return OVERFLOW, np.zeros_like(x)

    if start.size == 0:
        return start
    result = minimize(
        guarded,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        callback=None if report is None else reporting(report),
        options={"maxiter": most, "maxcor": memory, "ftol": ftol, "gtol": gtol},
    )
    return np.asarray(result.x)


def reporting(report: Callable[[float], None]) -> Any:
    """Return a callback for `scipy.optimize.minimize` that reports the value."""

    def callback(intermediate_result: OptimizeResult) -> None:
        report(float(intermediate_result.fun))

    return callback
