"""`gradient_accumulation_steps` under `PrivateTrainer`: the run of the undivided batches."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from hugging_face_runs import BATCH, N, bert, data, gpt2, private, trainer, weights
from rootnoise import Key, RootnoiseError
from rootnoise.integrations.hugging_face import PrivateTrainer, UnnoisedWarning

pytestmark = pytest.mark.filterwarnings("ignore:layer .* is not in the table of layers")


def parted(folder, parts, *, causal=True, **changes):
    """A run with batches of 4 in several parts; 12 examples, or 13, of which one step has one."""
    model, rows = (gpt2(), data("causal", N + 1)) if causal else (bert(), data())
    given = {"privacy": private(clip_norm=0.3), "key": Key.from_seed(70)} | changes
    return trainer(
        folder, model, rows, per_device_train_batch_size=BATCH // parts,
        gradient_accumulation_steps=parts, **given,
    )  # fmt: skip


def end(run):
    private = run.private.private
    rates = [e["learning_rate"] for e in run.state.log_history if "learning_rate" in e]
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    ledger = private.ledger.state_dict()
    noise = private.stream.state_dict()["state"]
    return weights(run.model).clone(), noise, ledger["count"], rates, losses, run.state.global_step


def own_loss(outputs, labels, num_items_in_batch=None):
    assert num_items_in_batch is None
    return nn.functional.cross_entropy(outputs.logits, labels)


CASES: dict[str, dict] = {
    "adam": {},
    "sgd": {"optim": "sgd", "privacy": private(clip_norm=5.0)},  # few are clipped
    "own loss": {"compute_loss_func": own_loss, "causal": False},
    "poisson": {"privacy": private(clip_norm=0.3, sampling="poisson", mechanism="identity")},
}


@pytest.mark.parametrize("case", CASES)
def test_parts_are_the_run_of_whole_batches(case, tmp_path):
    ends = []
    for parts in (1, 2, 4) if case == "adam" else (1, 4):
        run = parted(tmp_path, parts, **CASES[case])
        run.train()
        ends.append(end(run))
        del run
        gc.collect()
    assert ends[0][5] == (6 if case == "own loss" else 8)  # steps, not parts of them
    for other in ends[1:]:
        torch.testing.assert_close(other[0], ends[0][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(other[1], ends[0][1])  # the noise, bit by bit
        assert torch.equal(other[2], ends[0][2])
        assert other[3:] == ends[0][3:]


def test_the_loss_that_is_logged_is_that_of_the_batch(tmp_path):
    ends = []
    for parts in (1, 4):
        with pytest.warns(UnnoisedWarning):
            run = parted(tmp_path, parts, privacy=private(clip_norm=0.3, release_unnoised=True))
        with pytest.warns(UnnoisedWarning):
            run.train()
        ends.append(end(run)[4])
        del run
        gc.collect()
    assert len(ends[0]) == 8
    assert ends[1] == pytest.approx(ends[0], abs=2e-4)


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_has_the_same_bits(step, tmp_path):
    run = parted(tmp_path, 2, save_strategy="steps", save_steps=1)
    run.train()
    whole = end(run)
    del run
    gc.collect()
    run = parted(tmp_path / "again", 2, key=None)
    run.train(str(tmp_path / f"checkpoint-{step}"))
    again = end(run)
    assert all(torch.equal(a, b) for a, b in zip(again[:3], whole[:3], strict=True))
    assert again[5] == whole[5]


class Stops(PrivateTrainer):
    def training_step(self, *args, **kwargs):
        if self.private.t == 1 and self.private.step_was_skipped:
            raise KeyboardInterrupt
        loss = super().training_step(*args, **kwargs)
        self.seen = (*getattr(self, "seen", ()), weights(self.model))
        return loss


def test_a_batch_broken_off_changes_no_weight_and_no_checkpoint(tmp_path):
    run = parted(tmp_path, 2, kind=Stops)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.private.t == 1
    assert len(run.seen) == 3
    assert torch.equal(weights(run.model), run.seen[2])
    assert torch.equal(run.seen[0], run.seen[1])
    assert not torch.equal(run.seen[1], run.seen[2])
    with pytest.raises(
        RootnoiseError, match=r"^state must be that between two steps, got step 1 in"
    ):
        run._save_optimizer_and_scheduler(str(tmp_path))
