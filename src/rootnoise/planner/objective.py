"""Which iterates a plan counts: what the noise of a factorization is expected to move them by."""

from __future__ import annotations

import numpy as np

from rootnoise._check import Array, RootnoiseError, one_of
from rootnoise.factorization import Factorization, error
from rootnoise.participation import Participation
from rootnoise.workload import SGD, ScheduledSGD, Workload

# The words for it, each with what it says of an error.
OBJECTIVES = {
    "all": "all iterates, root mean square",
    "rates": "all iterates, root mean square with the learning rates as weights",
    "last": "the last iterate",
    "tail": "the last quarter of the iterates, root mean square",
    "tail-average": "the average of the last quarter of the iterates",
}
TAIL = 4  # the last 1 / TAIL of the steps


def expected(split: Factorization, participation: Participation, objective: str) -> float:
    """Return the expected error at noise multiplier 1, per coordinate, by one of `OBJECTIVES`.

    The error of iterate t is (B Z)_t with independent Z of standard deviation sens, so its standard
    deviation is sens |row t of B|, and that of a weighted sum of iterates sens |w^T B|.

    Raises:
        RootnoiseError: as for `check`.

    >>> from rootnoise.factorization import factorize
    >>> from rootnoise.participation import SingleParticipation
    >>> split, once = factorize(SGD(16), mechanism="identity"), SingleParticipation()
    >>> expected(split, once, "last")  # the sum of 16 independent steps
    4.0
    """
    check(split.workload, objective)
    if objective == "all":
        return split.rmse(participation)
    n, sens = split.n_steps, split.sensitivity(participation).value
    tail = np.zeros(n)
    tail[n - max(1, n // TAIL) :] = 1 / max(1, n // TAIL)
    if objective in ("last", "tail-average"):
        weights = np.eye(n, 1, 1 - n)[:, 0] if objective == "last" else tail
        return sens * float(np.linalg.norm(split.decoder.weighted_rows(weights)))
    weights = tail if objective == "tail" else _rates(split.workload)
    variances = np.square(error.per_step(split.decoder, sens))
    return float(np.sqrt(weights @ variances / weights.sum()))


def check(workload: Workload, objective: str) -> None:
    """Refuse an objective that is unknown, or that the workload does not have.

    Raises:
        RootnoiseError: it is none of `OBJECTIVES`, or "rates" for a workload that names none.
    """
    one_of("objective", objective, OBJECTIVES)
    if objective == "rates":
        _rates(workload)


def _rates(workload: Workload) -> Array:
    """Return the learning rate of every step, shape (n,), 1 without a schedule."""
    match workload:
        case ScheduledSGD():
            return np.asarray(workload.learning_rates)
        case SGD():
            return np.ones(workload.n_steps)
    kind = type(workload).__name__
    raise RootnoiseError(f"objective must not be rates for a workload that names none, got {kind}")
