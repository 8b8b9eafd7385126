"""`rootnoise factorize`: split a workload and say how good the split is."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from rootnoise._check import RootnoiseError
from rootnoise.cli import _options, _progress
from rootnoise.cli._report import show


def factorize(
    steps: _options.Steps,
    mechanism: Annotated[
        str,
        typer.Option(
            help="How to split: banded, banded-inverse, bisr, blt, bsr, bsr-gamma, "
            "column-normalised, dense, epoch-scaled, identity, lambda-cgd, square-root, tree, "
            "workload."
        ),
    ] = "bsr",
    bands: Annotated[
        str | None,
        typer.Option(
            metavar="<int|auto>",
            help="Diagonals p of a banded strategy, or auto for the best "
            "[default: the separation b, else n].",
        ),
    ] = None,
    buffers: Annotated[
        int | None, typer.Option(help="Buffers of blt [default: while each gains 0.1 %].")
    ] = None,
    effort: Annotated[
        str, typer.Option(help="How hard to look for the lower bound: none, fast or tight.")
    ] = "fast",
    momentum: _options.Momentum = 0.0,
    decay: _options.Decay = 1.0,
    participation: _options.ParticipationKind = None,
    min_sep: _options.MinSep = None,
    participations: _options.Participations = None,
    json: _options.Json = False,
) -> None:
    """Factorize the workload of SGD and print sensitivity, expected error and its gap.

    rmse and max_error are at noise multiplier 1 and clip norm 1. Sensitivity is exact, or an upper
    bound that says so. No factorization of any kind can have a smaller rmse than lower_bound; gap
    is how far above it this one is, so it is an upper bound on what is left to gain.
    """
    from rootnoise import error
    from rootnoise.certificate import lower_bound
    from rootnoise.factorization import factorize as split
    from rootnoise.workload import SGD

    start = time.perf_counter()
    if effort not in ("none", "fast", "tight"):
        raise RootnoiseError(f"effort must be none, fast or tight, got {effort!r}")
    who = _options.participation(participation, steps, min_sep, participations)
    workload = SGD(steps, momentum, decay)
    with _progress.search(mechanism, quiet=json) as progress:
        options = {"bands": _bands(bands), "buffers": buffers, "progress": progress}
        result = split(workload, who, mechanism, **options)
    sens = result.sensitivity(who)
    rmse = error.rmse(result.decoder, sens.value)
    bound = None if effort == "none" else lower_bound(workload, who, effort)
    coefficients = result.strategy.coefficients
    values = {
        "mechanism": result.mechanism,
        "n_steps": result.n_steps,
        "bands": result.strategy.bands,
        "participation": str(who),
        "sensitivity": sens.value,
        "sensitivity_exact": sens.exact,
        "sensitivity_method": sens.method,
        "rmse": rmse,
        "max_error": error.max_error(result.decoder, sens.value),
        "lower_bound": bound.value if bound else None,
        "lower_bound_method": bound.method if bound else None,
        "gap": bound.gap(rmse) if bound else None,
        "coefficients": None if coefficients is None else coefficients[:8].tolist(),
        "memory_rows": result.memory_rows,
        "seconds": time.perf_counter() - start,
    }
    show(f"{mechanism} over {steps} steps", values, json)


def _bands(value: str | None) -> int | str | None:
    """Return --bands as factorizations take it."""
    if value is None or value == "auto":
        return value
    try:
        return int(value)
    except ValueError:
        raise RootnoiseError(f"bands must be an integer or auto, got {value!r}") from None
