"""`PrivateTrainer` against the real Trainer, accelerate and peft, on tiny models from configs."""

from __future__ import annotations

import copy
import json
import math
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scipy import stats
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from rootnoise import Key, NoiseStream, RootnoiseError, make_private
from rootnoise.integrations.hugging_face import (
    STATE,
    PrivacyArguments,
    PrivateTrainer,
    UnnoisedWarning,
)
from rootnoise.integrations.per_example import example_losses

# peft 0.21 asks transformers 5.24 by a name that it is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:layer .* is not in the table of layers"),  # slower, no worse
]

logging.set_verbosity_error()
logging.disable_progress_bar()

WORDS, LENGTH, BATCH, N = 20, 6, 4, 12
SIZE = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": LENGTH + 2,
}


def seeded(make, *args, seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return make(*args, **kwargs)


def bert(kind=BertForSequenceClassification, dropout=0.0, seed=0):
    config = BertConfig(
        **SIZE, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=2
    )
    return seeded(kind, config, seed=seed)


def gpt2():
    drops = {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": LENGTH + 2}
    return seeded(GPT2LMHeadModel, GPT2Config(vocab_size=WORDS, **size, **drops, **ends))


def t5(freeze=True):
    size = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
    config = T5Config(vocab_size=WORDS, dropout_rate=0.0, **size, **ends)
    model = seeded(T5ForConditionalGeneration, config)
    for name, layer in model.named_modules():
        if freeze and name.endswith("relative_attention_bias"):
            layer.requires_grad_(False)
    return model


def masked():
    model = bert(BertForMaskedLM)
    model.get_parameter("cls.predictions.bias").requires_grad_(False)
    return model


def lora(model=None, **settings):
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **settings)
    made = seeded(get_peft_model, gpt2() if model is None else model, config, seed=3)
    for name, p in made.named_parameters():  # peft begins with B = 0, where A has no gradient
        if "lora_B" in name:
            seeded(nn.init.normal_, p, std=0.1)
    return made


def data(kind="class", n=N, seed=1):
    """Examples with labels on all of their tokens, or on some, or on the whole."""
    rng, rows = torch.Generator().manual_seed(seed), []
    for i in range(n):
        ids = torch.randint(1, WORDS, (LENGTH,), generator=rng)
        labels = ids.clone()
        labels[: 1 + i % 4] = -100
        if kind == "class":
            labels = ids[0] % 2
        elif kind == "token":
            labels = torch.where(labels == -100, -100, labels % 2)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def settings(folder, kind=TrainingArguments, **changes):
    return kind(
        str(folder),
        **{
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | changes,
    )


def private(**changes):
    given = {"epsilon": 8.0, "delta": 1e-5, "mechanism": "bsr", "batch_seed": 5}
    return PrivacyArguments(**given | changes)


def trainer(folder, model=None, rows=None, *, privacy=None, kind=PrivateTrainer, key=None, **rest):
    names = {name: rest.pop(name) for name in ARGUMENTS & rest.keys()}
    made = kind(
        model=bert() if model is None else model,
        args=settings(folder, **names),
        train_dataset=data() if rows is None else rows,
        privacy=privacy or private(),
        key=key,
        **rest,
    )
    for callback in list(made.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            made.remove_callback(callback)
    return made


EXAMPLE = Path(__file__).parents[1] / "examples" / "hugging_face.py"
ARGUMENTS = set(TrainingArguments.__dataclass_fields__)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def weights(model):
    return flat(model.parameters())


# ----------------------------------------------------------------------- what a step releases


class Oracle(PrivateTrainer):
    """Each example alone through a copy of the model, by the model's own loss and autograd."""

    def train(self, *args, **kwargs):
        self.plain, self.sums, self.given = copy.deepcopy(self.model), [], []
        self.add_callback(Watch(self))
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        assert num_items_in_batch is None
        drawn = self.private.private.sampler.batch(self.private.t)
        if len(drawn):  # and nothing has drawn them anew, or dealt them out
            rows = torch.stack([self.train_dataset[i]["input_ids"] for i in drawn])
            assert torch.equal(inputs["input_ids"], rows)
        self.plain.load_state_dict(self.model.state_dict())
        trained = [p for p in self.plain.parameters() if p.requires_grad]
        total = torch.zeros(len(flat(trained)), dtype=torch.float64)
        for i in range(self.private.rows):
            row = {name: x[i : i + 1] for name, x in inputs.items()}
            loss = self.plain(**row).loss
            g = flat(torch.autograd.grad(loss, trained)).double()
            total += g * min(1.0, self.privacy.clip_norm / float(g.norm()))
        self.sums.append(total)
        return super().training_step(model, inputs, num_items_in_batch)


class Watch(TrainerCallback):
    def __init__(self, of):
        self.of = of

    def on_optimizer_step(self, args, state, control, **_):
        trained = [p for p in self.of.model.parameters() if p.requires_grad]
        self.of.given.append(flat(p.grad for p in trained).double())


class Through(Oracle):
    """A compute_loss of one's own that comes back to PrivateTrainer's."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


CASES = {
    "bert": (bert, "class"),
    "bert tokens": (lambda: bert(BertForTokenClassification), "token"),
    "bert masked": (masked, "causal"),
    "gpt2": (gpt2, "causal"),
    "gpt2 through": (gpt2, "causal"),
    "gpt2 lora": (lora, "causal"),
    "t5": (t5, "causal"),
}


def key_of(case):
    return Key.from_seed(list(CASES).index(case))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return a run of a case: the trainer with its oracle's sums and the gradients it made."""
    made = {}

    def record(case):
        if case not in made:
            make, kind = CASES[case]
            run = trainer(
                tmp_path_factory.mktemp("run"), make(), data(kind),
                kind=Through if "through" in case else Oracle,
                key=key_of(case), privacy=private(clip_norm=0.3), max_grad_norm=1e-6,
            )  # fmt: skip
            run.train()
            made[case] = run
        return made[case]

    return record


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_each_example_clipped_alone_plus_the_noise(recorded, case):
    """Also: max_grad_norm clips nothing, no step has another's gradient, and no pair is coupled."""
    run = recorded(case)
    mechanism, n = run.private.private.mechanism, len(run.sums)
    assert n == 6
    stream = NoiseStream(mechanism, len(run.sums[0]), key_of(case))
    for t in range(n):
        noise = stream.next().double()
        exact = (run.sums[t] + noise) / BATCH
        np.testing.assert_allclose(run.given[t], exact, rtol=0, atol=2e-5 * mechanism.noise_std)
        assert 0 < run.sums[t].norm() <= 0.3 * BATCH * (1 + 1e-6)


def verdict(noise, strategy, std):
    """Whether C times the noise passes as white and of this std; wrong alarms below 1e-7."""
    z = strategy @ noise / std
    n, d = z.shape
    low, high = (float(stats.chi2.ppf(p, n * d)) for p in (5e-8, 1 - 5e-8))
    gram = z @ z.T / math.sqrt(d)
    pairs = gram[np.triu_indices(n, 1)]
    white = (pairs**2).sum() <= stats.chi2.isf(5e-8, len(pairs)) * 1.5  # products have fat tails
    return low <= (z**2).sum() <= high and bool(white)


@pytest.mark.parametrize("case", ["bert", "gpt2 lora"])
def test_c_times_the_recorded_noise_is_white_at_the_right_std(recorded, case):
    run = recorded(case)
    noise = torch.stack([BATCH * g - s for g, s in zip(run.given, run.sums, strict=True)]).numpy()
    mechanism = run.private.private.mechanism
    strategy, std = mechanism.strategy.dense(), mechanism.noise_std
    assert verdict(noise, strategy, std)
    off = 1.35 if noise.size < 2000 else 1.1
    assert not verdict(noise, strategy, std * off)
    assert not verdict(noise, strategy, std / off)
    if noise.size > 2000:
        assert not verdict(noise, np.eye(len(noise)), std)  # correlated without C


def test_plain_trainer_couples_examples_by_num_items_in_batch(tmp_path):
    plain = Trainer(model=gpt2(), args=settings(tmp_path), train_dataset=data("causal"))
    batches = [{"labels": torch.tensor([[1, 2, -100], [1, 2, 3]])}]
    assert plain.get_batch_samples(iter(batches), 1, torch.device("cpu"))[1] is not None
    ours = trainer(tmp_path, gpt2(), data("causal"))
    assert ours.get_batch_samples(iter(batches), 1, torch.device("cpu"))[1] is None


def test_an_examples_loss_is_its_own():
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 5, 4, generator=rng), torch.randint(0, 4, (3, 5), generator=rng)
    labels[0, :3], labels[2] = -100, -100
    alone = [float(example_losses(logits[i : i + 1], labels[i : i + 1])) for i in range(3)]
    assert example_losses(logits, labels).tolist() == pytest.approx(alone)
    own = nn.functional.cross_entropy(logits[0], labels[0], label_smoothing=0.1)
    assert float(example_losses(logits, labels, smoothing=0.1)[0]) == pytest.approx(float(own))
    assert alone[2] == 0
    shifted = nn.functional.cross_entropy(logits[1, :-1], labels[1, 1:])
    assert float(example_losses(logits, labels, shift=True)[1]) == pytest.approx(float(shifted))
    x, y = logits[:, 0, :1], torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(example_losses(x, y), (x[:, 0] - y) ** 2)
    asked = torch.randint(0, 2, (3, 4), generator=rng).float()
    both = nn.functional.binary_cross_entropy_with_logits(logits[1, 0], asked[1])
    assert float(example_losses(logits[:, 0], asked)[1]) == pytest.approx(float(both))
    with pytest.raises(RootnoiseError, match=r"^logits must have one row a label .* got \(3, 4\)"):
        example_losses(logits[:, 0], labels)


def test_an_empty_batch_is_a_step_of_noise_alone(tmp_path):
    privacy = private(sampling="poisson", mechanism="identity", batch_seed=2)
    run = trainer(
        tmp_path, kind=Oracle, privacy=privacy, key=Key.from_seed(50),
        per_device_train_batch_size=1, num_train_epochs=1,
    )  # fmt: skip
    run.train()
    drawn = [len(run.private.private.sampler.batch(t)) for t in range(N)]
    assert 0 in drawn
    stream = NoiseStream(run.private.private.mechanism, len(run.given[0]), Key.from_seed(50))
    for t, rows in enumerate(drawn):
        noise = stream.next().double()
        if rows == 0:
            np.testing.assert_allclose(run.given[t], noise, rtol=1e-6, atol=1e-9)
    assert run.private.t == N


def test_bfloat16_smoothing_decay_and_another_trainer(tmp_path):
    class Mine(PrivateTrainer, Seq2SeqTrainer):
        pass

    for i, changes in enumerate(
        [{"bf16": True}, {"label_smoothing_factor": 0.1, "weight_decay": 0.1}, {"optim": "sgd"}]
    ):
        run = trainer(tmp_path / str(i), gpt2(), data("causal"), num_train_epochs=1, **changes)
        before = weights(run.model)
        run.train()
        assert run.private.t == 3
        assert not torch.equal(before, weights(run.model))
    planned = run.private.private.mechanism.workload.to_dict()["learning_rates"]
    np.testing.assert_allclose(planned, [1e-2, 2e-2 / 3, 1e-2 / 3], rtol=1e-12)  # Trainer's own
    with torch.random.fork_rng():
        args = settings(tmp_path, Seq2SeqTrainingArguments, num_train_epochs=1)
        run = Mine(model=t5(), args=args, train_dataset=data("causal"), privacy=private())
        assert run.train().global_step == 3


def test_ones_own_model_loss_and_optimizer(tmp_path):
    made = PrivateTrainer(
        model_init=lambda: bert(),  # noqa: PLW0108 - Trainer wants it without arguments
        args=settings(tmp_path), train_dataset=data(), privacy=private(),
    )  # fmt: skip
    assert made.train().global_step == 6
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(num_items_in_batch)
        return nn.functional.cross_entropy(outputs.logits, labels)

    model = bert()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = torch.optim.lr_scheduler.LambdaLR(sgd, lambda t: 1 / (1 + t))
    run = trainer(tmp_path, model, compute_loss_func=loss, optimizers=(sgd, plan))
    run.train()
    assert calls
    assert set(calls) == {None}
    planned = run.private.private.mechanism.workload.to_dict()["learning_rates"]
    np.testing.assert_allclose(planned, [0.1 / (1 + t) for t in range(6)], rtol=1e-12)

    def mixing(outputs, labels, num_items_in_batch=None):
        weight = labels.float().mean()
        return weight * nn.functional.cross_entropy(outputs.logits, labels)

    run = trainer(tmp_path, compute_loss_func=mixing)
    before = weights(run.model)
    with pytest.raises(RootnoiseError, match=r"^loss \(.*\) must not mix the examples of a batch"):
        run.train()
    assert torch.equal(before, weights(run.model))


# ----------------------------------------------------------------------- what is logged


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


# ----------------------------------------------------------------------- checkpoints


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


DAMAGED = {
    "no state": (lambda d: (d / STATE).unlink(), "resume_from_checkpoint must be a whole checkp"),
    "no json": (lambda d: (d / "trainer_state.json").unlink(), "resume_from_checkpoint must be a"),
    "bytes": (lambda d: (d / STATE).write_bytes(b"PK"), "checkpoint must have a readable rootnoi"),
    "version": (put(STATE, version=0), "rootnoise.pt must be of version 1, got another in"),
    "mechanism": (put(STATE, fingerprint="x" * 64), "checkpoint must be of the mechanism that th"),
    "key": (put(STATE, key="00" * 32), "saved noise's key_id must be '"),
    "weights": (other_weights, "checkpoint must hold the weights of its step, got others in"),
    "step": (other_step, "checkpoint must be at one step, got trainer_state.json at 4 and root"),
}


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
    with pytest.raises(RootnoiseError, match=r"^checkpoint must be of the mechanism that these ar"):
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


# ----------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("first", ["to", "lora"])
def test_lora_trains_its_parameters_alone_in_either_order(first, tmp_path):
    """Opacus issue 820: `to(device)` before `get_peft_model` left adapters that did not learn."""
    model = lora(gpt2().to("cpu")) if first == "to" else lora(gpt2()).to("cpu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(
        tmp_path, model, data("causal"), save_strategy="epoch", eval_dataset=data("causal", seed=2),
        eval_strategy="epoch", load_best_model_at_end=True, num_train_epochs=1,
    )  # fmt: skip
    run.train()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name
    names = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert names
    assert all(name.startswith("base_model.model.transformer") for name in names)
    whole = run.private.private.mechanism
    again = trainer(tmp_path, lora(gpt2()), data("causal"), num_train_epochs=1)
    with pytest.raises(RootnoiseError, match=r"^resume_from_checkpoint must be a whole checkpoint"):
        again.train(str(tmp_path))
    assert whole.epsilon <= 8


# ----------------------------------------------------------------------- refused in one line

SETTINGS = {
    "gradient_accumulation_steps": (2, "be 1: one batch of per_device_train_batch_size is"),
    "auto_find_batch_size": (True, "be off: the batch size is a part of the guarantee"),
    "torch_compile": (True, "be off: clipping needs the layers as they are"),
    "gradient_checkpointing": (True, "be off: layers would run twice a step"),
    "neftune_noise_alpha": (1.0, "be None: its scale depends on the longest example"),
    "train_sampling_strategy": ("group_by_length", "be random: the private sampler draws"),
    "ignore_data_skip": (True, "be off: batches go on where noise does"),
    "debug": ("underflow_overflow", "be empty: it prints raw values"),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "be a schedule that is known before"),
    "include_num_input_tokens_seen": ("all", "be 'no' .the count is of raw data"),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_break_the_guarantee_are_refused(name, tmp_path):
    value, rule = SETTINGS[name]
    more = {"eval_strategy": "epoch"} if name == "lr_scheduler_type" else {}
    with pytest.raises(RootnoiseError, match=f"^{name} must {rule}") as refusal:
        trainer(tmp_path, eval_dataset=data(seed=2), **{name: value}, **more)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp16", True), ("world_size", 2), ("n_gpu", 2), ("deepspeed", "x.json"), ("fsdp", "full"),
        ("use_liger_kernel", True), ("hub_strategy", "checkpoint"),
    ],
)  # fmt: skip
def test_settings_of_other_machines_are_refused(name, value, tmp_path):
    """Not every one can be set here: what is read of them is put in their place."""

    class Args:
        push_to_hub = True

        def __getattr__(self, asked):
            if asked == name:
                return (
                    type("Named", (str,), {"value": value})(value)
                    if name == "hub_strategy"
                    else value
                )
            return getattr(plain, asked)

    plain = settings(tmp_path)
    run = trainer(tmp_path)
    run.args = Args()
    with pytest.raises(RootnoiseError, match=f"^{name} must be "):
        run.train()


