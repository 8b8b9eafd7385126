"""Trainer keeps its loop, but its parts are replaced.

The sampler draws the batches, the loss is a mean of per-example terms, the optimizer is that of
`make_private`, and nothing that Trainer computes from raw data (loss, gradient norm, token counts)
is logged.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator, Mapping
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
from rootnoise.integrations.hugging_face import checkpoint
from rootnoise.integrations.hugging_face.arguments import PrivacyArguments, check_arguments
from rootnoise.integrations.hugging_face.checkpoint import STATE
from rootnoise.integrations.hugging_face.loss import MeanLoss
from rootnoise.integrations.per_example import Rows, Shapes, check_batch, check_shared
from rootnoise.keys import Key
from rootnoise.participation.loader import Split
from rootnoise.planner import Job
from rootnoise.workload import Workload, from_optimizer

RAW = ("loss", "train_loss", "grad_norm", "total_flos")  # logs computed from raw data


class PrivateTrainer(Trainer):  # type: ignore[misc]  # transformers is not read by the type checker
    """`transformers.Trainer` whose training is differentially private.

    To combine it with another trainer, such as Seq2SeqTrainer, put it first:
    `class Mine(PrivateTrainer, Seq2SeqTrainer): ...`. One step is one batch of
    `per_device_train_batch_size * gradient_accumulation_steps` examples, which the model is given
    in `gradient_accumulation_steps` parts, in one process.

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
        self._mean_loss: MeanLoss | None = None
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
        """Refuse settings and data that would break the guarantee, or the loop that it needs."""
        check_arguments(self.args, self.privacy)
        sets = self.eval_dataset
        for held in sets.values() if isinstance(sets, dict) else [sets]:
            self._check_evaluated(held)

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
        parts = args.gradient_accumulation_steps
        batch_size = args.train_batch_size * parts
        # With its own generator, starting or resuming an epoch does not advance the global one.
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            generator=torch.Generator(),
        )
        job = Job(len(dataset), batch_size, 1, privacy.epsilon, privacy.delta)
        epochs = self._epochs(job.period)
        self._mean_loss = None  # of this model
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
            key=self._key if self._resume is None else checkpoint.read(self._resume).key,
            seed=privacy.batch_seed,
            independence=privacy.independence,
            workload=workload,
        )
        self._module, self.private = module, loop
        batches = batches.divided(Split(parts), together=True)
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
                seen[rows] = self._prepare_inputs(check_batch(inputs, rows))
            run = self._mean if self._own_loss else self.compute_loss
            run(model, dict(seen[1]))  # finds the form of the loss, if it is computed here
            for rows, inputs in seen.items():
                with Shapes(model) as shapes:
                    run(model, dict(inputs))
                if rows > 1:
                    shapes.check(rows)
            model.train()

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

    def _load_rng_state(self, path: str | None) -> None:
        """Do nothing: Trainer would do it after collating the first batch; see above."""

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward of one batch, or add a part of one to the sum.

        Returns the batch's loss, or a part's share of it, if it may be logged; else zero.
        """
        assert self.private is not None, "training_step is a part of train"  # noqa: S101
        rows, loss = self.private.rows, torch.zeros((), device=self.args.device)
        if rows:  # else it adds nothing, and a batch of nobody is a step of noise alone
            # A part's loss is its own mean: clipping must see each example's gradient as it is.
            self.current_gradient_accumulation_steps = 1
            part = super().training_step(self._module, check_batch(inputs, rows), None)
            if self.privacy.release_unnoised:
                loss = part * (rows / self.private.batch_rows)
        if self.private.more:
            self.private.accumulate()
        return loss

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
        loss, outputs = self._mean(model, inputs)
        return (loss, outputs) if return_outputs else loss

    @property
    def _mean(self) -> MeanLoss:
        """The loss that is computed here, once its form is known."""
        if self._mean_loss is None:
            shifts, smoothing = self._loss_shifts_labels, self.args.label_smoothing_factor
            self._mean_loss = MeanLoss(self.model, shifts, smoothing)
        return self._mean_loss

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

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return Trainer's loader; predictions have metrics, so the training set is refused."""
        self._check_evaluated(test_dataset)
        loader: DataLoader[Any] = super().get_test_dataloader(test_dataset)
        return loader

    # ---------------------------------------------------------------------------------- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the private state to one file, readable by its owner alone."""
        assert self.private is not None, "checkpoints are a part of train"  # noqa: S101
        checkpoint.write(Path(output_dir), self.private.private, self.model)
        buffer = io.BytesIO()
        torch.save(self.lr_scheduler.state_dict(), buffer)
        write_whole(Path(output_dir) / "scheduler.pt", buffer.getvalue())

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        """Continue from a checkpoint: noise, batches, ledger and scheduler."""
        if path is None:
            return
        assert self.private is not None, "loading is a part of train"  # noqa: S101
        folder, private = Path(path), self.private.private
        saved = checkpoint.read(folder)
        if saved.fingerprint != private.mechanism.fingerprint:
            raise RootnoiseError(
                "checkpoint must be of the mechanism that these arguments make, got "
                + private.mechanism.unlike(saved.settings)
            )
        if saved.weights != checkpoint.digest(self.model):
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


class _Epoch(Dataset[Any]):
    """The steps of an epoch as Trainer reads them: only the next one can be read.

    Accelerate's `skip_first_batches` can shorten a DataLoader of it: a resumed run then begins in
    the middle of an epoch, as `PrivateLoader` does.
    """

    def __init__(self, batches: PrivateLoader) -> None:
        self._batches = batches
        self._pass: Iterator[Any] = iter(())

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
