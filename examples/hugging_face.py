"""Private fine-tuning with LoRA by PrivateTrainer, offline, in a few minutes.

A small GPT-2 learns the docstrings of Python's standard library, which are public, with the plain
Trainer. Then it is fine-tuned on those of numpy, scipy and torch, which are taken to be private:
one docstring is one record. Compared is the loss on docstrings that were held out.
"""

from __future__ import annotations

import argparse
import ast
import copy
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from rootnoise.integrations.hugging_face import PrivacyArguments, PrivateTrainer

LENGTH, WORDS = 64, 512
DELTA = 1e-5


def docstrings(folder: Path, most: int) -> Iterator[str]:
    """Yield different docstrings of at least 80 characters below a folder."""
    seen: set[str] = set()
    for file in sorted(folder.rglob("*.py")):
        if "site-packages" in file.relative_to(folder).parts:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if len(text) >= 80 and text not in seen:
                    seen.add(text)
                    yield text
                    if len(seen) == most:
                        return


def encoded(tokenizer: ByteLevelBPETokenizer, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """Return the first tokens of each text, padded on the right to one length."""
    rows = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text).ids[:LENGTH])
        padded = torch.zeros(3, LENGTH, dtype=torch.int64)
        padded[2] = -100
        padded[:, : len(ids)] = torch.stack([ids, torch.ones_like(ids), ids])
        rows.append(dict(zip(("input_ids", "attention_mask", "labels"), padded, strict=True)))
    return rows


def main() -> None:
    """Pre-train, fine-tune in five ways, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--epsilon", type=float, default=2.0)
    tiny = (options := parser.parse_args()).tiny
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    size, batch, epochs = (100, 25, 1) if tiny else (3000, 200, 5)

    public = list(docstrings(Path(sysconfig.get_path("stdlib")), size))
    found: list[str] = []
    for package in ("numpy", "scipy", "torch"):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            found += docstrings(Path(spec.origin).parent, size)
    order = np.random.default_rng(0).permutation(len(found))[: size + size // 10]
    texts = [found[i] for i in order]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(public, WORDS, show_progress=False)
    held, private = (
        encoded(tokenizer, part) for part in (texts[: size // 10], texts[size // 10 :])
    )
    print(
        f"docstrings: {len(public)} public, {len(private)} private, {len(held)} held out",
        flush=True,
    )

    with tempfile.TemporaryDirectory() as folder:

        def arguments(rate: float, passes: int, rows: int) -> TrainingArguments:
            return TrainingArguments(
                folder,
                learning_rate=rate,
                num_train_epochs=passes,
                per_device_train_batch_size=rows,
                per_device_eval_batch_size=100,
                lr_scheduler_type="constant",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )

        def tuned(name: str, model: torch.nn.Module, rate: float, mechanism: str | None) -> None:
            args = arguments(rate, epochs, batch)
            if mechanism is None:
                trainer = Trainer(model=model, args=args, train_dataset=private)
            else:
                privacy = PrivacyArguments(options.epsilon, DELTA, mechanism=mechanism)
                trainer = PrivateTrainer(
                    model=model, args=args, train_dataset=private, privacy=privacy
                )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            loss = trainer.evaluate(held)["eval_loss"]
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(f"{name:42} {trained:8} {loss:8.4f}", flush=True)

        config = GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        base = GPT2LMHeadModel(config)
        args = arguments(3e-3, 1 if tiny else 3, 32)
        trainer = Trainer(model=base, args=args, train_dataset=encoded(tokenizer, public))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        print(f"\n{'fine-tuning':42} {'trained':>8} {'loss':>8}")
        print(f"{'none':42} {0:8} {trainer.evaluate(held)['eval_loss']:8.4f}")

        def adapted() -> torch.nn.Module:
            layers = ["c_attn", "c_proj", "c_fc"]
            lora = LoraConfig(r=4, lora_alpha=8, target_modules=layers, fan_in_fan_out=True)
            return get_peft_model(copy.deepcopy(base), lora)

        private_text = f"epsilon {options.epsilon:g}"
        tuned("LoRA, no privacy", adapted(), 3e-3, None)
        tuned(f"LoRA, independent noise, {private_text}", adapted(), 3e-3, "identity")
        tuned(f"LoRA, banded square root, {private_text}", adapted(), 3e-3, "bsr")
        whole = copy.deepcopy(base)
        tuned(f"all parameters, banded square root, {private_text}", whole, 1e-3, "bsr")


if __name__ == "__main__":
    main()
