"""The settings of a run: options, schedules, groups, and what the optimizer really does."""

from __future__ import annotations

import dataclasses
import inspect
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from rootnoise._check import RootnoiseError
from rootnoise.cli import main
from rootnoise.factorization.base import _BUILDERS
from rootnoise.participation import CyclicPoisson
from rootnoise.planner import Job, plan
from rootnoise.runs import data
from rootnoise.runs.config import (
    OPTIONS,
    RunConfig,
    make_mechanism,
    make_sampler,
    make_workload,
    planned,
    rates,
)
from rootnoise.runs.run import run
from rootnoise.runs.trainer import Trainer
from rootnoise.workload import SGD, ToeplitzWorkload, from_optimizer

PRIVATE = {"dataset": "digits", "model": "logistic", "epsilon": 4.0, "batch_size": 100}


def test_every_option_of_every_mechanism_is_a_setting():
    taken = {name for build in _BUILDERS.values() for name in inspect.signature(build).parameters}
    assert set(OPTIONS) == taken - {"workload", "participation", "progress"} | {"contraction"}
    assert set(OPTIONS) <= {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.2, "lr": 0.3},
        {"weight_decay": 30.0, "lr": 0.1},  # complex roots
        {"schedule": "cosine", "warmup": 3},
        {"schedule": "step", "final": 0.25, "weight_decay": 0.2, "lr": 0.3},
        {"schedule": "linear", "momentum": 0.0},
    ],
    ids=str,
)
def test_the_workload_is_what_torch_does(settings):
    n, config = 30, RunConfig(mechanism="none", **settings)
    factors = rates(config, n)
    sgd = partial(
        torch.optim.SGD,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    real = from_optimizer(sgd, n, lambda o: LambdaLR(o, lambda t: factors[min(t, n - 1)]))
    ours = config.learning_rate * make_workload(config, n).matrix.dense()
    np.testing.assert_allclose(ours, real.matrix.dense(), rtol=1e-8, atol=1e-12)


def test_constant_settings_stay_toeplitz():
    assert make_workload(RunConfig(mechanism="none", decay=0.9), 5) == SGD(5, 0.9, 0.9)
    assert isinstance(make_workload(RunConfig(mechanism="none", weight_decay=1e-3), 5), SGD)
    strong = RunConfig(mechanism="none", weight_decay=30.0, lr=0.1)
    assert isinstance(make_workload(strong, 5), ToeplitzWorkload)


@pytest.mark.parametrize("mechanism", ["none", "bsr"])
def test_the_trainer_does_what_the_workload_says(mechanism):
    """The learning rate of each step, and the way of a parameter under its own gradients."""
    config = RunConfig(
        **{**PRIVATE, "epsilon": None if mechanism == "none" else 4.0},
        mechanism=mechanism,
        epochs=1,
        schedule="cosine",
        warmup=2,
        weight_decay=0.5,
        lr=0.2,
        insecure_noise_seed=None if mechanism == "none" else 0,
    )
    digits = data.load("digits")
    sampler = make_sampler(config, digits.n_train)
    trainer = Trainer(config, digits, sampler, make_mechanism(config, sampler))
    weight = next(trainer.model.parameters())
    start = weight.detach().double().numpy().copy().ravel()
    gradients, way = [], []

    def remember(*_):
        # With weight decay torch adds w theta to the gradient; the noise is in it already.
        gradients.append(weight.grad.detach().double().numpy().copy().ravel())
        way.append(start - weight.detach().double().numpy().ravel())

    trainer.epoch(remember)
    n = sampler.n_steps
    a = config.learning_rate * make_workload(config, n).matrix.dense()
    # x = start - theta obeys the same recurrence, driven by g + w start.
    driven = np.array(gradients) + config.weight_decay * start
    np.testing.assert_allclose(a @ driven, np.array(way), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "rows"),
    [
        ("blt", {"buffers": 1}, 1),
        ("bisr", {"bands": 5}, 4),
        ("epoch-scaled", {"base": "banded", "bands": 6}, 5),
        ("bsr", {"bands": "auto"}, 14),
        ("bsr-gamma", {"gamma": 0.6}, 14),
    ],
)
def test_options_reach_the_mechanism(name, settings, rows):
    config = RunConfig(**PRIVATE, mechanism=name, epochs=2, **settings)
    made = make_mechanism(config, make_sampler(config, 1442))
    assert made.noising.state_size == rows
    if name == "bsr-gamma":
        assert made.strategy.column(0)[1] == pytest.approx(0.6 * 1.9)


