"""Per-example losses, and checks that transformers models give per-example gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rootnoise._check import RootnoiseError

IGNORED = -100  # Hugging Face's label for positions that are not predicted


def example_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shift: bool = False,
    problem_type: str | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return each example's own mean loss, a function of its row alone.

    Args:
        logits: (batch, ..., classes).
        labels: (batch, ...) class numbers, -100 where nothing is to be predicted; or real numbers:
            targets of a regression or of a multi-label classification.
        shift: whether logits predict the next label, as in causal language models.
        problem_type: as in the model's config; inferred from shapes and types when None.
        smoothing: label smoothing, in [0, 1).

    >>> logits = torch.zeros(2, 3, 4)
    >>> example_losses(logits, torch.tensor([[0, 1, 2], [3, -100, -100]]))
    tensor([1.3863, 1.3863])
    """
    rows, logits = len(labels), logits.float()
    regression = problem_type == "regression" or (problem_type is None and logits.shape[-1] == 1)
    if regression and labels.numel() == logits.numel():
        off = (logits.reshape(rows, -1) - labels.reshape(rows, -1)).square()
        return off.mean(1)
    if labels.is_floating_point():
        asked = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return asked.reshape(rows, -1).mean(1)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[:-1] != labels.shape:
        raise RootnoiseError(
            f"logits must have one row a label (or give compute_loss_func), got "
            f"{tuple(logits.shape)} for labels of {tuple(labels.shape)}"
        )
    each = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=smoothing,
    ).reshape(rows, -1)
    counted = labels.reshape(rows, -1).ne(IGNORED).sum(1)
    return each.sum(1) / counted.clamp(min=1)


def check_shared(model: nn.Module) -> None:
    """Refuse a layer that also holds a parameter of a layer inside it, as BERT's head does."""
    for name, layer in model.named_modules():
        inside = {id(p) for child in layer.children() for p in child.parameters()}
        for leaf, p in layer.named_parameters(recurse=False):
            if p.requires_grad and id(p) in inside:
                whole = f"{name}.{leaf}" if name else leaf
                raise RootnoiseError(
                    f"layer {name or 'model'} ({type(layer).__name__}) must hold no parameter of a "
                    f"layer inside it, got {leaf}: freeze it by "
                    f"model.get_parameter({whole!r}).requires_grad_(False)"
                )


def check_batch(inputs: Any, rows: int) -> Any:
    """Return a batch, or refuse one without a row per example, or with padding on the left."""
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


class Rows:
    """Expands embeddings that are looked up once for the whole batch to one row per example.

    BERT, GPT-2 and others look up positions as (1, length) and add them to every example: the
    gradient would have a single row for all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rows: int | None = None
        self._main = getattr(model, "main_input_name", "input_ids")
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)
        for layer in model.modules():
            if isinstance(layer, nn.Embedding) and layer.weight.requires_grad:
                layer.register_forward_pre_hook(self._expand)

    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        main = kwargs.get(self._main, args[0] if args else None)
        self._rows = len(main) if isinstance(main, torch.Tensor) and main.dim() else None

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        self._rows = None

    def _expand(self, layer: nn.Module, args: Any) -> Any:
        ids = args[0] if args else None
        if self._rows is None or not isinstance(ids, torch.Tensor):
            return None
        if ids.dim() != 2 or len(ids) != 1 or self._rows == 1:
            return None
        return (ids.expand(self._rows, -1), *args[1:])


class Shapes:
    """The shapes of inputs and outputs of trainable layers in a forward, by layer name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.of: dict[str, list[tuple[str, torch.Size]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Shapes:
        for name, layer in self._model.named_modules():
            if any(p.requires_grad for p in layer.parameters(recurse=False)):

                def note(layer: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    tensors = [x for x in (*args[:1], output) if isinstance(x, torch.Tensor)]
                    kind = type(layer).__name__
                    self.of.setdefault(name, []).extend((kind, x.shape) for x in tensors)

                self._handles.append(layer.register_forward_hook(note))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self, rows: int) -> None:
        """Refuse a layer whose inputs or outputs do not have one row per example."""
        for name, shapes in self.of.items():
            for kind, got in shapes:
                if got[:1] != (rows,):
                    raise RootnoiseError(
                        f"layer {name or 'model'} ({kind}) must get and give one row an example, "
                        f"got {tuple(got)} for {rows} examples: freeze it by "
                        f"model.get_submodule({name!r}).requires_grad_(False)"
                    )
