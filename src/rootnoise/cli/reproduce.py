"""`rootnoise reproduce`: the paper's tables and figures, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rootnoise._check import RootnoiseError
from rootnoise.cli import _options, _progress
from rootnoise.cli._report import show


def reproduce(
    out: Annotated[Path, typer.Option(help="Folder for CSV and PNG files and one page.")],
    part: Annotated[
        str, typer.Argument(help="errors, bounds, runtime, limits, accuracy, or all.")
    ] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer points; all parts in under 5 minutes.")
    ] = False,
    study: Annotated[
        list[str] | None,
        typer.Option(
            help="A study of accuracy, such as cifar10-epochs; may be given again "
            "[default: those that two CPU cores can do]."
        ),
    ] = None,
    device: _options.Device = "cpu",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set's files.")] = None,
    json: _options.Json = False,
) -> None:
    """Compute what Kalinin & Lampert (2024) claim, and judge each claim.

    OUT gets one CSV file a table, the figures, and README.md with all parts that are there so far.
    Accuracy appends each finished run to runs.jsonl and skips those: run it again to go on.
    """
    from rootnoise.lab.reproduce import PARTS
    from rootnoise.lab.reproduce import reproduce as run
    from rootnoise.lab.reproduce.page import load
    from rootnoise.lab.reproduce.part import Settings

    if study and part not in ("all", "accuracy"):
        raise RootnoiseError(f"study must be left out for part {part}, got {study[0]!r}")
    settings = Settings(out, quick, tuple(study or ()), data_dir, device)
    claims = []
    for name in PARTS if part == "all" else [part]:
        with _progress.pieces(quiet=json) as report:
            done = run(name, settings, report)
        claims += [(name, claim) for claim in done.claims(load(out, name))]
    if json:
        rows = [{"part": n, "claim": c.text, "verdict": c.verdict, "evidence": c.evidence}
                for n, c in claims]  # fmt: skip
        show("", {"claims": rows, "page": str(out / "README.md")}, as_json=True)
        return
    show(
        f"claims, with their evidence in {out / 'README.md'}",
        {claim.text: claim.verdict for _, claim in claims},
        as_json=False,
    )
