"""Print results: tables for people, one JSON object for machines."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

# Width in characters of a table's first column in a narrow terminal.
NARROW = 10


def show(title: str, values: dict[str, Any], as_json: bool) -> None:
    """Print one result: as a two-column table, or as one JSON object and nothing else."""
    if as_json:
        print(json.dumps(values, allow_nan=False))
        return
    head(title)
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        part = name.endswith("gap") and value is not None
        table.add_row(name.replace("_", " "), percent(value) if part else text(value))
    Console().print(table)


def table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    spare: Sequence[str] = (),
) -> None:
    """Print rows under headings; columns after the second are numbers. Only the first may wrap.

    In a narrow terminal columns are left out, in the order of `spare`.
    """
    head(title)
    console, grid = Console(), Table()
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    least = [min(widths[0], NARROW), *widths[1:]]
    shown, hidden = list(range(len(headings))), []
    for name in spare:
        if sum(least[i] + 3 for i in shown) + 1 > console.width:
            shown.remove(headings.index(name))
            hidden.append(name)
    others = sum(widths[i] + 3 for i in shown if i) + 1
    widths[0] = max(least[0], min(widths[0], console.width - others - 3))
    for i in shown:
        justify: Literal["left", "right"] = "left" if i < 2 else "right"
        grid.add_column(headings[i], justify=justify, overflow="fold", width=widths[i])
    for row in rows:
        grid.add_row(*(row[i] for i in shown))
    console.print(grid)
    if hidden:
        print(f"left out, as the terminal is narrow: {', '.join(hidden)}")


def head(title: str) -> None:
    """Print the title of a table, which may be wider than the table."""
    Console().print(title, style="italic", markup=False, highlight=False)


def lines(*texts: str) -> None:
    """Print lines of prose, broken at words where the terminal is narrower."""
    width = Console().width
    for one in texts:
        print(textwrap.fill(one, width, subsequent_indent="  ", break_on_hyphens=False))


def percent(value: float) -> str:
    """Format a fraction as a percentage.

    >>> percent(0.0512), percent(13.05), percent(1.5e-7)
    ('5.1%', '1305.0%', '1.5e-05%')
    """
    return f"{value:.1%}" if abs(value) >= 1e-3 or value == 0 else f"{100 * value:.2g}%"


def aligned(values: Sequence[float], digits: int = 4) -> list[str]:
    """Format numbers of one column alike: the least of them with so many digits.

    >>> aligned([1.26, 14.8312]), aligned([0.0, 1e-7])
    (['1.260', '14.831'], ['0.000e+00', '1.000e-07'])
    """
    least = min((abs(value) for value in values if value), default=1.0)
    if least < 1e-4 or max(map(abs, values), default=0.0) >= 1e7:
        return [f"{value:.{digits - 1}e}" for value in values]
    places = max(0, digits - 1 - math.floor(math.log10(least)))
    return [f"{value:.{places}f}" for value in values]


def text(value: Any) -> str:
    """Format one value for a table cell.

    >>> text([1.0, 0.5]), text(True), text(0.123456789)
    ('1, 0.5', 'yes', '0.123457')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "-"
    if isinstance(value, list | tuple):
        return ", ".join(text(item) for item in value)
    return "-" if value is None else str(value)
