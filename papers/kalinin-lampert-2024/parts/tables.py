"""Tables as lists of rows: selecting rows, CSV files, and Markdown."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, Any]
Tables = dict[str, list[Row]]


def where(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """Return the rows with these values, in order."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def workloads(rows: list[Row]) -> list[tuple[float, float]]:
    """Return the alpha and beta of the rows, each pair once and in order."""
    return list(dict.fromkeys((row["alpha"], row["beta"]) for row in rows))


def column(rows: Iterable[Row], name: str) -> NDArray[np.float64]:
    """Return one column, shape (rows,)."""
    return np.array([row[name] for row in rows], float)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV with one header line; numbers keep all their digits."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if v is None else v for name, v in row.items()} for row in rows)


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file with numbers as numbers and empty cells as None."""
    with path.open(newline="") as stream:
        return [
            {name: _value(text) for name, text in row.items()} for row in csv.DictReader(stream)
        ]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table with four significant digits.

    >>> print(markdown([{"n": 1000, "rmse": 3.14159, "gap": None}]))
    | n | rmse | gap |
    | ---: | ---: | ---: |
    | 1,000 | 3.142 | - |
    """
    names = list(rows[0])
    texts = [name for name in names if any(isinstance(row[name], str) for row in rows)]
    lines = [
        names,
        [":---" if name in texts else "---:" for name in names],
        *([cell(row[name]) for name in names] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(gap: float) -> str:
    """Format a gap for readers.

    >>> percent(0.0123), percent(0.123), percent(12.3)
    ('+1.23 %', '+12.3 %', '+1,230 %')
    """
    value = 100 * gap
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:+,.{digits}f} %"


def cell(value: Any) -> str:
    """Format one value for readers.

    >>> cell(0.00012345), cell(123456.7), cell(20), cell(None)
    ('0.0001234', '123,457', '20', '-')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