def long(n=N, left=False):
    """Examples of different lengths, padded to the longest of their batch."""

    def collate(rows):
        most = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), most, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            part = slice(-len(row["input_ids"]), None) if left else slice(len(row["input_ids"]))
            ids[i, part], mask[i, part] = row["input_ids"], 1
        labels = torch.stack([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    rows = data(n=n)
    for i, row in enumerate(rows):
        row["input_ids"] = row["input_ids"][: 2 + i % 4]
    return rows, collate


def flattened(rows):
    return {"input_ids": torch.cat([r["input_ids"] for r in rows])[None], "labels": torch.ones(1)}


def tuples(rows):
    return torch.stack([r["input_ids"] for r in rows]), torch.stack([r["labels"] for r in rows])


def no_labels(rows):
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}


def both_labels(rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids, "shift_labels": ids}


class Other(BertForSequenceClassification):
    """A loss that is not the usual one of its labels."""

    def forward(self, *args, **kwargs):
        made = super().forward(*args, **kwargs)
        if made.loss is not None:
            made.loss = 2 * made.loss
        return made


class Hidden(BertForSequenceClassification):
    def forward(self, **kwargs):
        made = super().forward(**kwargs)
        return {"scores": made.logits}


class Wide(nn.Module):
    """An encoder-decoder by its config alone."""

    class config:  # noqa: N801 - as transformers names it
        is_encoder_decoder = True

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(WORDS, 2)

    def forward(self, input_ids, labels=None):
        return {"logits": self.layer(input_ids)}


WRONG: dict[str, tuple] = {
    "packed rows": (bert, {"data_collator": flattened}, "data_collator must give one row an examp"),
    "tuples": (bert, {"data_collator": tuples}, "data_collator must return a dict of tensors, got"),
    "no labels": (bert, {"data_collator": no_labels}, "batch must hold labels .or give compute_lo"),
    "two labels": (gpt2, {"data_collator": both_labels}, "batch must hold labels and not shift_"),
    "a loss of its own": (lambda: bert(Other), {}, "loss of one example must be the model's own"),
    "no logits": (lambda: bert(Hidden), {}, "model must return logits .or give compute_loss_func"),
    "no decoder": (Wide, {}, "batch must hold decoder_input_ids for Wide, got none"),
    "a stream": (bert, {"rows": iter([]), "max_steps": 3}, "train_dataset must be a data set of "),
    "half an epoch": (bert, {"num_train_epochs": 1.5}, "num_train_epochs must be a whole number"),
    "half by steps": (bert, {"max_steps": 4}, "max_steps must be a multiple of an epoch's 3 steps"),
    "no such mechanism": (bert, {"privacy": private(mechanism="x")}, "mechanism must be"),
    "bands of auto": (
        bert, {"privacy": private(mechanism="auto", bands=2)}, "options must be left out with mech",
    ),
    "t5 positions": (
        lambda: t5(freeze=False), {"rows": data("causal")},
        r"layer encoder.block.0.layer.0.SelfAttention.relative_attention_bias .Embedding. must get "
        r"and give one row an example, got .* freeze it by model.get_submodule",
    ),
    "a shared bias": (
        lambda: bert(BertForMaskedLM), {"rows": data("causal")},
        r"layer cls.predictions .BertLMPredictionHead. must hold no parameter of a layer inside "
        r"it, got bias: freeze it by model.get_parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_models_and_data_that_do_not_fit_are_refused(what, tmp_path):
    make, changes, line = WRONG[what]
    given: dict[str, object] = {"remove_unused_columns": False, **changes}
    run = trainer(tmp_path, make(), **given)
    before = weights(run.model)
    with pytest.raises(RootnoiseError, match=f"^{line}") as refusal:
        run.train()
    assert "\n" not in str(refusal.value)
    assert torch.equal(before, weights(run.model))


def test_t5_is_refused_even_where_its_positions_are_as_many_as_the_examples(tmp_path):
    rows = data("causal")
    with pytest.raises(RootnoiseError, match=r"relative_attention_bias .* one row an example"):
        trainer(tmp_path, t5(freeze=False), rows, per_device_train_batch_size=LENGTH).train()


def test_padding_is_on_the_right(tmp_path):
    rows, collate = long()
    assert trainer(tmp_path, rows=rows, data_collator=collate).train().global_step == 6
    rows, collate = long(left=True)
    with pytest.raises(
        RootnoiseError, match=r"^(data_collator must pad on the right|collate_fn must make each)"
    ):
        trainer(tmp_path, rows=rows, data_collator=collate).train()


def test_metrics_of_the_training_set_are_refused(tmp_path):
    same = data()
    line = r"^eval_dataset must hold other examples than train_dataset"
    for held in (same, {"train": same}):
        with pytest.raises(RootnoiseError, match=line):
            trainer(tmp_path, rows=same, eval_dataset=held)
    run = trainer(tmp_path, rows=same, eval_dataset={"other": data(seed=2)})
    with pytest.raises(RootnoiseError, match=line):
        run.evaluate(same)
    assert run.evaluate("other")["eval_loss"] > 0


def test_privacy_is_asked_for():
    with pytest.raises(TypeError, match="privacy"):
        PrivateTrainer(model=bert(), args=settings("unused"))  # type: ignore[call-arg]
    with pytest.raises(RootnoiseError, match=r"^privacy must be PrivacyArguments, got dict"):
        PrivateTrainer(model=bert(), args=settings("unused"), privacy={"epsilon": 1})


def test_arguments_are_read_from_a_command_line():
    line = ["--epsilon", "2", "--delta", "1e-6", "--bands", "4", "--mechanism", "bsr"]
    (read,) = HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(line)
    assert read == PrivacyArguments(epsilon=2.0, delta=1e-6, bands=4, mechanism="bsr")


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hugging_face.py", "--tiny"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    last = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert all(float(words[-1]) < 6.3 for words in last)
    assert [int(words[-2]) for words in last] == [0, 8192, 8192, 8192, 136960]


# ----------------------------------------------------------------------- accelerate by itself


def test_a_loop_of_accelerate_makes_the_bits_of_the_loop_without(tmp_path):
    ends = []
    for accelerated in (False, True):
        model = seeded(nn.Linear, 3, 2)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = torch.arange(24.0).reshape(8, 3) / 24
        dataset = torch.utils.data.TensorDataset(x, torch.arange(8) % 2)
        run = make_private(
            model, sgd, dataset, epsilon=4, delta=1e-5, epochs=2, batch_size=2, mechanism="bsr",
            key=Key.from_seed(60), seed=1,
        )  # fmt: skip
        module, optimizer, loader = run
        backward = torch.Tensor.backward
        if accelerated:
            accelerator = Accelerator(cpu=True)
            module, optimizer, loader = accelerator.prepare(*run)
            assert loader is run.loader  # it has not been sharded
            backward = accelerator.backward
        for _ in range(2):
            for features, labels in loader:
                optimizer.zero_grad()
                backward(nn.functional.cross_entropy(module(features), labels))
                optimizer.step()
        ends.append(weights(model))
        assert run.optimizer.t == 8
    assert torch.equal(*ends)
