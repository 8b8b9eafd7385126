"""Which noise suits an optimizer that divides by the size of its gradients, as Adam does.

The planner compares mechanisms by the error of the sum of all steps, and correlated noise has the
smaller one. But it has more noise in each single step, which later steps take back, and that is
what the second moment of Adam sees: where noise dominates, Adam divides by it, and its steps become
as many times smaller. At a learning rate that is multiplied by that ratio the plan holds again; at
the same one, independent noise trains further (docs/training.md has the measurement).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import optim

from rootnoise._check import warn
from rootnoise.factorization import error, factorize
from rootnoise.planner import Row
from rootnoise.workload import Workload

# Those of torch that divide by a running mean of squared (or largest) gradients.
ADAPTIVE = (
    optim.Adadelta,
    optim.Adafactor,
    optim.Adagrad,
    optim.Adam,
    optim.Adamax,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
)
# Less error that is not worth a warning.
SLIGHT = 1.05


class AdaptiveOptimizerWarning(UserWarning):
    """Another noise was planned than the one with the least error, for an optimizer like Adam."""


def choose(rows: Sequence[Row], workload: Workload, optimizer: optim.Optimizer) -> Row:
    """Return the row to train with: the first, or for Adam and the like the first of one band.

    Warns if the first has clearly less error, and says which learning rate the first would need.

    Args:
        rows: of a plan, the one that it recommends and then all by error.
        workload: what was planned for.
        optimizer: the one to train with.
    """
    first = rows[0]
    plain = next((row for row in rows if row.bands == 1), first)
    if not isinstance(optimizer, ADAPTIVE) or first.bands == 1 or plain.bands > 1:
        return first
    gain = plain.rmse_per_example / first.rmse_per_example
    if gain < SLIGHT:
        return plain
    ratio = _step_noise(first, workload) / _step_noise(plain, workload)
    kind, best = type(optimizer).__name__, f"{first.mechanism} ({first.sampling})"
    warn(
        f"mechanism auto takes independent noise for {kind}, whose steps shrink with the noise of "
        f"a single one: {best} has {gain:.2g} times less error, but needs a learning rate about "
        f"{ratio:.2g} times that of independent noise; give it by name with such a rate",
        AdaptiveOptimizerWarning,
    )
    return plain


def _step_noise(row: Row, workload: Workload) -> float:
    """Return the standard deviation of the noise in one step, root mean square over all."""
    split = factorize(workload, row.participation, row.mechanism, **row.options)
    return row.noise_multiplier * error.rmse(split.noising, row.sensitivity)
