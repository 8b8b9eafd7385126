"""What the parts have in common: settings, and claims with a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure

from parts.studies import HERE, Study, find
from parts.tables import Row, Tables
from rootnoise import FixedCycle, Participation, SingleParticipation, Workload, factorize

# Called before a piece of work with its number, how many there are, and what it is.
Report = Callable[[int, int, str], None]

REPRODUCED = "reproduced"
SMALLER = "reproduced at smaller scale"
PARTLY = "reproduced in part"
NOT = "not reproduced"
BEYOND = "ours, not in the paper"

# Steps of the cycle of repeated participation, in which every sensitivity is exact and the dense
# optimum is known. For p <= b it is also that of a minimal separation, as in the paper.
SEPARATION = 100


@dataclass(frozen=True)
class Size:
    """How much the parts compute; the defaults are those of the page.

    Attributes:
        workloads: alpha (decay) and beta (momentum) of each.
        errors: steps n of the table of errors.
        dense: steps that the dense optimum goes to: 10 n^3 multiply-adds an iteration.
        scan: the n at which all `bands` are tried.
        bands: of that scan.
        tight: steps up to which the certified bound is solved to the end.
        single: steps of the theorems on one participation.
        repeated: steps of those on a cycle.
        runtime: steps of the timings.
        seconds: a method goes on to the next n while it took at most this long.
        epsilons: budgets at the limits.
        epochs: passes over the data at the limits.
        structure: the participation of foreign workloads.
        narrow: that of narrow bands, and the `narrow_bands` tried.
        studies: of accuracy, by name: those of two CPU cores.
    """

    workloads: tuple[tuple[float, float], ...] = (
        (1.0, 0.0), (0.999, 0.0), (1.0, 0.9), (0.9999, 0.9),
    )  # fmt: skip
    errors: tuple[int, ...] = (100, 200, 500, 1000, 2000, 5000, 10_000, 100_000, 1_000_000)
    dense: int = 1000
    scan: int = 1000
    bands: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 100, 150, 200, 300, 500, 1000)
    tight: int = 1000
    single: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000, 10_000, 100_000, 1_000_000)
    repeated: tuple[int, ...] = (200, 500, 1000, 2000, 5000, 10_000, 100_000, 1_000_000)
    runtime: tuple[int, ...] = (50, 100, 200, 500, 1000, 2000, 10_000, 100_000, 1_000_000)
    seconds: float = 5.0
    epsilons: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    epochs: tuple[int, ...] = (1, 5, 10, 20, 50)
    structure: FixedCycle = field(default_factory=lambda: FixedCycle(50, 5))
    narrow: FixedCycle = field(default_factory=lambda: FixedCycle(100, 10))
    narrow_bands: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 100)
    studies: tuple[str, ...] = HERE


FULL = Size()
QUICK = Size(
    errors=(100, 200, 500, 1000, 10_000),
    dense=200,
    tight=0,
    single=(10, 100, 1000, 10_000, 1_000_000),
    repeated=(200, 1000, 10_000, 1_000_000),
    runtime=(100, 200, 500, 1000, 100_000),
    seconds=1.0,
    epsilons=(0.1, 1.0, 8.0),
    epochs=(1, 10),
    studies=("quick",),
)


@dataclass(frozen=True)
class Settings:
    """How to run a part.

    Attributes:
        out: folder for what it leaves.
        size: how much is computed.
        names: of `studies`; those of `size` where empty.
        data_dir: where data sets are.
        device: of the runs that train, "cpu" or a GPU such as "cuda".

    Raises:
        RootnoiseError: an unknown study or device.
    """

    out: Path
    size: Size = FULL
    names: tuple[str, ...] = ()
    data_dir: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for study in self.studies:
            next(study.cells(self.device))

    @property
    def studies(self) -> list[Study]:
        """The studies of accuracy that are run."""
        return find(self.names or self.size.studies)


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
