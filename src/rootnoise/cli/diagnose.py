"""`rootnoise diagnose`: find what could be better about a mechanism, and how."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rootnoise._check import RootnoiseError
from rootnoise.cli import _options
from rootnoise.cli._report import show


def diagnose(
    mechanism: Annotated[Path, typer.Argument(help="A saved mechanism (JSON), or a run's folder.")],
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch.")] = None,
    dataset_size: Annotated[
        int | None, typer.Option(help="Examples in the data set; compares with DP-SGD.")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(help="Trainable parameters; compares noise with gradients.")
    ] = None,
    gradient_norm: Annotated[
        float | None,
        typer.Option(
            help="Typical norm of the mean of the clipped gradients [default: the clip norm]."
        ),
    ] = None,
    json: _options.Json = False,
) -> None:
    """List what could be better about a mechanism, each with its numbers and a remedy.

    It looks for too few bands, a sensitivity that is only a bound, and a workload that the strategy
    is not made for; with --batch-size also for noise that swamps the gradients (--parameters), and
    whether DP-SGD would win at this epsilon (--dataset-size).
    """
    from rootnoise import diagnostics

    if batch_size is None and (dataset_size is not None or parameters is not None):
        raise RootnoiseError(
            "batch-size must be given with --dataset-size or --parameters, got none"
        )
    if parameters is None and gradient_norm is not None:
        raise RootnoiseError("parameters must be given with --gradient-norm, got none")
    findings = diagnostics.diagnose(
        _options.saved(mechanism),
        batch_size=batch_size,
        n_examples=dataset_size,
        n_parameters=parameters,
        gradient_norm=gradient_norm,
    )
    if json:
        show("", {"findings": [asdict(finding) for finding in findings]}, as_json=True)
        return
    rows = {found.name: f"{found.message}\n{found.remedy}" for found in findings}
    show(f"findings on {mechanism.name}", rows or {"findings": "none"}, as_json=False)
