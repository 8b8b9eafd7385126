"""What was tried, as a value: its checks, its points, and its options."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from rootnoise._check import RootnoiseError
from rootnoise.accounting import Trials
from rootnoise.runs import settings_file
from rootnoise.runs.config import RunConfig
from rootnoise.runs.settings import Settings
from rootnoise.runs.tuning import TUNED, Tuning

GRID = {"lr": [0.1, 0.5], "clip_norm": [1.0]}


def test_what_may_be_tuned_changes_neither_batches_nor_noise_multiplier():
    assert TUNED == ("lr", "momentum", "decay", "clip_norm", "weight_decay")
    names = {field.name for field in dataclasses.fields(Settings)}
    assert {"epochs", "batch_size", "epsilon", "delta", "seed", "sampling"} < names - set(TUNED)


@pytest.mark.parametrize("shape", [0.0, 1.0, 2.5, "poisson"])
def test_the_number_of_trials_is_the_one_that_was_given(shape):
    tuning = Tuning(GRID, trials=8, trials_shape=shape)
    assert tuning.number == Trials(8.0, math.inf if shape == "poisson" else shape)
    assert Tuning(GRID, public="mnist").number is None


def test_points_are_all_combinations_in_order():
    tuning = Tuning({"momentum": [0.0, 0.9], "lr": (0.1, 0.2, 0.3)}, trials=2)
    points = [(point["momentum"], point["lr"]) for point in tuning.points()]
    assert points == [(m, lr) for m in (0.0, 0.9) for lr in (0.1, 0.2, 0.3)]


def test_it_survives_json_and_toml(tmp_path):
    """As the files of a run have it: equal after reading, so that a resumed run finds its own."""
    tunings = [
        Tuning(GRID, trials=3, trials_shape="poisson"),
        Tuning(GRID, public="mnist", public_dir="a b"),
    ]
    for tuning in tunings:
        config = RunConfig(epsilon=4.0, lr=0.5, tuning=tuning)
        saved = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
        assert RunConfig(**saved) == config
        assert dataclasses.asdict(RunConfig(**saved)) == saved
        path = tmp_path / "run.toml"
        path.write_bytes(settings_file.text(saved))
        assert path.read_text().startswith(settings_file.TUNED_HEAD)
        found = settings_file.read(path, tuning=True)
        assert found == settings_file.flat(vars(config))
        assert found["lr"] == [0.1, 0.5]
        assert found["clip_norm"] == [1.0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"grid": {"lr": [0.1]}},
            "grid must have at least 2 points, such as lr 0.1,0.2,0.5, got 1",
        ),
        ({"grid": {}}, "grid must have at least 2 points"),
        ({"grid": {"lr": []}}, r"grid's lr must be a list of numbers, got \[\]"),
        ({"grid": {"lr": 0.1}}, "grid's lr must be a list of numbers, got 0.1"),
        ({"grid": {"lr": [1.0, 1]}}, r"grid's lr must be distinct, got \[1.0, 1\]"),
        ({"grid": {"lr": [1.0, "x"]}}, "grid's lr must be a number, got 'x'"),
        ({"grid": {"epochs": [1, 2]}}, "grid's settings must be one of lr, momentum, .* 'epochs'"),
        ({"grid": [1]}, r"grid must have a list for each setting, got \[1\]"),
        ({"grid": {"lr": [float(i) for i in range(1001)]}}, "points of the grid must be in "),
        ({"trials": None}, "give exactly one of trials and public, got trials=None, public=None"),
        (
            {"public": "mnist"},
            "give exactly one of trials and public, got trials=5.0, public=mnist",
        ),
        ({"public_dir": "a"}, "public_dir must come with public, got a alone"),
        ({"trials": 2000.0}, "trials must be a finite number <= 1000, got 2000.0"),
        ({"trials": 1.0}, "mean must be a finite number >= 1.01"),
        ({"trials_shape": -1.0}, "shape must be a finite number >= 0 and <= 100, got -1.0"),
    ],
)
def test_refusals(change, line):
    with pytest.raises(RootnoiseError, match=line):
        Tuning(**({"grid": GRID, "trials": 5.0} | change))


def test_a_config_with_other_fields_is_refused():
    with pytest.raises(RootnoiseError, match=r"^tuning must have a grid and trials or public, got"):
        RunConfig(epsilon=4.0, lr=0.5, tuning={"grid": GRID, "trials": 5.0, "more": 1})
