"""What `PrivateTrainer` logs and saves, and how it goes on."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    TrainerCallback,
)

from hugging_face_runs import bert, data, private, trainer, weights
from rootnoise import RootnoiseError
from rootnoise.integrations.hugging_face import (
    STATE,
    UnnoisedWarning,
)
from rootnoise.integrations.hugging_face.checkpoint import digest

# peft 0.21 asks transformers 5.24 by a name that it is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:layer .* is not in the table of layers"),  # slower, no worse
]


def names_logged(run):
    return {name for entry in run.state.log_history for name in entry}


def test_nothing_raw_is_logged_and_epsilon_is(tmp_path):
    seen = []

    class Spy(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            seen.append(dict(logs))

    run = trainer(
        tmp_path, eval_dataset=data(seed=2), eval_strategy="epoch", save_strategy="steps",
        save_steps=3, callbacks=[Spy()],
    )  # fmt: skip
    output = run.train()
    raw = {"loss", "train_loss", "grad_norm", "total_flos"}
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["total_flos"] == 0
    names = {name for entry in [*seen, *state["log_history"]] for name in entry}
    assert not raw & (names | names_logged(run) | output.metrics.keys())
    assert math.isnan(output.training_loss)
    assert run._total_loss_scalar == 0
    assert "eval_loss" in names_logged(run)
    spent = [entry["privacy_epsilon"] for entry in seen if "learning_rate" in entry]
    assert len(spent) == 6
    assert all(a < b for a, b in pairwise(spent))
    assert spent[-1] == run.private.private.mechanism.epsilon <= 8
    assert "differential privacy" in run.claim()
    with pytest.raises(RootnoiseError, match=r"^train must be called once"):
        run.train()


def test_the_loss_is_logged_if_asked_for_with_a_warning(tmp_path):
    privacy, same = private(release_unnoised=True), data()
    with pytest.warns(UnnoisedWarning, match=r"^release_unnoised: the training loss is computed"):
        run = trainer(tmp_path, rows=same, privacy=privacy, eval_dataset=same)
    with pytest.warns(UnnoisedWarning):
        output = run.train()
    assert 0 < output.training_loss < 2
    assert {"loss", "train_loss"} <= names_logged(run)
    assert "grad_norm" not in names_logged(run)
    assert run.evaluate()["eval_loss"] > 0


def random_collator(rows):
    """Drop words at random, as masked language models do: from torch's global generator."""
    ids = torch.stack([row["input_ids"] for row in rows])
    kept = torch.rand(ids.shape) < 0.8
    return {"input_ids": ids * kept, "labels": torch.stack([row["labels"] for row in rows])}


