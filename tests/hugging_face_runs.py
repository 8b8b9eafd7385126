"""Tiny models and data for tests of `PrivateTrainer`, and how they set it up."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)
from transformers.utils import logging

from rootnoise.integrations.hugging_face import PrivacyArguments, PrivateTrainer

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
