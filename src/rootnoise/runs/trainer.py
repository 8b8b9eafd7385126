"""Model, batches and optimizer of one run, driven epoch by epoch."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rootnoise import _limits
from rootnoise._check import RootnoiseError, integer, warn
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.loader import Split
from rootnoise.participation.samplers import Indices, Sampler
from rootnoise.runs.averaging import Average
from rootnoise.runs.config import RunConfig, n_averaged, rates
from rootnoise.runs.data import Dataset
from rootnoise.runs.micro_batches import StepMemory, free_memory
from rootnoise.runs.models import build
from rootnoise.runs.processes import local_device, on_device, shard
from rootnoise.training import PrivateOptimizer, privatize, whole
from rootnoise.training.ranks import Ranks

# Called after every step with the step's number (from 1), n_steps, and the last test accuracy.
OnStep = Callable[[int, int, float | None], None]

EVALUATION_BATCH = 2000


class EnvironmentChangedWarning(RuntimeWarning):
    """A run is resumed in an environment where arithmetic may round differently."""


class Trainer:
    """Model, batches and optimizer of one run, step by step.

    With several ranks each takes its part of every batch. All ranks make the same calls.

    Args:
        config: the checked settings.
        data: all of it, on each rank.
        sampler: draws the batches; its seed must be that of the run on each rank.
        mechanism: None without privacy.
        key: fixes the noise; rank 0's counts.
        ranks: the processes of the run.
        fsdp: cut the parameters over the ranks, rather than give each a copy.

    Attributes:
        t: steps taken.
        history: one entry per evaluation: "epoch", "step", "test_accuracy" and "seconds".
    """

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        sampler: Sampler,
        mechanism: Mechanism | None,
        key: Key | None = None,
        ranks: Ranks | None = None,
        fsdp: bool = False,
    ) -> None:
        self.data, self.sampler, self._fsdp = data, sampler, fsdp
        ranks = ranks or Ranks()
        self._device = _device(local_device(config.device, ranks))
        self._ranks = ranks = on_device(ranks, self._device)
        if ranks.size > 1:
            ranks.same("training set", self._data)
        model = build(config.model, data.input_shape, data.n_classes, config.seed)
        self.model = model.to(self._device)
        memory = StepMemory.of(self.model, data.train_inputs[0])
        n_steps = sampler.n_steps
        self._average = (
            None
            if config.average is None
            else Average(self.model, n_averaged(config, n_steps), n_steps)
        )
        if fsdp:
            shard(self.model, ranks, self._device)
            if self._average is not None:
                shard(self._average.model, ranks, self._device)
        sgd = torch.optim.SGD(
            self.model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._sgd, self._lr = sgd, config.learning_rate * rates(config, sampler.n_steps)
        self._chosen = config.micro_batch_size is None and not fsdp
        rows = 0 if mechanism is None else 3 * mechanism.noising.state_size
        # float32; a checkpoint holds the rows twice more, in its state and in its bytes.
        # The sum of an average is float64, twice where it is saved, and its model float32.
        values = 4.0 * rows + (0 if self._average is None else 20)
        noise = values * sum(p.numel() for p in self.model.parameters())
        self._micro = config.micro_batch_size or self._fitting(config, memory, noise)
        self.module: nn.Module
        self.optimizer: PrivateOptimizer | _PlainOptimizer
        if mechanism is None:
            self.module = self.model
            self.optimizer = _PlainOptimizer(sgd, sampler, config.decay, ranks, fsdp)
        else:
            self._refuse_memory(config, memory, noise)
            wrapped = privatize(self.model, "sum")
            self.module = wrapped
            # Planned for these settings; `_step` sets the schedule.
            self.optimizer = PrivateOptimizer(
                sgd,
                wrapped,
                mechanism,
                sampler,
                key,
                decay=config.decay,
                process_group=ranks.group,
                planned=True,
            )
        self.history: list[dict[str, Any]] = []
        self._seconds = 0.0

    def _fitting(self, config: RunConfig, memory: StepMemory, noise: float) -> int:
        """Return the most examples that fit into memory at a time, and say if a batch does not."""
        most = self.sampler.n_examples  # under Poisson sampling, a batch may be all of them
        if not self._chosen:
            return most
        free = free_memory(self._device) / self._ranks.size - noise
        fit = memory.fitting(free, most)
        if fit < config.batch_size and self._ranks.rank == 0:
            warn(
                f"batches of {config.batch_size} are made in micro-batches of {fit}, which fit "
                "into the free memory (micro_batch_size says another number)"
            )
        return fit

    def _refuse_memory(self, config: RunConfig, memory: StepMemory, noise: float) -> None:
        """Refuse a run whose noise and clipping may not fit into memory; a GPU raises by itself."""
        if self._device.type != "cpu":
            return
        most = min(config.batch_size, self._micro)
        what = f"noise and a step of {most} examples at a time"
        cure = "fewer bands or a smaller batch or micro_batch_size"
        _limits.memory(what, noise + memory.bytes(most), cure)

    @property
    def t(self) -> int:
        """Steps taken."""
        return self.optimizer.t

    @property
    def mechanism(self) -> Mechanism | None:
        """The mechanism, None without privacy."""
        optimizer = self.optimizer
        return optimizer.mechanism if isinstance(optimizer, PrivateOptimizer) else None

    @property
    def epoch_end(self) -> int:
        """Number of steps taken when the epoch of the next step ends."""
        per_epoch = -(-self.sampler.n_examples // self.sampler.batch_size)
        return min((self.t // per_epoch + 1) * per_epoch, self.sampler.n_steps)

    def epoch(self, on_step: OnStep | None = None, most: int | None = None) -> None:
        """Train to the end of the epoch, evaluate on the test set, and add to `history`.

        With `most`, stop after that many steps unless the epoch ends before.
        """
        start, end = time.perf_counter(), self.epoch_end
        stop = end if most is None else min(self.t + most, end)
        accuracy = self.history[-1]["test_accuracy"] if self.history else None
        while self.t < stop:
            self._step()
            if on_step is not None:
                on_step(self.t, self.sampler.n_steps, accuracy)
        self._seconds += time.perf_counter() - start
        if stop < end:
            return
        entry = {"epoch": len(self.history) + 1, "step": self.t, "test_accuracy": self.accuracy()}
        self.history.append(entry | {"seconds": self._seconds})

    @property
    def _rounding(self) -> str:
        """What the last bits of the run depend on."""
        line = environment(self._device)
        if self._chosen and self._micro < self.sampler.n_examples:
            line += f", micro-batches of {self._micro}"
        parts = " with shards" if self._fsdp else ""
        return line if self._ranks.size == 1 else f"{line}, {self._ranks.size} processes{parts}"

    @cached_property
    def _data(self) -> str:
        """A hash of the training set; as secret as the checkpoint that it goes into."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.data.train_inputs, self.data.train_labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def _step(self) -> None:
        split = Split(most=self._micro, rank=self._ranks.rank, size=self._ranks.size)
        self.optimizer.zero_grad()
        *parts, last = split(self.sampler.batch(self.t))
        for part in parts:
            self._backward(part)
            self.optimizer.accumulate(part)
        if last.size or self._fsdp:  # shards are exchanged by all ranks or none
            self._backward(last)
        for group in self._sgd.param_groups:
            group["lr"] = float(self._lr[self.t])
        self.optimizer.step(last)
        if self._average is not None:
            self._average.add(self.model, self.t)

    def _backward(self, indices: Indices) -> None:
        index = torch.from_numpy(indices)
        logits = self.module(self.data.train_inputs[index].to(self._device))
        labels = self.data.train_labels[index].to(self._device)
        torch.autograd.backward(cross_entropy(logits, labels, reduction="sum"))

    def accuracy(self) -> float:
        """Return the share of test examples that the released model would get right, at this step.

        Whole models share the work; the batches do not depend on the number of ranks.
        """
        tests = (self.data.test_inputs, self.data.test_labels)
        batches = list(zip(*(torch.split(t, EVALUATION_BATCH) for t in tests), strict=True))
        if not self._fsdp:
            batches = batches[self._ranks.rank :: self._ranks.size]
        right = torch.zeros(1, dtype=torch.float64, device=self._device)
        model = self._released()
        model.eval()
        with torch.no_grad():
            for inputs, labels in batches:
                guesses = model(inputs.to(self._device)).argmax(1)
                right += (guesses == labels.to(self._device)).sum()
        self.model.train()
        if not self._fsdp:
            self._ranks.add_(right)
        return float(right) / len(self.data.test_labels)

    def _released(self) -> nn.Module:
        """Return the model that would be released at this step: the last iterate, or an average."""
        return self.model if self._average is None else self._average.at(self.model, self.t)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole weights of the model to release, on the CPU."""
        return {name: w.cpu() for name, w in whole.whole(self._released().state_dict()).items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs except the key, on any number of ranks."""
        if isinstance(self.optimizer, PrivateOptimizer):
            inner = whole.state_dict(self.optimizer)
        else:
            inner = self.optimizer.state_dict()
        mean = {} if self._average is None else {"average": self._average.state_dict()}
        return mean | {
            "version": 1,
            "data": self._data,
            "surroundings": self._rounding,
            "model": whole.whole(self.model.state_dict()),
            "optimizer": inner,
            "history": self.history,
            "seconds": self._seconds,
            "micro_batch_size": self._micro,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run.

        In the same environment the weights equal those of the uninterrupted run bit for bit; in
        another one a warning says so. Privacy does not depend on it: steps past the checkpoint have
        released nothing.

        Raises:
            RootnoiseError: the state is not of this run, or the training set has changed.
        """
        if state.get("data") != self._data:
            raise RootnoiseError("training set must be the one the run began with, got another")
        if self._chosen:  # as before the stop, if it still fits
            self._micro = min(self._micro, state.get("micro_batch_size", self._micro))
        then, now = state.get("surroundings"), self._rounding
        if then != now and self._ranks.rank == 0:
            warnings.warn(
                f"the run goes on in {now}, its checkpoint was written in {then}: the last bits "
                "of the weights will not be those of an uninterrupted run",
                EnvironmentChangedWarning,
                stacklevel=2,
            )
        try:
            if isinstance(self.optimizer, PrivateOptimizer):
                whole.load_state_dict(self.optimizer, state["optimizer"])
            else:
                self.optimizer.load_state_dict(state["optimizer"])
            whole.load_weights(self.model, state["model"])
            if self._average is not None:
                self._average.load_state_dict(state["average"], self.model, self.t)
            self.history, self._seconds = list(state["history"]), float(state["seconds"])
        except (AttributeError, KeyError, TypeError, RuntimeError) as reason:
            line = " ".join(str(reason).split())
            raise RootnoiseError(f"checkpoint must fit this run, got {line:.120}") from None


def environment(device: torch.device) -> str:
    """Return, in one line, what besides its settings the last bits of a run depend on."""
    cpu, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    line = f"torch {torch.__version__}, NumPy {np.__version__}, {cpu}, {threads} threads"
    return line if device.type == "cpu" else f"{line}, {torch.cuda.get_device_name(device)}"


def _device(name: str) -> torch.device:
    """Return a device by name, or refuse one that this machine does not have."""
    device = torch.device(name)
    n_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        rule = f"device must be one that torch finds here ({n_gpus} GPUs)"
        raise RootnoiseError(f"{rule}, got {name}")
    return device


class _PlainOptimizer:
    """PrivateOptimizer without clipping and noise: same divisor, same decay."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sampler: Sampler,
        decay: float,
        ranks: Ranks,
        sharded: bool,
    ) -> None:
        self.optimizer, self.sampler, self.decay, self.t = optimizer, sampler, decay, 0
        self._ranks, self._sharded = ranks, sharded

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def accumulate(self, indices: object) -> None:
        """Do nothing: torch has already added up the gradients."""

    def step(self, indices: object) -> None:
        with torch.no_grad():
            for p in (p for group in self.optimizer.param_groups for p in group["params"]):
                if p.grad is None:  # an empty part
                    p.grad = torch.zeros_like(p)
                if self._sharded:  # torch has averaged over the ranks
                    p.grad.mul_(self._ranks.size)
                else:
                    self._ranks.add_(p.grad)
                p.grad.div_(self.sampler.batch_size)
                p.mul_(self.decay)
        self.optimizer.step()
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "optimizer": whole.whole(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(whole.cut(state["optimizer"], self.optimizer))
        self.t = integer("saved t", state["t"], 0, self.sampler.n_steps)
