"""`rootnoise train`: train a model, privately or not, and keep the run in a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from rootnoise import __version__
from rootnoise.cli import _options, _progress
from rootnoise.cli._report import show
from rootnoise.runs.settings import Settings


@_options.grouped
def train(
    *,
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="New or empty folder for everything the run leaves.")],
    settings: Settings,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints [default: once an epoch].")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the unfinished run in OUT; no other option is needed."
        ),
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp", help="Under torchrun: cut the model over the processes, rather than copy it."
        ),
    ] = False,
    json: _options.Json = False,
) -> None:
    """Train a model and report its accuracy on the test set and its privacy.

    OUT keeps settings, mechanism, claim, metrics, curve and final weights. While the run is
    unfinished it also holds noise.key and checkpoint.pt: keep them as secret as the data, because
    the noise can be subtracted with them. They are deleted when the run ends. Loss and accuracy on
    the training set are not reported: epsilon does not cover them.

    On several processes: `torchrun --nproc-per-node 2 -m rootnoise train ...`.
    """
    from rootnoise.runs.config import RunConfig
    from rootnoise.runs.folder import RunFolder
    from rootnoise.runs.processes import StoppedError, joined
    from rootnoise.runs.run import run, stored, without_choice

    values = vars(settings) | {"bands": _options.bands(settings.bands)}
    given = {name: value for name, value in values.items() if _given(context, name)}
    folder = RunFolder(out)

    def goes_on() -> str:
        begun = (out / "config.json").exists()
        return f"{folder.resume} goes on" if begun else "before the first step, nothing is kept"

    try:
        with joined(lambda: f"; {goes_on()}") as ranks:
            ranks.all_same({"version": __version__, "out": str(out), "resume": resume} | values)
            if resume:
                moved = {"data_dir": given.pop("data_dir")} if "data_dir" in given else {}
                found = ranks.by_first(lambda: stored(out, without_choice(given)))
                config = dataclasses.replace(found, **moved)
            else:
                config = RunConfig(**values)
            title, first = f"{config.mechanism} on {config.dataset}", ranks.rank == 0
            with _progress.steps(title, quiet=json or not first) as on_step:
                result = run(
                    config,
                    out,
                    resume=resume,
                    checkpoint_every=checkpoint_every,
                    on_step=on_step,
                    ranks=ranks,
                    fsdp=fsdp,
                )
    except KeyboardInterrupt:
        typer.echo(f"stopped: {goes_on()}", err=True)
        raise typer.Exit(130) from None
    except StoppedError:
        raise typer.Exit(2) from None
    if first:
        show(title, dataclasses.asdict(result), json)


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
