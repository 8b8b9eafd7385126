"""Stopped runs go on to the same bits, in an unharmed folder and as they began."""

import json

import pytest
import torch

from rootnoise._check import RootnoiseError
from rootnoise.mechanism import Mechanism
from rootnoise.runs import trainer as trainer_module
from rootnoise.runs.config import make_mechanism, make_sampler
from rootnoise.runs.data import load
from rootnoise.runs.folder import RunFolder
from rootnoise.runs.run import run
from rootnoise.runs.trainer import EnvironmentChangedWarning
from test_runs import PERIOD, SMALL, stopped, weights, with_


@pytest.mark.parametrize(
    ("mechanism", "step"),
    [("bsr", 1), ("bsr", PERIOD), ("bsr", PERIOD + 3), ("none", PERIOD + 3)],
)
def test_resume_gives_the_same_bits(tmp_path, mechanism, step):
    private = mechanism != "none"
    config = with_(
        mechanism=mechanism,
        epsilon=4.0 if private else None,
        insecure_noise_seed=5 if private else None,
    )
    whole = run(config, tmp_path / "whole")
    stopped(tmp_path / "part", config, step)
    rest = run(config, tmp_path / "part", resume=True)
    assert rest.accuracy == whole.accuracy
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "part")[name], weight)
    accuracies = [
        [json.loads(line)["test_accuracy"] for line in file.read_text().splitlines()]
        for file in (tmp_path / "whole/metrics.jsonl", tmp_path / "part/metrics.jsonl")
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_checkpoints_come_every_so_many_steps_and_each_epoch(tmp_path, every):
    steps, config = [], with_(insecure_noise_seed=5)

    def on_step(t, n_steps, accuracy):
        steps.append(RunFolder(tmp_path / "out").checkpoint()["optimizer"]["t"])

    run(config, tmp_path / "out", checkpoint_every=every, on_step=on_step)
    made = [t - t % PERIOD + t % PERIOD // every * every for t in range(3 * PERIOD)]
    assert steps == made
    run(config, tmp_path / "whole")
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "out")[name], weight)


def test_another_environment_is_warned_of(tmp_path, monkeypatch):
    config = with_(insecure_noise_seed=5)
    stopped(tmp_path / "out", config)
    monkeypatch.setattr(trainer_module, "environment", lambda device: "torch 1.0, 99 threads")
    message = r"goes on in torch 1\.0, .* written in torch 2"
    with pytest.warns(EnvironmentChangedWarning, match=message):
        run(config, tmp_path / "out", resume=True)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Files of a stopped run, by name."""
    out = stopped(tmp_path_factory.mktemp("unfinished") / "out")
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def part(unfinished, tmp_path):
    for name, content in unfinished.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", 0.3, "lr must be 0.2, as when the run began, got 0.3"),
        ("epsilon", 8.0, "epsilon must be 4.0, as when the run began, got 8.0"),
        ("bands", 2, "bands must be None, as when the run began, got 2"),
        ("seed", 1, "seed must be 0, as when the run began, got 1"),
    ],
)
def test_resume_refuses_other_settings(part, field, value, message):
    with pytest.raises(RootnoiseError, match=message):
        run(with_(**{field: value}), part, resume=True)


def damage_mechanism(part):
    path = part / "mechanism.json"
    path.write_text(path.read_text().replace('"noise_multiplier": 1.', '"noise_multiplier": 0.'))


def weaken_mechanism(part):
    """Less noise, with derived numbers and claim to match."""
    path, config = part / "mechanism.json", with_(epsilon=9.0)
    mechanism = make_mechanism(config, make_sampler(config, load("digits").n_train))
    mechanism.save(path, overwrite=True)


def change_checkpoint(part, **fields):
    folder = RunFolder(part)
    folder.save_checkpoint(folder.checkpoint() | fields)


def cut_ledger(part):
    path = part / "ledger.bin"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_mechanism, "mechanism.json must be as when the run began, got an edited one"),
        (weaken_mechanism, "mechanism.json must be as when the run began, got an edited one"),
        (lambda part: (part / "mechanism.json").unlink(), "mechanism.json must be readable"),
        (lambda part: (part / "config.json").unlink(), "out must hold a run's config.json"),
        (lambda part: (part / "config.json").write_text("[]"), "out must hold a run's config.json"),
        (lambda part: (part / "noise.key").unlink(), "noise.key must be readable to resume"),
        (
            lambda part: (part / "noise.key").write_text("00" * 32),
            "noise.key must be the one of this",
        ),
        (lambda part: (part / "noise.key").write_text("key"), "noise.key must hold 64 hex digits"),
        (lambda part: (part / "checkpoint.pt").unlink(), "checkpoint.pt must be readable"),
        (lambda part: (part / "checkpoint.pt").write_bytes(b"x"), "checkpoint.pt must be as a run"),
        (lambda part: torch.save({}, part / "checkpoint.pt"), "checkpoint.pt must be as a run"),
        (lambda part: change_checkpoint(part, data="0"), "training set must be the one the run"),
        (lambda part: change_checkpoint(part, optimizer={}), "saved version must be 1, got None"),
        (lambda part: change_checkpoint(part, model={}), "checkpoint must fit this run, got Error"),
        (lambda part: (part / "ledger.bin").unlink(), "ledger file must be readable"),
        (lambda part: (part / "privacy.json").unlink(), "privacy.json must be readable, got none"),
        (lambda part: (part / "privacy.json").write_text("{"), "privacy.json must be as when the"),
        (lambda part: (part / "privacy.json").write_text("{}"), "privacy.json must be as when the"),
        (lambda part: (part / "privacy.md").write_text(""), "privacy.md must say what privacy.js"),
        (cut_ledger, "ledger file must hold the 8 steps of the saved state"),
    ],
    ids=[
        "mechanism edited",
        "mechanism weakened",
        "mechanism missing",
        "config missing",
        "config damaged",
        "key missing",
        "key replaced",
        "key damaged",
        "checkpoint missing",
        "checkpoint damaged",
        "checkpoint replaced",
        "data changed",
        "optimizer missing",
        "model missing",
        "ledger missing",
        "privacy missing",
        "privacy damaged",
        "privacy edited",
        "page edited",
        "ledger cut",
    ],
)
def test_resume_refuses_a_harmed_folder(part, harm, message):
    harm(part)
    with pytest.raises(RootnoiseError, match=message):
        run(SMALL, part, resume=True)


def test_resume_refuses_a_finished_run_and_deletes_forgotten_secrets(part):
    run(SMALL, part, resume=True)
    (part / "noise.key").touch()
    with pytest.raises(RootnoiseError, match="out must hold an unfinished run, got a finished one"):
        run(SMALL, part, resume=True)
    assert not (part / "noise.key").exists()


def test_what_is_told_at_a_checkpoint_is_on_disk(tmp_path):
    """A bar that shows an accuracy before it is committed would release it twice after a crash."""
    told = []

    def on_checkpoint(trainer):
        state = RunFolder(tmp_path).checkpoint()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert state["optimizer"]["t"] == trainer.t
        assert [json.loads(line) for line in lines] == trainer.history == state["history"]
        ours = Mechanism.load(tmp_path / "mechanism.json")
        assert trainer.mechanism is not None
        assert trainer.mechanism.fingerprint == ours.fingerprint
        told.append(trainer.t)

    run(SMALL, tmp_path, on_checkpoint=on_checkpoint, checkpoint_every=5)
    assert told == [5, 8, 13, 16, 21, 24]
