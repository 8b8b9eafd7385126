"""`rootnoise audit`: check a run from its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rootnoise.cli import _options, _progress, _report

if TYPE_CHECKING:
    from rootnoise.runs.checks import Check

# In a terminal of fewer columns the checks that hold are listed by name alone.
TABLE = 70


def audit(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run of `train`.")],
    seal: Annotated[
        str | None, typer.Option(help="The seal noted when the run ended; finds every edit.")
    ] = None,
    empirical: Annotated[
        bool,
        typer.Option("--empirical", help="Also attack the mechanism with canaries (seconds)."),
    ] = False,
    canaries: Annotated[
        int, typer.Option(help="Synthetic records to attack; more give a tighter bound.")
    ] = 4000,
    attack_seed: Annotated[int, typer.Option(help="Fixes the attacks.")] = 0,
    json: _options.Json = False,
) -> None:
    """Recompute what a run claims from its files; exit 0 only if all of it holds, else 1.

    Each file is compared with its hash; sensitivity, noise, epsilon, error and lower bound are
    recomputed by a second route; the ledger is replayed person by person. With --empirical the real
    optimizer runs again with canaries, and how well they can be detected gives a lower bound on
    epsilon: a bound above the claim refutes it.
    """
    from rootnoise.runs import audit as auditor

    checks = auditor.audit(run_dir, seal)
    if empirical:
        with _progress.pieces("attacks", quiet=json) as update:
            checks += auditor.empirical(run_dir, canaries, attack_seed, update)
    held = all(check.held for check in checks)
    if json:
        rows = [dataclasses.asdict(check) for check in checks]
        print(dumps({"held": held, "checks": rows}, allow_nan=False))
    else:
        _show(run_dir, checks)
    raise typer.Exit(0 if held else 1)


def _show(run_dir: Path, checks: Sequence[Check]) -> None:
    """Print the checks, failures first."""
    console, table = Console(), Table()
    wide = console.width >= TABLE
    _report.head(f"audit of {run_dir}")
    for name in ("check", "held", "stated", "found"):
        table.add_column(name, overflow="fold")
    holds = [check for check in checks if check.held]
    failed = [check for check in checks if not check.held]
    for check in [*failed, *(holds if wide else [])]:
        mark = "yes" if check.held else "[bold red]NO[/]"
        both = (check.stated, check.found)
        if check.name == "gap":
            both = _percent(check.stated), _percent(check.found)
        table.add_row(check.name, mark, *both)
    if table.rows:
        console.print(table)
    if not wide:
        names = ", ".join(check.name for check in holds)
        _report.lines(f"{len(holds)} checks hold: {names}")
    print(f"{len(failed)} of {len(checks)} checks do not hold" if failed else "all hold")
    for check in checks:
        if check.name == "finished":
            print(check.found)


def _percent(gap: str) -> str:
    """Return a gap as a percentage; of long runs none is stated."""
    return gap if gap == "None" else f"{100 * float(gap):.9g}%"
