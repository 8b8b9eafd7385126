"""Optimizer and loader for an unchanged loop: the loader tells the optimizer what it drew."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from rootnoise._check import RootnoiseError
from rootnoise.batches.loader import data_loader
from rootnoise.batches.samplers import Indices
from rootnoise.front_door import saved
from rootnoise.keys import Key
from rootnoise.training import PrivateOptimizer
from rootnoise.training.reuse import Releases

RATE_TOLERANCE = 1e-6  # schedulers round


class LoopOptimizer(torch.optim.Optimizer):
    """A `PrivateOptimizer` that is called like any torch optimizer: `step()`, without indices.

    The batch is the last one from the loader. Parameter groups, defaults and state are those of the
    inner optimizer, so that schedulers and hosts read and write the real ones.

    Args:
        private: the optimizer that gives the privacy guarantee.
        rates: the learning rate of each step that the noise is planned for; a single one for all
            steps, or None if it does not matter.
    """

    def __init__(self, private: PrivateOptimizer, rates: Sequence[float] = ()) -> None:
        self.private = private
        self.rates = rates
        self._indices: Indices | None = None
        self._ready = False
        groups, state = private.optimizer.param_groups, private.optimizer.state
        super().__init__(list(groups), private.optimizer.defaults)
        self.state, self._ready = state, True

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
        """Number of examples in the last batch if it still waits for its step, else 0."""
        return 0 if self._indices is None else self._indices.size

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, whatever `set_to_none` says: none is kept for the next step."""
        self.private.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the next private step with the loader's batch, after `closure` if one is given.

        Raises:
            RootnoiseError: no new batch was drawn, a gradient scaler, or what
                `PrivateOptimizer.step` refuses.
        """
        if hasattr(self, "grad_scale"):  # torch's GradScaler has set it
            raise RootnoiseError(
                "step must get gradients as they are (train in bfloat16 instead), got a GradScaler"
            )
        if self._indices is None:
            raise RootnoiseError(
                "step must follow a new batch of the loader that make_private returned, got none"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._compare_rates()
        self.private.step(self._indices)
        self._indices = None
        return loss

    def _compare_rates(self) -> None:
        """Warn once if the learning rates are not those that the noise was planned for."""
        if not len(self.rates):
            return
        planned = self.rates[min(self.t, len(self.rates) - 1)]
        for group in self.param_groups:
            rate = float(group["lr"])
            if abs(rate - planned) > RATE_TOLERANCE * abs(planned):
                self.rates = ()
                warnings.warn(
                    f"learning rate of step {self.t} should be {planned:.6g}, as planned, got "
                    f"{rate:.6g}: epsilon holds, but the noise suits another schedule and the "
                    "error is larger; give make_private the scheduler",
                    stacklevel=3,
                )
                return

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that `make_private(..., resume=path)` needs, atomically.

        The file holds the weights, the noise key and the batches' seed, and only its owner can read
        it: keep it as secret as the data. Release anything that depends on a step only after a save
        that contains the step. Resume from a file only once: two runs resumed from the same file
        share noise.

        Raises:
            RootnoiseError: a step failed midway, or the file cannot be written.
        """
        saved.write(Path(path), self.private)

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
        private._stream = private._new_stream(key)
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
    epoch. Each batch needs its `optimizer.step()` before the next one is drawn.
    """

    def __init__(
        self, dataset: Any, optimizer: LoopOptimizer, period: int, loading: Mapping[str, Any]
    ) -> None:
        self.dataset, self._optimizer, self.period = dataset, optimizer, period
        self.loading = dict(loading)

    @property
    def batch_size(self) -> int:
        """Records per batch, on average under random sampling."""
        return self._optimizer.private.sampler.batch_size

    def __len__(self) -> int:
        return self.period

    def __iter__(self) -> Iterator[Any]:
        loop, private = self._optimizer, self._optimizer.private
        sampler = private.sampler
        t = private.t
        if t == sampler.n_steps:
            raise RootnoiseError(
                f"loader must not be read past the planned steps={sampler.n_steps}: give "
                "make_private more epochs"
            )
        end = min(sampler.n_steps, (t // self.period + 1) * self.period)
        batches = data_loader(self.dataset, sampler, start=t, stop=end, **self.loading)
        for indices, batch in batches:
            if private.t != t:
                raise RootnoiseError(
                    f"each batch must be stepped on once before the next, got step {private.t} "
                    f"at batch {t}"
                )
            loop._indices = indices.numpy()
            yield self._nobody() if batch is None else batch
            t += 1

    def _nobody(self) -> Any:
        """Return a batch without rows, shaped like the others, for a step that drew no record."""
        collate = self.loading.get("collate_fn") or torch.utils.data.default_collate
        one = collate([self.dataset[0]])
        return tree_map(lambda x: x[:0] if isinstance(x, torch.Tensor) else x, one)
