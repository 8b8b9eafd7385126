"""The privacy settings of `PrivateTrainer`, and the settings of Trainer that it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rootnoise._check import RootnoiseError


class UnnoisedWarning(UserWarning):
    """Something that epsilon does not cover is logged."""


@dataclass
class PrivacyArguments:
    """What `PrivateTrainer` needs in addition to TrainingArguments; works with HfArgumentParser.

    Batch size, epochs, optimizer and scheduler come from TrainingArguments: the batch size of a
    private step is `per_device_train_batch_size` times `gradient_accumulation_steps`.

    >>> PrivacyArguments(epsilon=8, delta=1e-5).clip_norm
    1.0
    """

    epsilon: float = field(metadata={"help": "Privacy loss of the whole run, for one example."})
    delta: float = field(metadata={"help": "Its failure probability."})
    clip_norm: float = field(
        default=1.0, metadata={"help": "Largest l2 norm of one example's gradient."}
    )
    mechanism: str = field(
        default="auto", metadata={"help": "A name from rootnoise.mechanisms(), or auto."}
    )
    bands: int | None = field(default=None, metadata={"help": "Bands, for a banded mechanism."})
    sampling: str = field(default="auto", metadata={"help": "How batches are drawn."})
    memory_rows: int = field(
        default=64, metadata={"help": "Most noise vectors of the trained size, for auto."}
    )
    batch_seed: int | None = field(
        default=None, metadata={"help": "Fixes the batches; from OS entropy if not given. Secret."}
    )
    independence: str = field(
        default="probed", metadata={"help": "Whether examples are probed, or assumed, not to mix."}
    )
    release_unnoised: bool = field(
        default=False,
        metadata={"help": "Log training loss and the like, which epsilon does not cover."},
    )


def check_arguments(args: Any, privacy: Any) -> None:
    """Refuse settings that would break the guarantee, or the loop that it needs.

    Raises:
        RootnoiseError: the first of them.
    """
    if not isinstance(privacy, PrivacyArguments):
        raise RootnoiseError(f"privacy must be PrivacyArguments, got {type(privacy).__name__}")
    for name, bad, cure in _refusals(args):
        if bad:
            raise RootnoiseError(f"{name} must {cure}, got {getattr(args, name)!s:.60}")
    if privacy.release_unnoised:
        warnings.warn(
            "release_unnoised: the training loss is computed from raw data and logged, and "
            "epsilon does not cover it",
            UnnoisedWarning,
            stacklevel=4,
        )
    elif args.include_num_input_tokens_seen != "no":
        rule = "include_num_input_tokens_seen must be 'no' (the count is of raw data)"
        raise RootnoiseError(f"{rule}, got {args.include_num_input_tokens_seen!r}")


def _refusals(args: Any) -> Iterator[tuple[str, bool, str]]:
    """Yield names of TrainingArguments, whether to refuse them, and what they must be."""
    yield "world_size", args.world_size > 1, "be 1: PrivateTrainer runs in one process"
    yield "n_gpu", args.n_gpu > 1, "be at most 1 (set CUDA_VISIBLE_DEVICES)"
    yield "deepspeed", bool(args.deepspeed), "be off: PrivateTrainer runs in one process"
    yield "fsdp", bool(args.fsdp), "be off: PrivateTrainer runs in one process"
    yield "fp16", args.fp16, "be off, for it scales gradients (train in bf16)"
    yield "torch_compile", args.torch_compile, "be off: clipping needs the layers as they are"
    yield (
        "auto_find_batch_size",
        args.auto_find_batch_size,
        "be off: the batch size is a part of the guarantee",
    )
    checkpointing = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    yield "gradient_checkpointing", bool(checkpointing), "be off: layers would run twice a step"
    yield "use_liger_kernel", args.use_liger_kernel, "be off: it merges layers and loss"
    yield (
        "neftune_noise_alpha",
        args.neftune_noise_alpha is not None,
        "be None: its scale depends on the longest example",
    )
    yield (
        "train_sampling_strategy",
        args.train_sampling_strategy not in ("random", "sequential"),
        "be random: the private sampler draws the batches",
    )
    yield "ignore_data_skip", args.ignore_data_skip, "be off: batches go on where noise does"
    yield "debug", bool(args.debug), "be empty: it prints raw values"
    yield (
        "hub_strategy",
        bool(args.push_to_hub) and "checkpoint" in str(getattr(args.hub_strategy, "value", "")),
        "be end or every_save: checkpoints hold the secret key",
    )
    yield (
        "lr_scheduler_type",
        str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        in ("reduce_lr_on_plateau", "greedy"),
        "be a schedule that is known before training",
    )
