"""What the parts have in common: settings, and claims with a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure

from parts.studies import Study, find
from parts.tables import Row, Tables
from rootnoise import FixedCycle, Participation, SingleParticipation, Workload, factorize

# Called before a piece of work with its number, how many there are, and what it is.
Report = Callable[[int, int, str], None]

REPRODUCED = "reproduced"
SMALLER = "reproduced at smaller scale"
PARTLY = "reproduced in part"
NOT = "not reproduced"
BEYOND = "ours, not in the paper"

# alpha (decay), beta (momentum)
WORKLOADS = ((1.0, 0.0), (0.999, 0.0), (1.0, 0.9), (0.9999, 0.9))
# Steps of the cycle of repeated participation, in which every sensitivity is exact and the dense
# optimum is known. For p <= b it is also that of a minimal separation, as in the paper.
SEPARATION = 100


@dataclass(frozen=True)
class Settings:
    """How to run a part.

    Attributes:
        out: folder for what it leaves.
        quick: fewer points, so that all parts take minutes.
        names: of `studies`; those of two CPU cores where empty.
        data_dir: where data sets are.
        device: of the runs that train, "cpu" or a GPU such as "cuda".

    Raises:
        RootnoiseError: an unknown study or device.
    """

    out: Path
    quick: bool = False
    names: tuple[str, ...] = ()
    data_dir: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for study in self.studies:
            next(study.cells(self.device))

    @property
    def studies(self) -> list[Study]:
        """The studies of accuracy that are run."""
        return find(self.names, self.quick)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, whether it was found here, and by what numbers."""

    text: str
    verdict: str
    evidence: str


def judged(text: str, found: bool, evidence: str, verdict: str = REPRODUCED) -> Claim:
    """Return a claim with this verdict where it was found, and with "not reproduced" else."""
    return Claim(text, verdict if found else NOT, evidence)


class Part(Protocol):
    """One part of the paper, as a module.

    Attributes:
        TITLE: heads the section of the page.
        INTRO: what was computed and how, in Markdown.
        CAPTIONS: what each figure shows, by file name.
    """

    TITLE: str
    INTRO: str
    CAPTIONS: dict[str, str]

    def compute(self, settings: Settings, report: Report) -> Tables:
        """Return the tables, by title."""

    def claims(self, tables: Tables) -> list[Claim]:
        """Judge the tables."""

    def views(self, tables: Tables) -> dict[str, list[Row]]:
        """Return what the page shows of the tables, by caption."""

    def draw(self, tables: Tables) -> dict[str, Figure]:
        """Return the figures, by file name."""


def counted(work: Sequence[tuple[str, Any]], report: Report) -> Iterable[Any]:
    """Yield each piece of labelled work, after it was reported."""
    for number, (label, item) in enumerate(work, 1):
        report(number, len(work), label)
        yield item


def participation(kind: str, n: int) -> Participation:
    """Return "single" participation or the cycle of "repeated"."""
    return SingleParticipation() if kind == "single" else FixedCycle(SEPARATION, n // SEPARATION)


def gap(
    workload: Workload, who: Participation, bound: float, name: str, **options: object
) -> float:
    """Return by what fraction the rmse of a mechanism is above a bound."""
    return factorize(workload, who, name, **options).rmse(who) / bound - 1
