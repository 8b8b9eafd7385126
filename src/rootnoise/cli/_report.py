"""Tables for people, one JSON object for machines."""

from __future__ import annotations

import json
import math
from typing import Any

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
