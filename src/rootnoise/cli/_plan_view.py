"""A plan in words: the cells of its table, the row to take, and what the rows rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rootnoise.cli import _report

if TYPE_CHECKING:
    from rootnoise.planner import Job, Plan, Row

HEADINGS = ("mechanism", "batches", "bands", "memory", "noise", "error", "gap")
# Columns to leave out in a narrow terminal, in this order.
SPARE = ("bands", "noise", "memory", "batches")
# So much more error is worth less memory, or batches that need not be secret.
WORTH = 0.05


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


def cells(made: Plan) -> list[tuple[str, ...]]:
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
            "<0.1%" if 0 < row.gap < 1e-3 else f"{row.gap:.1%}",
        )
        for row, sigma, error in zip(made.rows, noise, errors, strict=True)
    ]


def notes(made: Plan) -> list[str]:
    """Return what the claims depend on, what was left out, and what could be better."""
    lines = [
        f"{'*' if is_amplified(row) else ' '} {row.note}."
        for row in {is_amplified(row): row for row in reversed(made.rows)}.values()
    ]
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


def choice(rows: Sequence[Row]) -> int:
    """Return the place of the row that most should take: of the good ones the least demanding.

    Of the rows with nearly the least error, those without secret batches come first, then those
    with less memory, then those with less error.
    """
    most = (1 + WORTH) * rows[0].rmse_per_example
    good = [i for i, row in enumerate(rows) if row.rmse_per_example <= most]
    return min(good, key=lambda i: (is_amplified(rows[i]), rows[i].memory_rows, i))


def frontier(rows: Sequence[Row]) -> set[int]:
    """Return the places of the rows than which none with as little memory is better."""
    least: dict[int, int] = {}
    for i, row in enumerate(rows):  # ranked: the first of a memory is its best
        least.setdefault(row.memory_rows, i)
    best, found = len(rows), set()
    for _, i in sorted(least.items()):
        if i < best:
            best = i
            found.add(i)
    return found
