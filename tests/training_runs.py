"""What the processes of test_runs_kill run; a child can import it, a test module it cannot."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from processes import die, kill_at_line, kill_at_state, kill_inside_write
from rootnoise.accounting import Trials
from rootnoise.runs import curves
from rootnoise.runs.config import RunConfig
from rootnoise.runs.run import run
from rootnoise.runs.trials import release_best
from rootnoise.runs.tuning import Tuning

CONFIG = RunConfig(
    dataset="digits",
    model="logistic",
    epsilon=4.0,
    epochs=3,
    batch_size=200,
    lr=0.2,
    insecure_noise_seed=5,
)
RUN = (
    "_files.py",
    "noise/blockplan.py",
    "training/clip/module.py",
    "training/clip/bounds.py",
    "training/clipping.py",
    "training/guards.py",
    "training/probe.py",
    "training/replicated.py",
    "training/reuse.py",
    "training/tape.py",
    "noise/engine.py",
    "participation/ledger_file.py",
    "participation/ledger.py",
    "noise/stream.py",
    "training/optimizer.py",
    "training/resume.py",
    "runs/folder.py",
    "runs/release.py",
    "runs/trainer.py",
    "runs/run.py",
)
FOLDER = ("_files.py", "runs/folder.py", "runs/release.py", "runs/run.py")


def train(out: Path, every: int | None, config: RunConfig = CONFIG) -> None:
    """Start the run in `out`, or resume it where it has a config.json; without its picture."""
    curves.learning_curves = _nothing  # type: ignore[assignment]
    run(config, out, resume=(out / "config.json").exists(), checkpoint_every=every)


def _nothing(*_: object) -> None:
    """Drawing takes most of the time of so short a run."""


def train_killed_at_step(out: Path, every: int, config: RunConfig, step: int) -> None:
    """Die when a step is made, of which the checkpoint does not know yet."""

    def on_step(t: int, n_steps: int, accuracy: float | None) -> None:
        if t == step:
            die()

    run(config, out, resume=(out / "config.json").exists(), checkpoint_every=every, on_step=on_step)


def train_killed_at_line(out: Path, every: int, fuse: int) -> None:
    kill_at_line(fuse, RUN)
    train(out, every)


def train_killed_at_state(out: Path, every: int, fuse: int) -> None:
    kill_at_state(fuse, out, FOLDER)
    train(out, every)


def train_killed_inside_write(out: Path, every: int, fuse: int) -> None:
    kill_inside_write(fuse)
    train(out, every)


def tune_killed_at_state(out: Path, fuse: int) -> None:
    """Die in a state of the folder that `out` is made in; two trials are made."""
    curves.learning_curves = _nothing  # type: ignore[assignment]
    Trials.draw = lambda self: 2  # type: ignore[method-assign,assignment,misc]
    tuning = Tuning({"lr": [0.1, 0.2]}, trials=5.0)
    kill_at_state(fuse, out.parent, (*FOLDER, "runs/trials.py"))
    config = replace(CONFIG, lr=0.1, epochs=1, insecure_noise_seed=None, tuning=tuning)
    release_best(config, out)


def train_and_wait(out: Path, at: Connection) -> None:
    """Say when the second step is made, and make no third."""

    def on_step(t: int, n_steps: int, accuracy: float | None) -> None:
        if t == 2:
            at.send(t)
            at.recv()

    run(CONFIG, out, checkpoint_every=1, on_step=on_step)
