"""What every host library must leave as it is: the noise that reaches the inner optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats

from rootnoise import Mechanism

FALSE_ALARM = 1e-7


class Recorder:
    """The noise of every step: what the inner optimizer got, less the clipped sum by autograd.

    Args:
        model: whose weights at each step and whose gradients to record, in the order of the noise.
        inner: the torch optimizer, of which every step is recorded.
        loss: of an output and its target, a mean over examples.
        clip_norm: of each example's gradient.
        batch_size: by which the sum is divided.
    """

    def __init__(
        self, model: Any, inner: Any, loss: Any, clip_norm: float, batch_size: int
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.model, self.loss, self.clip_norm, self.size = model, loss, clip_norm, batch_size
        self.batch: tuple[Any, Any] | None = None
        self.noise: list[np.ndarray] = []
        inner.register_step_pre_hook(self._record)

    def _record(self, *_: Any) -> None:
        got = torch.cat([p.grad.flatten() for p in self.parameters]) * self.size
        copy = type(self.model)(*self.model.settings)
        copy.load_state_dict(self.model.state_dict())
        assert self.batch is not None
        for x, y in zip(*self.batch, strict=True):
            grads = torch.autograd.grad(
                self.loss(copy(x[None]), y[None]), [p for p in copy.parameters() if p.requires_grad]
            )
            flat = torch.cat([g.flatten() for g in grads])
            got = got - flat * min(1.0, self.clip_norm / float(flat.norm()))
        self.noise.append(got.double().numpy())


def white(mechanism: Mechanism, noise: Any, scale: float = 1.0) -> bool:
    """Whether C times the noise (n, d) is white of standard deviation noise_std * scale.

    A false alarm has probability below 3e-7: one test of the variance, one of the correlation of
    successive steps, one of that of all pairs of steps.
    """
    z = mechanism.strategy.dense()[: len(noise)][:, : len(noise)] @ np.asarray(noise)
    z /= mechanism.noise_std * scale
    n, d = z.shape
    variance = stats.chi2.cdf((z**2).sum(), n * d)
    next_to = (z[1:] * z[:-1]).sum() / np.sqrt((n - 1) * d)
    gram = np.triu(z @ z.T, 1)
    pairs = (gram**2).sum() / d  # each square is close to chi-squared of 1; the bound is ample
    most = stats.chi2.isf(FALSE_ALARM, n * (n - 1) // 2) * (1 + 20 / np.sqrt(d))
    inside = FALSE_ALARM / 2 < variance < 1 - FALSE_ALARM / 2
    return bool(inside and abs(next_to) < stats.norm.isf(FALSE_ALARM / 2) * 1.1 and pairs < most)
