"""Private training with the Trainer of Hugging Face transformers: `PrivateTrainer`.

Trainer keeps its loop, but its parts are replaced: the sampler draws the batches, the loss is a
mean of per-example terms, the optimizer is that of `make_private`, and nothing that Trainer
computes from raw data (loss, gradient norm, token counts) is logged. Written against the internals
of transformers 5.24 and accelerate 1.15.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import pickle  # for the name of its error
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.front_door import LoopOptimizer, PrivateLoader, make_private
from rootnoise.integrations.per_example import Rows, Shapes, check_shared, example_losses
from rootnoise.keys import Key
from rootnoise.planner import Job
from rootnoise.workload import Workload, from_optimizer

STATE = "rootnoise.pt"  # in a checkpoint's folder, next to Trainer's own files
VERSION = 1
RAW = ("loss", "train_loss", "grad_norm", "total_flos")  # logs computed from raw data


class UnnoisedWarning(UserWarning):
    """Something that epsilon does not cover is logged."""


@dataclass
class PrivacyArguments:
    """What `PrivateTrainer` needs in addition to TrainingArguments; works with HfArgumentParser.

    Batch size, epochs, optimizer and scheduler come from TrainingArguments:
    `per_device_train_batch_size` is the batch size of a private step.

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


class PrivateTrainer(Trainer):  # type: ignore[misc]  # transformers is not read by the type checker
    """`transformers.Trainer` whose training is differentially private.

    To combine it with another trainer, such as Seq2SeqTrainer, put it first:
    `class Mine(PrivateTrainer, Seq2SeqTrainer): ...`. One step is one batch of
    `per_device_train_batch_size` examples, in one process.

    The loss is the mean over examples of each example's own mean over its labels, computed from the
    model's `logits` and the batch's `labels`; it is checked against the model's own loss on one
    example. With `compute_loss_func`, or an overridden `compute_loss`, the loss is yours: it must
    be a mean over examples of one term each.

    Args:
        args: as for Trainer. `max_grad_norm` is not used: each example is clipped to
            `privacy.clip_norm`, and nothing is clipped after the noise.
        privacy: epsilon, delta and the other private settings.
        key: fixes the noise; fresh from OS entropy when None. Keep it secret.
        kwargs: passed to Trainer.

    Attributes:
        private: the optimizer of the run, once `train` has begun: `private.epsilon_spent()`.

    Raises:
        RootnoiseError: settings under which the guarantee would not hold.
    """

    optimizer: Any
    lr_scheduler: Any
    _created_lr_scheduler: bool

    def __init__(
        self, *args: Any, privacy: PrivacyArguments, key: Key | None = None, **kwargs: Any
    ) -> None:
        self.privacy, self._key = privacy, key
        self.private: LoopOptimizer | None = None
        self._module: nn.Module | None = None
        self._resume: Path | None = None
        self._generators: str | None = None
        self._shift: bool | None = None
        super().__init__(*args, **kwargs)
        self._check_settings()

    def claim(self) -> str:
        """Return the guarantee of the whole run, once `train` has begun."""
        if self.private is None:
            raise RootnoiseError("claim must follow train, got it before")
        return self.private.claim()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as Trainer does, once; the training loss is NaN unless it may be released.

        Raises:
            RootnoiseError: settings, data or a model that cannot be trained privately, a second
                call, or a checkpoint that is incomplete or of another run.
        """
        if self.private is not None:
            raise RootnoiseError(
                "train must be called once: more steps need another plan (give num_train_epochs "
                "for all of them), got a second call"
            )
        self._check_settings()
        resume = resume_from_checkpoint or None
        if resume is True:
            resume = get_last_checkpoint(self.args.output_dir)
            if resume is None:
                rule = "resume_from_checkpoint must find a checkpoint in output_dir"
                raise RootnoiseError(f"{rule}, got none in {self.args.output_dir}")
        if resume is not None:
            self._resume, self._generators = Path(resume), str(resume)
            for name in (STATE, "scheduler.pt", "trainer_state.json"):
                if not (self._resume / name).is_file():
                    rule = "resume_from_checkpoint must be a whole checkpoint of PrivateTrainer"
                    raise RootnoiseError(f"{rule}, got {resume} without {name}")
        output = super().train(resume, *args, **kwargs)
        if self.privacy.release_unnoised:
            return output
        return TrainOutput(output.global_step, math.nan, self._released(output.metrics))

    # ------------------------------------------------------------------------------ before training

    def _check_settings(self) -> None:
        """Refuse settings that would break the guarantee, or the loop that it needs."""
        args, privacy = self.args, self.privacy
        if not isinstance(privacy, PrivacyArguments):
            raise RootnoiseError(f"privacy must be PrivacyArguments, got {type(privacy).__name__}")
        for name, bad, cure in _refusals(args):
            if bad:
                raise RootnoiseError(f"{name} must {cure}, got {getattr(args, name)!s:.60}")
        sets = self.eval_dataset
        for held in sets.values() if isinstance(sets, dict) else [sets]:
            self._check_evaluated(held)
        if privacy.release_unnoised:
            warnings.warn(
                "release_unnoised: the training loss is computed from raw data and logged, and "
                "epsilon does not cover it",
                UnnoisedWarning,
                stacklevel=3,
            )
        elif args.include_num_input_tokens_seen != "no":
            rule = "include_num_input_tokens_seen must be 'no' (the count is of raw data)"
            raise RootnoiseError(f"{rule}, got {args.include_num_input_tokens_seen!r}")

    def _check_evaluated(self, dataset: Any) -> None:
        """Refuse metrics of the training set, which would have no noise."""
        if dataset is None or dataset is not self.train_dataset or self.privacy.release_unnoised:
            return
        raise RootnoiseError(
            "eval_dataset must hold other examples than train_dataset, whose metrics are not "
            "covered by epsilon (release_unnoised=True releases them), got the same"
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the private batches; `make_private` is called here, where Trainer's loop begins.

        Raises:
            RootnoiseError: as for `train`.
        """
        args, privacy, dataset = self.args, self.privacy, self.train_dataset
        if isinstance(self.optimizer, AcceleratedOptimizer):
            raise RootnoiseError("train must be called once, got an optimizer of another training")
        if dataset is None or not hasattr(dataset, "__len__"):
            kind = type(dataset).__name__
            raise RootnoiseError(f"train_dataset must be a data set of known length, got {kind}")
        collate = self.data_collator
        if hasattr(dataset, "column_names"):  # from the datasets library
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        # With its own generator, starting or resuming an epoch does not advance the global one.
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=args.train_batch_size,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            generator=torch.Generator(),
        )
        job = Job(len(dataset), args.train_batch_size, 1, privacy.epsilon, privacy.delta)
        epochs = self._epochs(job.period)
        check_shared(self.model)
        Rows(self.model)
        self._rehearse(dataset, collate)
        given = self.optimizer is not None
        optimizer = self.create_optimizer()
        workload = None if given else self._workload(optimizer, epochs * job.period)
        module, loop, batches = make_private(
            self.model,
            optimizer,
            loader,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            epochs=epochs,
            clip_norm=privacy.clip_norm,
            mechanism=privacy.mechanism,
            sampling=privacy.sampling,  # type: ignore[arg-type]  # make_private checks it
            scheduler=self.lr_scheduler or self._scheduler(epochs * job.period),
            memory_rows=privacy.memory_rows,
            options=None if privacy.bands is None else {"bands": privacy.bands},
            key=self._key if self._resume is None else _read(self._resume).key,
            seed=privacy.batch_seed,
            independence=privacy.independence,
            workload=workload,
        )
        self._module, self.private = module, loop
        # Otherwise accelerate would take its state apart and rebuild it on the device.
        self.optimizer = AcceleratedOptimizer(loop, device_placement=False)
        self.optimizer._is_accelerate_prepared = True
        return DataLoader(
            _Epoch(batches),
            batch_sampler=[[step] for step in range(len(batches))],
            collate_fn=_only,
            generator=torch.Generator(),
        )

    def _epochs(self, period: int) -> int:
        """Return the number of epochs that TrainingArguments ask for."""
        steps, epochs = self.args.max_steps, self.args.num_train_epochs
        if steps > 0:
            if steps % period:
                rule = f"max_steps must be a multiple of an epoch's {period} steps"
                raise RootnoiseError(f"{rule} (or give num_train_epochs), got {steps}")
            return int(steps // period)
        if epochs != int(epochs) or epochs < 1:
            raise RootnoiseError(f"num_train_epochs must be a whole number, got {epochs}")
        return int(epochs)

    def _scheduler(self, n_steps: int) -> Any:
        """Return what builds the scheduler that Trainer will make."""

        def build(optimizer: torch.optim.Optimizer) -> Any:
            before = self.lr_scheduler, self._created_lr_scheduler
            self.lr_scheduler = None
            try:
                return self.create_scheduler(n_steps, optimizer)
            finally:
                self.lr_scheduler, self._created_lr_scheduler = before

        return build

    def _workload(self, optimizer: torch.optim.Optimizer, n_steps: int) -> Workload:
        """Return the workload of the largest group; Trainer exempts biases and norms from decay."""
        largest = max(optimizer.param_groups, key=lambda g: sum(p.numel() for p in g["params"]))
        alike = copy.copy(optimizer)
        alike.param_groups = [largest]
        return from_optimizer(alike, n_steps, self._scheduler(n_steps))

    @torch.no_grad()
    def _rehearse(self, dataset: Any, collate: Any) -> None:
        """Run one example in evaluation mode, to check the layers' rows and the loss.

        Raises:
            RootnoiseError: a collator or a layer without one row per example, or a loss that
                differs from the model's.
        """
        model, seen = self.model, {}
        with torch.random.fork_rng():
            model.eval()
            for rows in (3, 5, 1):
                inputs = collate([dataset[0] for _ in range(rows)])
                seen[rows] = self._prepare_inputs(self._checked(inputs, rows))
            run = self._own_mean if self._own_loss else self.compute_loss
            run(model, dict(seen[1]))  # finds the form of the loss, if it is computed here
            for rows, inputs in seen.items():
                with Shapes(model) as shapes:
                    run(model, dict(inputs))
                if rows > 1:
                    shapes.check(rows)
            model.train()

    @torch.no_grad()
    def _find_loss(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether logits predict the next label, by the model's own loss on one example.

        Raises:
            RootnoiseError: the model's own loss matches neither case.
        """
        one = {k: x[:1] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
        if one["labels"].is_floating_point():
            orders = [False]
        else:
            one["labels"] = one["labels"].clamp(min=0)  # so that all of them are predicted
            orders = [self._loss_shifts_labels, not self._loss_shifts_labels]
        with torch.random.fork_rng():
            training = self.model.training
            self.model.eval()
            outputs = self.model(**one)
            own = outputs.get("loss") if isinstance(outputs, Mapping) else None
            for shift in orders[: 1 if own is None or one["labels"].dim() < 2 else 2]:
                ours = self._made(self.model, one, shift, 0.0)[0]
                if own is None or math.isclose(float(own), float(ours), rel_tol=1e-2, abs_tol=1e-3):
                    self.model.train(training)
                    return shift
        raise RootnoiseError(  # without the two numbers, which come from raw data
            "loss of one example must be the model's own (or give compute_loss_func), got another "
            f"from {type(self.model).__name__}"
        )

    # ------------------------------------------------------------------------------------- the step

    @property
    def _own_loss(self) -> bool:
        """Whether the loss is computed here, and not overridden."""
        overridden = type(self).compute_loss is not PrivateTrainer.compute_loss
        return self.compute_loss_func is None and not overridden

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], None]:
        """Return the next batch without a number of items, whose use would couple examples."""
        if self._generators is not None:  # in a resumed run, before its first batch is collated
            super()._load_rng_state(self._generators)
            self._generators = None
        return super().get_batch_samples(*args, **kwargs)[0], None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: Trainer would do it after collating the first batch; see above."""

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward of one batch; return its loss if it may be logged, else zero."""
        assert self.private is not None, "training_step is a part of train"  # noqa: S101
        rows, nothing = self.private.rows, torch.zeros((), device=self.args.device)
        if rows == 0:  # a step of noise alone
            return nothing
        loss = super().training_step(self._module, self._checked(inputs, rows), None)
        return loss if self.privacy.release_unnoised else nothing

    def _checked(self, inputs: Any, rows: int) -> Any:
        """Refuse a batch without one row per example, or whose padding shifts an example."""
        if not isinstance(inputs, Mapping):
            kind = type(inputs).__name__
            raise RootnoiseError(f"data_collator must return a dict of tensors, got {kind}")
        for name, x in inputs.items():
            if isinstance(x, torch.Tensor) and x.shape[:1] != (rows,):
                raise RootnoiseError(
                    f"data_collator must give one row an example ({rows}), got {name} of shape "
                    f"{tuple(x.shape)}"
                )
        mask = inputs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all()):
            raise RootnoiseError(
                "data_collator must pad on the right (padding_side='right'), where an example's "
                "positions do not depend on the longest of its batch, got padding on the left"
            )
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean of per-example losses; for evaluation or a loss of yours, Trainer's."""
        if self.compute_loss_func is not None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, None)
        loss, outputs = self._own_mean(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def _own_mean(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
        """Return the mean of per-example losses, and what the model returned."""
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor):
            got = ", ".join(inputs)
            raise RootnoiseError(f"batch must hold labels (or give compute_loss_func), got {got}")
        if "shift_labels" in inputs:
            raise RootnoiseError("batch must hold labels and not shift_labels, got both")
        if self._shift is None:
            self._shift = self._find_loss(inputs)
        return self._made(model, inputs, self._shift, self.args.label_smoothing_factor)

    def _made(
        self, model: nn.Module, inputs: Mapping[str, Any], shift: bool, smoothing: float
    ) -> tuple[torch.Tensor, Any]:
        """Return the mean loss and output without asking the model for its own loss."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if self._is_encoder_decoder and "decoder_input_ids" not in inputs:
            prepare = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None:
                kind = type(self.model).__name__
                raise RootnoiseError(f"batch must hold decoder_input_ids for {kind}, got none")
            inputs["decoder_input_ids"] = prepare(labels=labels)
        outputs = model(**inputs)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, torch.Tensor):
            got = f"{type(outputs).__name__} of {type(self.model).__name__}"
            raise RootnoiseError(f"model must return logits (or give compute_loss_func), got {got}")
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        return example_losses(logits, labels, shift, problem, smoothing).mean(), outputs

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Do nothing: gradients here are raw, and each example is clipped separately."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Return None: the norm would be that of the raw gradient."""

    # ----------------------------------------------------------------------------- what is released

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log what does not come from raw data, with the epsilon spent so far."""
        if not self.privacy.release_unnoised:
            kept = self._released(logs)
            logs.clear()
            logs.update(kept)
        if self.private is not None:
            logs["privacy_epsilon"] = self.private.epsilon_spent()
        super().log(logs, *args, **kwargs)

    @staticmethod
    def _released(logs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in logs.items() if name not in RAW}

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0 unless raw logs are allowed: the number counts the tokens of raw batches."""
        return int(super().floating_point_ops(inputs)) if self.privacy.release_unnoised else 0

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return Trainer's loader; metrics of the training set are refused."""
        named = isinstance(eval_dataset, str)
        self._check_evaluated(self.eval_dataset[eval_dataset] if named else eval_dataset)
        loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
        return loader

    # ---------------------------------------------------------------------------------- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the private state to one file, readable by its owner alone."""
        assert self.private is not None, "checkpoints are a part of train"  # noqa: S101
        private, buffer = self.private.private, io.BytesIO()
        content = {
            "version": VERSION,
            "fingerprint": private.mechanism.fingerprint,
            "key": private.stream.key.secret.hex(),
            "weights": _digest(self.model),
            "optimizer": private.state_dict(),
        }
        torch.save(content, buffer)
        write_whole(Path(output_dir) / STATE, buffer.getvalue(), mode=0o600)
        buffer = io.BytesIO()
        torch.save(self.lr_scheduler.state_dict(), buffer)
        write_whole(Path(output_dir) / "scheduler.pt", buffer.getvalue())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Continue from a checkpoint: noise, batches, ledger and scheduler."""
        if checkpoint is None:
            return
        assert self.private is not None, "loading is a part of train"  # noqa: S101
        folder, private = Path(checkpoint), self.private.private
        saved = _read(folder)
        if saved.fingerprint != private.mechanism.fingerprint:
            raise RootnoiseError(
                "checkpoint must be of the mechanism that these arguments make, "
                f"{private.mechanism.fingerprint[:16]}, got {saved.fingerprint:.16}"
            )
        if saved.weights != _digest(self.model):
            raise RootnoiseError(
                f"checkpoint must hold the weights of its step, got others in {folder}"
            )
        self.private.load_state_dict(saved.optimizer)
        if self.private.t != self.state.global_step:
            raise RootnoiseError(
                f"checkpoint must be at one step, got trainer_state.json at "
                f"{self.state.global_step} and {STATE} at {self.private.t}"
            )
        state = torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(state)


# -------------------------------------------------------------------------------------------- parts


def _refusals(args: Any) -> Iterator[tuple[str, bool, str]]:
    """Yield names of TrainingArguments, whether to refuse them, and what they must be."""
    yield "world_size", args.world_size > 1, "be 1: PrivateTrainer runs in one process"
    yield "n_gpu", args.n_gpu > 1, "be at most 1 (set CUDA_VISIBLE_DEVICES)"
    yield "deepspeed", bool(args.deepspeed), "be off: PrivateTrainer runs in one process"
    yield "fsdp", bool(args.fsdp), "be off: PrivateTrainer runs in one process"
    yield "fp16", args.fp16, "be off, for it scales gradients (train in bf16)"
    yield "torch_compile", args.torch_compile, "be off: clipping needs the layers as they are"
    yield (
        "gradient_accumulation_steps",
        args.gradient_accumulation_steps != 1,
        "be 1: one batch of per_device_train_batch_size is one private step",
    )
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


class _Epoch(Dataset[Any]):
    """The steps of an epoch as Trainer reads them: only the next one can be read.

    Accelerate's `skip_first_batches` can shorten a DataLoader of it: a resumed run then begins in
    the middle of an epoch, as `PrivateLoader` does.
    """

    def __init__(self, batches: PrivateLoader) -> None:
        self._batches, self._pass = batches, iter(())  # type: Any, Iterator[Any]

    def __len__(self) -> int:
        return len(self._batches.dataset)

    def __getitem__(self, step: int) -> Any:
        batch = next(self._pass, None)
        if batch is None:
            self._pass = iter(self._batches)
            batch = next(self._pass)
        return batch


def _only(batches: list[Any]) -> Any:
    """Return the one batch, which is already collated."""
    return batches[0]


@dataclass(frozen=True)
class _Saved:
    """The private part of a checkpoint."""

    key: Key
    fingerprint: str
    weights: str
    optimizer: dict[str, Any]


def _read(folder: Path) -> _Saved:
    """Return the private state in a checkpoint's folder."""
    try:
        saved = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as reason:
        line = str(reason).partition("\n")[0]
        raise RootnoiseError(f"checkpoint must have a readable {STATE}, got {line:.80}") from None
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        raise RootnoiseError(f"{STATE} must be of version {VERSION}, got another in {folder}")
    key = Key(bytes.fromhex(saved["key"]))
    return _Saved(key, saved["fingerprint"], saved["weights"], saved["optimizer"])


def _digest(model: nn.Module) -> str:
    """Return a hash of the names and values of the trainable parameters."""
    hashed = hashlib.sha256()
    for name, p in model.named_parameters():
        if p.requires_grad:
            hashed.update(name.encode())
            values = p.detach().cpu().contiguous().reshape(-1)
            hashed.update(values.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
