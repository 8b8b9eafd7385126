"""Which mechanism to train with: all that fit a job and a memory limit, ranked by expected error.

Sensitivities and noise multipliers differ between samplings, so mechanisms are compared by noise
multiplier times rmse divided by the batch size: the expected error of the iterates per unit of clip
norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rootnoise import _limits, accounting
from rootnoise._check import RootnoiseError, integer, real
from rootnoise.bounds.certificate import Certificate, lower_bound
from rootnoise.diagnostics import Finding, diagnose
from rootnoise.factorization import Factorization, default_bands, factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    Participation,
    SingleParticipation,
)
from rootnoise.workload import Workload

# Most steps for which a mechanism is tried: for more, it would take longer than about 10 s.
AFFORDABLE = {
    "dense": 256,
    "bandmf": 256,
    "tree": 4096,
    "column-normalised": 20_000,
    "epoch-scaled": 20_000,
    "banded": 200_000,
}
# Most steps of a job, for which all candidates together take about half a minute.
MOST_STEPS = 100_000
# Fraction of epsilon that calibration under sampling may waste, to answer within seconds.
TOLERANCE = 0.01
# Bands to try below the separation, for less memory.
SMALL = (2, 4, 16, 64)
# Enough buffers for blt at any number of steps.
BUFFERS = 6

# Mechanisms without a size to choose.
UNSIZED = ("identity", "lambda-cgd", "tree", "square-root", "workload", "dense")

# What the privacy claim of a row depends on.
AMPLIFIED = (
    "secret random sampling needed: batches drawn anew and shown to nobody; one record added or "
    "removed"
)
PLAIN = "batches in any order, which may be public; one record zeroed out"

# A mechanism by name with its options.
Candidate = tuple[str, dict[str, Any]]
# Called with the number of rows so far, and the name of the mechanism that is tried next.
Progress = Callable[[int, str], None]


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


@dataclass(frozen=True)
class Row:
    """One way to train, calibrated to the job.

    Attributes:
        mechanism: the registered name.
        options: other options of `factorize`, given or found: enough to reproduce it.
        participation: who may take part when.
        bands: diagonals p of the strategy.
        noise_multiplier: sigma; it spends at most epsilon.
        sensitivity: sensitivity of the strategy, an upper bound if the note says so.
        rmse_per_example: sigma * rmse / batch_size, the expected error of the iterates per unit of
            clip norm; rows are ranked by it.
        gap: upper bound on how far rmse is above the best factorization for the same sampling.
        memory_rows: noise vectors of the model's size that must be kept between steps.
        note: what the privacy claim depends on.
    """

    mechanism: str
    options: Mapping[str, Any]
    participation: Participation
    bands: int
    noise_multiplier: float
    sensitivity: float
    rmse_per_example: float
    gap: float
    memory_rows: int
    note: str

    @property
    def sampling(self) -> str:
        """How batches are drawn: "fixed-cycle", "poisson", "cyclic-poisson" or "balls-in-bins"."""
        match self.participation:
            case CyclicPoisson(groups=1):
                return "poisson"
        return self.participation.type


@dataclass(frozen=True)
class Plan:
    """All rows, the best first.

    Attributes:
        rows: those within the memory limit, sorted by rmse_per_example.
        left_out: mechanisms that were not tried or do not fit, and why.
        findings: those of `diagnose` for the best row that does not need secret batches.
    """

    rows: tuple[Row, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def plan(
    workload: Workload, job: Job, progress: Progress | None = None, *, bins: bool = False
) -> Plan:
    """Return every mechanism that fits the job and its memory, ranked by expected error.

    All are tried in fixed cycles, where every record is in one batch of each epoch. Independent
    noise is also tried with Poisson sampling, and strategies of p bands with cyclic Poisson
    sampling of p groups: amplification by sampling beats correlation if epsilon is small or batches
    are a small part of the data, but it needs random and secret batches.

    Args:
        workload: what the optimizer computes, of `job.n_steps` steps.
        job: data, batches, privacy and memory.
        progress: called before each candidate.
        bins: also try balls-in-bins sampling, with the best mechanism in fixed cycles and the best
            one with one row of memory: Monte Carlo accounting takes up to half a minute.

    Raises:
        RootnoiseError: a workload of another number of steps.

    >>> from rootnoise.workload import SGD
    >>> job = Job(n_examples=400, batch_size=100, epochs=4, epsilon=8, delta=1e-5, memory_rows=1)
    >>> best = plan(SGD(job.n_steps, momentum=0.9), job).rows[0]
    >>> best.mechanism, best.sampling, best.memory_rows
    ('lambda-cgd', 'fixed-cycle', 1)
    """
    integer("workload's n_steps", workload.n_steps, job.n_steps, job.n_steps)
    rows: dict[tuple[Any, ...], Row] = {}
    refused: dict[str, str] = {}
    kinds = samplings(job)
    # However many groups, cyclic Poisson sampling counts as one participation.
    bounds = [lower_bound(workload, who) for who in (kinds[0], SingleParticipation())]
    for who in kinds:
        bound = bounds[isinstance(who, CyclicPoisson)]
        sigma = accounting.noise_multiplier(who, job.n_steps, job.epsilon, job.delta, TOLERANCE)
        for name, options in candidates(job, who):
            if progress is not None:
                progress(len(rows), name)
            try:
                split = _split(workload, job, who, name, options)
            except RootnoiseError as reason:
                refused.setdefault(name, str(reason))
                continue
            row = _row(split, options, job, who, sigma, bound)
            rows.setdefault((name, who, row.bands, row.memory_rows), row)
    who = BallsInBins(job.period, job.epochs)
    for twin in _best_in_cycles(_ranked(rows.values())) if bins else []:
        if progress is not None:
            progress(len(rows), f"{twin.mechanism}, balls in bins")
        split = factorize(workload, who, twin.mechanism, **twin.options)
        sigma = accounting.noise_multiplier(
            who, job.n_steps, job.epsilon, job.delta, strategy=split.strategy
        )
        row = _row(split, twin.options, job, who, sigma, bounds[0])
        rows[row.mechanism, who, row.bands, row.memory_rows] = row
    ranked = _ranked(rows.values())
    names = {row.mechanism for row in ranked}
    left_out = {name: reason for name, reason in refused.items() if name not in names}
    return Plan(ranked, left_out, _findings(workload, job, ranked))


def samplings(job: Job) -> list[Participation]:
    """Return the fixed cycle, Poisson sampling, and cyclic Poisson sampling of 2, 4, ... groups.

    A group of g has n_examples / g records, each drawn with probability g batch_size / n_examples
    in the group's steps. Draws with probability 1 give no amplification, and are left out.
    """
    found: list[Participation] = [FixedCycle(job.period, job.epochs)]
    groups = 1
    while groups * job.batch_size < job.n_examples and groups <= job.n_steps:
        if job.memory_rows is None or groups - 1 <= job.memory_rows:
            found.append(CyclicPoisson(groups, groups * job.batch_size / job.n_examples))
        groups *= 2
    return found


def candidates(job: Job, participation: Participation) -> list[Candidate]:
    """Return the candidates for one participation, in the sizes that fit the memory."""
    b = default_bands(job.n_steps, participation)
    if isinstance(participation, CyclicPoisson):
        if b == 1:
            return [("identity", {})]
        return [(name, {"bands": b}) for name in ("bsr", "banded", "bandmf")] + [("dense", {})]
    memory = job.n_steps if job.memory_rows is None else job.memory_rows
    room = max(2, min(b, memory + 1))  # one band would be independent noise
    sizes = sorted({p for p in (*SMALL, room) if 1 < p <= room})
    found: list[Candidate] = [(name, {}) for name in UNSIZED]
    found += [(name, {"bands": p}) for name in ("bsr", "banded", "bisr") for p in sizes]
    if room >= b:  # the best p may be beyond the separation
        found += [("bsr", {"bands": "auto"}), ("bisr", {"bands": "auto"})]
    found += [("banded-inverse", {"bands": p}) for p in sizes[:3]]  # larger sizes gain little
    found += [("blt", {"buffers": max(1, min(BUFFERS, memory))})]
    found += [(name, {"bands": room}) for name in ("bsr-gamma", "bandmf")]
    scaled = ("column-normalised", "epoch-scaled")
    return found + [(name, {"bands": room, "base": "banded"}) for name in scaled]


def _split(
    workload: Workload, job: Job, who: Participation, name: str, options: Mapping[str, Any]
) -> Factorization:
    """Factorize one candidate, or refuse it: too slow, not applicable, or too much memory."""
    if job.n_steps > AFFORDABLE.get(name, job.n_steps):
        raise RootnoiseError(f"n_steps must be at most {AFFORDABLE[name]} for an answer in seconds")
    split = factorize(workload, who, name, **options)
    if job.memory_rows is not None:
        integer("memory_rows", job.memory_rows, split.memory_rows)
    return split


def _row(
    split: Factorization,
    options: Mapping[str, Any],
    job: Job,
    who: Participation,
    sigma: float,
    bound: Certificate,
) -> Row:
    sens, rmse = split.sensitivity(who), split.rmse(who)
    note = AMPLIFIED if who.amplified else PLAIN
    return Row(
        mechanism=split.mechanism,
        options=options,
        participation=who,
        bands=split.strategy.bands,
        noise_multiplier=sigma,
        sensitivity=sens.value,
        rmse_per_example=sigma * rmse / job.batch_size,
        gap=bound.gap(rmse),
        memory_rows=split.memory_rows,
        note=note if sens.exact else f"{note}; sensitivity is an upper bound",
    )


def _ranked(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: row.rmse_per_example))


def _best_in_cycles(ranked: Iterable[Row]) -> list[Row]:
    """Return the best row in fixed cycles, and the best with little memory if it is another one."""
    cycles = [row for row in ranked if row.sampling == "fixed-cycle"]
    light = next(row for row in cycles if row.memory_rows <= 1)  # at least independent noise
    return [cycles[0]] if light is cycles[0] else [cycles[0], light]


def _findings(workload: Workload, job: Job, ranked: tuple[Row, ...]) -> tuple[Finding, ...]:
    """Return what could be better about the best row in fixed cycles."""
    best = next((row for row in ranked if row.sampling == "fixed-cycle"), None)
    if best is None:
        return ()
    who = best.participation
    split = factorize(workload, who, best.mechanism, **best.options)
    made = Mechanism.calibrate(split, who, noise_multiplier=best.noise_multiplier, delta=job.delta)
    return tuple(diagnose(made, batch_size=job.batch_size, n_examples=job.n_examples))
