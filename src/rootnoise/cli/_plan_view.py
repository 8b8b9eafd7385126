"""A plan in words: the cells of its table, the row to take, and what the rows rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rootnoise.cli import _report

if TYPE_CHECKING:
    from rootnoise.planner import Job, Plan, Row, Size, Speed

HEADINGS = ("mechanism", "batches", "bands", "memory", "noise", "error", "gap")
# Columns to leave out in a narrow terminal, in this order.
SPARE = ("bands", "noise", "memory", "batches")


def title(job: Job, work: Mapping[str, Any]) -> str:
    """Return the job and its optimizer in one line."""
    return (
        f"{job.n_steps} steps, {job.epochs} epochs of {job.n_examples} examples in batches of "
        f"{job.batch_size}, epsilon {job.epsilon:g}, delta {job.delta:g}; {optimizer(work)}"
    )


def optimizer(work: Mapping[str, Any]) -> str:
    """Return the options of a workload in words.

    >>> optimizer({"momentum": 0.9, "schedule": "cosine", "warmup": 50})
    'momentum 0.9, schedule cosine, warmup 50'
    """
    said = []
    for name, value in work.items():
        written = f"{value:g}" if isinstance(value, float) else str(value)
        said.append(name.replace("_", " ") + ("" if value is True else f" {written}"))
    return ", ".join(said)


def headings(made: Plan) -> tuple[str, ...]:
    """Return the names of the columns: those of a rank too where the plan knows the model."""
    return HEADINGS if made.job.fleet is None else (*HEADINGS, "a rank", "time")


def cells(made: Plan, speed: Speed | None = None) -> list[tuple[str, ...]]:
    """Return the rows as text; a star marks batches that must stay secret."""
    noise = _report.aligned([row.noise_multiplier for row in made.rows])
    errors = _report.aligned([row.rmse_per_example for row in made.rows])
    return [
        (
            name(row),
            batches(row),
            str(row.bands),
            str(row.memory_rows),
            sigma,
            error,
            gap(row),
            *rank(made.size(row, speed)),
        )
        for row, sigma, error in zip(made.rows, noise, errors, strict=True)
    ]


def gap(row: Row) -> str:
    """Return the certified gap; a dash where the objective has no bound."""
    if row.gap is None:
        return "-"
    return "<0.1%" if 0 < row.gap < 1e-3 else f"{row.gap:.1%}"


def rank(size: Size | None) -> tuple[str, ...]:
    """Return bytes and seconds of a rank; an exclamation mark is what does not fit."""
    if size is None:
        return ()
    return amount(size.total, "B") + "!" * (not size.fits), amount(size.seconds or 0, "s")


def amount(value: float, unit: str) -> str:
    """Return a number of three digits with a prefix.

    >>> amount(12_345_678_901, "B"), amount(0.0123, "s")
    ('12.3 GB', '12.3 ms')
    """
    prefixes = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "u"}
    size = next((size for size in prefixes if value >= 0.9995 * size), 1e-6)
    return f"{value / size:.3g} {prefixes[size]}{unit}"


def notes(made: Plan, speed: Speed | None = None) -> list[str]:
    """Return what the claims depend on, what was left out, and what could be better."""
    from rootnoise.planner import AMPLIFIED, OBJECTIVES, PLAIN

    kinds = dict.fromkeys(map(is_amplified, made.rows))
    lines = [f"* {AMPLIFIED}." if amplified else f"  {PLAIN}." for amplified in kinds]
    of: dict[str, dict[str, None]] = {}  # what holds of some rows only, and of which
    for row in made.rows:
        extra = row.note.removeprefix(AMPLIFIED).removeprefix(PLAIN).removeprefix("; ")
        if extra:
            of.setdefault(extra, {})[f"{name(row)}, {batches(row).rstrip('*')}"] = None
    lines += [f"{extra}: {' and '.join(rows)}." for extra, rows in of.items()]
    if made.objective != "all":
        lines.append(f"error: of {OBJECTIVES[made.objective]}; no bound is known, hence no gap.")
    size = made.size(made.rows[0], speed)
    if size is not None and speed is not None:
        parts = {
            "parameters and momentum": size.parameter_bytes,
            "gradients": size.gradient_bytes,
            "float64 sums": size.sum_bytes,
            "noise": size.noise_bytes,
        }
        said = ", ".join(f"{what} {amount(value, 'B')}" for what, value in parts.items())
        lines += [
            f"a rank of row 1: {said}; activations are not counted; sends "
            f"{amount(size.traffic, 'B')} a step.",
            f"time: of the noise of a step, a model ({speed.source}).",
        ]
        if not all(map(made.fits, made.rows)):
            lines.append("! does not fit the device's memory: never chosen by itself.")
    lines += [f"left out: {name}: {reason}" for name, reason in made.left_out.items()]
    return lines + [f"{found.name}: {found.message}; {found.remedy}" for found in made.findings]


def name(row: Row) -> str:
    """Return the name of a row's mechanism: independent noise under Poisson sampling is DP-SGD."""
    if row.mechanism == "identity" and row.sampling == "poisson":
        return "dpsgd (identity)"
    return f"{row.mechanism} ({row.options['base']})" if "base" in row.options else row.mechanism


def batches(row: Row) -> str:
    """Return how the batches are drawn, with a star where they must stay secret."""
    groups = getattr(row.participation, "groups", 1)
    kind = f"poisson 1/{groups}" if groups > 1 else row.sampling
    return kind + "*" * is_amplified(row)


def is_amplified(row: Row) -> bool:
    """Whether the row's epsilon counts on secret batches."""
    return row.sampling != "fixed-cycle"


def frontier(rows: Sequence[Row]) -> set[int]:
    """Return the indices of the Pareto frontier: no row has less error with as little memory."""
    least: dict[int, int] = {}
    for i, row in enumerate(rows):  # sorted by error: the first with a memory has the least
        least.setdefault(row.memory_rows, i)
    best, found = len(rows), set()
    for _, i in sorted(least.items()):
        if i < best:
            best = i
            found.add(i)
    return found
