"""What the parts have in common: tables as lists of rows, and claims with a verdict."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Tables = dict[str, list[Row]]
# Called before a piece of work with its number, how many there are, and what it is.
Report = Callable[[int, int, str], None]

REPRODUCED = "reproduced"
SMALLER = "reproduced at smaller scale"
PARTLY = "reproduced in part"
NOT = "not reproduced"
BEYOND = "ours, not in the paper"


@dataclass(frozen=True)
class Settings:
    """How to run a part.

    Attributes:
        out: folder for what it leaves.
        quick: fewer points, so that all parts take minutes.
        studies: names of `accuracy.studies`; those of two CPU cores where empty.
        data_dir: where data sets are.
        device: of the runs that train, "cpu" or a GPU such as "cuda".
    """

    out: Path
    quick: bool = False
    studies: tuple[str, ...] = ()
    data_dir: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, whether it was found here, and by what numbers."""

    text: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Part:
    """One part of the paper.

    Attributes:
        name: as `rootnoise reproduce` takes it.
        title: heads the section of the page.
        intro: what was computed and how, in Markdown.
        compute: returns the tables.
        claims: judges the tables.
        views: what the page shows of them, by caption.
        figures: draws them, by file name; the caption is in `captions`.
        captions: what each figure shows.
    """

    name: str
    title: str
    intro: str
    compute: Callable[[Settings, Report], Tables]
    claims: Callable[[Tables], list[Claim]]
    views: Callable[[Tables], dict[str, list[Row]]]
    figures: Callable[[Tables], dict[str, Figure]]
    captions: Mapping[str, str]


def counted(work: Sequence[tuple[str, Any]], report: Report) -> Iterable[Any]:
    """Yield each piece of labelled work, after it was reported."""
    for number, (label, item) in enumerate(work, 1):
        report(number, len(work), label)
        yield item


def where(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """Return the rows with these values, in order."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


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
    """Return a gap as a reader wants it.

    >>> percent(0.0123), percent(0.123), percent(12.3)
    ('+1.23 %', '+12.3 %', '+1,230 %')
    """
    value = 100 * gap
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:+,.{digits}f} %"


def cell(value: Any) -> str:
    """Return one value as a reader wants it.

    >>> cell(0.00012345), cell(123456.7), cell(20), cell(None)
    ('0.0001234', '123,457', '20', '-')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
