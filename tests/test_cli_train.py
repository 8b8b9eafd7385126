"""`rootnoise train` and `rootnoise demo` as a user types them."""

import dataclasses
import errno
import gzip
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest

from commands import refused
from rootnoise.cli.train import train
from rootnoise.cli.tune import tune
from rootnoise.runs import demo as demo_module
from rootnoise.runs.config import RunConfig
from rootnoise.runs.run import run, stored
from rootnoise.runs.settings import resuming
from rootnoise.runs.tuning import TUNED

BASE = ["--dataset", "digits", "--model", "logistic", "--batch-size", "200", "--epochs", "2"]
PRIVATE = [*BASE, "--epsilon", "4"]


def test_train_prints_one_json_object(call, tmp_path):
    status, out, err = call("train", *PRIVATE, "--out", tmp_path / "run", "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert set(result) >= {
        "accuracy",
        "epsilon",
        "delta",
        "noise_multiplier",
        "sensitivity",
        "rmse",
        "n_steps",
        "bands",
        "memory_rows",
        "seconds",
        "claim",
        "out",
        "mechanism",
    }
    assert result["accuracy"] > 0.5
    assert result["claim"].startswith("(4, 1e-05)-differential privacy for one record")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_train_prints_a_table_and_refuses_to_overwrite(call, tmp_path):
    arguments = ["train", *BASE, "--mechanism", "none", "--out", tmp_path / "run"]
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")  # no progress bar where there is no terminal
    assert "No privacy is claimed" in out
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert "out must be new or empty" in refused(call, *arguments)
    assert "got a finished one" in refused(call, *arguments, "--resume")
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epsilon", "-1", "epsilon must be a finite number > 0, got -1.0"),
        ("--epsilon", "nan", "epsilon must be a finite number > 0, got nan"),
        ("--delta", "1", "delta must be a finite number > 0 and < 1, got 1.0"),
        ("--bands", "0", "bands must be >= 1, got 0"),
        ("--batch-size", "5000", "batch_size must be in [1, n_examples=1442], got 5000"),
        ("--batch-size", "0", "batch_size must be >= 1, got 0"),
        ("--micro-batch-size", "0", "micro_batch_size must be >= 1, got 0"),
        ("--epochs", "0", "epochs must be >= 1, got 0"),
        ("--checkpoint-every", "0", "checkpoint_every must be >= 1, got 0"),
        ("--epochs", "two", "--epochs"),
        ("--mechanism", "magic", "mechanism must be one of none, dpsgd, banded"),
        (
            "--sampling",
            "poisson",
            "sampling must be fixed-cycle for mechanism bsr without groups, got poisson",
        ),
        (
            "--model",
            "huge",
            "model must be one of logistic, mlp, cnn, resnet18, transformer, got 'huge'",
        ),
        ("--dataset", "digit", "dataset must be one of digits"),
        ("--clip", "0", "clip_norm must be a finite number > 0, got 0.0"),
        ("--nonsense", "1", "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(call, tmp_path, option, value, message):
    line = refused(call, "train", *PRIVATE, "--out", tmp_path / "run", option, value)
    assert message in line
    assert not (tmp_path / "run").exists()


def test_missing_input_is_one_line_and_nothing_is_written(call, tmp_path):
    out = tmp_path / "run"
    assert "--out" in refused(call, "train", *PRIVATE)
    assert "epsilon must be given" in refused(call, "train", *BASE, "--out", out)
    no_data = ["--dataset", "mnist", "--data-dir", tmp_path / "nowhere"]
    assert "mnist" in refused(call, "train", "--epsilon", "4", *no_data, "--out", out)
    resume = ["--out", out, "--resume"]
    assert "out must hold a run's config.json" in refused(call, "train", *PRIVATE, *resume)
    assert not out.exists()


def test_resume_refuses_an_edited_mechanism_and_other_settings(call, tmp_path, monkeypatch):
    arguments = ["train", *PRIVATE, "--out", tmp_path]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rootnoise.runs.trainer.Trainer.epoch", interrupt)
        status, out, err = call(*arguments)
        line = f"stopped: rootnoise train --resume --out {tmp_path} goes on\n"
        assert (status, out, err) == (130, "", line)
    path = tmp_path / "mechanism.json"
    sound = path.read_text()
    edited = json.loads(sound)
    edited["definition"]["noise_multiplier"] /= 2
    path.write_text(json.dumps(edited))
    line = refused(call, *arguments, "--resume")
    assert line.startswith("error: mechanism.json must be as when the run began")
    path.write_text(sound)
    line = refused(call, *arguments, "--lr", "0.1", "--resume")
    assert "lr must be 0.91, as when the run began, got 0.1" in line
    line = refused(call, "train", "--resume", "--out", tmp_path, "--model", "cnn")
    assert "model must be 'logistic', as when the run began, got 'cnn'" in line
    same = ("--epsilon", "4", "--sampling", "auto")
    status, out, _ = call("train", "--resume", "--out", tmp_path, *same, "--json")
    assert (status, json.loads(out)["n_steps"]) == (0, 16)


def test_resume_knows_where_the_data_were(call, tmp_path, monkeypatch):
    """A relative folder is found from elsewhere too; moved data, by --data-dir; others, never."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 784))
    lines = "\n".join(",".join(map(str, [*row, i % 10])) for i, row in enumerate(pixels.tolist()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mnist_5k.csv.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    line = "train --dataset mnist-5k --data-dir mine --model logistic --epsilon 4 --batch-size 20"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rootnoise.runs.trainer.Trainer.epoch", interrupt)
        assert call(*line.split(), "--out", out)[0] == 130
    assert json.loads((out / "config.json").read_text())["data_dir"] == str(tmp_path / "mine")
    resume = ["train", "--resume", "--out", out, "--json"]
    monkeypatch.chdir(out)
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert "mnist_5k.csv.gz not found in" in refused(call, *resume)
    (tmp_path / "other").mkdir()
    other = gzip.compress(lines.replace(",0", ",1", 1).encode())
    (tmp_path / "other/mnist_5k.csv.gz").write_bytes(other)
    line = refused(call, *resume, "--data-dir", tmp_path / "other")
    assert "training set must be the one the run began with" in line
    with monkeypatch.context() as patch:
        patch.setattr("rootnoise.runs.trainer.Trainer.epoch", interrupt)
        assert call(*resume, "--data-dir", tmp_path / "moved")[0] == 130
    (tmp_path / "moved").rename(tmp_path / "mine")
    plain = dataclasses.replace(stored(out, {}), data_dir=None)
    with monkeypatch.context() as patch:
        patch.setattr("rootnoise.runs.trainer.Trainer.epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):  # settings of a program, without a folder
            run(plain, out, resume=True)
    assert call(*resume)[0] == 0
    assert call("audit", out, "--json")[0] == 0


def test_an_interrupt_before_the_first_step_says_so(call, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rootnoise.runs.run.load", interrupt)
    line = "stopped: before the first step, nothing is kept\n"
    assert call("train", *PRIVATE, "--out", tmp_path / "run") == (130, "", line)


@pytest.mark.parametrize("file", ["checkpoint.pt", "ledger.bin", "result.json"])
def test_a_disk_that_fills_up_names_the_command_that_goes_on(call, tmp_path, monkeypatch, file):
    """The last checkpoint is whole, and the resumed run ends as if nothing had been."""
    out, left = tmp_path / "run", [2 if file == "checkpoint.pt" else 1]

    def full(path):
        left[0] -= path.name == file
        if path.name == file and left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def fsync(descriptor, real=os.fsync):
        temporary = Path(f"/proc/self/fd/{descriptor}").readlink()
        full(temporary.with_name(temporary.name.removeprefix(".").removesuffix(".partial")))
        real(descriptor)

    with monkeypatch.context() as patch:
        if file == "ledger.bin":
            left[0] = 2  # the first is its header
        patch.setattr("os.fsync", fsync)
        line = refused(call, "train", *PRIVATE, "--out", out)
    assert line == (
        f"error: {file} must be writable, got No space left on device; the last checkpoint is "
        f"whole: make room and rootnoise train --resume --out {out}\n"
    )
    assert not list(out.glob(".*.partial"))
    status, text, _ = call("train", "--resume", "--out", out, "--json")
    assert (status, json.loads(text)["n_steps"]) == (0, 16)
    assert call("audit", out)[0] == 0


@pytest.mark.parametrize("command", [train, tune])
def test_defaults_are_those_of_the_library(command):
    options = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    for field in dataclasses.fields(RunConfig):
        if field.name == "tuning":
            continue
        # Of one or several values; the rate is auto, or a number.
        text = command is tune and field.name in TUNED and field.name != "lr"
        found = float(options[field.name]) if text else options[field.name]
        assert found == field.default, field.name


@pytest.mark.parametrize("command", ["train", "tune", "demo"])
def test_help_explains(call, command):
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "")
    assert "--out" in out


def test_demo_prints_a_table_or_json(call, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "REPETITIONS", 1)
    monkeypatch.setattr(demo_module, "EPOCHS", 1)
    status, out, err = call("demo", "--out", tmp_path / "demo")
    assert (status, err) == (0, "")
    for label in ("no privacy", "correlated (BSR)", "independent"):
        assert label in out
    status, out, err = call("demo", "--out", tmp_path / "demo", "--json")
    assert (status, err) == (0, "")
    assert len(json.loads(out)["rows"]) == 3
    assert "seed must be >= 0, got -1" in refused(
        call, "demo", "--out", tmp_path / "x", "--seed", "-1"
    )
    assert not (tmp_path / "x").exists()


def test_an_audit_lists_what_fails_first(call, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert call("train", *PRIVATE, "--epochs", "1", "--out", tmp_path / "run", "--json")[0] == 0
    (tmp_path / "run/model.pt").write_bytes(b"other")
    status, out, _ = call("audit", tmp_path / "run")
    rows = [
        [cell.strip() for cell in row.split("│")[1:5]] for row in out.splitlines() if "│" in row
    ]
    assert status == 1
    assert [row[:2] for row in rows if row[1] == "NO"] == [["model.pt", "NO"]] == [rows[0][:2]]
    assert all(cell.endswith("%") for row in rows if row[0] == "gap" for cell in row[2:4])
    assert any(row[0] == "gap" for row in rows)


def test_the_command_that_resumes_names_the_program_as_it_was_called(monkeypatch):
    monkeypatch.setattr("sys.argv", ["my env/bin/rootnoise"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert resuming(Path("a")) == "'my env/bin/rootnoise' train --resume --out a"
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert resuming(Path("a")) == "rootnoise train --resume --out a"
