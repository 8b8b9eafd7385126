"""One self-contained page of HTML about a plan: it loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.cli import _plots

if TYPE_CHECKING:
    from rootnoise.planner import Row

WORDS = {
    "error": "noise multiplier x rmse / batch size: how far the noise is expected to move the "
    "trained parameters, for clip norm 1. Rows are ranked by it; half of it is as good as twice "
    "the batch.",
    "gap": "how much smaller the error of any factorization could be at most, at the same "
    "sampling; certified, not estimated. Under Poisson sampling it counts one participation and "
    "any number of bands.",
    "memory": "noise vectors, each as large as the model, that a step must remember.",
    "noise": "the noise multiplier sigma: the standard deviation of the noise in units of clip "
    "norm x sensitivity. Each spends at most the epsilon above.",
    "bands": "diagonals of the strategy; 1 is independent noise, as in DP-SGD.",
    "batches": "fixed-cycle: every record once in each epoch, in any order. poisson: every record "
    "independently at every step. poisson 1/g: cyclic Poisson sampling, the same from one of g "
    "groups in turn. balls-in-bins: once in each epoch, from a first step drawn at random.",
}

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
thead th { position: sticky; top: 0; background: Canvas; }
tbody tr:first-child { font-weight: 600; background: var(--soft); }
td { white-space: nowrap; }
figure { margin: 1.5rem 0; background: white; border-radius: 6px; padding: .5rem; }
svg { width: 100%; height: auto; } dt { font-weight: 600; } .scroll { overflow-x: auto; }
"""


def write(
    path: Path,
    title: str,
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    notes: Sequence[str],
    rows: Sequence[Row],
) -> None:
    """Write the page, or refuse a path that cannot be written."""
    svg = _plots.plan(rows, "svg").decode()
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in cells
    )
    words = "".join(f"<dt>{word}</dt><dd>{escape(text)}</dd>\n" for word, text in WORDS.items())
    lines = "".join(f"<li>{escape(note.strip())}</li>\n" for note in notes)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rootnoise plan</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Which mechanism to train with</h1>
<p>{escape(title)}. The best row is the first.</p>
<figure>{svg[svg.index("<svg") :]}</figure>
<div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody></table></div>
<h2>What the rows rest on</h2>
<ul>
{lines}</ul>
<h2>Words</h2>
<dl>
{words}</dl>
</body>
</html>
"""
    try:
        write_whole(path, page.encode())
    except OSError as reason:
        raise RootnoiseError(f"html must be writable, got {path}: {reason.strerror}") from None
