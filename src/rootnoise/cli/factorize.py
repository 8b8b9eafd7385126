"""`rootnoise factorize`: factorize a workload and say how good the factorization is."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rootnoise import _limits
from rootnoise._check import RootnoiseError, integer
from rootnoise.cli import _offline, _options, _plots, _progress, _workload
from rootnoise.cli._report import show

if TYPE_CHECKING:
    from rootnoise.factorization import Factorization
    from rootnoise.participation import Participation


@_options.grouped
def factorize(
    *,
    steps: Annotated[int | None, typer.Option(help="Steps n of the whole run.")] = None,
    mechanism: Annotated[
        str | None,
        typer.Option(
            help="How to split: banded, banded-inverse, bandmf, bisr, blt, bsr, bsr-gamma, "
            "column-normalised, dense, epoch-scaled, identity, lambda-cgd, square-root, tree, "
            "workload [default: bsr]."
        ),
    ] = None,
    work: _workload.Options,
    who: _options.Who,
    split: _options.Split,
    effort: Annotated[
        str, typer.Option(help="How hard to look for the lower bound: none, fast or tight.")
    ] = "fast",
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="The file is symmetric positive semi-definite: its root, no stream."
        ),
    ] = False,
    ablation: Annotated[
        bool,
        typer.Option("--ablation", help="With --offline: break its bands, symmetry, definiteness."),
    ] = False,
    epsilon: Annotated[
        float | None, typer.Option(help="With --save: privacy loss of the mechanism.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Its failure probability.")] = 1e-5,
    save: Annotated[
        Path | None, typer.Option(help="New JSON file for the mechanism, calibrated to --epsilon.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for the coefficients and the error of each step.")
    ] = None,
    json: _options.Json = False,
) -> None:
    """Factorize a workload and print sensitivity, expected error and its gap.

    rmse and max_error are at noise multiplier 1 and clip norm 1. Sensitivity is exact unless marked
    as an upper bound. No factorization can have a smaller rmse than lower_bound; gap is how far
    above it this one is, an upper bound on what is left to gain.

    The workload is SGD over --steps steps unless --schedule, --optimizer or --workload is given.
    """
    start = time.perf_counter()
    if effort not in ("none", "fast", "tight"):
        raise RootnoiseError(f"effort must be none, fast or tight, got {effort!r}")
    if offline:
        others = {"steps": steps, "mechanism": mechanism, "save": save, "plot": plot}
        with _progress.busy("square root", quiet=json):
            values = _offline.values(work, who, split, others, ablation=ablation)
        show("symmetric workload", values | {"seconds": time.perf_counter() - start}, json)
        return
    if ablation:
        raise RootnoiseError("ablation must come with --offline, got it alone")
    if (epsilon is None) != (save is None):
        raise RootnoiseError(f"epsilon must come with --save, got {epsilon} and {save}")
    from rootnoise.factorization import factorize as splitter

    if steps is not None:
        integer("steps", steps, 1, _limits.MOST_STEPS)
        _limits.memory(f"{steps} steps", 200.0 * steps, "a shorter run")
    if epsilon is not None:
        _limits.epsilon(epsilon)
    name, workload = mechanism or "bsr", work.value(steps)
    participation = who.value(workload.n_steps)
    with _progress.search(name, quiet=json) as progress:
        result = splitter(workload, participation, name, progress=progress, **split.given())
    with _progress.busy("error and lower bounds", quiet=json):
        values = _values(result, participation, effort)
    if save is not None:
        with _progress.busy("calibration", quiet=json):
            values |= _saved(result, participation, save, epsilon, delta)
    if plot is not None:
        _plots.save(plot, partial(_plots.factorization, result, participation))
        values["plot"] = str(plot)
    values["seconds"] = time.perf_counter() - start
    show(f"{name} over {workload.n_steps} steps", values, json)


def _values(result: Factorization, who: Participation, effort: str) -> dict[str, Any]:
    """Return everything that is printed about a factorization."""
    from rootnoise.bounds.certificate import lower_bound
    from rootnoise.factorization import error

    sens = result.sensitivity(who)
    errors = error.per_step(result.decoder, sens.value)
    rmse = float((errors**2).mean() ** 0.5)
    bound = worst = None if effort == "none" else lower_bound(result.workload, who, effort)
    if bound and bound.witness:  # longer runs have no bound on the worst step
        worst = lower_bound(result.workload, who, effort, "max")
    coefficients = result.strategy.coefficients
    return {
        "mechanism": result.mechanism,
        "n_steps": result.n_steps,
        "bands": result.strategy.bands,
        "participation": str(who),
        "sensitivity": sens.value,
        "sensitivity_exact": sens.exact,
        "sensitivity_method": sens.method,
        "rmse": rmse,
        "max_error": float(errors.max()),
        "lower_bound": bound.value if bound else None,
        "lower_bound_method": bound.method if bound else None,
        "gap": bound.gap(rmse) if bound else None,
        "max_error_lower_bound": worst.value if worst else None,
        "max_error_gap": worst.gap(float(errors.max())) if worst else None,
        "coefficients": None if coefficients is None else coefficients[:8].tolist(),
        "memory_rows": result.memory_rows,
    }


def _saved(
    result: Factorization, who: Participation, path: Path, epsilon: float | None, delta: float
) -> dict[str, Any]:
    """Save the calibrated mechanism and return what is printed about it."""
    from rootnoise.mechanism import Mechanism

    made = Mechanism.calibrate(result, who, epsilon=epsilon, delta=delta)
    made.save(path)
    return {
        "epsilon": made.epsilon,
        "delta": made.delta,
        "noise_multiplier": made.noise_multiplier,
        "claim": made.claim(),
        "saved": str(path),
    }
