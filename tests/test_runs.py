"""Whole runs on the digits: folder, claim, secrets, refusals."""

import dataclasses
import json
import stat

import pytest
import torch
from torch.nn.functional import cross_entropy

from rootnoise._check import RootnoiseError
from rootnoise.mechanism import Mechanism
from rootnoise.runs.config import RunConfig, claim, make_sampler
from rootnoise.runs.data import load
from rootnoise.runs.run import run
from rootnoise.runs.trainer import Trainer

SMALL = RunConfig(dataset="digits", model="logistic", epsilon=4.0, epochs=3, batch_size=200, lr=0.2)
PERIOD = 8  # ceil(1442 / 200)
LEFT = {"config.json", "claim.txt", "metrics.jsonl", "model.pt", "curves.png", "result.json"}
LEFT |= {"privacy.json", "privacy.md", "run.toml", "model.safetensors"}
PRIVATE = LEFT | {"mechanism.json", "ledger.bin"}


def with_(**fields):
    return dataclasses.replace(SMALL, **({"sampling": "auto"} | fields))


def stop_at(step):
    def on_step(t, n_steps, accuracy):
        if t == step:
            raise KeyboardInterrupt

    return on_step


def weights(out):
    return torch.load(out / "model.pt", weights_only=True)


def stopped(out, config=SMALL, step=PERIOD + 3):
    with pytest.raises(KeyboardInterrupt):
        run(config, out, on_step=stop_at(step))
    return out