def test_groups_are_cyclic_poisson_sampling():
    config = RunConfig(**PRIVATE, mechanism="bsr", epochs=2, sampling="poisson", groups=4)
    sampler = make_sampler(config, 1442)
    assert sampler.participation == CyclicPoisson(4, 400 / 1442)
    made = make_mechanism(config, sampler)
    assert (made.strategy.bands, made.participation) == (4, sampler.participation)
    assert made.epsilon <= 4
    wide = dataclasses.replace(config, bands=5)
    with pytest.raises(RootnoiseError, match="bands"):
        make_mechanism(wide, sampler)


@pytest.mark.parametrize("sampling", ["auto", "fixed-cycle", "poisson", "balls-in-bins"])
def test_auto_is_the_recommended_row_of_a_plan(sampling):
    batch = 500 if sampling == "balls-in-bins" else 100  # few bins are calibrated in seconds
    private = PRIVATE | {"batch_size": batch}
    config = RunConfig(**private, mechanism="auto", epochs=2, sampling=sampling, memory_rows=3)
    chosen = planned(config, 1442)
    job = Job(1442, batch, 2, 4.0, 1e-5, memory_rows=3)
    rows = plan(SGD(job.n_steps, 0.9), job, bins=sampling == "balls-in-bins")
    row = rows.recommended(*{"poisson": ("poisson", "cyclic-poisson")}.get(sampling, (sampling,)))
    sampler = make_sampler(chosen, 1442)
    made = make_mechanism(chosen, sampler)
    assert sampler.participation == row.participation
    assert (made.noise_multiplier, made.epsilon) == (row.noise_multiplier, row.epsilon)
    assert made.strategy.bands == row.bands
    assert made.noising.state_size <= 3
    assert planned(chosen, 1442) is chosen


def test_auto_needs_a_data_set():
    config = RunConfig(**PRIVATE, mechanism="auto")
    rule = "mechanism must be planned for a data set first, got auto"
    sampler = make_sampler(RunConfig(**PRIVATE), 1442)
    for make in (lambda: make_sampler(config, 1442), lambda: make_mechanism(config, sampler)):
        with pytest.raises(RootnoiseError, match=rule):
            make()
    with pytest.raises(
        RootnoiseError, match=r"batch_size must be in \[1, n_examples=50\], got 100"
    ):
        planned(config, 50)


