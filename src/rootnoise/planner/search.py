"""All mechanisms that fit a job, tried one by one.

Sensitivities and noise multipliers differ between samplings, so mechanisms are compared by noise
multiplier times rmse divided by the batch size: the expected error of the iterates per unit of clip
norm. Which iterates count is in `objective.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from rootnoise import accounting
from rootnoise._check import RootnoiseError, integer
from rootnoise.bounds.certificate import Certificate, lower_bound
from rootnoise.causal import CausalMatrix, Inverse, Toeplitz
from rootnoise.diagnostics import Finding, diagnose
from rootnoise.factorization import AIMLESS, Factorization, default_bands, factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    Participation,
    SingleParticipation,
)
from rootnoise.planner import bins as in_bins
from rootnoise.planner import groups
from rootnoise.planner import objective as objectives
from rootnoise.planner.job import AMPLIFIED, CONTRACTION, PLAIN, Job, Plan, Row
from rootnoise.workload import MatrixWorkload, Workload

# Most steps for which a mechanism is tried: for more, it would take longer than about 10 s.
AFFORDABLE = {
    "dense": 512,
    "bandmf": 2560,
    "tree": 4096,
}
# The same for workloads that are not Toeplitz: there their errors take O(n^2) time or memory.
AFFORDABLE_IN_GENERAL = AFFORDABLE | {"workload": 4096, "square-root": 20_000, "bsr-gamma": 20_000}
# Free bands take n p^2 time: 2 to 5 s at most for so much. Under cyclic sampling, where they gain
# at most 1 % (docs/planning.md), they are tried up to so many steps.
FREE, FREE_IN_CYCLES = 2**25, 512
# Where a search over all entries ends, as a part of the error over 100 (bandmf), and a gap (dense).
CLOSE = 1e-3
# Beyond, only cyclic sampling near the best number of groups is tried, and columns are scaled of at
# most so many bands: 0.5 s at 100,000 steps, where 2,000 bands of BSR took 12 s. So are all bands
# where the workload is not Toeplitz.
LONG, MOST_SCALED = 20_000, 256
# Bands to try below the separation, for less memory.
SMALL = (2, 4, 16, 64)
# Enough buffers for blt at any number of steps.
BUFFERS = 6

# Mechanisms without a size to choose.
UNSIZED = ("identity", "lambda-cgd", "tree", "square-root", "workload")

# A mechanism by name with its options.
Candidate = tuple[str, dict[str, Any]]
# Called with how many candidates were tried, of how many, and what is tried next.
Progress = Callable[[int, int, str], None]


def plan(
    workload: Workload,
    job: Job,
    progress: Progress | None = None,
    *,
    bins: bool | None = None,
    contraction: float = CONTRACTION,
    objective: str = "all",
) -> Plan:
    """Return every mechanism that fits the job and its memory, ranked by expected error.

    All are tried in fixed cycles, where every record is in one batch of each epoch. Independent
    noise is also tried with Poisson sampling, and strategies of p bands with cyclic Poisson
    sampling of p groups: amplification by sampling beats correlation if epsilon is small or batches
    are a small part of the data, but it needs random and secret batches.

    Args:
        workload: what the optimizer computes, of `job.n_steps` steps.
        job: data, batches, privacy and memory.
        progress: called before each candidate with how many were tried, of how many, and its name;
            not at all where the process has made this plan. Of how many changes once, when the
            numbers of groups are known.
        bins: also try balls-in-bins sampling, with what is best there by a forecast of the
            mechanisms in fixed cycles, and of `banded` and `bandmf` with fewer bands [default: in
            a single epoch of at most 512 steps, where they often have 10 to 20 % less error]. That
            takes some seconds, or half a minute with 500 steps in an epoch. Unless the bands are
            few, epsilon is an upper bound of confidence there.
        contraction: strategies are optimised and ranked for `workload.contracted(it)`, as a loss
            of curvature forgets old noise; 0 counts all of it, as the papers on factorizations do.
        objective: which iterates rows are ranked by: "all" (root mean square), "rates" (the same
            with learning rates as weights), "last", "tail" (root mean square of the last quarter)
            or "tail-average" (the average of the last quarter). Strategies are optimised for all.

    Raises:
        RootnoiseError: a workload of another number of steps, a contraction below 0, or an
            objective that is unknown or wants rates of a workload that names none.

    >>> from rootnoise.workload import SGD
    >>> job = Job(n_examples=400, batch_size=100, epochs=4, epsilon=8, delta=1e-5, memory_rows=1)
    >>> best = plan(SGD(job.n_steps, momentum=0.9), job).rows[0]
    >>> best.mechanism, best.sampling, best.memory_rows
    ('lambda-cgd', 'fixed-cycle', 1)
    """
    integer("workload's n_steps", workload.n_steps, job.n_steps, job.n_steps)
    objectives.check(workload, objective)
    bins = in_bins.pays(job) if bins is None else bins
    tell = progress or (lambda done, of, name: None)
    if isinstance(workload, MatrixWorkload):  # to compare n^2 numbers takes as long as some plans
        return _made(workload, job, tell, bins, contraction, objective)
    key = json.dumps(workload.to_dict(), sort_keys=True), job, bins, contraction, objective
    made = _KEPT.pop(key, None) or _made(workload, job, tell, bins, contraction, objective)
    _KEPT[key] = made
    if len(_KEPT) > MOST_KEPT:
        del _KEPT[next(iter(_KEPT))]
    # Mappings of their own: whoever changes them changes no later plan.
    rows = tuple(replace(row, options=dict(row.options)) for row in made.rows)
    return replace(made, rows=rows, left_out=dict(made.left_out))


# Plans of this process by all that they depend on, the latest last: a process has one version.
_KEPT: dict[tuple[str, Job, bool, float, str], Plan] = {}
MOST_KEPT = 8


def _made(
    workload: Workload,
    job: Job,
    progress: Progress,
    bins: bool,
    contraction: float,
    objective: str,
) -> Plan:
    aim = workload.contracted(contraction)
    search = _Search(aim, job, progress, objective, bins)
    search.all(FixedCycle(job.period, job.epochs))
    search.amplified()
    if bins:
        search.bins()
    ranked = _ranked(search.rows.values())
    names = {row.mechanism for row in ranked}
    left_out = {name: reason for name, reason in search.refused.items() if name not in names}
    findings = _findings(aim, job, ranked)
    if contraction:  # so that `factorize` makes them for the workload itself
        ranked = tuple(map(partial(_aimed, contraction), ranked))
    return Plan(workload, job, ranked, contraction, left_out, findings, objective)


def _aimed(contraction: float, row: Row) -> Row:
    own = {} if row.mechanism in AIMLESS else {"contraction": contraction}
    return replace(row, options={**row.options, **own})


class _Search:
    """The rows found so far, and what was refused."""

    def __init__(
        self, workload: Workload, job: Job, progress: Progress, objective: str, bins: bool
    ) -> None:
        self.workload, self.job, self._progress = workload, job, progress
        self._objective = objective
        self._last = 2 * bins  # candidates that `bins` tries
        self._done, self._of = 0, sum(map(self._number, samplings(job))) + self._last
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.refused: dict[str, str] = {}

    def all(self, who: Participation) -> list[Row]:
        """Try all candidates of one participation, and return their rows."""
        cost, found = _calibrated(self.job, who), []
        for name, options in self._candidates(who):
            self._begin(name)
            try:
                split = _split(self.workload, self.job, who, name, options)
            except RootnoiseError as reason:
                self.refused.setdefault(name, str(reason))
                continue
            found.append(self._add(split, options, who, cost))
        return found

    def amplified(self) -> None:
        """Try independent draws, powers of two, and the best number of groups near the best."""
        job, powers = self.job, groups.powers(self.job)
        if not powers:
            return
        self._progress(self._done, self._of, "numbers of groups")
        near = groups.region(self.workload, job, self._objective)
        if job.n_steps > LONG:
            powers = [who for who in powers if who.groups in (1, *near)]
        self._of = self._done + sum(map(self._number, powers)) + self._last
        gains = {}
        for who in powers:
            found = self.all(who)
            if who.groups in near:
                errors = {row.mechanism: row.rmse_per_example for row in found}
                gains[who.groups] = min(errors.values()) / errors.get("bsr", min(errors.values()))
        number = groups.best(self.workload, job, gains, self._objective)
        best = groups.cyclic(job, number)
        if best not in powers:
            self._of += self._number(best)
            self.all(best)

    def bins(self) -> None:
        """Try balls in bins with the strategies that are best there by a forecast."""
        who = BallsInBins(self.job.period, self.job.epochs)
        self._progress(self._done, self._of, "strategies for balls in bins")
        chosen = self._in_bins(who)
        self._of = self._done + len(chosen)
        for name, options in chosen:
            self._begin(f"{name}, balls in bins")
            split = factorize(self.workload, who, name, **options)
            self._add(split, options, who, _calibrated(self.job, who, split.strategy))

    def _in_bins(self, who: BallsInBins) -> list[Candidate]:
        """Return what to calibrate: of what is best in fixed cycles, and of few bands."""
        best: dict[str, Row] = {}
        for row in _ranked(self.rows.values()):
            if row.sampling == "fixed-cycle":
                best.setdefault(row.mechanism, row)
        found = [(row.mechanism, dict(row.options)) for row in best.values()]
        if who.period > in_bins.MANY or who.period * self.job.n_steps > in_bins.LARGE:
            self.refused["balls in bins"] = "few strategies are tried with so many bins"
            light = [name for name, row in best.items() if row.memory_rows <= 1]
            return [one for one in found if one[0] in (found[0][0], light[0])]
        looked = in_bins.Forecasts(self.job, self._objective)

        def look(name: str, options: dict[str, Any]) -> float:
            try:
                split = _split(self.workload, self.job, who, name, options)
                return looked.look((name, options), split)
            except RootnoiseError as reason:
                self.refused.setdefault(f"{name}, balls in bins", str(reason))
                return math.inf

        for name, options in found:
            look(name, options)
        n, sizes = self.job.n_steps, [p for p in in_bins.BANDS if p <= who.period]
        errors = {p: look("banded", {"bands": p}) for p in sizes}
        near = min(errors, key=errors.__getitem__, default=1)
        if 1 < near <= math.isqrt(FREE // n):
            look("bandmf", {"bands": near, "tolerance": CLOSE})
        if passed := looked.passed():
            self.refused["balls in bins"] = passed
        return [looked.chosen] if looked.chosen else []

    def _begin(self, name: str) -> None:
        self._progress(self._done, self._of, name)
        self._done += 1

    def _candidates(self, who: Participation) -> list[Candidate]:
        """Return the candidates as they are tried, each once."""
        found: list[Candidate] = []
        for name, wanted in candidates(self.job, who):
            one = name, _affordable(self.workload, wanted)
            if one not in found:
                found.append(one)
        return found

    def _number(self, who: Participation) -> int:
        return len(self._candidates(who))

    def _add(
        self, split: Factorization, options: Mapping[str, Any], who: Participation, cost: Cost
    ) -> Row:
        bound = self._bound(who) if self._objective == "all" else None
        row = _row(split, options, self.job, who, cost, self._objective, bound)
        return self.rows.setdefault((row.mechanism, who, row.bands, row.memory_rows), row)

    def _bound(self, who: Participation) -> Certificate:
        # However many groups, cyclic Poisson sampling counts as one participation.
        once = isinstance(who, CyclicPoisson)
        return self._once if once else self._cycle

    @cached_property
    def _once(self) -> Certificate:
        return lower_bound(self.workload, SingleParticipation())

    @cached_property
    def _cycle(self) -> Certificate:
        return lower_bound(self.workload, FixedCycle(self.job.period, self.job.epochs))


def samplings(job: Job) -> list[Participation]:
    """Return the fixed cycle, Poisson sampling, and cyclic Poisson sampling of 2, 4, ... groups.

    A group of g has n_examples / g records, each drawn with probability g batch_size / n_examples
    in the group's steps. Draws with probability 1 give no amplification, and are left out.
    """
    return [FixedCycle(job.period, job.epochs), *groups.powers(job)]


def candidates(job: Job, participation: Participation) -> list[Candidate]:
    """Return the candidates for one participation, in the sizes that fit the memory."""
    b = default_bands(job.n_steps, participation)
    if isinstance(participation, CyclicPoisson):
        if b == 1:
            return [("identity", {})]
        free = (
            [("bandmf", {"bands": b, "tolerance": CLOSE})] if job.n_steps <= FREE_IN_CYCLES else []
        )
        return [(name, {"bands": b}) for name in ("bsr", "banded")] + free
    memory = job.n_steps if job.memory_rows is None else job.memory_rows
    room = max(2, min(b, memory + 1))  # one band would be independent noise
    sizes = sorted({p for p in (*SMALL, room) if 1 < p <= room})
    found: list[Candidate] = [(name, {}) for name in UNSIZED]
    found += [(name, {"bands": p}) for name in ("bsr", "banded", "bisr") for p in sizes]
    if room >= b:  # the best p may be beyond the separation
        found += [("bsr", {"bands": "auto"}), ("bisr", {"bands": "auto"})]
    found += [("banded-inverse", {"bands": p}) for p in sizes[: 3 if job.n_steps <= LONG else 1]]
    found += [("blt", {"buffers": max(1, min(BUFFERS, memory))})]
    found += [("bsr-gamma", {"bands": room}), ("dense", {"tolerance": CLOSE})]
    most = max(1, min(room, math.isqrt(FREE // job.n_steps)))
    found += [("bandmf", {"bands": most, "tolerance": CLOSE})]
    scaled = ("column-normalised", "epoch-scaled")
    room = room if job.n_steps <= LONG else min(room, MOST_SCALED)
    return found + [(name, {"bands": room, "base": "banded"}) for name in scaled]


def _affordable(workload: Workload, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, with few bands in a long run of a workload that is not Toeplitz."""
    wanted = options.get("bands")
    if wanted is None or workload.n_steps <= LONG or workload.matrix.is_toeplitz:
        return options
    return options | {"bands": MOST_SCALED if wanted == "auto" else min(wanted, MOST_SCALED)}