# --------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("mechanism", ["bsr", "identity", "square-root", "workload", "dpsgd"])
def test_a_private_run_keeps_its_folder(tmp_path, mechanism):
    result = run(with_(mechanism=mechanism), tmp_path / "a" / "b")
    assert {file.name for file in (tmp_path / "a" / "b").iterdir()} == PRIVATE
    assert result.private
    assert result.epsilon is not None
    assert 4 * (1 - 1e-3) < result.epsilon <= 4
    assert result.n_steps == 3 * PERIOD
    assert result.sampling == ("poisson" if mechanism == "dpsgd" else "fixed-cycle")
    assert (tmp_path / "a/b/claim.txt").read_text().strip() == result.claim
    assert result.claim == Mechanism.load(tmp_path / "a/b/mechanism.json").claim()
    assert json.loads((tmp_path / "a/b/result.json").read_text()) == dataclasses.asdict(result)
    lines = (tmp_path / "a/b/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in metrics] == [PERIOD, 2 * PERIOD, 3 * PERIOD]
    assert metrics[-1]["test_accuracy"] == result.accuracy
    assert set(metrics[0]) == {"epoch", "step", "test_accuracy", "seconds"}


def test_a_run_without_privacy_is_plain_sgd(tmp_path):
    config = with_(mechanism="none", epsilon=None)
    result = run(config, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == LEFT
    assert (result.private, result.epsilon, result.noise_multiplier) == (False, None, None)
    assert result.claim == claim(config, None)
    assert result.claim.startswith("No privacy is claimed")
    data = load("digits")
    model = Trainer(config, data, make_sampler(config, data.n_train), None).model
    sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for batch in make_sampler(config, data.n_train):
        sgd.zero_grad()
        logits = model(data.train_inputs[batch])
        (cross_entropy(logits, data.train_labels[batch], reduction="sum") / 200).backward()
        sgd.step()
    for name, weight in weights(tmp_path).items():
        torch.testing.assert_close(weight, model.state_dict()[name])


def test_noise_is_fresh_unless_it_is_insecure(tmp_path):
    for name in ("a", "b"):
        run(with_(epochs=1), tmp_path / name)
        run(with_(epochs=1, insecure_noise_seed=1), tmp_path / f"insecure {name}")
    key = "1.weight"
    assert not torch.equal(weights(tmp_path / "a")[key], weights(tmp_path / "b")[key])
    same = [weights(tmp_path / f"insecure {name}")[key] for name in ("a", "b")]
    assert torch.equal(*same)
    result = json.loads((tmp_path / "insecure a/result.json").read_text())
    assert not result["private"]
    assert result["claim"].startswith("No privacy is claimed: the noise is reproducible")
    assert "noise seed 1" in (tmp_path / "insecure a/claim.txt").read_text()


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(tmp_path):
    line = r"^device must be one that torch finds here \(\d+ GPUs\), got cuda:99$"
    with pytest.raises(RootnoiseError, match=line):
        run(with_(device="cuda:99"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_is_resumed_there_and_leaves_weights_for_the_cpu(tmp_path):
    config = with_(device="cuda", insecure_noise_seed=0)
    whole = run(config, tmp_path / "whole")
    resumed = run(config, stopped(tmp_path / "part", config), resume=True)
    assert whole.accuracy == resumed.accuracy > 0.5
    for name, weight in weights(tmp_path / "whole").items():
        assert weight.device.type == "cpu"
        torch.testing.assert_close(weight, weights(tmp_path / "part")[name])


def test_secrets_are_private_while_the_run_lasts_and_gone_after_it(tmp_path):
    config = with_(mechanism="dpsgd")
    stopped(tmp_path, config)
    for name in ("noise.key", "checkpoint.pt", "ledger.bin"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    run(config, tmp_path, resume=True)  # with the sampler's seed, which is in the checkpoint alone
    assert {file.name for file in tmp_path.iterdir()} == PRIVATE


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mechanism": "magic"}, "mechanism must be one of none, dpsgd, banded, .*, got 'magic'"),
        (
            {"sampling": "always"},
            "sampling must be one of auto, fixed-cycle, balls-in-bins, poisson, .*, got 'always'",
        ),
        ({"epsilon": None}, "epsilon must be given for mechanism bsr, got none"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number > 0, got nan"),
        ({"epsilon": -1.0}, "epsilon must be a finite number > 0, got -1.0"),
        ({"mechanism": "none"}, "epsilon must be left out for mechanism none, got 4.0"),
        (
            {"mechanism": "none", "epsilon": None, "bands": 2},
            "bands must be left out for mechanism none, got 2",
        ),
        ({"delta": 1.0}, "delta must be a finite number > 0 and < 1, got 1.0"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"momentum": 1.0}, "momentum must be a finite number >= 0 and < 1, got 1.0"),
        ({"decay": 0.0}, "decay must be a finite number > 0 and <= 1, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be a finite number > 0, got -1.0"),
        ({"bands": 0}, "bands must be >= 1, got 0"),
        ({"seed": -1}, "seed must be in .*, got -1"),
        ({"insecure_noise_seed": -1}, "insecure_noise_seed must be >= 0, got -1"),
        (
            {"mechanism": "dpsgd", "sampling": "fixed-cycle"},
            "sampling must be poisson for mechanism dpsgd .identity takes both., got fixed-cycle",
        ),
        (
            {"sampling": "poisson"},
            "sampling must be fixed-cycle for mechanism bsr without groups, got poisson",
        ),
    ],
)
def test_settings_are_refused(fields, message):
    with pytest.raises(RootnoiseError, match=message):
        with_(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 2000}, r"batch_size must be in \[1, n_examples=1442\], got 2000"),
        ({"every": 0}, "checkpoint_every must be >= 1, got 0"),
        ({"bands": 25}, r"bands must be in \[1, n_steps=24\], got 25"),
        ({"model": "huge"}, "model must be one of .*, got 'huge'"),
        ({"dataset": "digit"}, "dataset must be one of .*, got 'digit'"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(
    tmp_path, fields, message
):
    every = fields.get("every")
    config = with_(**{name: value for name, value in fields.items() if name != "every"})
    with pytest.raises(RootnoiseError, match=message):
        run(config, tmp_path / "out", checkpoint_every=every)
    assert not list(tmp_path.iterdir())


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "out must be new or empty .--resume continues a run., got"),
        (tmp_path / "file", "out must be a folder, got the file"),
        (tmp_path / "file" / "out", "out must be writable, got .*: Not a directory"),
    ):
        with pytest.raises(RootnoiseError, match=message):
            run(with_(epochs=1), out)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
