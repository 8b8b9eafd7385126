"""`rootnoise plan`: rank every mechanism that fits a job, before anything is trained."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rootnoise._check import RootnoiseError, integer, warn_of_delta
from rootnoise.cli import (
    _number_files,
    _options,
    _plan_view,
    _plots,
    _progress,
    _report,
    _workload,
)

if TYPE_CHECKING:
    from rootnoise.planner import Job, Plan, Row, Speed


@_options.grouped
def plan(
    *,
    dataset_size: Annotated[int, typer.Option(help="Examples N in the data set.")],
    batch_size: Annotated[int, typer.Option(help="Examples B in a batch.")],
    epochs: Annotated[int, typer.Option(help="Passes over the data.")],
    epsilon: Annotated[float, typer.Option(help="Privacy loss to spend.")],
    delta: Annotated[float, typer.Option(help="Failure probability, in (0, 1).")],
    memory_rows: Annotated[
        int | None,
        typer.Option(help="Most noise vectors of the model's size to keep [default: no limit]."),
    ] = None,
    balls_in_bins: Annotated[
        bool | None,
        typer.Option(
            "--balls-in-bins/--no-bins",
            help="Also try balls-in-bins sampling: seconds, or half a minute with 500 steps in an "
            "epoch [default: in a single epoch of at most 512].",
        ),
    ] = None,
    contraction: Annotated[
        float | None,
        typer.Option(
            help="The loss pulls the parameters back by exp(-c) over the run, which forgets old "
            "noise: errors foretell accuracy best with 12; 0 is the error of the papers "
            "[default: 12]."
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            metavar="<all|rates|last|tail|tail-average>",
            help="Which iterates rows are ranked by: all, all weighted by the learning rates, the "
            "last, the last quarter, or the average of the last quarter.",
        ),
    ] = "all",
    work: _workload.Options,
    devices: _options.Devices,
    top: Annotated[int, typer.Option(help="Rows of the table; JSON and HTML have all.")] = 12,
    plot: Annotated[Path | None, typer.Option(help="PNG file: error against memory.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="HTML file: one page with table, plot and the words.")
    ] = None,
    train_args: Annotated[
        int | None,
        typer.Option(
            metavar="<row>",
            help="Print only the command that trains with this row; the best row is 1.",
        ),
    ] = None,
    json: _options.Json = False,
) -> None:
    """Rank every mechanism for a job by its expected error, within a memory limit.

    The error is noise multiplier x rmse / batch size at clip norm 1, so that mechanisms of
    different sampling compare. A fixed cycle needs no secret. Poisson and cyclic Poisson sampling
    amplify privacy, but only while batches are random and secret.
    """
    from rootnoise import planner

    integer("top", top, 1)
    fleet = devices.fleet(bool(work.momentum) or work.optimizer is not None)
    job = planner.Job(dataset_size, batch_size, epochs, epsilon, delta, memory_rows, fleet)
    warn_of_delta(job.delta, job.n_examples)
    workload = work.value(job.n_steps)
    pull = planner.CONTRACTION if contraction is None else contraction
    speed = None if fleet is None else devices.speed()
    if train_args is not None:
        _refuse_untrainable(work, train_args, json)
    with _progress.pieces("plan", quiet=json) as update:
        made = planner.plan(
            workload,
            job,
            update,
            bins=balls_in_bins,
            contraction=pull,
            objective=objective,
        )
    if plot is not None:
        _plots.save(plot, partial(_plots.plan, made.rows))
    if html is not None:
        from rootnoise.cli import _page  # with what it draws, as slow to import as all the rest

        _page.write(html, _plan_view.title(job, work.described()), made, speed)
    if train_args is not None:
        row = integer("train-args", train_args, 1, len(made.rows), high_name="rows") - 1
        print(shlex.join(train_command(job, work, made.rows[row])))
        return
    if json:
        _report.show("", _values(job, work, made, speed), as_json=True)
        return
    title, rows = _plan_view.title(job, work.described()), _plan_view.cells(made, speed)[:top]
    _report.table(title, _plan_view.headings(made), rows, _plan_view.SPARE)
    hidden = len(made.rows) - top
    more = [f"{hidden} more rows: --top {len(made.rows)}, --json or --html."] if hidden > 0 else []
    take = made.place_to_take
    more.append(f"Most should take row {take + 1}, as auto does.")
    if (rate := _rate(work, made, made.rows[take])) is not None:
        more.append(f"Start it at learning rate {rate:g} with clip norm 1, as train does.")
    if _trainable(work):
        more.append("To train with a row: --train-args ROW prints the command.")
    _report.lines(*more, *_plan_view.notes(made, speed))


def train_command(job: Job, work: _workload.Options, row: Row) -> list[str]:
    """Return the words of the command that trains with a row; DATASET and OUT are placeholders."""
    from rootnoise.runs.config import row_settings

    given = {
        name: getattr(work, name)
        for name in ("momentum", "decay", "schedule", "warmup", "final", "lr")
        if getattr(work, name) is not None
    }
    words: dict[str, Any] = {
        "dataset": "DATASET",
        "out": "OUT",
        "epsilon": job.epsilon,
        "delta": job.delta,
        "batch_size": job.batch_size,
        "epochs": job.epochs,
        "momentum": 0.0,  # the default of `plan`, not that of `train`
        **given,
        **row_settings(row),
    }
    pairs = ([f"--{name.replace('_', '-')}", str(value)] for name, value in words.items())
    return ["rootnoise", "train", *chain(*pairs)]


def _trainable(work: _workload.Options) -> bool:
    """Whether `train` has this workload."""
    named = work.optimizer is None and work.workload is None
    return named and not (work.schedule and _number_files.named(work.schedule))


def _rate(work: _workload.Options, made: Plan, row: Row) -> float | None:
    """Return the learning rate to start a row at with clip norm 1, None where there is no advice.

    Errors of a schedule are for iterates of its peak, so that the advice is relative to that.
    """
    from rootnoise.planner import CONTRACTION, learning_rate

    if not _trainable(work) or (made.contraction, made.objective) != (CONTRACTION, "all"):
        return None
    peak = 1.0 if work.lr is None else work.lr
    return float(f"{learning_rate(row.rmse_per_example / peak):.2g}")


def _refuse_untrainable(work: _workload.Options, row: int, json: bool) -> None:
    """Refuse, before any work, a row or a workload for which there is no command."""
    integer("train-args", row, 1)
    if json:
        raise RootnoiseError(f"json must be left out with --train-args, got --train-args {row}")
    for name in ("optimizer", "workload"):
        if getattr(work, name) is not None:
            got = getattr(work, name)
            raise RootnoiseError(
                f"{name} must be left out with --train-args (train has SGD alone), got {got}"
            )
    if work.schedule is not None and _number_files.named(work.schedule):
        raise RootnoiseError(
            f"schedule must be one that train has with --train-args, got {work.schedule}"
        )


def _values(job: Job, work: _workload.Options, made: Plan, speed: Speed | None) -> dict[str, Any]:
    from rootnoise import participation

    hidden = ("participation", "remembers_noise")
    rows = [
        {
            **{name: value for name, value in vars(row).items() if name not in hidden},
            "sampling": row.sampling,
            "participation": participation.to_dict(row.participation),
            "learning_rate": _rate(work, made, row),
            **({} if (size := made.size(row, speed)) is None else {"size": size.to_dict()}),
        }
        for row in made.rows
    ]
    asked = {name: value for name, value in asdict(job).items() if name != "fleet"}
    fleet = {} if job.fleet is None else {"fleet": asdict(job.fleet)}
    return {
        **asked,
        "n_steps": job.n_steps,
        "workload": work.described(),
        "contraction": made.contraction,
        "objective": made.objective,
        "take": made.place_to_take + 1,
        **fleet,
        **({} if speed is None else {"speed": asdict(speed)}),
        "rows": rows,
        "left_out": dict(made.left_out),
        "diagnostics": [asdict(finding) for finding in made.findings],
    }
