"""Optimizer, loader and parts of batches, with the names that Opacus's scripts read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from rootnoise._check import RootnoiseError, integer
from rootnoise.front_door import LoopOptimizer, PrivateLoader
from rootnoise.participation.loader import Split
from rootnoise.participation.samplers import Indices

MICRO_BATCHES = "BatchMemoryManager splits a batch of the loader into physical ones"
# Attributes of Opacus's optimizer that are not supported here, and what applies instead.
REFUSED = {
    "virtual_step": MICRO_BATCHES,
    "accumulated_iterations": MICRO_BATCHES,
    "attach_step_hook": "use torch's register_step_post_hook",
    "grad_samples": "gradients are clipped inside of step",
    "clip_and_accumulate": "gradients are clipped inside of step",
    "add_noise": "noise is added inside of step",
    "pre_step": "all is done inside of step",
    "scale_grad": "gradients are divided by the planned batch size inside of step",
}


class EngineOptimizer(LoopOptimizer):
    """A `LoopOptimizer` with the names that Opacus's scripts read."""

    @property
    def original_optimizer(self) -> torch.optim.Optimizer:
        """The inner optimizer."""
        return self.private.optimizer

    @property
    def noise_multiplier(self) -> float:
        """The mechanism's noise multiplier for the whole run; it is fixed."""
        return self.private.mechanism.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        raise RootnoiseError(f"noise_multiplier must stay as calibrated, got {value}")

    @property
    def max_grad_norm(self) -> float:
        """The clip norm of one record's gradient; it is fixed."""
        return self.private.mechanism.clip_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        raise RootnoiseError(f"max_grad_norm must stay as calibrated, got {value}")

    @property
    def expected_batch_size(self) -> int:
        """The divisor of every sum."""
        return self.private.sampler.batch_size

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Note from Opacus's BatchMemoryManager whether more of the batch follows the next part."""
        self._skips_next = bool(do_skip)

    _skips_next = False

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        """Whether the next `step` only adds a physical batch; asking changes nothing."""
        return self.more

    @property
    def _is_last_step_skipped(self) -> bool:
        return self.step_was_skipped

    def __getattr__(self, name: str) -> Any:
        """Explain why an attribute of Opacus's optimizer is not supported."""
        if name in REFUSED:
            raise RootnoiseError(f"{name} must not be used: {REFUSED[name]}")
        raise AttributeError(name)


class EngineLoader(PrivateLoader):
    """A `PrivateLoader` with the names that Opacus's scripts read."""

    @property
    def sample_rate(self) -> float:
        """Fraction of the records in a step, on average."""
        return self.batch_size / len(self.dataset)

    # What follows is read by Opacus's own BatchMemoryManager, which makes a DataLoader of it. It
    # tells the optimizer whether a physical batch is the last, and collating it tells how many
    # examples it has: the next ones of the batch. So it is collated in this process, in order.
    num_workers, timeout, persistent_workers = 0, 0, False
    worker_init_fn = multiprocessing_context = prefetch_factor = None

    @property
    def pin_memory(self) -> bool:
        """Whether batches are copied to pinned memory, as the script's own loader said."""
        return bool(self.loading.get("pin_memory"))

    @property
    def generator(self) -> Any:
        """The generator of the script's own loader."""
        return self.loading.get("generator")

    @cached_property
    def batch_sampler(self) -> Batches:
        """The numbers of the examples of each batch of a pass."""
        return Batches(self)

    def collate_fn(self, examples: list[Any]) -> Any:
        """Collate the next examples of a batch, and tell the optimizer that they were drawn.

        Raises:
            RootnoiseError: the last examples of a batch are not those of its last physical one, as
                when two iterators over one manager take turns: then some would be taken twice.
        """
        loop: Any = self._optimizer
        part, last = self.batch_sampler.take(len(examples)), not loop._skips_next
        if last != (self.batch_sampler.left == 0):
            raise RootnoiseError(
                "physical batches must come in their order from one iterator, got "
                f"{'the last one' if last else 'another one'} with {self.batch_sampler.left} "
                "examples of the batch to come"
            )
        loop.draw(part, last)
        collate = self.loading.get("collate_fn") or default_collate
        return collate(examples) if examples else self._nobody()


class Batches:
    """The batches of a pass as lists, which remember how much of the last one was drawn."""

    def __init__(self, loader: EngineLoader) -> None:
        self._loader = loader
        self._rest = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._loader.period

    def __iter__(self) -> Iterator[list[int]]:
        loader = self._loader
        loop, steps = loader._optimizer, loader._steps()
        loop.restart()
        for t in steps:
            if loop.t != t:
                raise RootnoiseError(
                    f"each batch must be stepped on once before the next, got step {loop.t} at "
                    f"batch {t}"
                )
            self._rest = loop.private.sampler.batch(t)
            yield self._rest.tolist()

    @property
    def left(self) -> int:
        """How many examples of the last batch were not taken."""
        return self._rest.size

    def take(self, n: int) -> Indices:
        """Return the next n examples of the batch."""
        part, self._rest = self._rest[:n], self._rest[n:]
        return part


class Hooks:
    """What `wrap_model=False` returns: the loop goes on calling its own model."""

    def cleanup(self) -> None:
        """Do nothing: the model can be used, saved and evaluated as it is."""


class BatchMemoryManager:
    """Splits batches into physical ones, as Opacus's own does, but with the loader's workers.

    Opacus's works too. In either case `optimizer.step()` changes the weights only after the last
    part of a batch, and `zero_grad()` keeps the sum until then.

    Args:
        data_loader: the loader of `PrivacyEngine.make_private`.
        max_physical_batch_size: most examples at a time.
        optimizer: that of the same call.

    Raises:
        RootnoiseError: parts of another run, or a size below 1.
    """

    def __init__(
        self, *, data_loader: EngineLoader, max_physical_batch_size: int, optimizer: EngineOptimizer
    ) -> None:
        if not isinstance(data_loader, EngineLoader) or data_loader._optimizer is not optimizer:
            raise RootnoiseError(
                "data_loader and optimizer must be those that one engine made private, got "
                f"{type(data_loader).__name__} and {type(optimizer).__name__}"
            )
        most = integer("max_physical_batch_size", max_physical_batch_size, 1)
        self._loader = data_loader.divided(Split(most=most))

    def __enter__(self) -> EngineLoader:
        return self._loader

    def __exit__(self, *_: object) -> None:
        pass
