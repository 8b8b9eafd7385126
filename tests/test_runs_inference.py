"""`rootnoise predict`, and a finished model in Python."""

from __future__ import annotations

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from commands import refused
from rootnoise._check import RootnoiseError
from rootnoise.runs import data
from rootnoise.runs.config import RunConfig
from rootnoise.runs.data import load as load_data
from rootnoise.runs.data import refuse_unscaled, standardised
from rootnoise.runs.inference import ABOUT, load, settings
from rootnoise.runs.run import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    run(RunConfig(dataset="digits", model="cnn", epsilon=8.0, epochs=1, batch_size=200), out)
    return out


@pytest.fixture(scope="module")
def pixels():
    """The test part of the digits as pixels, from 0 to 16."""
    digits = load_data("digits")
    mean, std = 0.3053, 0.3760
    return ((digits.test_inputs * std + mean) * 16).round().numpy()


@pytest.fixture
def call(call):
    return partial(call, "predict")


def test_the_accuracy_is_that_of_the_run(folder, call):
    result = json.loads((folder / "result.json").read_text())
    status, out, err = call(folder, "--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    said = json.loads(out)
    assert list(said) == ["inputs", "accuracy", "labels", "out"]
    assert said["accuracy"] == pytest.approx(result["accuracy"])
    assert said["inputs"] == len(said["labels"]) == 355


def test_pixels_in_a_file_are_scaled_when_asked(folder, call, pixels, tmp_path):
    np.save(tmp_path / "raw.npy", pixels)
    np.savetxt(tmp_path / "rows.csv", standardised("digits", pixels).reshape(-1, 64), delimiter=",")
    ours = json.loads(call(folder, "--json")[1])["labels"]
    for arguments in (("raw.npy", "--raw"), ("rows.csv",)):
        name, *more = arguments
        status, out, _ = call(folder, "--data", tmp_path / name, *more, "--json")
        said = json.loads(out)
        assert status == 0
        assert said["labels"] == ours
        assert said["accuracy"] is None
    line = refused(call, folder, "--data", tmp_path / "raw.npy")
    rule = "inputs must be in [-0.812, 1.848] as those of digits are (--raw takes pixels), got 0 to"
    assert rule in line
    np.save(tmp_path / "raw.npy", pixels * 16)
    line = refused(call, folder, "--data", tmp_path / "raw.npy", "--raw")
    assert "pixels of digits must be in [0, 16], got 0 to 256" in line


def test_labels_and_probabilities_of_every_input_go_to_a_file(folder, call, tmp_path):
    status, out, _ = call(folder, "--out", tmp_path / "said.csv")
    assert status == 0
    assert "0: " in out
    with (tmp_path / "said.csv").open() as file:
        rows = list(csv.DictReader(file))
    made = load(folder).predict(load_data("digits").test_inputs)
    assert list(rows[0]) == ["label", *(f"p{i}" for i in range(10))]
    assert [int(row["label"]) for row in rows] == made.labels.tolist()
    shares = [[float(row[f"p{i}"]) for i in range(10)] for row in rows]
    np.testing.assert_allclose(shares, made.probabilities, atol=1e-6)
    assert call(folder, "--out", tmp_path / "said.json")[0] == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert [row["label"] for row in said] == made.labels.tolist()
    assert [row["probabilities"] for row in said] == shares


def test_a_loaded_model_is_that_of_the_run(folder):
    finished = load(folder)
    digits = load_data("digits")
    assert (finished.input_shape, finished.n_classes) == ((1, 8, 8), 10)
    assert not finished.model.training
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in finished.model.state_dict().items()
    )
    made = finished.predict(digits.test_inputs)
    np.testing.assert_allclose(made.probabilities.sum(1), 1)
    with torch.no_grad():
        own = finished.model(digits.test_inputs).double().softmax(1)
    np.testing.assert_allclose(made.probabilities, own, rtol=1e-4, atol=1e-6)
    assert (made.labels == own.argmax(1).numpy()).all()


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (np.zeros((3, 63)), r"inputs must be \(N, 1, 8, 8\), or as many numbers in each of N rows"),
        (np.zeros(64), r"inputs must be .*, got shape \(64,\)"),
        (np.zeros((0, 64)), r"inputs must be .*, got shape \(0, 64\)"),
        (np.full((1, 64), np.nan), "inputs must be finite, got NaN"),
    ],
)
def test_other_inputs_are_refused(folder, inputs, line):
    with pytest.raises(RootnoiseError, match=line):
        load(folder).predict(inputs)


def test_folders_without_a_finished_run_are_refused(folder, tmp_path):
    with pytest.raises(RootnoiseError, match=r"run must be finished, with model\.safetensors in"):
        load(tmp_path)
    with pytest.raises(RootnoiseError, match=r"run must have its config\.json, got"):
        settings(tmp_path)
    path = tmp_path / "model.safetensors"
    rule = r"model\.safetensors must be as a run wrote it, got"
    path.write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(RootnoiseError, match=rule):
        load(tmp_path)
    save_file({"1.weight": torch.zeros(2)}, path)
    with pytest.raises(RootnoiseError, match=rule):
        load(tmp_path)
    about = {"model": "logistic", "input_shape": [2], "n_classes": 2}
    save_file({"1.weight": torch.zeros(3, 2)}, path, {ABOUT: json.dumps(about)})
    with pytest.raises(RootnoiseError, match=rule):
        load(tmp_path)


def test_options_that_do_not_go_together_are_refused(folder, call, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 64)))
    a = tmp_path / "a.npy"
    assert "out must be .csv or .json, got said.txt" in refused(call, folder, "--out", "said.txt")
    assert "raw must be left out without --data" in refused(call, folder, "--raw")
    line = refused(call, folder, "--data", a, "--data-dir", tmp_path)
    assert "data-dir must be left out with --data, got" in line
    line = refused(call, folder, "--data", a, "--out", tmp_path / "no/said.csv")
    assert "out must be writable, got" in line


def test_only_built_in_data_have_a_scale():
    with pytest.raises(RootnoiseError, match=r"pixels must be of a built-in data set \(digits, "):
        standardised("own:data", np.zeros((1, 1, 2, 2)))
    refuse_unscaled("own:data", torch.full((1, 5), 1e6))
    colours = np.zeros((2, 3, 2, 2))
    colours[:, 2] = 255
    for name in data._STATISTICS:
        channels = 3 if name == "cifar10" else 1
        top = data._STATISTICS[name][0]
        refuse_unscaled(name, standardised(name, colours[:, -channels:] * (top / 255)))
