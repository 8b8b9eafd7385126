"""What a step of `PrivateTrainer` releases, with the real Trainer, accelerate and peft."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from scipy import stats
from torch import nn
from transformers import (
    BertForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hugging_face_runs import (
    BATCH,
    N,
    bert,
    data,
    flat,
    gpt2,
    lora,
    masked,
    private,
    seeded,
    settings,
    t5,
    trainer,
    weights,
)
from rootnoise import Key, NoiseStream, RootnoiseError, make_private
from rootnoise.integrations.hugging_face import (
    PrivateTrainer,
)
from rootnoise.integrations.per_example import example_losses

# peft 0.21 asks transformers 5.24 by a name that it is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:layer .* is not in the table of layers"),  # slower, no worse
]


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