def _split(
    workload: Workload, job: Job, who: Participation, name: str, options: Mapping[str, Any]
) -> Factorization:
    """Factorize one candidate, or refuse it: too slow, not applicable, or too much memory."""
    most = AFFORDABLE if workload.matrix.is_toeplitz else AFFORDABLE_IN_GENERAL
    if job.n_steps > most.get(name, job.n_steps):
        raise RootnoiseError(f"n_steps must be at most {most[name]} for an answer in seconds")
    split = factorize(workload, who, name, **options)
    if job.memory_rows is not None:
        integer("memory_rows", job.memory_rows, split.memory_rows)
    return split


class Cost(NamedTuple):
    """A noise multiplier, the epsilon that it spends, and whether that is certain."""

    sigma: float
    epsilon: float
    certain: bool


def _calibrated(job: Job, who: Participation, strategy: CausalMatrix | None = None) -> Cost:
    """Return what `Mechanism.calibrate` will find, so that a run has its plan's numbers."""
    n, delta = job.n_steps, job.delta
    sigma = accounting.noise_multiplier(who, n, job.epsilon, delta, strategy=strategy)
    spent = accounting.privacy_cost(who, n, sigma, delta, strategy=strategy)
    return Cost(sigma, spent.epsilon, spent.monte_carlo is None)


