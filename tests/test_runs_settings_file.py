"""`train --config run.toml`: a file is the flags, and every run leaves the one that repeats it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootnoise._check import RootnoiseError
from rootnoise.cli import main
from rootnoise.runs import settings_file
from rootnoise.runs.config import RunConfig
from rootnoise.runs.folder import RunFolder
from rootnoise.runs.run import run
from rootnoise.runs.tuning import BESIDE, Tuning

SMALL = """
dataset = "digits"
model = "logistic"
batch-size = 400
epochs = 1
epsilon = 4
"""


@pytest.fixture
def call(call_in_folder, tmp_path):
    """Write a file run.toml in an empty folder and train with it; return status and both texts."""

    def train(text, *more):
        (tmp_path / "run.toml").write_text(text)
        return call_in_folder("train", "--config", "run.toml", *more)

    return train


def config_of(out):
    return json.loads((out / "config.json").read_text())


def test_the_run_that_is_left_is_the_run_that_is_made(call, tmp_path):
    """The same settings and, where the noise is repeatable, the same weights."""
    more = 'bands = "auto"\nschedule = "cosine"\nwarmup = 1\ninsecure-noise-seed = 3\nlr = 0.2\n'
    assert call(SMALL + more, "--out", "one", "--json")[0] == 0
    assert call((tmp_path / "one/run.toml").read_text(), "--out", "two", "--json")[0] == 0
    for name in ("config.json", "run.toml", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert config_of(tmp_path / "one")["bands"] == "auto"


def test_a_flag_overrides_the_file(call, tmp_path):
    assert call(SMALL + 'out = "there"', "--lr", "0.25", "--epsilon", "2", "--json")[0] == 0
    found = config_of(tmp_path / "there")
    assert (found["lr"], found["epsilon"], found["batch_size"]) == (0.25, 2.0, 400)


def test_both_spellings_of_a_name_are_read(tmp_path):
    (tmp_path / "a.toml").write_text("batch_size = 3\nclip-norm = 2")
    assert settings_file.read(tmp_path / "a.toml") == {"batch_size": 3, "clip_norm": 2}


@pytest.mark.parametrize(
    ("more", "line"),
    {
        "batchsize = 3": "run.toml must hold settings of `train`, such as batch-size, got 'batch",
        "epsilom = 3": "run.toml must hold settings of `train`, such as epsilon, got 'epsilom'",
        "noise-key = 'ab'": "run.toml must hold settings of `train`, such as ",
        "resume = true": "run.toml must hold settings of `train`, such as ",
        "[train]\nlr = 1": "run.toml must hold settings of `train`, such as ",
        "batch_size = 3": "run.toml must name batch-size once, got it twice",
        "seed = [1, 2]": "seed in run.toml must be a number or a text, got [1, 2]",
        "lr = [1, 2]": "run.toml must be of one run, got a tuning's lr: rootnoise tune --config",
        "trials = 3": "run.toml must be of one run, got a tuning's trials: rootnoise tune",
        "public-dir = 'a'": "run.toml must be of one run, got a tuning's public-dir: rootnoise",
        "lr = true": "lr in run.toml must be a number or a text, got True",
        "seed = 1.5": "Invalid value for '--seed'",
        "lr = 'much'": "lr must be a number or auto, got 'much'",
        "lr = nan": "lr must be a finite number > 0, got nan",
        "[run]\nlr = 1": "run.toml must hold settings of `train`, such as lr, without sections",
        "lr = ": "config must hold TOML, got run.toml: ",
        "checkpoint-every = 0": "checkpoint_every must be >= 1, got 0",
        "mechanism = 'magic'": "mechanism must be one of none, dpsgd",
    }.items(),
)
def test_a_bad_file_is_one_line_and_nothing_is_written(call, tmp_path, more, line):
    status, out, err = call(SMALL + more, "--out", "run")
    assert (status, out) == (2, "")
    assert err.startswith("error: " + line)
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_text_without_quotes_is_told_of_them(call):
    status, _, err = call(SMALL + "device = cpu", "--out", "run")
    assert status == 2
    assert err.endswith('(a text needs quotes: mechanism = "bsr")\n')


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RootnoiseError, match=r"config must be readable, got .*: No such file"):
        settings_file.read(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_bytes(b"\xff")
    with pytest.raises(RootnoiseError, match="config must hold TOML, got"):
        settings_file.read(tmp_path / "a.toml")


def test_a_path_that_is_no_text_is_refused():
    with pytest.raises(RootnoiseError, match="settings must be Unicode, got a path that is not"):
        settings_file.text({"data_dir": "\udc80"})


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    number=st.floats(allow_nan=False, allow_infinity=False),
    whole=st.integers(-(2**63), 2**63 - 1),
)
def test_what_is_written_is_read(tmp_path_factory, text, number, whole):
    values = {"data_dir": text, "lr": number, "seed": whole, "bands": None}
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(settings_file.text(values))
    read = settings_file.read(path)
    assert read == {"data_dir": text, "lr": number, "seed": whole}
    assert math.copysign(1, read["lr"]) == math.copysign(1, number)


def test_every_setting_has_a_name_in_the_file_and_no_secret_has_one():
    names = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(settings_file.NAMES) == names - {"tuning"} | {"out", "checkpoint_every"}
    parts = {field.name for field in dataclasses.fields(Tuning)}
    assert set(BESIDE) == parts - {"grid"}
    assert not [name for name in names if "key" in name]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A private run with secret batches, stopped after its first epoch."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    config = RunConfig(
        dataset="digits",
        model="logistic",
        mechanism="dpsgd",
        epsilon=4.0,
        epochs=2,
        batch_size=400,
        lr=0.5,
    )

    def stop(t, n_steps, accuracy):
        if t == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, out, on_step=stop)
    return out


def test_the_file_carries_neither_key_nor_secret_seed(stopped):
    text = (stopped / "run.toml").read_text()
    key = (stopped / "noise.key").read_text().strip()
    seed = RunFolder(stopped).checkpoint()["optimizer"]["sampler"]["seed"]
    assert len(key) == 64
    assert key not in text
    assert str(seed) not in text


def test_a_resumed_run_takes_its_own_file_and_no_other(stopped, call, capsys):
    own = (stopped / "run.toml").read_text()
    status, _, err = call(own.replace("lr = 0.5", "lr = 0.4"), "--resume", "--out", str(stopped))
    assert (status, err) == (2, "error: lr must be 0.5, as when the run began, got 0.4\n")
    assert call(own, "--resume", "--out", str(stopped), "--json")[0] == 0
    assert main(["audit", str(stopped), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["held"] for check in checks if check["name"] == "run.toml agrees"] == [True]


def test_the_audit_reads_what_people_read(tmp_path):
    """A run.toml of a smaller epsilon, though the folder is sealed anew by whoever has it."""
    from rootnoise.runs import audit, statement

    config = RunConfig(dataset="digits", model="logistic", epsilon=4.0, epochs=1, batch_size=400)
    run(config, tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(path.read_text().replace("epsilon = 4.0", "epsilon = 1.0"))
    folder = RunFolder(tmp_path)
    stated = folder.statement()
    files = {name: (tmp_path / name).read_bytes() for name in folder.evidence()}
    sealed = statement.completed(stated, None, files) | {"ledger": stated["ledger"]}
    folder._write_privacy(statement.sealed(sealed))
    failed = [check.name for check in audit.audit(tmp_path) if not check.held]
    assert failed == ["run.toml agrees"]


def test_weights_are_the_same_in_both_formats_and_of_the_plain_model(stopped):
    from safetensors.torch import load_file

    plain = torch.load(stopped / "model.pt", weights_only=True)
    open_ = load_file(stopped / "model.safetensors")
    assert list(plain) == ["1.weight", "1.bias"]  # no prefix of a wrapper
    assert {name: tensor.tolist() for name, tensor in plain.items()} == {
        name: tensor.tolist() for name, tensor in open_.items()
    }
