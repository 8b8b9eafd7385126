"""Per-sample gradients of any layer, by running it again for each example.

`torch.func` runs all examples at once; where that fails (recurrent kernels) they run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from rootnoise._check import RootnoiseError
from rootnoise.training.clip.taps import Call, Tapped, is_replaced, kind_of

# Layers whose examples are not in the first dimension of every tensor.
SEQUENCES = (nn.RNNBase, nn.MultiheadAttention)
# Layers that read the parameters of their children without calling them.
WHOLE = (nn.MultiheadAttention,)


def opacus_sampler(module: nn.Module) -> Callable[..., Any] | None:
    """Return the per-sample gradient function that is registered with Opacus, if there is one."""
    if is_replaced(module):
        return None
    found: Callable[..., Any] | None = GradSampleModule.GRAD_SAMPLERS.get(kind_of(module))
    return found


class Fallback:
    """Per-sample gradients of one layer.

    Raises:
        RootnoiseError: a layer that draws random numbers (dropout), which a second run would not
            repeat.
    """

    def __init__(self) -> None:
        self.one_by_one = False

    def per_sample(
        self,
        tapped: Tapped,
        call: Call,
        inputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
    ) -> dict[str, torch.Tensor]:
        """Return the gradient of each parameter, (examples, *shape)."""
        tapped.book.paused = True
        try:
            return self._per_sample(tapped, call, inputs, gradients)
        finally:
            tapped.book.paused = False

    def _per_sample(
        self,
        tapped: Tapped,
        call: Call,
        inputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
    ) -> dict[str, torch.Tensor]:
        structure, rest, places, mine, kind, cast = call.context
        module, rows = tapped.module, tapped.book.rows
        used = [j for j, g in enumerate(gradients) if g is not None]
        kept = [gradients[j] for j in used]
        in_dims = input_dims(tapped, structure, rest, places, inputs)
        out_dims = [output_dim(module, mine[j]) for j in used]
        for dim, g in zip(out_dims, kept, strict=True):
            if g is None or g.dim() <= dim or g.shape[dim] != rows:
                got = None if g is None else tuple(g.shape)
                raise RootnoiseError(
                    f"layer {tapped.name} must give one row an example ({rows}), got shape {got}"
                )

        def loss(parameters: Any, arguments: Any, weights: Any) -> torch.Tensor:
            leaves = list(rest)
            for place, x, dim in zip(places, arguments, in_dims, strict=True):
                leaves[place] = x if dim is None else x.unsqueeze(dim)
            args, kwargs = tree_unflatten(leaves, structure)
            again = torch.autocast(kind, dtype=cast) if cast is not None else nullcontext()
            with again:
                output = torch.func.functional_call(module, parameters, args, kwargs)
            outputs = tree_flatten(output)[0]
            terms = (
                (outputs[mine[j]] * w.unsqueeze(dim)).sum()
                for j, w, dim in zip(used, weights, out_dims, strict=True)
            )
            return sum(terms, torch.zeros((), device=weights[0].device))

        parameters = {n: p.detach() for n, p in tapped.gathered().items()}
        arguments = list(inputs)
        state = torch.get_rng_state()
        if not self.one_by_one:
            dims = (None, in_dims, out_dims)
            try:
                made = torch.vmap(torch.func.grad(loss), dims)(parameters, arguments, kept)
                return dict(made)
            except (RuntimeError, NotImplementedError, ValueError) as reason:
                if isinstance(reason, RootnoiseError) or "andomness" in str(reason):
                    raise _random(tapped) from None
                self.one_by_one = True
        made = [
            _gradient(loss, parameters, *_example(i, in_dims, arguments, out_dims, kept))
            for i in range(rows)
        ]
        if not torch.equal(state, torch.get_rng_state()):
            raise _random(tapped)
        return {n: torch.stack([m[n] for m in made]) for n in parameters}


def _random(tapped: Tapped) -> RootnoiseError:
    kind = type(tapped.module).__name__
    return RootnoiseError(
        f"layer {tapped.name} must draw no random numbers, got {kind} with dropout: set its "
        "dropout to 0, or use Opacus's layer of that kind"
    )


def _gradient(
    loss: Callable[..., torch.Tensor], parameters: dict[str, torch.Tensor], x: Any, g: Any
) -> dict[str, torch.Tensor]:
    with torch.enable_grad():
        leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
        made = torch.autograd.grad(loss(leaves, x, g), list(leaves.values()), allow_unused=True)
    zero = (torch.zeros_like(p) for p in parameters.values())
    return {n: z if m is None else m for n, m, z in zip(leaves, made, zero, strict=True)}


def _example(i: int, in_dims: Any, inputs: Any, out_dims: Any, outputs: Any) -> Any:
    own = [x if d is None else x.select(d, i) for d, x in zip(in_dims, inputs, strict=True)]
    return own, [g.select(d, i) for d, g in zip(out_dims, outputs, strict=True)]


def input_dims(
    tapped: Tapped, structure: Any, rest: Any, places: Any, inputs: Any
) -> list[int | None]:
    """Return the examples' dimension in each tensor argument; None where there is none."""
    module, rows = tapped.module, tapped.book.rows
    if not isinstance(module, SEQUENCES):
        dims: list[int | None] = [0 if x.dim() and len(x) == rows else None for x in inputs]
        if not inputs or dims[0] is None:
            got = tuple(inputs[0].shape) if inputs else None
            rule = f"must take one row an example ({rows})"
            raise RootnoiseError(f"layer {tapped.name} {rule}, got shape {got}")
        return dims
    leaves = list(rest)
    for place, x in zip(places, inputs, strict=True):
        leaves[place] = x
    args, kwargs = tree_unflatten(leaves, structure)
    by_tensor: dict[int, int | None] = {}
    where = _argument_dims(module)
    for name, value in [*zip(where, args, strict=False), *kwargs.items()]:
        if isinstance(value, PackedSequence):
            rule = "must get sequences padded to one length"
            raise RootnoiseError(f"layer {tapped.name} {rule}, got a PackedSequence")
        for x in tree_flatten(value)[0]:
            if isinstance(x, torch.Tensor):
                dim = by_tensor[id(x)] = where[name]
                if dim is not None and (x.dim() <= dim or x.shape[dim] != rows):
                    rule = f"must take one row an example ({rows}) in dimension {dim} of {name}"
                    raise RootnoiseError(f"layer {tapped.name} {rule}, got {tuple(x.shape)}")
                if name == "attn_mask" and x.dim() != 2:
                    rule = "must get an attention mask that all examples share"
                    raise RootnoiseError(f"layer {tapped.name} {rule}, got {x.dim()} dimensions")
    return [by_tensor[id(x)] for x in inputs]


def _argument_dims(module: nn.Module) -> dict[str, int | None]:
    """Return the examples' dimension in each argument of a recurrent or attention layer."""
    first = 0 if module.batch_first else 1
    if isinstance(module, nn.RNNBase):
        return {"input": first, "hx": 1}
    return {
        "query": first,
        "key": first,
        "value": first,
        "key_padding_mask": 0,
        "need_weights": None,
        "attn_mask": None,
    }


def output_dim(module: nn.Module, index: int) -> int:
    """Return the examples' dimension in an output."""
    if isinstance(module, nn.RNNBase) and index:
        return 1
    if isinstance(module, SEQUENCES) and not index:
        return 0 if module.batch_first else 1
    return 0
