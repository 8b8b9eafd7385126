"""Model, batches and optimizer of one run, driven epoch by epoch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rootnoise._check import RootnoiseError, integer
from rootnoise.lab.config import RunConfig
from rootnoise.lab.data import Dataset
from rootnoise.lab.models import build
from rootnoise.mechanism import Mechanism
from rootnoise.randomness import Key
from rootnoise.sampling import Sampler
from rootnoise.training import PrivateOptimizer, privatize

# Called after every step with the step's number (from 1), n_steps, and the last test accuracy.
OnStep = Callable[[int, int, float | None], None]

EVALUATION_BATCH = 2000


class Trainer:
    """Model, batches and optimizer of one run, step by step.

    Attributes:
        t: steps made.
        history: one entry an evaluation, of "epoch", "step", "test_accuracy" and "seconds".
    """

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        sampler: Sampler,
        mechanism: Mechanism | None,
        key: Key | None = None,
    ) -> None:
        self.data, self.sampler = data, sampler
        self.model = build(config.model, data.input_shape, data.n_classes, config.seed)
        sgd = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=config.momentum)
        self.module: nn.Module
        self.optimizer: PrivateOptimizer | _PlainOptimizer
        if mechanism is None:
            self.module = self.model
            self.optimizer = _PlainOptimizer(sgd, sampler, config.decay)
        else:
            wrapped = privatize(self.model, "sum")
            self.module = wrapped
            self.optimizer = PrivateOptimizer(
                sgd, wrapped, mechanism, sampler, key, decay=config.decay
            )
        self.history: list[dict[str, Any]] = []
        self._seconds = 0.0

    @property
    def t(self) -> int:
        """Steps made."""
        return self.optimizer.t

    def epoch(self, on_step: OnStep | None = None) -> None:
        """Train until the end of the epoch, evaluate on the test set, and add to `history`."""
        start = time.perf_counter()
        per_epoch = -(-self.sampler.n_examples // self.sampler.batch_size)
        accuracy = self.history[-1]["test_accuracy"] if self.history else None
        with warnings.catch_warnings():
            # torch, on Opacus's hooks: the first layer's input, the data, needs no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            for _ in range(min(per_epoch, self.sampler.n_steps - self.t)):
                self._step()
                if on_step is not None:
                    on_step(self.t, self.sampler.n_steps, accuracy)
        self._seconds += time.perf_counter() - start
        entry = {"epoch": len(self.history) + 1, "step": self.t, "test_accuracy": self.accuracy()}
        self.history.append(entry | {"seconds": self._seconds})

    def _step(self) -> None:
        batch = self.sampler.batch(self.t)
        self.optimizer.zero_grad()
        if batch.size:
            index = torch.from_numpy(batch)
            logits = self.module(self.data.train_inputs[index])
            loss = cross_entropy(logits, self.data.train_labels[index], reduction="sum")
            torch.autograd.backward(loss)
        self.optimizer.step(batch)

    def accuracy(self) -> float:
        """Return the share of test examples that the model gets right."""
        self.model.eval()
        with torch.no_grad():
            inputs = torch.split(self.data.test_inputs, EVALUATION_BATCH)
            guesses = torch.cat([self.model(part).argmax(1) for part in inputs])
        self.model.train()
        return float((guesses == self.data.test_labels).double().mean())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, but the key."""
        return {
            "version": 1,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "seconds": self._seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved run.

        Raises:
            RootnoiseError: the state is not of this run.
        """
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.model.load_state_dict(state["model"])
            self.history, self._seconds = list(state["history"]), float(state["seconds"])
        except (KeyError, TypeError, RuntimeError) as reason:
            line = " ".join(str(reason).split())
            raise RootnoiseError(f"checkpoint must fit this run, got {line:.120}") from None


class _PlainOptimizer:
    """The twin of PrivateOptimizer without clipping and noise: same divisor, same decay."""

    def __init__(self, optimizer: torch.optim.Optimizer, sampler: Sampler, decay: float) -> None:
        self.optimizer, self.sampler, self.decay, self.t = optimizer, sampler, decay, 0

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, indices: object) -> None:
        with torch.no_grad():
            for p in (p for group in self.optimizer.param_groups for p in group["params"]):
                p.grad.div_(self.sampler.batch_size)
                p.mul_(self.decay)
        self.optimizer.step()
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.t = integer("saved t", state["t"], 0, self.sampler.n_steps)
