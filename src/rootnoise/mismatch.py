"""Is the noise planned for this optimizer? What it costs, in error, if it is not.

Privacy does not depend on it: whatever an optimizer makes of noised gradients is post-processing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rootnoise._check import RootnoiseError
from rootnoise.factorization import Factorization, error, factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import SGD, Workload, from_optimizer

ALIKE = 1e-6  # sine of the angle between what two workloads make of one sequence
SLIGHT = 0.01  # a smaller part of the error is not worth a word
MOST_STEPS = 10_000  # beyond, the error is not computed: it would take longer than a second


def mismatch(mechanism: Mechanism, optimizer: Any, *, decay: float = 1.0) -> str:
    """Return what to warn of if the noise was planned for another optimizer; nothing if it suits.

    The loss is how much smaller the rmse would be, at the same noise multiplier, with a banded
    square root of as many bands of the optimizer's own workload; other mechanisms may gain more.
    Independent noise suits every optimizer as well, and an optimizer that already has a scheduler
    of its own is not judged: its rates are not known.

    Args:
        mechanism: whose workload was planned.
        optimizer: a torch optimizer of the model's parameters; it stays as it is.
        decay: alpha by which parameters are multiplied before each step, as `PrivateOptimizer` has.

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
    """Return what optimizer and decay make of gradients, or None if that is not known."""
    if decay == 1:
        return from_optimizer(optimizer, n)
    group: dict[str, Any] = optimizer.param_groups[0]
    if any(group.get(name) for name in ("weight_decay", "dampening", "nesterov")):
        return None
    return SGD(n, momentum=float(group.get("momentum", 0.0)), decay=decay)


def _alike(planned: Workload, actual: Workload) -> bool:
    """Whether the two maps are the same up to a factor, told by what they make of one sequence."""
    g = np.random.default_rng(0).standard_normal((planned.n_steps, 1))
    a, b = (w.matrix.apply(g) / np.linalg.norm(w.matrix.apply(g)) for w in (planned, actual))
    return bool(min(np.linalg.norm(a - b), np.linalg.norm(a + b)) < ALIKE)


def _rmse(mechanism: Mechanism, strategy: Any, actual: Workload) -> float:
    split = Factorization(mechanism.name, actual, strategy)
    return error.rmse(split.decoder, sensitivity(strategy, mechanism.participation).value)


def _best(mechanism: Mechanism, actual: Workload) -> float:
    """Return the rmse of the strategy to compare with."""
    own = factorize(actual, mechanism.participation, "bsr", bands=mechanism.strategy.bands)
    return error.rmse(own.decoder, sensitivity(own.strategy, mechanism.participation).value)
