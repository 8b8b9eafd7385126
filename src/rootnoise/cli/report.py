"""`rootnoise report` and `rootnoise compare`: one page about a run, or about several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run of `train`.")],
    out: Annotated[
        Path | None, typer.Option(help="The page [default: the name of RUN_DIR plus .html].")
    ] = None,
) -> None:
    """Write one self-contained page about a run: claim, curves, noise, diagnostics.

    Nothing on it comes from the ledger or the training set, and it loads nothing from elsewhere.
    It is no audit: `rootnoise audit RUN_DIR` recomputes what the run claims.
    """
    from rootnoise.runs.report import page, read

    folder = run_dir.resolve()
    _write(out or folder.with_name(f"{folder.name}.html"), page(read(folder)))


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Folders of runs of `train`.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
) -> None:
    """Write one page that draws several runs together."""
    from rootnoise.runs.report import comparison, read

    _write(out, comparison([read(folder) for folder in run_dirs]))


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as reason:
        raise RootnoiseError(f"out must be writable, got {path}: {reason.strerror}") from None
    typer.echo(f"The page is {path}")
