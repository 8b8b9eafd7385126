"""How the hyperparameters of a run were chosen, where several were tried."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootnoise._check import RootnoiseError, integer, one_of, real, set_fields
from rootnoise.runs.settings import Settings

if TYPE_CHECKING:
    from rootnoise.accounting import Trials

# What may differ between trials: it changes neither who takes part when nor the noise multiplier,
# and so not the privacy of a trial.
TUNED = tuple(field.name for field in fields(Settings) if field.metadata.get("tuned"))
# Settings to choose from; each is checked before the first trial.
MOST_POINTS = 1000


@dataclass(frozen=True)
class Tuning:
    """What was tried, and how: by private trials, which cost, or on public data, which do not.

    Args:
        grid: values tried, by the names of settings; every combination is a point.
        trials: expected number of private trials, each of a random point; None on public data.
        trials_shape: of their number, as `Trials` has it, or "poisson".
        public: name of the public data set on which every point was tried.
        public_dir: folder of its files.

    Raises:
        RootnoiseError: fewer than two points or more than `MOST_POINTS`, a setting that is not for
            tuning, a value twice, trials out of range, or not exactly one of trials and public.

    >>> list(Tuning({"lr": [0.1, 0.2], "clip_norm": [1.0]}, trials=10).points())
    [{'lr': 0.1, 'clip_norm': 1.0}, {'lr': 0.2, 'clip_norm': 1.0}]
    """

    grid: Mapping[str, Sequence[float]]
    trials: float | None = None
    trials_shape: float | str = 1.0
    public: str | None = None
    public_dir: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Mapping):
            raise RootnoiseError(f"grid must have a list for each setting, got {self.grid!s:.40}")
        grid = {name: _values(name, values) for name, values in self.grid.items()}
        n_points = math.prod(map(len, grid.values()))
        if n_points < 2:
            rule = "grid must have at least 2 points, such as lr 0.1,0.2,0.5"
            raise RootnoiseError(f"{rule}, got {n_points}: train it")
        integer("points of the grid", n_points, 2, MOST_POINTS)
        if (self.trials is None) == (self.public is None):
            got = f"trials={self.trials}, public={self.public}"
            raise RootnoiseError(f"give exactly one of trials and public, got {got}")
        if self.public_dir is not None and self.public is None:
            raise RootnoiseError(f"public_dir must come with public, got {self.public_dir} alone")
        if self.trials is not None:
            from rootnoise.accounting.selection import MOST_DRAWN  # SciPy: help is to be quick

            mean = real("trials", self.trials, at_most=MOST_DRAWN)
            set_fields(self, trials=mean)
            set_fields(self, trials_shape=self.number.to_dict()["shape"])  # type: ignore[union-attr]
        set_fields(self, grid=grid)

    @property
    def number(self) -> Trials | None:
        """The distribution of the number of private trials, None on public data."""
        if self.trials is None:
            return None
        from rootnoise.accounting import Trials

        return Trials.from_dict({"mean": self.trials, "shape": self.trials_shape})

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield every combination, in a fixed order."""
        for values in product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Tuning:
        """Return what a config.json holds.

        Raises:
            RootnoiseError: other fields than these, or what the constructor refuses.
        """
        try:
            return cls(**fields)
        except TypeError:
            rule = "tuning must have a grid and trials or public"
            raise RootnoiseError(f"{rule}, got {', '.join(map(str, fields)):.80}") from None

    def options(self) -> dict[str, Any]:
        """Return the options of `rootnoise tune` beside the settings of a run."""
        if self.public is not None:
            return dict(self.grid) | {"public": self.public, "public_dir": self.public_dir}
        return dict(self.grid) | {"trials": self.trials, "trials_shape": self.trials_shape}

    def said(self) -> str:
        """Return what was tried, in words.

        >>> Tuning({"lr": [0.1, 0.2], "clip_norm": [0.5, 1]}, public="mnist").said()
        'lr among 0.1, 0.2; clip norm among 0.5, 1'
        """
        parts = (
            f"{name.replace('_', ' ')} among {', '.join(f'{value:g}' for value in values)}"
            for name, values in self.grid.items()
        )
        return "; ".join(parts)

    def claim(self, dataset: str) -> str:
        """Return how the hyperparameters of a run on a data set were chosen, for its claim."""
        if self.public is not None:
            return (
                f"Chosen by trials on {self.public}: {self.said()}. That these data are public, "
                "and none of them is in the training set, is up to whoever ran this; then it costs "
                "nothing."
            )
        return (
            f"Drawn at random in each trial: {self.said()}. Trials were scored on the test part of "
            f"{dataset}, none of which may be in the training set."
        )


# Options of `rootnoise tune` that are no settings of a run.
BESIDE = ("trials", "trials_shape", "public", "public_dir")


def marker(out: Path) -> Path:
    """Return the empty file that says that a tuning into `out` has begun."""
    whole = Path(out).resolve()
    return whole.with_name(f".{whole.name}.tuning")


def starting_over(out: Path) -> str:
    """Return what it means to start again after a tuning that released nothing."""
    return (
        f"if nobody saw anything of it, its duration included, delete {marker(out)} and start "
        "over; else epsilon and delta of both add up"
    )


def _values(name: str, values: Any) -> list[float]:
    one_of("grid's settings", name, TUNED)
    if not isinstance(values, list | tuple) or not values:
        raise RootnoiseError(f"grid's {name} must be a list of numbers, got {values!r:.40}")
    found = [real(f"grid's {name}", value) for value in values]
    if len(set(found)) < len(found):
        raise RootnoiseError(f"grid's {name} must be distinct, got {values!s:.60}")
    return found
