"""torch's attention, divided into its projections: the same outputs, gradients an example."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from rootnoise import RootnoiseError
from rootnoise.training.clip import Flat, PrivateModule
from rootnoise.training.clip.attention import divide, divides

CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True], [False] * 5])
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "bool": {"attn_mask": CAUSAL < 0},
    "each its own": {
        "attn_mask": torch.stack([CAUSAL * i for i in (0, 1, 1, 0, 1, 0)]).nan_to_num(0)
    },
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
def test_outputs_are_those_of_torch(
    masks: str, first: bool, dropout: float, weights: dict[str, Any]
) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(1)
        theirs = nn.MultiheadAttention(6, 2, dropout, bias=first, batch_first=first)
        ours, shape = copy.deepcopy(theirs), (3, 5, 6) if first else (5, 3, 6)
        divide("layer", ours)
        for inputs in ([torch.randn(shape)] * 3, [torch.randn(shape) for _ in range(3)]):
            torch.random.manual_seed(2)
            expected = theirs(*inputs, **MASKS[masks], **weights)
            torch.random.manual_seed(2)
            found = ours(*inputs, **MASKS[masks], **weights)
            torch.testing.assert_close(found, expected)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(*inputs)[0], theirs.eval()(*inputs)[0])


@pytest.mark.parametrize("decoder", [False, True])
def test_transformers_with_dropout_have_the_gradients_of_torch(decoder: bool) -> None:
    """One forward, one backward an example through it: dropout is drawn once."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("error")  # no layer outside the table
        torch.random.manual_seed(3)
        kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        model = kind(8, 2, 12, batch_first=True)
        plain, inputs = copy.deepcopy(model), [torch.randn(4, 5, 8)]
        if decoder:
            inputs.append(torch.randn(4, 3, 8))
        ours = PrivateModule(model, "sum")
        for layer in plain.modules():  # dropout draws in the order of memory, which differs
            if isinstance(layer, nn.MultiheadAttention):
                divide("plain", layer)
        torch.random.manual_seed(4)
        out = plain(*inputs)
        parameters = list(plain.parameters())
        rows = [torch.autograd.grad(y.sin().sum(), parameters, retain_graph=True) for y in out]
        truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
        torch.random.manual_seed(4)
        ours(*inputs).sin().sum().backward()
        norms = truth.norm(dim=1)
        torch.testing.assert_close(ours.norms(4), norms, rtol=1e-3, atol=0)
        clip = float(norms.median())
        ours.add(Flat(clip))
        expected = ((clip / norms).clamp(max=1)[:, None] * truth).sum(0)
        assert (ours.finish()[0] - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_half_frozen_attention(frozen: str) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        model, x = nn.MultiheadAttention(6, 2, batch_first=True), torch.randn(1, 4, 6)
    model.get_parameter(frozen).requires_grad_(False)
    plain = copy.deepcopy(model)
    plain(x, x, x)[0].square().sum().backward()
    truth = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    ours = PrivateModule(model)
    ours(x, x, x)[0].square().sum().backward()
    assert float(ours.norms(1)) == pytest.approx(float(truth.norm()), rel=1e-3)
    ours.add(Flat(1e9))
    torch.testing.assert_close(ours.finish()[0].float(), truth, rtol=1e-4, atol=1e-5)


def test_layers_with_more_than_two_projections_are_left_as_they_are() -> None:
    options: list[dict[str, Any]] = [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 4}]
    assert [divides(nn.MultiheadAttention(6, 2, **o)) for o in options] == [False] * 3


def test_what_is_refused() -> None:
    ours = PrivateModule(nn.MultiheadAttention(6, 2, batch_first=True))
    x = torch.ones(2, 3, 6)
    with pytest.raises(RootnoiseError, match="layer model must take a batch of sequences, got 2"):
        ours(x[0], x[0], x[0])
    with pytest.raises(RootnoiseError, match="layer model must get attn_mask with is_causal"):
        ours(x, x, x, is_causal=True)
