"""`rootnoise factorize`: split a workload and say how good the split is."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from rootnoise.cli import _options
from rootnoise.cli._report import show


def factorize(
    steps: _options.Steps,
    mechanism: Annotated[
        str, typer.Option(help="How to split: bsr, square-root, identity, workload.")
    ] = "bsr",
    bands: Annotated[
        int | None,
        typer.Option(help="Diagonals p of a banded strategy [default: the separation b, else n]."),
    ] = None,
    momentum: _options.Momentum = 0.0,
    decay: _options.Decay = 1.0,
    participation: _options.ParticipationKind = None,
    min_sep: _options.MinSep = None,
    participations: _options.Participations = None,
    json: _options.Json = False,
) -> None:
    """Factorize the workload of SGD and print sensitivity and expected error.

    rmse and max_error are at noise multiplier 1 and clip norm 1. Sensitivity is exact, or an upper
    bound that says so.
    """
    from rootnoise.factorization import factorize as split
    from rootnoise.workload import SGD

    start = time.perf_counter()
    who = _options.participation(participation, steps, min_sep, participations)
    result = split(SGD(steps, momentum, decay), who, mechanism, bands=bands)
    sens = result.sensitivity(who)
    coefficients = result.strategy.coefficients
    values = {
        "mechanism": result.mechanism,
        "n_steps": result.n_steps,
        "bands": result.strategy.bands,
        "participation": str(who),
        "sensitivity": sens.value,
        "sensitivity_exact": sens.exact,
        "sensitivity_method": sens.method,
        "rmse": result.rmse(who),
        "max_error": result.max_error(who),
        "coefficients": None if coefficients is None else coefficients[:8].tolist(),
        "memory_rows": result.memory_rows,
        "seconds": time.perf_counter() - start,
    }
    show(f"{mechanism} over {steps} steps", values, json)
