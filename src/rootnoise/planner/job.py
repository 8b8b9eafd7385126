"""What a planner is asked and what it answers: frozen values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rootnoise import _limits
from rootnoise._check import RootnoiseError, integer, real
from rootnoise.diagnostics import Finding
from rootnoise.factorization import Factorization, factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, Participation
from rootnoise.participation.samplers import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedCycleSampler,
    Sampler,
)
from rootnoise.planner.sizing import Fleet, Size, Speed
from rootnoise.workload import Workload

# Most steps of a job, for which all candidates together take about half a minute.
MOST_STEPS = 100_000
# Default limit of noise vectors of the model's size where a plan is used without being shown.
MEMORY_ROWS = 64
# What batches that need not be secret are worth, and half the memory, or an epsilon that is certain
# rather than of confidence: so much more error, as a logarithm (docs/planning.md).
WORTH, SLIGHT = 0.02, 0.005
# How far the loss is taken to pull the parameters back in a run, exp(-12): errors of this workload
# foretell accuracy better than those of linear iterates, 0 (docs/planning.md).
CONTRACTION = 12.0

# What the privacy claim of a row depends on.
AMPLIFIED = (
    "secret random sampling needed: batches drawn anew and shown to nobody; one record added or "
    "removed"
)
PLAIN = "batches in any order, which may be public; one record zeroed out"


@dataclass(frozen=True)
class Job:
    """A training job, with its privacy budget and memory limit.

    Args:
        n_examples: records in the data set.
        batch_size: records per step, expected ones under Poisson sampling.
        epochs: passes over the data.
        epsilon: privacy loss to spend.
        delta: its failure probability.
        memory_rows: most noise vectors of the model's size to keep; None for no limit.
        fleet: the model's size and the devices: rows that do not fit are not chosen.

    Raises:
        RootnoiseError: a value out of range.

    >>> Job(n_examples=1000, batch_size=64, epochs=3, epsilon=8, delta=1e-5).n_steps
    48
    """

    n_examples: int
    batch_size: int
    epochs: int
    epsilon: float
    delta: float
    memory_rows: int | None = None
    fleet: Fleet | None = None

    def __post_init__(self) -> None:
        integer("n_examples", self.n_examples, 1)
        integer("batch_size", self.batch_size, 1, self.n_examples, high_name="n_examples")
        integer("epochs", self.epochs, 1)
        if self.n_steps > MOST_STEPS:
            rule = f"n_steps must be at most {MOST_STEPS} for a plan in seconds (a larger batch, or"
            raise RootnoiseError(f"{rule} `factorize` for one mechanism), got {self.n_steps}")
        _limits.epsilon(self.epsilon)
        real("delta", self.delta, above=0, below=1)
        if self.memory_rows is not None:
            integer("memory_rows", self.memory_rows, 0)

    @property
    def period(self) -> int:
        """Steps per epoch; the last batch of each may be smaller."""
        return -(-self.n_examples // self.batch_size)

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.period

    def sampler(self, participation: Participation, seed: int | None = None) -> Sampler:
        """Return the batches of a participation that was planned for this job.

        Args:
            participation: a row's.
            seed: fixes the batches; from OS entropy when None. Keep it secret where epsilon is
                amplified.

        Raises:
            RootnoiseError: no sampler makes such batches of this job.

        >>> Job(1000, 64, epochs=3, epsilon=8, delta=1e-5).sampler(FixedCycle(16, 3)).n_steps
        48
        """
        size, batch = self.n_examples, self.batch_size
        made: Sampler | None = None
        match participation:
            case BallsInBins():
                made = BallsInBinsSampler(size, batch, self.epochs, seed)
            case FixedCycle():
                made = FixedCycleSampler(size, batch, self.epochs, seed)
            case CyclicPoisson(groups, _):
                made = CyclicPoissonSampler(size, batch, self.n_steps, groups, seed)
        # Epsilon was computed for one participation, and would be claimed for another.
        if made is None or made.participation != participation:
            raise RootnoiseError(f"participation must be one of this job's, got {participation!r}")
        return made


@dataclass(frozen=True)
class Row:
    """One way to train, calibrated to the job.

    Attributes:
        mechanism: the registered name.
        options: other options of `factorize`, given or found: enough to reproduce it.
        participation: who may take part when.
        bands: diagonals p of the strategy.
        noise_multiplier: sigma, as `Mechanism.calibrate` finds it for the job's epsilon.
        epsilon: what it spends, at most the job's.
        sensitivity: sensitivity of the strategy, an upper bound if the note says so.
        rmse_per_example: sigma * rmse / batch_size, the expected error of the iterates per unit of
            clip norm, for the workload that the plan contracts; rows are ranked by it. For another
            objective than all iterates its error takes the place of rmse.
        gap: upper bound on how far rmse is above the best factorization for the same sampling; None
            for another objective, as the bound is one on rmse.
        memory_rows: noise vectors of the model's size that must be kept between steps.
        note: what the privacy claim depends on.
        remembers_noise: those vectors are the noise of the last steps (see `sizing.held_rows`).
        certain: False where epsilon is an upper bound of confidence, from samples.
    """

    mechanism: str
    options: Mapping[str, Any]
    participation: Participation
    bands: int
    noise_multiplier: float
    epsilon: float
    sensitivity: float
    rmse_per_example: float
    gap: float | None
    memory_rows: int
    note: str
    remembers_noise: bool = False
    certain: bool = True

    @property
    def sampling(self) -> str:
        """How batches are drawn: "fixed-cycle", "poisson", "cyclic-poisson" or "balls-in-bins"."""
        match self.participation:
            case CyclicPoisson(groups=1):
                return "poisson"
        return self.participation.type

    @property
    def price(self) -> float:
        """The logarithm of the error, and of what else is asked for: `Plan.recommended`."""
        asked = WORTH * self.participation.amplified + SLIGHT * (not self.certain)
        return priced(self.rmse_per_example, self.memory_rows) + asked


def priced(error: float, memory_rows: int) -> float:
    """Return the logarithm of an error, with what its memory is worth.

    >>> round(math.exp(priced(1.0, memory_rows=7) - priced(1.0, memory_rows=3)), 3)
    1.005
    """
    return math.log(error) + SLIGHT * math.log2(1 + memory_rows)


class Planned(NamedTuple):
    """What a run needs: the noise, and the batches that its epsilon is stated for."""

    mechanism: Mechanism
    sampler: Sampler


@dataclass(frozen=True)
class Plan:
    """All rows, the best first.

    Attributes:
        workload: what was planned for.
        job: and for which data, batches, privacy and memory.
        contraction: of the loss, see `plan`.
        objective: which iterates errors are of, see `plan`.
        rows: those within the memory limit, sorted by rmse_per_example.
        left_out: mechanisms that were not tried or do not fit, and why.
        findings: those of `diagnose` for the best row that does not need secret batches.
    """

    workload: Workload
    job: Job
    rows: tuple[Row, ...]
    contraction: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    objective: str = "all"

    def recommended(self, *samplings: str) -> Row:
        """Return the row to take, of all or of some samplings: what auto and the page take.

        It is the one of least error, where 2 % more error (`WORTH`) are worth batches that need not
        be secret, and half a per cent (`SLIGHT`) half the memory, or an epsilon that is certain.

        Raises:
            RootnoiseError: see `first`.
        """
        return min(self._fitting(*samplings), key=lambda row: row.price)

    @property
    def place_to_take(self) -> int:
        """Where in `rows` the recommended one is; the first where none fits the devices."""
        fit = any(map(self.fits, self.rows))
        return self.rows.index(self.recommended()) if fit else 0

    def first(self, *samplings: str) -> Row:
        """Return the row of least error, of all or of some samplings.

        Rows that do not fit the job's devices are passed over.

        Raises:
            RootnoiseError: no row has one of these samplings, or none of them fits.
        """
        return self._fitting(*samplings)[0]

    def _fitting(self, *samplings: str) -> list[Row]:
        """Return the rows of some samplings that fit the devices, at least one."""
        any_ = not samplings or "auto" in samplings
        rows = [row for row in self.rows if any_ or row.sampling in samplings]
        if not rows:
            names = " or ".join(samplings)
            raise RootnoiseError(f"sampling must be one that the plan has, got {names!r}")
        if found := [row for row in rows if self.fits(row)]:
            return found
        least = min(size.total for row in rows if (size := self.size(row)) is not None)
        limit = self.job.fleet.device_memory if self.job.fleet else None
        raise RootnoiseError(
            f"device_memory must hold the least row, {least / 1e9:.3g} GB (more ranks, or "
            f"sharded), got {(limit or 0) / 1e9:.3g} GB"
        )

    def size(self, row: Row, speed: Speed | None = None) -> Size | None:
        """Return what a row takes on each rank of the job's fleet, None without one."""
        fleet = self.job.fleet
        if fleet is None:
            return None
        return fleet.size(self.job.n_steps, row.memory_rows, row.remembers_noise, speed)

    def fits(self, row: Row) -> bool:
        """Whether a row fits the devices; it does where they are not known."""
        size = self.size(row)
        return size is None or size.fits

    def split(self, row: Row) -> Factorization:
        """Return the factorization of a row."""
        return factorize(self.workload, row.participation, row.mechanism, **row.options)

    def take(self, row: Row, *, clip_norm: float = 1.0, seed: int | None = None) -> Planned:
        """Return the mechanism and the batches of a row.

        Args:
            row: one of `rows`.
            clip_norm: largest l2 norm of one record's gradient.
            seed: see `Job.sampler`.

        Raises:
            RootnoiseError: a clip norm out of range, or a row of another job.
        """
        sampler = self.job.sampler(row.participation, seed)
        mechanism = Mechanism.calibrate(
            self.split(row),
            row.participation,
            noise_multiplier=row.noise_multiplier,
            delta=self.job.delta,
            clip_norm=clip_norm,
        )
        if mechanism.epsilon > self.job.epsilon:
            rule = f"row must spend at most epsilon={self.job.epsilon:g}"
            raise RootnoiseError(f"{rule}, got {mechanism.epsilon:g}")
        return Planned(mechanism, sampler)

    def best(
        self, *, sampling: str = "auto", clip_norm: float = 1.0, seed: int | None = None
    ) -> Planned:
        """Return the mechanism and the batches of the row to take, or of that of one sampling.

        >>> from rootnoise.planner import plan
        >>> from rootnoise.workload import SGD
        >>> job = Job(n_examples=400, batch_size=100, epochs=4, epsilon=8, delta=1e-5)
        >>> mechanism, sampler = plan(SGD(job.n_steps, momentum=0.9), job).best(clip_norm=0.5)
        >>> mechanism.participation == sampler.participation, round(mechanism.epsilon, 6)
        (True, 8.0)
        """
        return self.take(self.recommended(sampling), clip_norm=clip_norm, seed=seed)
