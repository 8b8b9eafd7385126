"""`--average`: what is released is the mean of the last iterates, and training is as without it."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from torch import nn

import training_runs
from processes import outcome
from rootnoise._check import RootnoiseError
from rootnoise.cli import main
from rootnoise.runs import audit, report, settings_file
from rootnoise.runs.averaging import Average
from rootnoise.runs.config import RunConfig, make_key, make_mechanism, make_sampler, n_averaged
from rootnoise.runs.data import load
from rootnoise.runs.folder import RunFolder
from rootnoise.runs.inference import load as finished
from rootnoise.runs.models import build
from rootnoise.runs.run import run
from rootnoise.runs.trainer import Trainer
from test_runs import PERIOD, stopped, weights, with_

N = 3 * PERIOD
REPEATABLE = {"insecure_noise_seed": 5}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], w) for name, w in theirs.items())


def iterates(config):
    """The weights after each step of a run without an average, by hand."""
    config = dataclasses.replace(config, average=None)
    data = load(config.dataset)
    sampler = make_sampler(config, data.n_train)
    mechanism = make_mechanism(config, sampler)
    trainer = Trainer(config, data, sampler, mechanism, make_key(config))
    kept = []

    def keep(*_):
        named = trainer.model.named_parameters()
        kept.append({name: p.detach().double().numpy().copy() for name, p in named})

    while trainer.t < sampler.n_steps:
        trainer.epoch(keep)
    return kept


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"average": 0.25}, 6),
        ({"average": 1}, 24),
        ({"average": 1e-9}, 1),
        ({"average": 0.4, "model": "mlp", "sampling": "poisson", "mechanism": "identity"}, 10),
        ({"average": 0.5, "mechanism": "none", "epsilon": None, "insecure_noise_seed": None}, 12),
        ({"average": 0.1, "decay": 0.99, "micro_batch_size": 70}, 2),
    ],
)
def test_the_release_is_the_mean_of_the_iterates(tmp_path, changes, count):
    config = with_(**(REPEATABLE | changes))
    result = run(config, tmp_path)
    kept = iterates(config)
    assert len(kept) == N
    assert n_averaged(config, N) == count
    for name, w in weights(tmp_path).items():
        mean = np.mean([each[name] for each in kept[-count:]], axis=0)
        assert w.dtype == torch.float32
        np.testing.assert_array_equal(w.numpy(), mean.astype(np.float32))
    data, model = load("digits"), finished(tmp_path)
    right = model.predict(data.test_inputs).accuracy(data.test_labels)
    assert result.accuracy == pytest.approx(right, abs=1e-12)


def test_it_changes_nothing_but_the_release(tmp_path):
    """Same noise, ledger, mechanism and claim; the last checkpoint has the last iterate."""
    last = {}
    for name, average in (("plain", None), ("mean", 0.5)):
        config, out = with_(**REPEATABLE, average=average), tmp_path / name

        def at_checkpoint(trainer, name=name, out=out):
            last[name] = RunFolder(out).checkpoint()

        run(config, out, on_checkpoint=at_checkpoint)
    assert_same(last["mean"]["model"], last["plain"]["model"])
    assert set(last["mean"]) - set(last["plain"]) == {"average"}
    assert set(last["plain"]["model"]) == set(weights(tmp_path / "mean"))
    assert_same(last["plain"]["model"], weights(tmp_path / "plain"))
    mean, plain = weights(tmp_path / "mean"), weights(tmp_path / "plain")
    assert not any(torch.equal(mean[name], w) for name, w in plain.items())
    for name in ("mechanism.json", "claim.txt"):
        assert (tmp_path / "mean" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    # Before the average begins, in step 13, accuracy is that of the last iterate.
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in last]
    first, second = ([json.loads(line)["test_accuracy"] for line in each] for each in lines)
    assert first[0] == second[0]
    assert all(check.held for check in audit.audit(tmp_path / "mean"))


def test_zero_is_a_run_as_before(tmp_path):
    """No setting in run.toml, no sum in the checkpoint, the same bits."""
    keys = []
    zero = with_(**REPEATABLE, average=0.0)
    assert zero == with_(**REPEATABLE)
    run(zero, tmp_path, on_checkpoint=lambda trainer: keys.append({*trainer.state_dict()}))
    known = {"version", "data", "surroundings", "model", "optimizer", "history", "seconds"}
    assert keys == [known | {"micro_batch_size"}] * 3
    assert "average" not in (tmp_path / "run.toml").read_text()
    assert "mean of the last" not in report.page(report.read(tmp_path))
    for name, w in weights(tmp_path).items():
        np.testing.assert_array_equal(w.double().numpy(), iterates(zero)[-1][name])


def test_a_run_of_before_the_setting_goes_on_and_is_audited(tmp_path):
    run(with_(), tmp_path / "done")
    path = tmp_path / "done" / "config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("average") is None
    config = RunConfig(**saved)
    read = settings_file.read(tmp_path / "done" / "run.toml")
    assert settings_file.flat(vars(config)) == read


@pytest.mark.parametrize("step", [PERIOD, 2 * PERIOD, 2 * PERIOD + 5])
@pytest.mark.parametrize("mechanism", ["bsr", "none"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, mechanism, step):
    """Stopped before the mean begins (in step 13), in it, and in it past a checkpoint."""
    private = mechanism != "none"
    config = with_(
        mechanism=mechanism,
        epsilon=4.0 if private else None,
        insecure_noise_seed=5 if private else None,
        average=0.5,
    )
    whole = run(config, tmp_path / "whole")
    stopped(tmp_path / "part", config, step)
    rest = run(config, tmp_path / "part", resume=True, checkpoint_every=3)
    assert rest.accuracy == whole.accuracy
    assert_same(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_a_run_killed_three_times_has_the_bits_of_an_unbroken_one(tmp_path):
    """By SIGKILL, in the first step of the mean (of 24 steps the 13th), and twice after it."""
    config = with_(**REPEATABLE, average=0.5)
    for step in (13, 17, 23):
        killed = outcome(training_runs.train_killed_at_step, tmp_path / "out", 3, config, step)
        assert killed == -signal.SIGKILL
    assert outcome(training_runs.train, tmp_path / "out", 3, config) == 0
    whole = run(config, tmp_path / "whole")
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["accuracy"] == whole.accuracy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("average"), "checkpoint must fit this run, got 'average'"),
        (lambda s: s.update(average=3), "checkpoint must fit this run, got 'int'"),
        (lambda s: s.update(average={}), "saved average must have a float64 sum of each of 2 wei"),
        (lambda s: s["average"].popitem(), "of each of 2 weights, got 1 of 1"),
        (
            lambda s: s["average"].update({n: x.float() for n, x in s["average"].items()}),
            "of each of 2 weights, got 0 of 2",
        ),
        (
            lambda s: s["average"].update({n: x[:1] for n, x in s["average"].items()}),
            "of each of 2 weights, got 2 of 2",
        ),
    ],
)
def test_a_harmed_sum_is_refused(tmp_path, change, message):
    config = with_(average=0.5)
    stopped(tmp_path, config, 2 * PERIOD + 1)
    folder = RunFolder(tmp_path)
    state = folder.checkpoint()
    change(state)
    folder.save_checkpoint(state)
    with pytest.raises(RootnoiseError, match=message):
        run(config, tmp_path, resume=True)


def test_a_sum_before_its_time_is_refused():
    model = nn.Linear(2, 1)
    state = {name: w.detach().double() for name, w in model.state_dict().items()}
    with pytest.raises(RootnoiseError, match="sum of each of 0 weights, got 2 of 2"):
        Average(model, 1, 3).load_state_dict(state, model, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.1, r"average must be .*>= 0.*, got -0\.1"),
        (1.5, r"average must be .*1.*, got 1\.5"),
        (float("nan"), "average must be .*, got nan"),
    ],
)
def test_a_fraction_out_of_range_is_refused(value, message):
    with pytest.raises(RootnoiseError, match=message):
        with_(average=value)


def test_another_average_is_refused_on_resume(tmp_path):
    stopped(tmp_path, with_(average=0.5))
    with pytest.raises(RootnoiseError, match=r"average must be 0\.5, as when the run began, got 0"):
        run(with_(average=0.25), tmp_path, resume=True)


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn", "resnet18", "transformer"])
def test_no_model_has_a_buffer_to_average(name):
    model = build(name, (1, 28, 28), 10, 0)
    assert not [*model.buffers()]
    assert {n for n, _ in model.named_parameters()} == {*model.state_dict()}


RUN = ["train", "--dataset", "digits", "--model", "logistic", "--batch-size", "400", "--json"]
RUN += ["--epochs", "2", "--epsilon", "4", "--insecure-noise-seed", "3"]


def test_the_command_line_says_that_it_is_an_average(tmp_path, capsys):
    out = tmp_path / "one"
    assert main([*RUN, "--average", "0.25", "--out", str(out)]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    page = (out / "report.html").read_text()
    assert "The model is the mean of the last 2 of 8 iterates. The claim is about all" in page
    assert "--average 0.25" in page
    assert "average = 0.25\n" in (out / "run.toml").read_text()
    assert main(["predict", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(accuracy)
    again = ["--config", str(out / "run.toml"), "--out", str(tmp_path / "two"), "--json"]
    assert main(["train", *again]) == 0
    assert_same(weights(out), weights(tmp_path / "two"))


def test_zero_at_the_command_line_is_the_default_and_may_be_said_on_resume(tmp_path):
    stopped(tmp_path / "zero", with_())
    line = ["train", "--resume", "--out", str(tmp_path / "zero"), "--average"]
    assert main([*line, "0.5", "--json"]) == 2
    assert main([*line, "0", "--json"]) == 0


def test_the_best_of_several_trials_may_be_averages(tmp_path, capsys):
    line = "tune --dataset digits --model logistic --batch-size 400 --epochs 1 --epsilon 4"
    more = ["--lr", "0.1,0.2", "--trials-shape", "1", "--trials", "2", "--average", "0.5"]
    assert main([*line.split(), *more, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["released"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["average"] == 0.5
    assert all(check.held for check in audit.audit(tmp_path / "out"))
    assert "mean of the last 2 of 4" in report.page(report.read(tmp_path / "out"))
