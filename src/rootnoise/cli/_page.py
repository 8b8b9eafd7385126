"""One self-contained page of HTML about a plan: it loads nothing from elsewhere."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.cli import _plan_view, _plots, _report
from rootnoise.runs import pages, pictures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rootnoise.planner import Plan, Row, Speed

WORDS = (
    (
        "error",
        "noise multiplier x rmse / batch size: how far the noise is expected to move the trained "
        "parameters, for clip norm 1. Rows are ranked by it; half of it is as good as twice the "
        "batch.",
    ),
    (
        "gap",
        "how much smaller the error of any factorization could be at most, at the same sampling; "
        "certified, not estimated. Under Poisson sampling it counts one participation and any "
        "number of bands.",
    ),
    ("memory", "noise vectors, each as large as the model, that a step must remember."),
    (
        "noise",
        "the noise multiplier sigma: the standard deviation of the noise in units of clip norm x "
        "sensitivity. Each spends at most the epsilon above.",
    ),
    ("bands", "diagonals of the strategy; 1 is independent noise, as in DP-SGD."),
    (
        "dpsgd, identity",
        "independent noise: with Poisson batches this is DP-SGD, for which train has the mechanism "
        "dpsgd.",
    ),
    (
        "batches",
        "fixed-cycle: every record once in each epoch, in any order. poisson: every record "
        "independently at every step. poisson 1/g: cyclic Poisson sampling, the same from one of g "
        "groups in turn. balls-in-bins: once in each epoch, from a first step drawn at random.",
    ),
)

# A phone shows the columns that decide: the name with its batches below, memory, error and gap.
STYLE = """
figure { max-width: 42rem; margin: 1.5rem 0; }
.plan th:nth-child(n+4), .plan td:nth-child(n+4), .plan td:first-child, .plan th:first-child {
  text-align: right; }
.plan td:nth-child(n+3) { white-space: nowrap; overflow-wrap: normal; }
.plan thead th { position: sticky; top: 0; background: Canvas; overflow-wrap: normal; }
.plan td:first-child { white-space: nowrap; }
.plan .take { background: #0072B233; font-weight: 600; }
.tag { font-size: .8rem; font-weight: 400; opacity: .8; }
.plan .small { display: none; font-size: .85rem; font-weight: 400; }
@media (max-width: 44rem) {
  body { padding: 0 .6rem; } .plan { font-size: .9rem; }
  .plan th, .plan td { padding: .3rem .25rem; }
  .plan .wide { display: none; } .plan .small { display: block; }
}
"""
WIDE = ("batches", "bands", "noise")  # columns that only a wide page shows
SMALL = "A wider page also has bands and noise."


def write(path: Path, title: str, made: Plan, speed: Speed | None = None) -> None:
    """Write the page, or refuse a path that cannot be written."""
    rows, take = made.rows, made.place_to_take
    draw = partial(_plots.numbered, rows=rows)
    rest = "".join(f"<li>{escape(note.strip())}</li>" for note in _plan_view.notes(made, speed))
    caption = "Each point is a row of the table, by its number; further left is less memory, "
    caption += "further down less error."
    parts = [
        "<h1>Which mechanism to train with</h1>",
        f"<p>{escape(title)}.</p>",
        f'<div class="claim"><p>{escape(_advice(rows, take))}</p></div>',
        pages.figure(pictures.drawn(_alt(rows, take), draw), caption + _too_far(rows)),
        _table(made, take, speed),
        f'<p class="tag">{SMALL}</p>',
        "<h2>What the rows rest on</h2>",
        f"<ul>{rest}</ul>",
        "<h2>Words</h2>",
        pages.definitions(WORDS),
    ]
    text = pages.document("Which mechanism to train with", parts, STYLE)
    try:
        write_whole(path, text.encode())
    except OSError as reason:
        raise RootnoiseError(f"html must be writable, got {path}: {reason.strerror}") from None


def _advice(rows: Sequence[Row], take: int) -> str:
    """Say which row to take, and what the best one costs if it is another."""
    row, best = rows[take], rows[0]
    said = (
        f"Most should take row {take + 1}: {_plan_view.name(row)} with "
        f"{_plan_view.batches(row).rstrip('*')} batches, which keeps {row.memory_rows} noise "
        "vectors of the model's size."
    )
    if _plan_view.is_amplified(row):
        said += " Its batches must be drawn at random and stay secret."
    if take:
        less = _report.percent(1 - best.rmse_per_example / row.rmse_per_example)
        said += (
            f" Row 1, {_plan_view.name(best)}, has {less} less error and keeps {best.memory_rows}."
        )
    return f"{said} With --train-args {take + 1} plan prints the command that trains with it."


def _alt(rows: Sequence[Row], take: int) -> str:
    row = rows[take]
    return (
        f"Expected error of {len(rows)} rows over the memory that each needs: from "
        f"{rows[0].rmse_per_example:.4g} with {rows[0].memory_rows} noise vectors up; row "
        f"{take + 1} has {row.rmse_per_example:.4g} with {row.memory_rows}."
    )


def _too_far(rows: Sequence[Row]) -> str:
    """Say which rows the picture leaves out."""
    most = _plots.FARTHEST
    limit = most * rows[0].rmse_per_example
    far = [i for i, row in enumerate(rows, 1) if row.rmse_per_example > limit]
    left_out = _plots.ranges(far)
    return f" Not drawn, with over {most} times the least error: {left_out}." if far else ""


def _table(made: Plan, take: int, speed: Speed | None) -> str:
    """Return the table, with what is said of some rows below their names."""
    kinds = [' class="wide"' if name in WIDE else "" for name in _plan_view.headings(made)]
    head = "".join(
        f'<th scope="col"{kind}>{name}</th>'
        for name, kind in zip(_plan_view.headings(made), kinds, strict=True)
    )
    good = _plan_view.frontier(made.rows)
    body = []
    for i, row in enumerate(_plan_view.cells(made, speed)):
        tags = list(_tags(i, take, good))
        below = f'<span class="small">{escape(row[1])}</span>'
        below += "".join(f' <span class="tag">{tag}</span>' for tag in tags)
        inner = [escape(row[0]) + below, *map(escape, row[1:])]
        line = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(inner, kinds, strict=True))
        mark = ' class="take"' if i == take else ""
        body.append(f"<tr{mark}><td>{i + 1}</td>{line}</tr>\n")
    first = '<th scope="col"><abbr title="row">#</abbr></th>'
    return (
        f'<table class="plan"><thead><tr>{first}{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _tags(i: int, take: int, good: set[int]) -> Iterator[str]:
    if i == take:
        yield "take this one"
    elif i in good:
        yield "best for its memory"
