"""The methods whose accuracy is compared: the paper's, and what the planner chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from rootnoise import Job, plan
from rootnoise.planner import MEMORY_ROWS
from rootnoise.runs.config import RunConfig, make_workload, planned, row_settings

BSR, AOF, PLAIN, AMPLIFIED, OUTPUT = "BSR", "AOF", "A·Id", "A·Id amplified", "Id·A"
FIRST, CYCLIC, BINS = "planner's choice", "cyclic Poisson", "balls in bins"
MIN_SEP = "b-min-sep Poisson"
PAPER = (BSR, AOF, PLAIN, AMPLIFIED, OUTPUT)


@dataclass(frozen=True)
class Method:
    """A mechanism with its sampling, or what the planner takes of one sampling.

    Attributes:
        mechanism: as for `rootnoise train`; with auto, the planner chooses.
        start: binary logarithm of the first learning rate.
        sampling: of which rows the planner chooses, auto for all. b-min-sep sampling, which it does
            not plan, gets the strategy of cyclic Poisson sampling, and a separation of its groups.
    """

    mechanism: str = "auto"
    start: int = -2
    sampling: str = "auto"

    def settled(self, cell: RunConfig, n_examples: int) -> RunConfig:
        """Return the settings of a cell, of mechanism auto, with those of the method.

        Raises:
            RootnoiseError: settings for which there is no plan.
        """
        if self.mechanism != "auto":
            return replace(cell, mechanism=self.mechanism)
        if self.sampling in ("auto", "balls-in-bins"):
            return planned(replace(cell, sampling=self.sampling), n_examples)
        epsilon = cast("float", cell.epsilon)
        job = Job(n_examples, cell.batch_size, cell.epochs, epsilon, cell.delta, MEMORY_ROWS)
        made = plan(make_workload(cell, job.n_steps), job, bins=False)
        row = made.recommended("cyclic-poisson")
        own = row_settings(row)
        if self.sampling == "min-sep-poisson":
            own |= {"sampling": self.sampling, "groups": 1, "separation": own["groups"]}
        return replace(cell, **own)


METHODS = {
    BSR: Method("bsr"),
    AOF: Method("dense"),
    AMPLIFIED: Method("dpsgd"),
    PLAIN: Method("identity", -4),
    OUTPUT: Method("workload", -5),
    FIRST: Method(),
    CYCLIC: Method(sampling="cyclic-poisson"),
    BINS: Method(sampling="balls-in-bins"),
    MIN_SEP: Method(sampling="min-sep-poisson"),
}
