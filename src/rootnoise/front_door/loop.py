"""Optimizer and loader for an unchanged loop: the loader tells the optimizer what it drew."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map

from rootnoise._check import RootnoiseError, warn
from rootnoise.front_door import saved
from rootnoise.keys import Key
from rootnoise.participation.loader import WHOLE, Split, count, data_loader
from rootnoise.participation.samplers import Indices
from rootnoise.training import PrivateOptimizer
from rootnoise.training.ranks import SAVING
from rootnoise.training.reuse import Releases

RATE_TOLERANCE = 1e-6  # schedulers round
# Settings of torch's optimizers that the noise is planned for, besides the learning rate; a
# scheduler may move the first two.
SETTINGS = ("momentum", "betas", "dampening", "nesterov", "weight_decay", "maximize")
MOVED = SETTINGS[:2]


class Drawn(NamedTuple):
    """A micro-batch that the loader gave out, and whether it is the last of its batch."""

    indices: Indices
    last: bool


class LoopOptimizer(torch.optim.Optimizer):
    """A `PrivateOptimizer` that is called like any torch optimizer: `step()`, without indices.

    The batch is the last one from the loader. If the loader gives micro-batches, `step` adds each
    to the sum of its batch, and only the last of them changes the weights; `zero_grad` between them
    keeps the sum. Parameter groups, defaults and state are those of the inner optimizer, so that
    schedulers and hosts read and write the real ones.

    Args:
        private: the optimizer that gives the privacy guarantee.
        rates: the learning rate of each step that the noise is planned for; a single one for all
            steps, or None if it does not matter.
        dataset: the training data, for `save`.
    """

    def __init__(
        self, private: PrivateOptimizer, rates: Sequence[float] = (), dataset: Any = ()
    ) -> None:
        self.private = private
        self.rates, self.dataset = rates, dataset
        self._identity: list[Any] | None = None
        self._drawn: deque[Drawn] = deque()  # micro-batches that wait for their step
        self._skipped = False
        self._held: list[Any] = []  # the rates at the first micro-batch of a batch
        self._ready = False
        groups, state = private.optimizer.param_groups, private.optimizer.state
        super().__init__(list(groups), private.optimizer.defaults)
        self.state, self._ready = state, True
        names = SETTINGS if len(rates) < 2 else [n for n in SETTINGS if n not in MOVED]
        self._settings = [{n: group[n] for n in names if n in group} for group in groups]

    # torch's constructor and hosts assign these two; they are the inner optimizer's.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the inner optimizer."""
        return self.private.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.private.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the inner optimizer."""
        return self.private.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.private.optimizer.state = state

    @property
    def t(self) -> int:
        """Steps taken."""
        return self.private.t

    @property
    def rows(self) -> int:
        """Number of examples in the micro-batch that waits for its step, 0 without one."""
        return self._drawn[0].indices.size if self._drawn else 0

    @property
    def more(self) -> bool:
        """Whether a micro-batch waits that is not the last of its batch."""
        return bool(self._drawn) and not self._drawn[0].last

    @property
    def batch_rows(self) -> int:
        """Number of examples in the batch of the next step, a secret where sampling is."""
        return int(self.private.sampler.batch(self.t).size)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last `step` only added a micro-batch: no scheduler should step then."""
        return self._skipped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, whatever `set_to_none` says: none is kept for the next step.

        Between the micro-batches of a batch, the sum of those before is kept.
        """
        self.private.zero_grad(keep_parts=self._skipped)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the next private step with the loader's batch, after `closure` if one is given.

        With a micro-batch that is not the last of its batch, only its clipped gradients are added
        to the sum.

        Raises:
            RootnoiseError: no new batch was drawn, a gradient scaler, a learning rate that changes
                between micro-batches, or what `PrivateOptimizer.step` refuses.
        """
        if hasattr(self, "grad_scale"):  # torch's GradScaler has set it
            raise RootnoiseError(
                "step must get gradients as they are (train in bfloat16 instead), got a GradScaler"
            )
        drawn = self._next()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not drawn.last:
            self.accumulate()
            return loss
        self._hold_rates()
        self._compare_plan()
        self.private.step(drawn.indices)
        self._drawn.popleft()
        self._skipped = False
        return loss

    def accumulate(self) -> None:
        """Add the gradients of a micro-batch to the sum of its batch, as `step` does by itself.

        Raises:
            RootnoiseError: no micro-batch was drawn, it is the last of its batch, or as for
                `step`.
        """
        drawn = self._next()
        if drawn.last:
            raise RootnoiseError(
                f"last micro-batch of step {self.t} must be taken by step, got accumulate"
            )
        self._hold_rates()
        self.private.accumulate(drawn.indices)
        self._drawn.popleft()
        self._skipped = True

    def _next(self) -> Drawn:
        if not self._drawn:
            raise RootnoiseError(
                "step must follow a new batch of the loader that make_private returned, got none"
            )
        return self._drawn[0]

    def draw(self, indices: Indices, last: bool = True, *, together: bool = False) -> None:
        """Note the micro-batch that the loader gives out.

        Args:
            indices: its examples.
            last: whether it is the last of its batch.
            together: the one before may still wait, if it is of the same batch.

        Raises:
            RootnoiseError: a micro-batch before it was not stepped on.
        """
        if self._drawn and (self._drawn[-1].last or not together):
            raise RootnoiseError(
                f"each batch must be stepped on once before the next, got step {self.t} and "
                f"{len(self._drawn)} drawn"
            )
        if not self._drawn:
            self.private._guard.reset()  # a forward before this was not of its examples
        self._drawn.append(Drawn(indices, last))

    def restart(self) -> None:
        """Drop what was drawn and not stepped on, and the micro-batches of a batch broken off."""
        self._drawn.clear()
        if self._skipped:
            self.private.zero_grad()
        self._skipped = False

    def pace(self, scheduler: Any) -> None:
        """Let a scheduler of this run step only with the steps of batches, not of micro-batches.

        Its `step` does nothing after a step that was skipped, as in accelerate. The class of the
        scheduler is replaced by a subclass, so that its `state_dict` stays as it is. What is not a
        scheduler, such as a function that makes one, is left alone.
        """
        if not isinstance(scheduler, LRScheduler):
            return
        kind: type[Any] = type(scheduler)

        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            return None if self._skipped else kind.step(scheduler, *args, **kwargs)

        scheduler.__class__ = type(kind.__name__, (kind,), {"step": step})

    def _hold_rates(self) -> None:
        """Refuse learning rates that change from one micro-batch of a batch to the next."""
        rates = [group.get("lr") for group in self.param_groups]
        if self._skipped and rates != self._held:
            raise RootnoiseError(
                f"learning rate must stay the same within a batch, got {rates[0]:.6g} after "
                f"{self._held[0]:.6g}: give make_private the scheduler, or step it unless "
                "optimizer.step_was_skipped"
            )
        self._held = [r.clone() if isinstance(r, torch.Tensor) else r for r in rates]

    def _compare_plan(self) -> None:
        """Warn once if rates or other settings are not those that the noise was planned for."""
        if not len(self.rates):
            return
        for group, settings in zip(self.param_groups, self._settings, strict=False):
            for name, value in settings.items():
                if group.get(name) != value:
                    self.rates = ()
                    warn(
                        f"{name} should be {value}, as planned, got {group.get(name)} at step "
                        f"{self.t}: epsilon holds, but the noise suits another optimizer and the "
                        "error is larger; set it before make_private"
                    )
                    return
        planned = self.rates[min(self.t, len(self.rates) - 1)]
        for group in self.param_groups:
            rate = float(group["lr"])
            if abs(rate - planned) > RATE_TOLERANCE * abs(planned):
                self.rates = ()
                warn(
                    f"learning rate of step {self.t} should be {planned:.6g}, as planned, got "
                    f"{rate:.6g}: epsilon holds, but the noise suits another schedule and the "
                    "error is larger; give make_private the scheduler"
                )
                return

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that `make_private(..., resume=path)` needs, atomically.

        The file holds the weights, the noise key and the batches' seed, and only its owner can read
        it: keep it as secret as the data. Release anything that depends on a step only after a save
        that contains the step. Resume from a file only once: two runs resumed from the same file
        share noise. The first call reads a `TensorDataset` whole, to recognise it on resume.

        In several processes every rank must call it; rank 0 writes the file, which any number of
        processes can resume, with shards or without.

        Raises:
            RootnoiseError: a step failed midway or its batch is not whole, the file cannot be
                written, or a rank does something else.
        """
        self.private._ranks.agree(SAVING)
        if self._identity is None:
            self._identity = saved.identity(self.dataset, self.private.stream.key)
        saved.write(Path(path), self.private, self._identity)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: two optimizers would add the same noise to two gradients."""
        raise RootnoiseError(
            "private optimizer must not be copied or pickled, got an attempt: use save and resume"
        )

    def follow(self, key: Key) -> None:
        """Switch to the noise key of a run to be resumed, before the first step.

        Raises:
            RootnoiseError: a step has been taken.
        """
        private = self.private
        if private.t:
            raise RootnoiseError(f"key must be set before the first step, got step {private.t}")
        private._stream, self._identity = private._new_stream(key), None
        private._releases = Releases(key.id, private.mechanism.fingerprint)

    # Makes torch's GradScaler pass its scale to `step`, which refuses it, instead of dividing
    # gradients that do not exist yet.
    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse to add parameters: the mechanism does not cover them."""
        if self._ready:
            rule = "parameters must all be the optimizer's before make_private"
            raise RootnoiseError(f"{rule}, got {len(list(param_group['params']))} more")
        super().add_param_group(param_group)

    def epsilon_spent(self, delta: float | None = None) -> float:
        """Return an upper bound on the privacy loss of the steps so far.

        If the strategy is Toeplitz and the sampling is by fixed cycles or (cyclic) Poisson, the
        bound is for the steps taken: C restricted to them is again such a strategy. Otherwise it is
        that of the whole run. It holds for a number of steps that was fixed in advance: a run that
        stops early because of its results costs as much as the whole run.

        Args:
            delta: failure probability; the mechanism's when None.

        Raises:
            RootnoiseError: delta outside (0, 1).
        """
        return self.private.mechanism.epsilon_spent(self.t, delta)

    def claim(self) -> str:
        """Return the guarantee of the whole run, as `PrivateOptimizer.claim` states it."""
        return self.private.claim()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs except key and weights; see `PrivateOptimizer`."""
        return self.private.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved run; see `PrivateOptimizer.load_state_dict`."""
        self.private.load_state_dict(state_dict)


class PrivateLoader:
    """The batches of the private run, one epoch per pass, collated as the data set's own.

    A pass begins at the optimizer's next step, so that a resumed run continues in the middle of an
    epoch. Each batch, or micro-batch, needs its `optimizer.step()` before the next one is drawn. A
    new pass drops the micro-batches of a batch that the last one has left unfinished.

    Attributes:
        period: steps of an epoch.
        split: divides each batch into the micro-batches that a pass gives.
    """

    def __init__(
        self,
        dataset: Any,
        optimizer: LoopOptimizer,
        period: int,
        loading: Mapping[str, Any],
        split: Split = WHOLE,
        *,
        together: bool = False,
    ) -> None:
        self.dataset, self._optimizer, self.period = dataset, optimizer, period
        self.loading, self.split, self._together = dict(loading), split, together

    def divided(self, split: Split, *, together: bool = False) -> Self:
        """Return a loader of the same batches in micro-batches.

        Args:
            split: how each batch is divided.
            together: all micro-batches of a batch may be drawn before the first is stepped on.
        """
        parts = (self.dataset, self._optimizer, self.period, self.loading)
        own = dataclasses.replace(split, rank=self.split.rank, size=self.split.size)
        return type(self)(*parts, own, together=together)

    @property
    def batch_size(self) -> int:
        """Records per batch, on average under random sampling."""
        return self._optimizer.private.sampler.batch_size

    def __len__(self) -> int:
        """Return how many batches or micro-batches a pass over the current epoch gives."""
        sampler = self._optimizer.private.sampler
        last = min(self._optimizer.t, sampler.n_steps - 1)
        start = last // self.period * self.period
        return count(sampler, start, start + self.period, self.split)

    def _steps(self) -> range:
        """Return the steps of the next pass."""
        t, n_steps = self._optimizer.t, self._optimizer.private.sampler.n_steps
        if t == n_steps:
            raise RootnoiseError(
                f"loader must not be read past the planned steps={n_steps}: give make_private more "
                "epochs"
            )
        return range(t, min(n_steps, (t // self.period + 1) * self.period))

    def __iter__(self) -> Iterator[Any]:
        loop, sampler, steps = self._optimizer, self._optimizer.private.sampler, self._steps()
        loop.restart()
        batches = iter(
            data_loader(
                self.dataset,
                sampler,
                start=steps.start,
                stop=steps.stop,
                split=self.split,
                **self.loading,
            )
        )
        for t in steps:
            parts = self.split(sampler.batch(t))
            for i in range(len(parts)):
                indices, batch = next(batches)
                if loop.t != t:
                    raise RootnoiseError(
                        f"each batch must be stepped on once before the next, got step {loop.t} "
                        f"at batch {t}: call step of the optimizer that make_private returned"
                    )
                loop.draw(indices.numpy(), i == len(parts) - 1, together=self._together and i > 0)
                yield self._nobody() if batch is None else batch

    def _nobody(self) -> Any:
        """Return a batch without rows, shaped like the others, for a step that drew no record."""
        collate = self.loading.get("collate_fn") or torch.utils.data.default_collate
        one = collate([self.dataset[0]])
        return tree_map(lambda x: x[:0] if isinstance(x, torch.Tensor) else x, one)
