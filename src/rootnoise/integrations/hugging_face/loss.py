"""The loss of a transformers model as a mean of one term per example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise.integrations.per_example import example_losses


class MeanLoss:
    """The mean over examples of each one's own mean over its labels, computed from logits.

    Args:
        model: any that returns `logits`.
        shifts: whether logits are expected to predict the next label, by the class of the model.
        smoothing: label smoothing, in [0, 1).
    """

    def __init__(self, model: nn.Module, shifts: bool, smoothing: float) -> None:
        self._model, self._expected, self._smoothing = model, shifts, smoothing
        self._config = getattr(model, "config", None)
        self._shift: bool | None = None  # whether they do, once it is known

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
        """Return the loss and what the model returned.

        Raises:
            RootnoiseError: inputs without labels, a model without logits, or a loss that is not
                the model's own.
        """
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor):
            got = ", ".join(inputs)
            raise RootnoiseError(f"batch must hold labels (or give compute_loss_func), got {got}")
        if "shift_labels" in inputs:
            raise RootnoiseError("batch must hold labels and not shift_labels, got both")
        if self._shift is None:
            self._shift = self._find_shift(inputs)
        return self._made(model, inputs, self._shift, self._smoothing)

    @torch.no_grad()
    def _find_shift(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether logits predict the next label, by the model's own loss on one example.

        Raises:
            RootnoiseError: the model's own loss matches neither case.
        """
        one = {k: x[:1] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
        if one["labels"].is_floating_point():
            orders = [False]
        else:
            one["labels"] = one["labels"].clamp(min=0)  # so that all of them are predicted
            orders = [self._expected, not self._expected]
        model = self._model
        with torch.random.fork_rng():
            training = model.training
            model.eval()
            outputs = model(**one)
            own = outputs.get("loss") if isinstance(outputs, Mapping) else None
            for shift in orders[: 1 if own is None or one["labels"].dim() < 2 else 2]:
                ours = self._made(model, one, shift, 0.0)[0]
                if own is None or math.isclose(float(own), float(ours), rel_tol=1e-2, abs_tol=1e-3):
                    model.train(training)
                    return shift
        raise RootnoiseError(  # without the two numbers, which come from raw data
            "loss of one example must be the model's own (or give compute_loss_func), got another "
            f"from {type(model).__name__}"
        )

    def _made(
        self, model: nn.Module, inputs: Mapping[str, Any], shift: bool, smoothing: float
    ) -> tuple[torch.Tensor, Any]:
        """Return the mean loss and output without asking the model for its own loss."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        kind = type(self._model).__name__
        if getattr(self._config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
            prepare = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None:
                raise RootnoiseError(f"batch must hold decoder_input_ids for {kind}, got none")
            inputs["decoder_input_ids"] = prepare(labels=labels)
        outputs = model(**inputs)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, torch.Tensor):
            got = f"{type(outputs).__name__} of {kind}"
            raise RootnoiseError(f"model must return logits (or give compute_loss_func), got {got}")
        problem = getattr(self._config, "problem_type", None)
        return example_losses(logits, labels, shift, problem, smoothing).mean(), outputs
