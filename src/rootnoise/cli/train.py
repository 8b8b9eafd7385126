"""`rootnoise train`: train a model, privately or not, and keep the run in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rootnoise import __version__
from rootnoise.cli import _options, _progress, _report
from rootnoise.runs import settings_file
from rootnoise.runs.settings import Settings, resuming

if TYPE_CHECKING:
    from rootnoise.runs.trainer import Trainer


def settings_from(*, tuning: bool) -> Callable[[typer.Context, Path | None], Path | None]:
    """Let a file give the defaults: its values go through the checks of the flags, as text."""

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            values = settings_file.read(path, tuning)
            context.default_map = {name: _typed(value) for name, value in values.items()}
        return path

    return read


def _typed(value: settings_file.Value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else f"{value}"


def goes_on(out: Path) -> str:
    """Say what a run in OUT that was stopped leaves, and how to go on."""
    begun = (out / "config.json").exists() and not (out / "result.json").exists()
    return f"{resuming(out)} goes on" if begun else "before the first step, nothing is kept"


@_options.grouped
def train(
    *,
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="New or empty folder for everything the run leaves.")],
    config: Annotated[
        Path | None,
        typer.Option(
            callback=settings_from(tuning=False),
            is_eager=True,
            help="TOML file of these options, such as batch-size = 500; a flag overrides it. Every "
            "run leaves its own as run.toml.",
        ),
    ] = None,
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
    # An average of 0 is none: the default.
    own = {"bands": _options.bands(settings.bands), "average": settings.average or None}
    own["lr"] = _options.rate(settings.lr)
    values = vars(settings) | own
    given = {name: value for name, value in values.items() if _given(context, name)}

    def go() -> None:  # imports take a second, in which one may be interrupted too
        from rootnoise.runs.config import RunConfig
        from rootnoise.runs.processes import StoppedError, joined
        from rootnoise.runs.run import run, stored, without_choice

        try:
            with joined(lambda: f"; {goes_on(out)}") as ranks:
                ranks.all_same({"version": __version__, "out": str(out), "resume": resume} | values)
                if resume:
                    moved = {"data_dir": given.pop("data_dir")} if "data_dir" in given else {}
                    found = ranks.by_first(lambda: stored(out, without_choice(given)))
                    made = dataclasses.replace(found, **moved)
                else:
                    made = RunConfig(**values)
                title, first = f"{made.mechanism} on {made.dataset}", ranks.rank == 0
                private = made.mechanism != "none" and made.insecure_noise_seed is None
                with _progress.steps(title, quiet=json or not first) as bar:
                    result = run(
                        made,
                        out,
                        resume=resume,
                        checkpoint_every=checkpoint_every,
                        on_step=bar.step,
                        on_checkpoint=partial(_tell, bar, private) if bar.shown else None,
                        report=True,
                        ranks=ranks,
                        fsdp=fsdp,
                    )
        except StoppedError:
            raise typer.Exit(2) from None
        if first:
            _report.show(title, dataclasses.asdict(result), json)

    try:
        go()
    except KeyboardInterrupt:
        typer.echo(f"stopped: {goes_on(out)}", err=True)
        raise typer.Exit(130) from None


def _tell(bar: _progress.Steps, private: bool, trainer: Trainer) -> None:
    """Say what is released with the checkpoint: accuracy, and the epsilon of the steps so far."""
    from rootnoise.accounting.rounding import round_up

    said, mechanism = [], trainer.mechanism
    if trainer.history:
        said.append(f"accuracy {trainer.history[-1]['test_accuracy']:.3f}")
    if private and mechanism is not None:
        spent = round_up(mechanism.epsilon_spent(trainer.t), 3)
        said.append(f"epsilon {spent} of {round_up(mechanism.epsilon, 3)}")
    bar.say(", ".join(said))


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
