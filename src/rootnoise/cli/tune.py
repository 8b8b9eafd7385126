"""`rootnoise tune`: choose hyperparameters by private trials, or on public data, and train."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from rootnoise.cli import _options, _progress, _report
from rootnoise.cli.train import goes_on, settings_from
from rootnoise.runs.settings import Settings
from rootnoise.runs.tuning import TUNED, Tuning, marker, starting_over

# Trials on average, where nothing else is said: the best of 10 costs some 1.5 times one alone.
TRIALS = 10.0
# Learning rates to try, over the one advised.
FACTORS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Several(Settings):
    """The settings of a run, where those in `TUNED` are texts of one or several values."""

    several: ClassVar[bool] = True


@_options.grouped
def tune(
    *,
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="New or empty folder for the best run.")],
    config: Annotated[
        Path | None,
        typer.Option(
            callback=settings_from(tuning=True),
            is_eager=True,
            help="TOML file of these options, such as lr = [0.1, 0.2]; a flag overrides it. Every "
            "tuning leaves its own as run.toml.",
        ),
    ] = None,
    tried: _options.Tried,
    public: Annotated[
        str | None,
        typer.Option(help="Try every combination on this public data set instead: costs nothing."),
    ] = None,
    public_dir: Annotated[
        Path | None, typer.Option(help="Folder of the public data set's files.")
    ] = None,
    settings: Several,
    json: _options.Json = False,
) -> None:
    """Choose learning rate, clip norm and the like by trials, paid for or on public data.

    Several values of an option, with commas between, are tried; without any, the learning rates
    0.5, 1 and 2 times the one that the plan advises. Privately: a random, secret number
    of trials (10 on average, or --trials), each of a combination drawn at random; the best on the
    test part is released, at the epsilon of private selection, and nothing of the others. Keep the
    time that it takes as secret as the data, since it tells how many there were. With --public
    every combination is tried on data that need no privacy; the best is then trained once.
    """
    values = vars(settings) | {"bands": _options.bands(settings.bands)}
    auto = {"lr"} if values["lr"] == "auto" else set()
    grid = {name: _options.numbers(name, values[name]) for name in TUNED if name not in auto}
    values |= {name: given[0] for name, given in grid.items()}
    several = {name: given for name, given in grid.items() if len(given) > 1}
    number = tried.value(None if public else TRIALS)
    how: dict[str, Any] = {"public": public}
    how["public_dir"] = None if public_dir is None else str(public_dir)
    if number is not None:
        how |= {"trials": number.mean, "trials_shape": number.to_dict()["shape"]}
    if auto and not several:
        several["lr"] = _advised(values, how)
        values["lr"] = several["lr"][0]
    values["tuning"] = Tuning(several, **how)
    if public is None:
        _paid(values, out, json)
    else:
        _free(values, out, json)


def _advised(values: dict[str, Any], how: dict[str, Any]) -> list[float]:
    """Return the rates to try where nothing else is: around the one that is advised."""
    from rootnoise.runs.config import RunConfig, planned
    from rootnoise.runs.data import load

    # The advice knows how many trials share epsilon, whatever they try: any second value will do.
    clip = values["clip_norm"]
    tuning = Tuning({"clip_norm": [clip, 2.0 if clip == 1 else 1.0]}, **how)
    made = RunConfig(**values | {"tuning": tuning})
    data = load(made.dataset, None if made.data_dir is None else Path(made.data_dir))
    rate = planned(made, data.n_train).learning_rate
    return [factor * rate for factor in FACTORS]


def _paid(values: dict[str, Any], out: Path, json: bool) -> None:
    try:  # imports take a second, in which one may be interrupted too
        from rootnoise.runs import trials
        from rootnoise.runs.config import RunConfig

        made = RunConfig(**values)
        # Neither how long it takes nor how far it is may be seen.
        with _progress.waiting("private trials", quiet=json):
            result = trials.release_best(made, out, report=True)
    except KeyboardInterrupt:
        if (out / "result.json").exists():
            more = f"{out} holds a whole run, which is released; starting over is another release"
        elif marker(out).exists():
            more = f"nothing is released; {starting_over(out)}"
        else:
            more = "nothing is kept"
        typer.echo(f"stopped: {more}", err=True)
        raise typer.Exit(130) from None
    title = f"the best of several trials: {made.mechanism} on {made.dataset}"
    if result is not None:
        _report.show(title, {"released": True} | asdict(result), json)
        return
    spent = {"epsilon": made.epsilon, "delta": made.delta}
    said = (
        "No trial was made, as their number was drawn to be 0. That is the result: it costs the "
        f"same, and {starting_over(out)}."
    )
    _report.show(title, {"released": False, **spent, "said": said}, json)


def _free(values: dict[str, Any], out: Path, json: bool) -> None:
    try:
        from rootnoise.runs import trials
        from rootnoise.runs.config import RunConfig
        from rootnoise.runs.folder import RunFolder
        from rootnoise.runs.run import run

        made, found = RunConfig(**values), []
        RunFolder(out).refuse_used()
        assert made.tuning is not None  # noqa: S101
        with _progress.pieces(f"trials on {made.tuning.public}", quiet=json) as bar:

            def on_trial(done: int, of: int, accuracy: float, point: dict[str, Any]) -> None:
                found.append(point | {"accuracy": accuracy})
                bar(done, of, f"accuracy {accuracy:.3f}")

            chosen = trials.chosen_on_public(made, on_trial)
        title = f"{chosen.mechanism} on {chosen.dataset}"
        with _progress.steps(title, quiet=json) as steps:
            result = run(chosen, out, on_step=steps.step, report=True)
    except KeyboardInterrupt:
        typer.echo(f"stopped: {goes_on(out)}", err=True)
        raise typer.Exit(130) from None
    if json:
        _report.show(title, {"released": True, "tried": found} | asdict(result), json)
        return
    names = [*found[0]]
    rows = [[f"{row[name]:.4g}" for name in names] for row in found]
    heads = [name.replace("_", " ") for name in names]
    _report.table(f"tried on {made.tuning.public}, which costs nothing", heads, rows)
    _report.show(title, asdict(result), json)
