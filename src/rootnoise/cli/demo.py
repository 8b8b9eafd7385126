"""`rootnoise demo`: correlated against independent noise, in under a minute."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rootnoise.cli import _options, _progress
from rootnoise.cli._report import text


def demo(
    out: Annotated[Path, typer.Option(help="Folder for curves.png, claim.txt and result.json.")],
    seed: Annotated[int, typer.Option(help="Fixes data order and initial weights, not noise.")] = 0,
    json: _options.Json = False,
) -> None:
    """Train one model three ways: without privacy, with independent and with correlated noise.

    All use the same data, batches, initial weights, epsilon and delta; each way runs three times at
    its own best learning rate. rmse is the expected error of the iterates at noise multiplier 1.
    """
    from rootnoise.runs.demo import DELTA, REPETITIONS
    from rootnoise.runs.demo import demo as compare

    with _progress.steps("training", quiet=json) as bar:
        result = compare(out, seed, bar.step)
    if json:
        print(jsonlib.dumps(dataclasses.asdict(result), allow_nan=False))
        return
    table = Table(
        title=f"Digits at delta {DELTA:g}: mean of {REPETITIONS} runs and largest deviation",
        title_justify="left",
    )
    table.add_column("noise", no_wrap=True)
    for name in ("test accuracy", "epsilon", "noise\nmultiplier", "rmse", "seconds\na run"):
        table.add_column(name, justify="right")
    for row in result.rows:
        deviation = max(row.highest - row.accuracy, row.accuracy - row.lowest)
        table.add_row(
            row.label,
            f"{row.accuracy:.1%} ± {100 * deviation:.1f}",
            text(row.epsilon),
            "-" if row.noise_multiplier is None else f"{row.noise_multiplier:.3f}",
            "-" if row.rmse is None else f"{row.rmse:.1f}",
            f"{row.seconds:.1f}",
        )
    console = Console()
    console.print(table)
    console.print("Fixed batches in every row; train --mechanism dpsgd adds Poisson sampling.")
    console.print(f"Curves and claim: {out / 'curves.png'}, {out / 'claim.txt'}", soft_wrap=True)
