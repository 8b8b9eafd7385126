"""Tables for people, one JSON object for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


def show(title: str, values: dict[str, Any], as_json: bool) -> None:
    """Print one result: as a two-column table, or as one JSON object and nothing else."""
    if as_json:
        print(json.dumps(values, allow_nan=False))
        return
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), text(value))
    Console().print(table)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headings; columns after the second are numbers. Only the first may wrap."""
    grid = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        width = max(len(row[i]) for row in [headings, *rows])
        justify: Literal["left", "right"] = "left" if i < 2 else "right"
        grid.add_column(heading, justify=justify, overflow="fold", min_width=width if i else None)
    for row in rows:
        grid.add_row(*row)
    Console().print(grid)


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
