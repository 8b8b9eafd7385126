"""Extreme numbers: an answer or one line, whatever the command."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from rootnoise import _limits, planner
from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.cli import main
from rootnoise.runs.config import RunConfig, make_sampler
from rootnoise.workload import SGD

TRAIN = "train --dataset digits --model logistic --batch-size 721 --epochs 1 --epsilon 4"
PLAN = "plan --dataset-size 100 --batch-size 25 --epochs 1 --epsilon 1 --delta 1e-5"
FACTORIZE = "factorize --steps 20"
HUGE = ["1e300", "-1e300", "1e-300", "nan", "inf", "100", "0"]
WHOLE = ["100000000000", "99999999999999999999999", "-1", "0", "1e3"]
REAL = ("--epsilon", "--delta", "--lr", "--momentum", "--decay", "--clip", "--weight-decay")
COUNTS = ("--epochs", "--batch-size", "--seed", "--insecure-noise-seed", "--bands")
SIZES = ("--dataset-size", "--batch-size", "--epochs", "--memory-rows")
DIAGNOSE = "diagnose run/mechanism.json --batch-size 10"
AUDIT = "audit run --empirical --canaries 20"
DEMO = "demo --out demo"
OF_BATCHES = ("--dataset-size", "--parameters")
CASES = [
    *((TRAIN, option, value) for value in HUGE for option in REAL),
    *((TRAIN, option, value) for value in WHOLE for option in COUNTS),
    *((PLAN, "--epsilon", value) for value in HUGE),
    *((PLAN, "--delta", value) for value in HUGE),
    *((PLAN, option, value) for value in WHOLE for option in SIZES),
    *((FACTORIZE, option, value) for value in HUGE for option in ("--momentum", "--decay")),
    *((FACTORIZE, option, value) for value in WHOLE for option in ("--steps", "--min-sep")),
    (TRAIN, "--batch-size 1 --epochs", "1000000"),
    (TRAIN, "--dataset mnist --data-dir", "/dev/full"),
    (FACTORIZE, "--steps", "100000000"),
    (FACTORIZE, "--plot", "/dev/full"),
    (FACTORIZE, "--epsilon 1 --save", "/dev/full"),
    (FACTORIZE, "--epsilon 1e300 --save", "/dev/null/x"),
    (PLAN, "--html", "/dev/full"),
    (PLAN, "--plot", "/dev/full"),
    *((DIAGNOSE, option, value) for value in WHOLE for option in ("--batch-size", *OF_BATCHES)),
    *((DIAGNOSE, "--parameters 9 --gradient-norm", value) for value in HUGE),
    *((AUDIT, option, value) for value in WHOLE for option in ("--canaries", "--attack-seed")),
    (AUDIT, "--canaries", "9" * 400),
    (AUDIT, "--canaries", "900000"),
    *((DEMO, "--seed", value) for value in ("9223372036854775807", "9" * 400, "-1", "1e3")),
    ("demo --out", "", "/dev/full"),
    ("diagnose", "", "/dev/full"),
    ("account --epsilon 1 --delta 1e-5 --mechanism-file", "", "/dev/full"),
    ("audit", "", "/dev/full"),
    (PLAN, "--batch-size 1000 --dataset-size", "1000000000"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([*TRAIN.split(), "--out", str(folder / "run"), "--json"]) == 0
    return folder


@pytest.mark.parametrize(("command", "option", "value"), CASES, ids=lambda x: x[:60])
def test_any_number_is_answered_or_refused_in_one_line(
    capsys, tmp_path, monkeypatch, finished, command, option, value
):
    capsys.readouterr()  # what `finished` has printed
    monkeypatch.chdir(finished if "run" in command else tmp_path)
    monkeypatch.setattr("rootnoise.runs.curves.learning_curves", lambda *_: None)
    line = [*command.split(), *option.split(), value, "--json"]
    line += ["--out", str(tmp_path / "run")] if command == TRAIN else []
    status = main(line)
    out, err = capsys.readouterr()
    if status == 0:
        assert err == ""
        json.loads(out, parse_constant=pytest.fail)
    else:
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"epsilon": 1e300},
            r"epsilon must be a finite number >= 1e-06 and <= 100000, got 1e\+300",
        ),
        ({"epsilon": 1e-300}, "epsilon must be a finite number >= 1e-06 and <= 100000, got 1e-300"),
        ({"lr": 1e300}, r"lr must be a finite number <= 1e\+06, got 1e\+300"),
        ({"clip_norm": 1e-300}, r"clip_norm must be a finite number >= 1e-06 and <= 1e\+06, got"),
        (
            {"lr": 0.5, "weight_decay": 7.6},
            r"weight_decay must be < 2 \(1 \+ momentum\) / lr = 7.6, or the .*, got 7.6",
        ),
    ],
)
def test_settings_beyond_use_are_refused(fields, line):
    with pytest.raises(RootnoiseError, match=line):
        RunConfig(**{"epsilon": 4.0, **fields})


def test_the_bound_of_weight_decay_is_that_of_stability():
    config = RunConfig(epsilon=4.0, lr=0.5, weight_decay=7.5)
    x, m = 1.0, 0.0
    for _ in range(5000):
        m = config.momentum * m + config.weight_decay * x
        x -= config.learning_rate * m
    assert math.hypot(x, m) < 1e-6


def test_what_does_not_fit_into_memory_is_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(_limits, "_free", lambda: 2e9)
    _limits.memory("it", 2e9, "less")
    line = r"^memory must hold it, 2\.1 GB \(less needs less\), got 2 GB free$"
    with pytest.raises(RootnoiseError, match=line):
        _limits.memory("it", 2.1e9, "less")
    config = RunConfig(epsilon=4.0, mechanism="bsr", sampling="min-sep-poisson", separation=2)
    with pytest.raises(RootnoiseError, match=r"memory must hold all batches, 11\.5 GB"):
        make_sampler(RunConfig(**vars(config) | {"epochs": 6000}), 60_000)
    monkeypatch.setattr(_limits, "_free", lambda: None)
    _limits.memory("it", 1e30, "less")


def test_free_memory_is_known_here():
    free = _limits._free()
    assert free is None or 1e6 < free < 1e16


def test_noise_that_does_not_fit_is_refused_before_the_folder_is_made(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(_limits, "_free", lambda: 1e6)
    whole = ["--micro-batch-size", "721"]
    assert main([*TRAIN.split(), *whole, "--out", str(tmp_path / "run")]) == 2
    line = "memory must hold noise and a step of 721 examples at a time, 0.0068 GB"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("1 TiB"), "memory must suffice (a shorter run needs less), got 1 TiB"),
        (OSError(28, "No space left on device", "x"), "output must be writable, got x No space"),
    ],
)
def test_what_nobody_foresaw_is_one_line_too(capsys, monkeypatch, error, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("rootnoise.planner.plan", fail)
    assert main(PLAN.split()) == 2
    assert line in capsys.readouterr().err


def test_what_is_no_regular_file_is_written_to_and_not_replaced(tmp_path):
    """As root a device would become a file: /dev/full did."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"whole")
    assert pipe.is_fifo()
    assert os.read(reader, 10) == b"whole"
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_picture_on_a_full_disk_is_refused(capsys):
    """Matplotlib itself passes over the failure."""
    assert main([*FACTORIZE.split(), "--plot", "/dev/full"]) == 2
    line = "error: plot must be a picture that can be written, got /dev/full: [Errno 28] No space"
    assert capsys.readouterr().err.startswith(line)


