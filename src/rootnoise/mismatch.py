"""Whether the noise is planned for this optimizer, and how much larger the error is if not.

Privacy does not depend on it: what an optimizer does with noised gradients is post-processing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rootnoise._check import RootnoiseError
from rootnoise.factorization import Factorization, error, factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import SGD, Workload, from_optimizer

ALIKE = 1e-6  # sine of the angle between the outputs of two workloads for the same input
SLIGHT = 0.01  # no warning for a smaller relative loss
MOST_STEPS = 10_000  # for more steps the error is not computed: it would take over a second


def mismatch(mechanism: Mechanism, optimizer: Any, *, decay: float = 1.0) -> str:
    """Return a warning if the noise was planned for another optimizer, or an empty string.

    The loss compares the rmse, at the same noise multiplier, with that of a banded square root of
    the optimizer's own workload with as many bands; other mechanisms may gain more. Independent
    noise suits every optimizer equally. An optimizer that already has a scheduler is not judged,
    because its rates are not known.

    Args:
        mechanism: its workload is what the noise was planned for.
        optimizer: a torch optimizer of the model's parameters; it is not changed.
        decay: factor alpha on the parameters before each step, as in `PrivateOptimizer`.

    >>> import torch
    >>> from rootnoise.participation import FixedCycle
    >>> cycle = FixedCycle(period=20, epochs=3)
    >>> split = factorize(SGD(60, momentum=0.9), cycle, "bsr")
    >>> made = Mechanism.calibrate(split, cycle, epsilon=2.0, delta=1e-5)
    >>> weights = [torch.nn.Parameter(torch.zeros(2))]
    >>> mismatch(made, torch.optim.SGD(weights, lr=0.1, momentum=0.9))
    ''
    >>> print(mismatch(made, torch.optim.SGD(weights, lr=0.1)))
    optimizer should be the one that the noise was planned for, got SGD: epsilon holds, but the
    error is ...% larger than with noise planned for it (from_optimizer, or make_private)
    """
    if mechanism.strategy.bands == 1 or any("initial_lr" in g for g in optimizer.param_groups):
        return ""
    kind = type(optimizer).__name__
    rule = f"optimizer should be the one that the noise was planned for, got {kind}: epsilon holds"
    cure = "(from_optimizer, or make_private)"
    try:
        actual = _workload(optimizer, mechanism.n_steps, decay)
    except RootnoiseError as reason:
        return f"{rule}, but how large the error is cannot be said ({reason})"
    if actual is None or _alike(mechanism.workload, actual):
        return ""
    if mechanism.n_steps > MOST_STEPS:
        return f"{rule}, but the error is larger than with noise planned for it {cure}"
    loss = _rmse(mechanism, mechanism.strategy, actual) / _best(mechanism, actual) - 1
    if loss < SLIGHT:
        return ""
    return f"{rule}, but the error is {loss:.0%} larger than with noise planned for it {cure}"


def _workload(optimizer: Any, n: int, decay: float) -> Workload | None:
    """Return the workload of optimizer and decay, or None if it is not known."""
    if decay == 1:
        return from_optimizer(optimizer, n)
    group: dict[str, Any] = optimizer.param_groups[0]
    if any(group.get(name) for name in ("weight_decay", "dampening", "nesterov")):
        return None
    return SGD(n, momentum=float(group.get("momentum", 0.0)), decay=decay)


def _alike(planned: Workload, actual: Workload) -> bool:
    """Whether two workloads agree up to a factor, judged by their outputs for one random input."""
    g = np.random.default_rng(0).standard_normal((planned.n_steps, 1))
    a, b = (w.matrix.apply(g) / np.linalg.norm(w.matrix.apply(g)) for w in (planned, actual))
    return bool(min(np.linalg.norm(a - b), np.linalg.norm(a + b)) < ALIKE)


def _rmse(mechanism: Mechanism, strategy: Any, actual: Workload) -> float:
    split = Factorization(mechanism.name, actual, strategy)
    return error.rmse(split.decoder, sensitivity(strategy, mechanism.participation).value)


def _best(mechanism: Mechanism, actual: Workload) -> float:
    """Return the rmse of the strategy that a mechanism is compared with."""
    own = factorize(actual, mechanism.participation, "bsr", bands=mechanism.strategy.bands)
    return error.rmse(own.decoder, sensitivity(own.strategy, mechanism.participation).value)
