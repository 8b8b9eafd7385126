"""torch's multi-head attention as two Linear layers, its projections, and the code between them.

`nn.MultiheadAttention` never calls its projections as modules, so there is nothing to tap. Here it
calls one Linear that holds its input projection, and its own `out_proj`; what is between them,
dropout included, is left to autograd.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rootnoise._check import RootnoiseError
from rootnoise.training.clip.taps import is_replaced, kind_of


def divides(module: Any) -> bool:
    """Return whether a layer is torch's attention with no parameters other than two projections."""
    ours = getattr(vars(module).get("forward"), "func", None) is attend  # by an earlier wrapping
    return (
        kind_of(module) is nn.MultiheadAttention
        and (ours or not is_replaced(module))
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


def divide(name: str, module: Any) -> nn.Linear:
    """Make a layer call its projections, and return the input one, which shares its weights."""
    width, bias = module.embed_dim, module.in_proj_bias is not None
    project = nn.Linear(width, 3 * width, bias, device="meta")
    project.weight = module.in_proj_weight
    if bias:
        project.bias = module.in_proj_bias
    module.forward = functools.partial(attend, name, module, project)
    return project


def attend(
    name: str,
    module: Any,
    project: nn.Linear,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `nn.MultiheadAttention.forward` returns, up to float rounding.

    Dropout inside draws the same numbers. Dropout after the layer may not, because torch's layer
    returns a transposed array, with another memory order.

    Raises:
        RootnoiseError: input without a batch dimension, or `is_causal` without `attn_mask`, for
            which it is only a hint.
    """
    if not torch.is_grad_enabled():  # torch's fast path
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return nn.MultiheadAttention.forward(module, query, key, value, *options)
    project.weight = module.in_proj_weight  # FSDP2 has put the whole one there
    if module.in_proj_bias is not None:
        project.bias = module.in_proj_bias
    if query.dim() != 3:
        got = f"{query.dim()} dimensions"
        raise RootnoiseError(f"layer {name} must take a batch of sequences, got {got}")
    if is_causal and attn_mask is None:
        raise RootnoiseError(f"layer {name} must get attn_mask with is_causal, got none")
    # (examples, heads, places, width of a head)
    q, k, v = (
        x.reshape(*x.shape[:2], module.num_heads, module.head_dim).transpose(1, 2)
        for x in _projected(module, project, query, key, value)
    )
    mask = _mask(attn_mask, key_padding_mask, q)
    dropout = module.dropout if module.training else 0.0
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = functional.dropout(weights, dropout)
        out = weights @ v
    else:
        out = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = module.out_proj(out.transpose(1, 2).flatten(2))
    out = out if module.batch_first else out.transpose(0, 1)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _projected(
    module: Any, project: nn.Linear, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values, (examples, places, width).

    If the inputs differ, each is projected by the whole packed weight and the unused parts are
    dropped. Their output gradients are zero, so that the calls of this one layer add up to the
    gradient of the packed weight.
    """
    made: dict[int, tuple[torch.Tensor, ...]] = {}
    for x in (query, key, value):
        if id(x) not in made:
            made[id(x)] = project(x if module.batch_first else x.transpose(0, 1)).chunk(3, -1)
    return made[id(query)][0], made[id(key)][1], made[id(value)][2]


def _mask(
    attention: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor
) -> torch.Tensor | None:
    """Return the additive mask of the scores, (examples or 1, heads or 1, places or 1, places)."""
    parts = []
    if attention is not None:
        size = (1, 1) if attention.dim() == 2 else q.shape[:2]
        parts.append(attention.reshape(*size, *attention.shape[-2:]))
    if padding is not None:
        parts.append(padding[:, None, None])
    added = [
        torch.zeros_like(x, dtype=q.dtype).masked_fill_(x, -math.inf)
        if x.dtype == torch.bool
        else x.to(q.dtype)
        for x in parts
    ]
    return sum(added[1:], added[0]) if added else None