def _row(
    split: Factorization,
    options: Mapping[str, Any],
    job: Job,
    who: Participation,
    cost: Cost,
    objective: str,
    bound: Certificate | None,
) -> Row:
    sens, error = split.sensitivity(who), objectives.expected(split, who, objective)
    note = AMPLIFIED if who.amplified else PLAIN
    note += "" if sens.exact else "; sensitivity is an upper bound"
    note += "" if cost.certain else "; epsilon is an upper confidence bound"
    return Row(
        mechanism=split.mechanism,
        options=options,
        participation=who,
        bands=split.strategy.bands,
        noise_multiplier=cost.sigma,
        epsilon=cost.epsilon,
        sensitivity=sens.value,
        rmse_per_example=cost.sigma * error / job.batch_size,
        gap=None if bound is None else bound.gap(error),
        memory_rows=split.memory_rows,
        note=note,
        certain=cost.certain,
        remembers_noise=isinstance(split.noising, Inverse)
        and isinstance(split.noising.base, Toeplitz),
    )


def _ranked(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: row.rmse_per_example))


def _findings(workload: Workload, job: Job, ranked: tuple[Row, ...]) -> tuple[Finding, ...]:
    """Return what could be better about the best row in fixed cycles."""
    best = next((row for row in ranked if row.sampling == "fixed-cycle"), None)
    if best is None:
        return ()
    who = best.participation
    split = factorize(workload, who, best.mechanism, **best.options)
    made = Mechanism.calibrate(split, who, noise_multiplier=best.noise_multiplier, delta=job.delta)
    return tuple(diagnose(made, batch_size=job.batch_size, n_examples=job.n_examples))
