"""The mean of a run's last iterates, which is released in place of the last one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise.training import whole


class Average:
    """The mean of a model's weights after each of its last steps.

    It is a function of iterates that the claim covers already, so it costs no privacy (post-
    processing: Dwork and Roth, 2014, Proposition 2.1). The mean of the last part of the iterates
    is that of Rakhlin, Shamir and Sridharan (2012).

    Args:
        model: trained; it is copied, and never written to. No layer of ours has a buffer.
        n_averaged: how many iterates, at least 1.
        n_steps: steps of the run.

    Attributes:
        model: a copy, which `at` gives the mean.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = Average(model, n_averaged=2, n_steps=3)
    >>> for t in (1, 2, 3):
    ...     _ = nn.init.constant_(model.weight, t)
    ...     average.add(model, t)
    >>> average.at(model, 3).weight.item()
    2.5
    """

    def __init__(self, model: nn.Module, n_averaged: int, n_steps: int) -> None:
        self.model = copy.deepcopy(model).eval()
        self._skipped = n_steps - n_averaged
        # float64: then the mean of float32 is rounded once. In shards, where the model is.
        self._sum: dict[str, torch.Tensor] = {}

    def add(self, model: nn.Module, t: int) -> None:
        """Take in the weights after step t, counted from 1."""
        if t > self._skipped:
            for name, w in model.state_dict().items():
                known = self._sum.get(name)
                self._sum[name] = w.double().clone() if known is None else known.add_(w)

    def at(self, model: nn.Module, t: int) -> nn.Module:
        """Return a model of the mean after step t: `model` itself before there is one."""
        if t <= self._skipped:
            return model
        self.model.load_state_dict({n: x / (t - self._skipped) for n, x in self._sum.items()})
        return self.model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sum, whole; all ranks call this."""
        return dict(whole.whole(self._sum))

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module, t: int) -> None:
        """Continue with the sum of a run that has taken t steps.

        Raises:
            RootnoiseError: it is not of this model, or not of this step.
        """
        places = model.state_dict()
        known = {name: w.shape for name, w in places.items()} if t > self._skipped else {}
        found = {n: x.shape for n, x in state.items() if x.dtype == torch.float64}
        if len(found) != len(state) or found != known:
            rule = f"saved average must have a float64 sum of each of {len(known)} weights"
            raise RootnoiseError(f"{rule}, got {len(found)} of {len(state)}")
        self._sum = {n: whole.like(x, places[n]).to(places[n].device) for n, x in state.items()}
