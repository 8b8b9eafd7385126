"""The advised learning rate: a pure function of the plan, and the number that a run stores."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSepPoisson
from rootnoise.planner import CONTRACTION, Job, advised_rate, learning_rate, plan
from rootnoise.planner.advice import MOVED, contracted_error
from rootnoise.runs.config import RunConfig, make_mechanism, make_sampler, planned
from rootnoise.runs.data import load
from rootnoise.runs.run import run
from rootnoise.runs.trials import _points, chosen_on_public
from rootnoise.runs.tuning import Tuning
from rootnoise.workload import SGD, ScheduledSGD, learning_rates
from trial_cases import PUBLIC, SMALL

CYCLE = FixedCycle(8, 10)


def calibrated(workload=None, who=CYCLE, name="bsr", **options):
    split = factorize(workload or SGD(80, 0.9), who, name, **options)
    return Mechanism.calibrate(split, who, epsilon=2.0, delta=1e-5)


def test_the_rate_halves_when_error_or_clip_norm_doubles():
    assert learning_rate(1.0) == MOVED
    for error in (0.01, 0.12, 7.0):
        assert learning_rate(2 * error) == pytest.approx(learning_rate(error) / 2)
        for clip in (0.01, 1.0, 30.0):
            assert learning_rate(error, 2 * clip) == pytest.approx(learning_rate(error, clip) / 2)
            # What the noise moves a weight by does not depend on either.
            assert learning_rate(error, clip) * error * clip == pytest.approx(MOVED)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 1.0), "error must be a finite number > 0, got 0.0"),
        ((float("nan"), 1.0), "error must be a finite number > 0, got nan"),
        ((0.1, -1.0), "clip_norm must be a finite number > 0, got -1.0"),
    ],
)
def test_there_is_no_rate_for_what_is_not_above_zero(values, message):
    with pytest.raises(RootnoiseError, match=f"^{message}"):
        learning_rate(*values)
    with pytest.raises(RootnoiseError, match=r"^batch_size must be >= 1, got 0"):
        advised_rate(calibrated(), 0)


@pytest.mark.parametrize(
    ("who", "name", "options"),
    [
        (CYCLE, "bsr", {}),
        (CYCLE, "identity", {}),
        (CYCLE, "lambda-cgd", {}),
        (CYCLE, "epoch-scaled", {"base": "banded"}),
        (CyclicPoisson(1, 0.1), "identity", {}),
        (CyclicPoisson(4, 0.4), "banded", {"bands": 4}),
        (MinSepPoisson(4, 0.1), "banded", {"bands": 4}),
    ],
)
@pytest.mark.parametrize("scheduled", [False, True])
def test_the_error_is_that_of_the_noise_in_the_iterates(who, name, options, scheduled):
    """Against dense matrices: what sigma sens A C^-1 Z / B moves the contracted iterates by."""
    factors = learning_rates("cosine", 80, 5)
    work = ScheduledSGD(factors, 0.9) if scheduled else SGD(80, 0.9)
    made = calibrated(work, who, name, **options)
    aim = work.contracted(CONTRACTION).matrix.dense()
    rows = aim @ np.linalg.inv(made.strategy.dense())
    moved = made.noise_multiplier * made.sensitivity.value * np.sqrt(np.square(rows).sum(1).mean())
    assert contracted_error(made, 200) == pytest.approx(moved / 200)
    assert advised_rate(made, 200) == pytest.approx(MOVED / (moved / 200), rel=0.06)
    halved = replace(made, clip_norm=0.5)
    assert advised_rate(halved, 200) == pytest.approx(2 * advised_rate(made, 200), rel=0.12)


def test_advice_has_a_limit():
    assert learning_rate(MOVED / 4.0) == learning_rate(1e-9) == 4.0
    assert learning_rate(1e-9, clip_norm=0.5) == 8.0


def test_a_schedule_that_ends_early_may_start_higher():
    constant, falling = SGD(80, 0.9), ScheduledSGD(learning_rates("linear", 80), 0.9)
    low, high = (advised_rate(calibrated(work), 200) for work in (constant, falling))
    assert low < high < 4 * low


def test_the_plan_and_the_run_advise_the_same():
    config = RunConfig(mechanism="auto", epsilon=2.0, epochs=3, batch_size=100)
    job = Job(1000, 100, 3, 2.0, 1e-5, 64)
    row = plan(SGD(job.n_steps, 0.9), job).recommended()
    chosen = planned(config, 1000)
    assert chosen.lr == pytest.approx(learning_rate(row.rmse_per_example), rel=0.06)
    small = planned(replace(config, clip_norm=0.1), 1000)
    assert small.lr == pytest.approx(10 * chosen.learning_rate, rel=0.1)
    # A row of the same job that is trained by name.
    assert planned(replace(chosen, lr="auto"), 1000).lr == chosen.lr


def test_weight_decay_is_no_part_of_the_advice_and_is_one_of_the_mechanism():
    config = RunConfig(mechanism="bsr", epsilon=2.0, epochs=3, batch_size=100, weight_decay=0.05)
    chosen = planned(config, 1000)
    assert chosen.lr == planned(replace(config, weight_decay=0.0), 1000).lr
    mechanism = make_mechanism(chosen, make_sampler(chosen, 1000))
    without = make_mechanism(replace(chosen, weight_decay=0.0), make_sampler(chosen, 1000))
    assert mechanism.fingerprint != without.fingerprint
    with pytest.raises(RootnoiseError, match=r"^weight_decay must be < 2 \(1 \+ momentum\) / lr"):
        planned(replace(config, weight_decay=1e4), 1000)


def test_a_rate_that_is_auto_trains_nothing_before_it_is_planned():
    config = RunConfig(**SMALL)
    assert config.lr == "auto"
    with pytest.raises(RootnoiseError, match=r"^lr must be planned for a data set first, got auto"):
        _ = config.learning_rate
    assert RunConfig(mechanism="none").lr == 0.5
    for lr, message in {
        "much": "lr must be a number, got 'much'",
        0: "lr must be a finite number > 0, got 0.0",
        2e6: "lr must be a finite number <= 1e",
    }.items():
        with pytest.raises(RootnoiseError, match=f"^{message}"):
            RunConfig(epsilon=1.0, lr=lr)


def test_the_advice_knows_nothing_of_the_data(monkeypatch, tmp_path):
    """Other inputs and labels, as many of them: the same number, before a step is made."""
    digits = load("digits")
    found = []
    for sign in (1, -1):
        inputs = sign * digits.train_inputs * (1 + 5 * (sign < 0))
        labels = digits.train_labels if sign > 0 else torch.zeros_like(digits.train_labels)
        data = replace(digits, train_inputs=inputs, train_labels=labels)
        monkeypatch.setattr("rootnoise.runs.run.load", lambda *_, data=data: data)
        result = run(RunConfig(**SMALL), tmp_path / str(sign))
        found.append(result.lr)
    assert found[0] == found[1] == planned(RunConfig(**SMALL), 1442).lr


def test_train_stores_the_number_and_resumes_by_it(call, tmp_path, monkeypatch):
    line: list[object] = ["train", "--json"]
    for name, value in (SMALL | {"insecure_noise_seed": 3}).items():
        line += [f"--{name.replace('_', '-')}", value]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(*line, "--lr", "auto", "--out", whole)[0] == 0
    stored = json.loads((whole / "config.json").read_text())["lr"]
    assert stored == planned(RunConfig(**SMALL), 1442).lr
    assert f"lr = {stored}\n" in (whole / "run.toml").read_text()
    epoch = []

    def interrupt(trainer, *rest, original=None):
        epoch.append(1)
        if len(epoch) == 2:
            raise KeyboardInterrupt
        return original(trainer, *rest)

    with monkeypatch.context() as patch:
        from rootnoise.runs.trainer import Trainer

        original = Trainer.epoch
        patch.setattr(Trainer, "epoch", lambda t, *rest: interrupt(t, *rest, original=original))
        assert call(*line, "--out", cut)[0] == 130
    # Another version may advise otherwise: the run goes on with its own number.
    monkeypatch.setattr("rootnoise.planner.advice.MOVED", 0.5)
    again = shutil.copytree(cut, tmp_path / "again")
    config = RunConfig(**SMALL, insecure_noise_seed=3)
    assert run(config, again, resume=True).lr == stored
    assert call("train", "--resume", "--lr", "auto", "--out", cut, "--json")[0] == 0
    assert json.loads((cut / "config.json").read_text())["lr"] == stored
    assert call("audit", cut, "--json")[0] == 0
    weights, *others = (
        torch.load(folder / "model.pt", weights_only=True) for folder in (whole, cut, again)
    )
    for other in others:
        assert all(torch.equal(weights[name], other[name]) for name in weights)


def test_tune_tries_rates_around_the_one_for_its_own_noise(call, tmp_path, monkeypatch):
    seen = []

    def kept(config, *_, **__):
        seen.append(config)

    monkeypatch.setattr("rootnoise.runs.trials.release_best", kept)
    line: list[object] = ["tune"]
    for name, value in SMALL.items():
        line += [f"--{name.replace('_', '-')}", value]
    assert call(*line, "--clip-norm", "0.5", "--out", tmp_path / "a")[0] == 0
    assert call(*line, "--momentum", "0,0.9", "--out", tmp_path / "b")[0] == 0
    (found, other) = seen
    middle = found.tuning.grid["lr"][1]
    assert found.tuning.grid == {"lr": [middle / 2, middle, 2 * middle]}
    made = make_mechanism(found, make_sampler(found, 1442))
    assert made.trials is not None
    assert middle == advised_rate(made, 400)
    assert middle < planned(RunConfig(**SMALL, clip_norm=0.5), 1442).lr  # trials add noise
    # Where something else is tried, each point has the rate advised for it.
    assert (other.lr, other.tuning.grid) == ("auto", {"momentum": [0.0, 0.9]})
    points = [point.config for point in _points(other, 1442)]
    assert [point.momentum for point in points] == [0.0, 0.9]
    for point in points:
        alone = make_mechanism(point, make_sampler(point, 1442))
        assert point.lr == advised_rate(alone, 400)


def test_clip_norms_that_are_tried_have_rates_of_their_own():
    config = RunConfig(**SMALL, clip_norm=0.5, tuning=Tuning({"clip_norm": [0.5, 5.0]}, trials=2))
    small, large = (point.config.lr for point in _points(config, 1442))
    assert small == pytest.approx(10 * large, rel=0.1)


def test_a_choice_on_public_data_leaves_the_rate_to_the_private_run(monkeypatch):
    tuning = Tuning({"momentum": [0.0, 0.9]}, public=PUBLIC)
    config = RunConfig(**SMALL, momentum=0.0, tuning=tuning)
    tried = []
    chosen = chosen_on_public(config, lambda *told: tried.append(told))
    assert len(tried) == 2
    assert chosen.lr == "auto"
