"""What people meet on their first day: the wrong data, the wrong order, a narrow terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import rootnoise
from rootnoise import RootnoiseError, evaluate, make_private
from rootnoise.cli import main
from rootnoise.runs.data import load

X = torch.arange(120.0).reshape(40, 3) / 120
Y = (torch.arange(40) % 2).long()


def private(data=None, delta=1e-5, optimizer=None, **options):
    data = TensorDataset(X[:32], Y[:32]) if data is None else data
    model = nn.Linear(3, 2)
    inner = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    goal = {"epsilon": 8, "epochs": 1, "batch_size": 8, "mechanism": "bsr"}
    return make_private(model, inner, data, delta=delta, **goal, **options)


# --------------------------------------------------------------------------------------- privacy


@pytest.mark.parametrize("delta", [1 / 32, 0.5])
def test_a_delta_that_lets_records_be_published_is_warned_of(delta):
    with pytest.warns(
        UserWarning, match=r"^delta should be well below 1/32=0.031, .*, got "
    ) as told:
        private(delta=delta)
    assert [each.filename for each in told] == [__file__]  # the line of the user


def test_a_small_delta_is_fine():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private(delta=0.99 / 32)


def test_train_warns_of_a_large_delta_in_one_line(tmp_path):
    run = "train --dataset digits --model logistic --epsilon 8 --epochs 1 --batch-size 721 --lr 0.1"
    words = [sys.executable, "-m", "rootnoise", *run.split(), "--delta", "0.01", "--out", "run"]
    env = os.environ | {"PYTHONPATH": str(Path(rootnoise.__file__).parents[1])}
    made = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    (line,) = made.stderr.splitlines()
    assert line.startswith("warning: delta should be well below 1/1442=0.00069, one over the ")


def test_plan_warns_of_a_large_delta():
    words = "plan --dataset-size 100 --batch-size 50 --epochs 1 --epsilon 1 --delta 0.01"
    with pytest.warns(UserWarning, match=r"^delta should be well below 1/100=0.01, "):
        assert main(words.split()) == 0


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(X[:32], Y[:32]),
        TensorDataset(X[31:], Y[31:]),
        TensorDataset(X[::3], Y[::3]),
        Subset(TensorDataset(X, Y), [39, 5]),
        DataLoader(TensorDataset(X[20:], Y[20:]), batch_size=4),
    ],
    ids=["again", "one", "every third", "subset", "loader"],
)
def test_training_records_are_known_by_their_memory(data):
    model = private().model
    with pytest.raises(RootnoiseError, match=r"^data must be held out, .* got the training set$"):
        evaluate(model, data)
    assert 0 <= evaluate(model, data, release_unnoised=True) <= 1


def test_what_was_held_out_may_be_evaluated():
    whole = TensorDataset(X, Y)
    training, test = Subset(whole, range(0, 40, 2)), Subset(whole, range(1, 40, 2))
    for model, held_out in [
        (private().model, TensorDataset(X[32:], Y[32:])),
        (private(training).model, test),
        (private(training).model, DataLoader(test, batch_size=3)),
        (private(Subset(training, range(8))).model, Subset(training, range(8, 20))),
    ]:
        assert 0 <= evaluate(model, held_out) <= 1
    model = private(Subset(training, range(8))).model
    for overlapping in (whole, training, Subset(training, [7])):
        with pytest.raises(RootnoiseError, match=r"^data must be held out, "):
            evaluate(model, overlapping)


@pytest.mark.parametrize(
    ("parts", "refused"),
    [
        ("x, y, x, y", True),
        ("x, y, x.copy(), y", True),
        ("x[:40], y[:40], x[39:], y[39:]", True),
        ("made(x, y, x[30:], y[30:])", True),
        ("made(x[:30], y[:30], x[30:], y[30:])", False),
        ("x[:40], y[:40], x[40:], y[40:]", False),
        ("x[::2], y[::2], x[1::2], y[1::2]", False),
    ],
)
def test_test_inputs_must_not_be_training_inputs(tmp_path, monkeypatch, parts, refused):
    monkeypatch.chdir(tmp_path)
    name = f"mine_{abs(hash(parts))}"
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\nimport torch\nfrom rootnoise.runs.data import Dataset\n\n\n"
        "def made(*parts):\n"
        "    return Dataset('mine', *map(torch.from_numpy, parts), 2)\n\n\n"
        "def load():\n"
        "    x = np.random.default_rng(0).normal(size=(50, 2)).astype('f4')\n"
        f"    y = np.arange(50) % 2\n    return {parts}\n"
    )
    if not refused:
        assert load(f"{name}:load").input_shape == (2,)
        return
    with pytest.raises(RootnoiseError, match=r": test inputs must be other people's than "):
        load(f"{name}:load")


# ------------------------------------------------------------------------- the cure is in the line


def test_a_tuple_of_tensors_is_no_data_set():
    with pytest.raises(RootnoiseError, match=r"a tuple of 2 tensors: TensorDataset\(\*data\)$"):
        private((X, Y))


def test_an_optimizer_with_a_closure_names_others():
    model = nn.Linear(3, 2)
    with pytest.raises(RootnoiseError, match=r"'closure': take one without, such as SGD or Adam$"):
        make_private(
            model,
            torch.optim.LBFGS(model.parameters()),
            TensorDataset(X, Y),
            batch_size=8,
            epochs=1,
            epsilon=8,
            delta=1e-5,
        )


def test_a_loop_with_the_old_optimizer_is_told_of_the_new_one():
    model = nn.Linear(3, 2)
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = make_private(
        model, old, TensorDataset(X, Y), batch_size=8, epochs=1, epsilon=8, delta=1e-5
    ).loader

    def loop():
        for x, y in loader:
            cross_entropy(model(x), y).backward()
            old.step()

    with pytest.raises(RootnoiseError, match=r"call step of the optimizer that make_private ret"):
        loop()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--dataset mine.csv",
            r"got 'mine.csv': a function of yours reads a file, docs/your-data.md$",
        ),
        ("--dataset own:words", r"got ndarray <U1 \(4, 1\): convert each column to numbers$"),
        ("--dataset own:names", r"got ndarray <U1 \(4,\): number the classes 0, 1, 2, ...$"),
        (
            "--dataset own:table",
            r"input_shape of model cnn \(mlp takes any\) must be .*, got \(2,\)$",
        ),
        ("predict run --data nowhere.csv", r"file must be readable, got nowhere.csv: no such file"),
    ],
)
def test_the_command_line_names_the_cure(tmp_path, capsys, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import numpy as np\n\nx, y = np.eye(4)[:, :2], np.arange(4) % 2\n\n\n"
        "def words():\n    return [['1']] * 4, y, [['2']] * 4, y\n\n\n"
        "def names():\n    return x, ['a'] * 4, x + 1, ['b'] * 4\n\n\n"
        "def table():\n    return x, y, x + 1, y\n"
    )
    if words.startswith("predict"):
        run = "train --dataset own:table --model logistic --epsilon 8 --epochs 1 --batch-size 4"
        assert main([*run.split(), "--out", "run"]) == 0
    else:
        words = f"train --epsilon 4 --batch-size 4 --out r {words}"
    capsys.readouterr()
    assert main(words.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said


# ------------------------------------------------------------------------------------ the terminal


@pytest.mark.parametrize("columns", ["50", "80"])
@pytest.mark.parametrize("command", [[], ["plan"], ["train"], ["account"], ["factorize"]])
def test_help_cuts_no_option_short(capsys, monkeypatch, columns, command):
    monkeypatch.setenv("COLUMNS", columns)
    assert main([*command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert not command or "--help" in said
    assert all(len(line) <= int(columns) for line in said.splitlines())


def test_plan_says_how_to_train(capsys):
    job = "plan --dataset-size 100 --batch-size 50 --epochs 1 --epsilon 1 --delta 1e-5"
    line = "\nTo train with a row: --train-args ROW prints the command.\n"
    assert main(job.split()) == 0
    assert line in capsys.readouterr().out
    assert main(f"{job} --optimizer adam --lr 0.1".split()) == 0
    assert line not in capsys.readouterr().out


def test_diagnose_takes_the_folder_of_a_run(tmp_path, capsys):
    run = "train --dataset digits --model logistic --epsilon 8 --epochs 1 --batch-size 721 --lr 0.1"
    assert main([*run.split(), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["diagnose", str(tmp_path / "run"), "--json"]) == 0
    one = capsys.readouterr().out
    assert main(["diagnose", str(tmp_path / "run" / "mechanism.json"), "--json"]) == 0
    assert capsys.readouterr().out == one
