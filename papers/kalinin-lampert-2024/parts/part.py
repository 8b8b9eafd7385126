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

# Called before each piece of work with its number, the total, and its label.
Report = Callable[[int, int, str], None]

REPRODUCED = "reproduced"
SMALLER = "reproduced at smaller scale"
PARTLY = "reproduced in part"
NOT = "not reproduced"
BEYOND = "ours, not in the paper"
PARTLY_OURS = "ours, in most settings"
NOT_OURS = "ours, not so"

# Period of the fixed cycle for repeated participation, where every sensitivity is exact and the
# dense optimum is known. For p <= b sensitivities equal those of minimal separation, as in the
# paper.
SEPARATION = 100


@dataclass(frozen=True)
class Size:
    """How much the parts compute; the defaults are those of README.md.

    Attributes:
        workloads: alpha (decay) and beta (momentum) of each.
        errors: numbers of steps n in the table of errors.
        dense: largest n of the dense optimum, which takes 10 n^3 multiply-adds per iteration.
        scan: the n at which all `bands` are tried.
        bands: the bands of that scan.
        tight: largest n for which the certified bound is optimised to convergence.
        single: numbers of steps for the theorems on one participation.
        repeated: numbers of steps for the theorems on repeated participation.
        runtime: numbers of steps for the timings.
        seconds: a method is timed at the next n if it took at most this long.
        epsilons: budgets in the part on limits.
        epochs: passes over the data in the part on limits.
        structure: participation for workloads that are not of the assumed structure.
        narrow: participation for narrow bands; `narrow_bands` are tried.
        studies: names of the accuracy studies, by default those that two CPU cores can run.
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
        out: folder for the results.
        size: how much is computed.
        names: names of the studies; those of `size` if empty.
        data_dir: folder of the data sets.
        device: device for training runs, "cpu" or a GPU such as "cuda".

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
        """The accuracy studies to run."""
        return find(self.names or self.size.studies)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, the verdict on it, and the numbers behind the verdict."""

    text: str
    verdict: str
    evidence: str


def judged(text: str, found: bool, evidence: str, verdict: str = REPRODUCED) -> Claim:
    """Return a claim with this verdict if `found`, and with "not reproduced" otherwise."""
    return Claim(text, verdict if found else NOT, evidence)


class Part(Protocol):
    """One part of the paper, as a module.

    Attributes:
        TITLE: title of the section in README.md.
        INTRO: what was computed and how, in Markdown.
        CAPTIONS: what each figure shows, by file name.
    """

    TITLE: str
    INTRO: str
    CAPTIONS: dict[str, str]

    def compute(self, settings: Settings, report: Report) -> Tables:
        """Return the tables, by title."""

    def claims(self, tables: Tables) -> list[Claim]:
        """Judge the claims by the tables."""

    def views(self, tables: Tables) -> dict[str, list[Row]]:
        """Return what the page shows of the tables, by caption."""

    def draw(self, tables: Tables) -> dict[str, Figure]:
        """Return the figures, by file name."""


def counted(work: Sequence[tuple[str, Any]], report: Report) -> Iterable[Any]:
    """Yield each piece of labelled work, after reporting it."""
    for number, (label, item) in enumerate(work, 1):
        report(number, len(work), label)
        yield item


def participation(kind: str, n: int) -> Participation:
    """Return "single" participation or the cycle of "repeated"."""
    return SingleParticipation() if kind == "single" else FixedCycle(SEPARATION, n // SEPARATION)


def gap(
    workload: Workload, who: Participation, bound: float, name: str, **options: object
) -> float:
    """Return the fraction by which the rmse of a mechanism is above a bound."""
    return factorize(workload, who, name, **options).rmse(who) / bound - 1
