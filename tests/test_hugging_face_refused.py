"""What `PrivateTrainer` refuses, in one line each."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    HfArgumentParser,
)

from hugging_face_runs import (
    EXAMPLE,
    LENGTH,
    WORDS,
    N,
    bert,
    data,
    gpt2,
    private,
    settings,
    t5,
    trainer,
    weights,
)
from rootnoise import RootnoiseError
from rootnoise.integrations.hugging_face import (
    PrivacyArguments,
    PrivateTrainer,
)
from rootnoise.integrations.per_example import check_batch

# peft 0.21 asks transformers 5.24 by a name that it is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:layer .* is not in the table of layers"),  # slower, no worse
]


SETTINGS = {
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


class Normed(BertForSequenceClassification):
    """A head that mixes the examples of a batch."""

    def __init__(self, config):
        super().__init__(config)
        self.mixing = nn.BatchNorm1d(2)

    def forward(self, *args, **kwargs):
        made = super().forward(*args, **kwargs)
        made.logits, made.loss = self.mixing(made.logits), None
        return made


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
    "batch norm": (lambda: bert(Normed), {}, "layer mixing must not mix examples"),
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


def test_the_mask_of_a_batch_says_where_its_padding_is():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"attention_mask": mask}
    assert check_batch(batch, 2) is batch
    with pytest.raises(RootnoiseError, match=r"^data_collator must pad on the right"):
        check_batch({"attention_mask": mask.flip(1)}, 2)


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
    with pytest.raises(RootnoiseError, match=line):
        run.predict(same)
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
