"""Layers outside the table: examples at once or one by one, the gradients are those of autograd."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from torch import nn

from rootnoise import RootnoiseError
from rootnoise.training.clip import Flat, PrivateModule
from rootnoise.training.clip.rules import Automatic, PerLayer


class Branching(nn.Module):
    """A layer that looks at each example, which `torch.vmap` refuses."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.low = nn.Parameter(torch.randn(3, generator=generator))
        self.high = nn.Parameter(torch.randn(3, generator=generator))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([y * self.high if y.sum() > 0 else (y * self.low).sin() for y in x])


class Attention(nn.Module):
    """Attention outside the table, over examples in the first dimension."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.layer = nn.MultiheadAttention(6, 2, batch_first=first, add_bias_kv=True)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = x if self.first else x.transpose(0, 1)
        out: torch.Tensor = self.layer(x, x, x, key_padding_mask=padding)[0]
        return out if self.first else out.transpose(0, 1)


def check(model: nn.Module, *inputs: torch.Tensor) -> None:
    """Compare norms and clipped sum with one backward pass an example."""
    plain, n = copy.deepcopy(model), len(inputs[0])
    parameters = list(plain.parameters())
    rows = [
        torch.autograd.grad(y.sin().sum(), parameters, retain_graph=True, materialize_grads=True)
        for y in plain(*inputs)
    ]
    truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    norms = truth.norm(dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that says that the layer is outside the table
        ours = PrivateModule(model, "sum")
        ours(*inputs).sin().sum().backward()
        torch.testing.assert_close(ours.norms(n), norms, rtol=1e-3, atol=0)
        clip = float(norms.median())
        ours.add(Flat(clip))
        expected = ((clip / norms).clamp(max=1)[:, None] * truth).sum(0)
        assert (ours.finish()[0] - expected).norm() <= 1e-3 * expected.norm()


def doubled(layer: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """Return twice what a layer's class returns, as a library's hook would change it."""
    out = type(layer).forward(layer, *args)
    whole: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return 2.0 * whole


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Embedding", "LayerNorm", "Bilinear"])
def test_a_layer_whose_forward_was_replaced_is_run_again(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 4, 6, generator=generator)
    layer: nn.Module = {
        "Linear": lambda: nn.Linear(6, 3),
        "Conv1d": lambda: nn.Conv1d(4, 3, 2),
        "Embedding": lambda: nn.Embedding(7, 3),
        "LayerNorm": lambda: nn.LayerNorm(6),
        "Bilinear": lambda: nn.Bilinear(6, 6, 2),
    }[kind]()
    layer.forward = types.MethodType(doubled, layer)
    inputs = (x, x.flip(0)) if kind == "Bilinear" else (x,)
    if kind == "Embedding":
        inputs = (torch.randint(7, (5, 4), generator=generator),)
    check(layer, *inputs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.MultiheadAttention])
def test_a_replaced_forward_of_a_sequence_is_never_replaced_again(kind: type[nn.Module]) -> None:
    layer = kind(6, 2, batch_first=True)
    layer.forward = types.MethodType(doubled, layer)
    x = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(2))
    inputs = (x,) if kind is nn.LSTM else (x, x, x)
    check(layer, *inputs)


def test_a_layer_that_cannot_run_all_examples_at_once() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    assert 0 < (x.sum(1) > 0).sum() < 6
    check(Branching(), x)


@pytest.mark.parametrize("first", [True, False])
def test_padding_is_that_of_the_example(first: bool) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        model, x = Attention(first), torch.randn(3, 5, 6)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]).bool()
    check(model, x, padding)


def test_small_groups_are_not_enlarged() -> None:
    squares = torch.tensor([[0.01, 4.0], [0.04, 0.01]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0.5**1.5], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(PerLayer(1.0).factors(squares), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("inf")])
def test_every_rule_checks_its_clip_norm(clip_norm: float) -> None:
    for rule in (Flat, PerLayer, Automatic):
        with pytest.raises(RootnoiseError, match=r"^clip_norm must be .* got "):
            rule(clip_norm)
    with pytest.raises(RootnoiseError, match=r"^gamma must be "):
        Automatic(1.0, gamma=0.0)