def test_a_planned_run_goes_on_with_what_was_planned(capsys, tmp_path, monkeypatch):
    line = ["train", "--dataset", "digits", "--model", "logistic", "--epsilon", "4"]
    line += ["--batch-size", "700", "--epochs", "2", "--mechanism", "auto", "--memory-rows", "2"]
    line += ["--out", str(tmp_path / "run"), "--json"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", interrupt)
        assert main(line) == 130
    before = (tmp_path / "run/mechanism.json").read_bytes()
    monkeypatch.setattr("rootnoise.runs.config.plan", interrupt)  # it is not planned again
    assert main([*line, "--sampling", "min-sep-poisson", "--resume"]) == 2
    assert "sampling must be " in capsys.readouterr().err
    config = RunConfig(**PRIVATE | {"batch_size": 700}, epochs=2, mechanism="auto", memory_rows=2)
    result = run(config, tmp_path / "run", resume=True)
    assert result.mechanism != "auto"
    assert (tmp_path / "run/mechanism.json").read_bytes() == before


def test_a_planned_run_trains_and_passes_its_audit(capsys, tmp_path):
    line = (
        "train --dataset digits --model logistic --epsilon 4 --batch-size 100 --epochs 1 "
        f"--mechanism banded --sampling poisson --groups 4 --schedule linear --out {tmp_path}/run"
    )
    assert main([*line.split(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["bands"], result["memory_rows"]) == (4, 8)
    assert "added to or removed from the data set" in result["claim"]
    assert main(["audit", f"{tmp_path}/run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held"] is True


@pytest.mark.parametrize(
    "sampling", [["poisson", "--groups", "2"], ["balls-in-bins"]], ids=["cyclic", "bins"]
)
def test_secret_batches_survive_a_resume(capsys, tmp_path, monkeypatch, sampling):
    """A draw made anew would put people in other groups, and the ledger would refuse them."""
    line = ["train", "--dataset", "digits", "--model", "logistic", "--epsilon", "4"]
    line += ["--batch-size", "400", "--epochs", "3", "--mechanism", "banded"]
    line += ["--sampling", *sampling, "--out", str(tmp_path / "run"), "--json"]
    epoch = Trainer.epoch

    def interrupt(trainer, *arguments):
        if trainer.t:
            raise KeyboardInterrupt
        epoch(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", interrupt)
        assert main(line) == 130
    assert main([*line, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["n_steps"] == 12
    assert main(["audit", str(tmp_path / "run"), "--json"]) == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"gamma": 0.5}, "gamma must be left out for mechanism 'bsr', got 0.5"),
        ({"mechanism": "dpsgd", "bands": 2}, "bands must be left out for mechanism 'identity'"),
        ({"mechanism": "identity", "bands": 2}, "bands must be left out for mechanism 'identity'"),
        (
            {"mechanism": "none", "epsilon": None, "lam": 0.5},
            "lam must be left out for mechanism none, got 0.5",
        ),
        ({"groups": 2}, "groups must be 1 but for a banded mechanism under poisson sampling, got"),
        ({"mechanism": "dpsgd", "groups": 2}, "groups must be 1 but for"),
        ({"groups": 0}, "groups must be >= 1, got 0"),
        (
            {"separation": 2, "sampling": "balls-in-bins"},
            "^separation must be 1 but for a banded mechanism under min-sep-poisson sampling, got",
        ),
        ({"separation": 0}, "separation must be >= 1, got 0"),
        (
            {"sampling": "min-sep-poisson", "groups": 4},
            "^groups must be 1 under min-sep-poisson sampling, got 4: give --separation 4$",
        ),
        (
            {"sampling": "poisson", "separation": 4},
            "^separation must be 1 under poisson sampling, got 4: give --groups 4$",
        ),
        (
            {"sampling": "min-sep-poisson"},
            "sampling must be fixed-cycle for mechanism bsr without separation, got min-sep-pois",
        ),
        ({"schedule": "wavy"}, "schedule must be one of cosine, linear, exponential, step, got"),
        ({"warmup": 2}, "warmup must be left out without schedule, got 2"),
        ({"final": 0.5}, "final must be left out without schedule, got 0.5"),
        ({"schedule": "step", "final": 0.0}, "final must be a finite number > 0 and <= 1, got 0"),
        ({"schedule": "step", "warmup": -1}, "warmup must be >= 0, got -1"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number >= 0, got -1.0"),
        ({"weight_decay": 0.1, "decay": 0.9}, "decay must be 1 with weight_decay, got 0.9"),
        ({"bands": "many"}, "bands must be an integer, got 'many'"),
        ({"mechanism": "auto", "bands": 2}, "bands must be left out for mechanism auto, got 2"),
        ({"mechanism": "auto", "epsilon": None}, "epsilon must be given for mechanism auto, got"),
        ({"mechanism": "auto", "memory_rows": -1}, "memory_rows must be >= 0, got -1"),
        ({"mechanism": "auto", "groups": 2}, "groups must be 1 but for a banded mechanism under"),
        (
            {"mechanism": "auto", "sampling": "min-sep-poisson"},
            "sampling must be one of auto, fixed-cycle, poisson, balls-in-bins for mechanism auto",
        ),
        ({"memory_rows": 3}, r"memory_rows must be left out for mechanism bsr \(auto chooses"),
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "cuda:"}, "device must be cpu, cuda or cuda:N, got 'cuda:'"),
    ],
)
def test_refusals(settings, line):
    with pytest.raises(RootnoiseError, match=line):
        RunConfig(**{**PRIVATE, "mechanism": "bsr", **settings})


def test_a_warmup_longer_than_the_run_is_refused():
    config = RunConfig(**PRIVATE, schedule="linear", warmup=99)
    with pytest.raises(RootnoiseError, match=r"warmup must be in \[0, n_steps-1=9\], got 99"):
        make_workload(config, 10)
