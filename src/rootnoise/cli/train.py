"""`rootnoise train`: train a model, privately or not, and keep what it leaves in a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from rootnoise.cli import _options, _progress
from rootnoise.cli._report import show


@_options.grouped
def train(
    *,
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="New or empty folder for everything the run leaves.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="digits, fashion-mnist, mnist, mnist-5k, cifar10, or your own module:function."
        ),
    ] = "fashion-mnist",
    model: Annotated[
        str, typer.Option(help="logistic, mlp, cnn, resnet18 or transformer.")
    ] = "cnn",
    mechanism: Annotated[
        str,
        typer.Option(
            help="Any of `factorize`, such as bsr or identity (independent noise); dpsgd "
            "(independent noise, Poisson sampling); none (no privacy)."
        ),
    ] = "bsr",
    epsilon: Annotated[
        float | None,
        typer.Option(help="Privacy loss to spend; needed unless the mechanism is none."),
    ] = None,
    delta: Annotated[float, typer.Option(help="Failure probability, in (0, 1).")] = 1e-5,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 4,
    batch_size: Annotated[
        int, typer.Option(help="Examples a step (expected ones under Poisson sampling).")
    ] = 500,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="Examples at a time, for less memory [default: the whole batch]."),
    ] = None,
    lr: Annotated[
        float, typer.Option(help="Learning rate of SGD: less where there is more noise.")
    ] = 0.5,
    momentum: _options.Momentum = 0.9,
    decay: _options.Decay = 1.0,
    clip_norm: Annotated[
        float, typer.Option("--clip-norm", "--clip", help="Largest l2 norm of one gradient.")
    ] = 1.0,
    weight_decay: Annotated[
        float, typer.Option(help="Part of the parameters that is added to the gradient (L2).")
    ] = 0.0,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, linear, exponential or step [default: constant].")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up before the schedule.")] = 0,
    final: Annotated[
        float | None,
        typer.Option(
            help="Where the schedule ends, relative to --lr "
            "[default: 0; 0.01 for exponential and step]."
        ),
    ] = None,
    split: _options.Split,
    sampling: Annotated[
        str,
        typer.Option(
            help="fixed-cycle, balls-in-bins, poisson, min-sep-poisson (with --groups, where more "
            "than one band) or auto: poisson for dpsgd, else fixed-cycle."
        ),
    ] = "auto",
    groups: Annotated[
        int,
        typer.Option(
            help="Groups of cyclic Poisson sampling, or least separation of min-sep-poisson; a "
            "mechanism has as many bands."
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Fixes the order of the data and first weights.")] = 0,
    insecure_noise_seed: Annotated[
        int | None,
        typer.Option(
            help="Makes the noise repeatable. Then no privacy is claimed: experiments only."
        ),
    ] = None,
    device: _options.Device = "cpu",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data set's files; --resume remembers it.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints [default: once an epoch].")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the unfinished run in OUT; no other option is needed."
        ),
    ] = False,
    json: _options.Json = False,
) -> None:
    """Train a model and state its accuracy on the test set and its privacy.

    OUT keeps settings, mechanism, claim, metrics, curve and final weights. While the run is
    unfinished it also holds noise.key and checkpoint.pt: keep them as secret as the data, for with
    them the noise can be subtracted. They are deleted when the run ends. Loss and accuracy on the
    training set are not reported: epsilon does not cover them.
    """
    from rootnoise.runs.config import RunConfig
    from rootnoise.runs.folder import RunFolder
    from rootnoise.runs.run import run, stored

    settings: dict[str, Any] = {
        "dataset": dataset,
        "model": model,
        "mechanism": mechanism,
        "epsilon": epsilon,
        "delta": delta,
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "lr": lr,
        "momentum": momentum,
        "decay": decay,
        "clip_norm": clip_norm,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup": warmup,
        "final": final,
        **split.given(),
        "sampling": sampling,
        "groups": groups,
        "seed": seed,
        "insecure_noise_seed": insecure_noise_seed,
        "device": device,
    }
    if resume:
        given = {name: value for name, value in settings.items() if _given(context, name)}
        if given.get("sampling") == "auto":
            del given["sampling"]
        config = stored(out, given)
    else:
        config = RunConfig(**settings)
    try:
        with _progress.steps(f"{config.mechanism} on {config.dataset}", quiet=json) as on_step:
            result = run(
                config,
                out,
                data_dir=data_dir,
                resume=resume,
                checkpoint_every=checkpoint_every,
                on_step=on_step,
            )
    except KeyboardInterrupt:
        folder = RunFolder(out)
        begun = (out / "config.json").exists()
        how = f"{folder.resume} goes on" if begun else "before the first step, nothing is kept"
        typer.echo(f"stopped: {how}", err=True)
        raise typer.Exit(130) from None
    show(f"{config.mechanism} on {config.dataset}", dataclasses.asdict(result), json)


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, and is not just at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