def saving(folder, seed=0, **changes):
    return trainer(
        folder, bert(dropout=0.1, seed=seed), save_strategy="steps", save_steps=1,
        data_collator=random_collator, privacy=private(**changes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run that has saved each of its six steps, its end, and its seed."""
    folder = tmp_path_factory.mktemp("saved")
    run = saving(folder, batch_seed=None)
    run.train()
    ended = {
        "weights": weights(run.model),
        "ledger": run.private.private.ledger.state_dict(),
        "noise": run.private.private.stream.state_dict(),
        "epsilon": run.private.epsilon_spent(),
        "history": [e for e in run.state.log_history if "learning_rate" in e],
    }
    return folder, ended


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_has_the_same_bits(saved, step, tmp_path):
    folder, ended = saved
    run = saving(tmp_path, seed=9)  # other weights, and no seed of batches that fits
    run.train(str(folder / f"checkpoint-{step}"))
    private = run.private.private
    assert torch.equal(weights(run.model), ended["weights"])
    assert equal(private.ledger.state_dict(), ended["ledger"])
    assert equal(private.stream.state_dict(), ended["noise"])
    assert run.private.epsilon_spent() == ended["epsilon"]
    assert [e for e in run.state.log_history if "learning_rate" in e] == ended["history"]


def test_a_checkpoint_keeps_its_secrets_in_one_file_of_the_owners(saved):
    folder, _ = saved
    checkpoint = folder / "checkpoint-3"
    assert (checkpoint / STATE).stat().st_mode & 0o077 == 0
    secret = torch.load(checkpoint / STATE, weights_only=True)["key"]
    for file in folder.rglob("*"):
        if file.is_file() and file.name != STATE:
            content = file.read_bytes()
            assert secret.encode() not in content
            assert bytes.fromhex(secret) not in content
    assert not (checkpoint / "optimizer.pt").exists()


def test_what_is_saved_is_a_model_with_plain_names(tmp_path):
    run = trainer(tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "model"))
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "training_args.bin"}
    read = load_file(tmp_path / "model" / "model.safetensors")
    assert read.keys() == bert().state_dict().keys()
    again = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(weights(again), weights(run.model))


def damaged(folder, saved, change):
    """A copy of a checkpoint with something changed."""
    copied = folder / "checkpoint-3"
    copied.mkdir(parents=True)
    for file in (saved / "checkpoint-3").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    change(copied)
    return copied


def put(name, **changes):
    def change(folder):
        file = folder / name
        content = torch.load(file, weights_only=True) | changes
        torch.save(content, file)

    return change


def other_step(folder):
    file = folder / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 4}))


def other_weights(folder):
    bert(dropout=0.1, seed=3).save_pretrained(folder)


class Harm:
    """A pickle that does something when it is read."""

    def __reduce__(self):
        return print, ("read",)


DAMAGED = {
    "a programme": (
        lambda d: torch.save({"harm": Harm()}, d / STATE),
        "checkpoint must have a readable rootnoise.pt, got Weights only load failed",
    ),
    "no state": (lambda d: (d / STATE).unlink(), "resume_from_checkpoint must be a whole checkp"),
    "no json": (lambda d: (d / "trainer_state.json").unlink(), "resume_from_checkpoint must be a"),
    "bytes": (lambda d: (d / STATE).write_bytes(b"PK"), "checkpoint must have a readable rootnoi"),
    "version": (put(STATE, version=0), "rootnoise.pt must be of version 1, got another in"),
    "mechanism": (put(STATE, fingerprint="x" * 64), "checkpoint must be of the mechanism that th"),
    "key": (put(STATE, key="00" * 32), "saved noise's key_id must be '"),
    "weights": (other_weights, "checkpoint must hold the weights of its step, got others in"),
    "step": (other_step, "checkpoint must be at one step, got trainer_state.json at 4 and root"),
}


def test_weights_are_known_by_name_and_value():
    """Two layers that change places are other weights."""
    one, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    made = nn.ModuleDict({"a": one, "b": other})
    assert digest(made) == digest(nn.ModuleDict({"a": one, "b": other}))
    assert digest(made) != digest(nn.ModuleDict({"a": one, "c": other}))
    assert digest(made) != digest(nn.ModuleDict({"a": other, "b": one}))


@pytest.mark.parametrize("what", DAMAGED)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, what, tmp_path):
    change, line = DAMAGED[what]
    path = damaged(tmp_path, saved[0], change)
    run = saving(tmp_path / "out")
    with pytest.raises(RootnoiseError, match=f"^{line}") as refusal:
        run.train(str(path))
    assert "\n" not in str(refusal.value)


def test_the_last_checkpoint_is_found_or_missed_in_one_line(saved, tmp_path):
    with pytest.raises(RootnoiseError, match=r"^resume_from_checkpoint must find a checkpoint in"):
        saving(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(
        RootnoiseError, match=r"^checkpoint must be of .* make, got epsilon: saved .*, given 7$"
    ):
        saving(tmp_path, epsilon=7.0).train(str(saved[0] / "checkpoint-3"))
    with pytest.raises(RootnoiseError, match=r"^claim must follow train"):
        saving(tmp_path).claim()


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(
        tmp_path, eval_dataset=data(seed=2), eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, learning_rate=1.0,
    )  # fmt: skip
    run.train()
    losses = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    best = Path(run.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{1 + int(np.argmin(losses))}"
    read = BertForSequenceClassification.from_pretrained(best)
    assert torch.equal(weights(run.model), weights(read))
