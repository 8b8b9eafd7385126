"""Reproduce the results of Kalinin & Lampert (2024): `python reproduce.py --help`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from parts import accuracy, bounds, errors, limits, runtime, tables
from parts.page import load, write_page
from parts.part import FULL, QUICK, Part, Report, Settings
from rootnoise import RootnoiseError

PARTS: dict[str, Part] = {
    "errors": errors,
    "bounds": bounds,
    "runtime": runtime,
    "limits": limits,
    "accuracy": accuracy,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def reproduce(
    out: Annotated[Path, typer.Option(help="Folder for CSV and PNG files and one page.")],
    part: Annotated[str, typer.Argument(help=f"{', '.join(PARTS)}, or all.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points, in minutes.")] = False,
    study: Annotated[
        list[str] | None,
        typer.Option(
            help="A study of accuracy, such as cifar10-epochs; may be given again "
            "[default: those that two CPU cores can do]."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where models train: cpu, cuda or cuda:N.")] = "cpu",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data sets' files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recompute the results of Kalinin & Lampert (2024), and judge each of their claims.

    OUT gets one CSV file per table, the figures, and README.md with all parts computed so far. The
    accuracy part appends each finished run to runs.jsonl and skips those in it: to continue, start
    it again.
    """
    try:
        names = chosen(part, study or [])
        settings = Settings(out, QUICK if quick else FULL, tuple(study or ()), data_dir, device)
        if "accuracy" in names:
            accuracy.check(settings)
        for name in names:
            with progress() as report:
                run(name, settings, report)
    except RootnoiseError as refusal:
        typer.echo(f"error: {refusal}", err=True)
        raise typer.Exit(2) from None
    judged = [(name, claim) for name in names for claim in PARTS[name].claims(load(out, name))]
    page = str(out / "README.md")
    if as_json:
        rows = [
            {"part": name, "claim": c.text, "verdict": c.verdict, "evidence": c.evidence}
            for name, c in judged
        ]
        typer.echo(json.dumps({"claims": rows, "page": page}))
        return
    for _, claim in judged:
        typer.echo(f"{claim.verdict}: {claim.text}")
    typer.echo(f"The evidence is in {page}")


def chosen(part: str, studies: list[str]) -> list[str]:
    """Return the names of the parts to run.

    Raises:
        RootnoiseError: an unknown part, or studies for a part without studies.
    """
    if part not in ("all", *PARTS):
        raise RootnoiseError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if studies and part not in ("all", "accuracy"):
        raise RootnoiseError(f"study must be left out for part {part}, got {studies[0]!r}")
    return list(PARTS) if part == "all" else [part]


def run(name: str, settings: Settings, report: Report) -> None:
    """Run one part: write its tables as CSV and its figures as PNG, and update the page.

    Raises:
        RootnoiseError: a folder that cannot be written.
    """
    part, out = PARTS[name], settings.out
    if out.exists() and not out.is_dir():
        raise RootnoiseError(f"out must be a folder, got the file {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        made = part.compute(settings, report)
        for title, rows in made.items():
            tables.write(out / f"{name}-{title}.csv", rows)
        for file, figure in part.draw(made).items():
            figure.savefig(out / file)
        write_page(out, PARTS)
    except OSError as reason:
        raise RootnoiseError(f"out must be writable, got {out}: {reason.strerror}") from None


@contextmanager
def progress() -> Iterator[Report]:
    """Show a bar on standard error and yield its update; only at a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def update(piece: int, n_pieces: int, label: str) -> None:
            bar.update(task, completed=piece, total=n_pieces, description=label)

        yield update


if __name__ == "__main__":
    app()
