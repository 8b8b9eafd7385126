"""Options that several commands share, and the values they stand for."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from rootnoise._check import RootnoiseError, integer
from rootnoise.participation import FixedCycle, MinSeparation, SingleParticipation

Steps = Annotated[int, typer.Option(help="Steps n of the whole run.")]
Momentum = Annotated[float, typer.Option(help="Momentum beta of SGD, in [0, 1).")]
Decay = Annotated[
    float, typer.Option(help="Factor alpha on the parameters at each step; 1 is no decay.")
]
MinSep = Annotated[
    int | None, typer.Option(help="Steps b between two of one record (period of a fixed cycle).")
]
Participations = Annotated[
    int | None, typer.Option(help="Most steps k of one record [default: as many as fit].")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


class Kind(StrEnum):
    """Who may take part when."""

    SINGLE = "single"
    MIN_SEP = "min-sep"
    FIXED_CYCLE = "fixed-cycle"


ParticipationKind = Annotated[
    Kind | None,
    typer.Option(
        "--participation",
        help="Who may take part when [default: single; min-sep once --min-sep is given].",
    ),
]


def participation(
    kind: Kind | None, n_steps: int, min_sep: int | None, participations: int | None
) -> SingleParticipation | MinSeparation | FixedCycle:
    """Return the participation value that the options describe."""
    integer("steps", n_steps, 1)
    if kind is None:
        kind = Kind.SINGLE if min_sep is None and participations is None else Kind.MIN_SEP
    if kind is Kind.SINGLE:
        for name, value in (("min-sep", min_sep), ("participations", participations)):
            if value is not None:
                raise RootnoiseError(
                    f"{name} must be left out for single participation, got {value}"
                )
        return SingleParticipation()
    if min_sep is None:
        raise RootnoiseError(f"min-sep must be given for participation {kind.value}, got none")
    b = integer("min-sep", min_sep, 1)
    k = -(-n_steps // b) if participations is None else participations
    return FixedCycle(b, k) if kind is Kind.FIXED_CYCLE else MinSeparation(b, k)