JOB = planner.Job(100, 25, 1, 1.0, 1e-5)
TRIED = sum(len(planner.candidates(JOB, who)) for who in planner.samplings(JOB))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (PLAN + " --momentum 0.9 --no-bins", ["plan", f"{TRIED - 1}/{TRIED}"]),
        (AUDIT, ["attacks", "steps of the attacks", "8/8"]),
        (FACTORIZE, ["bsr", "error and lower bounds"]),
        ("account --noise-multiplier 1 --delta 1e-5", ["epsilon"]),
    ],
)
def test_work_is_seen_at_a_terminal_and_nowhere_else(capsys, monkeypatch, finished, line, shown):
    monkeypatch.chdir(finished)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("rich.console.Console.is_terminal", True)
        patch.setenv("COLUMNS", "200")
        assert main(line.split()) == 0
        err = capsys.readouterr().err
        assert all(word in err for word in shown)
        assert main([*line.split(), "--json"]) == 0
        assert capsys.readouterr().err == ""
    assert main(line.split()) == 0
    assert capsys.readouterr().err == ""


def test_a_plan_warns_of_nothing():
    """Newton's method meets Hessians whose norm overflows here."""
    job = planner.Job(60_000, 600, 20, 4.0, 1e-5)
    work, who = SGD(job.n_steps, momentum=0.9), planner.samplings(job)[0]
    assert planner.search._split(work, job, who, "banded-inverse", {"bands": 16}).memory_rows == 15
