"""torch's recurrent layers, unrolled: gradients are those of one backward an example."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rootnoise import RootnoiseError
from rootnoise.training.clip import Flat, PrivateModule

N, STEPS, WIDTH = 4, 6, 3
KINDS: dict[str, Any] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


class Whole(nn.Module):
    """A recurrent layer whose outputs, last states and first states all count."""

    def __init__(self, layer: nn.RNNBase, starts: bool) -> None:
        super().__init__()
        self.layer, self.starts = layer, starts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        x = x if layer.batch_first else x.transpose(0, 1)
        if self.starts:
            cells = (1 + layer.bidirectional) * layer.num_layers
            rows = x.mean((1, 2) if layer.batch_first else (0, 2))
            h = rows[None, :, None].expand(cells, -1, layer.hidden_size).contiguous()
            y, last = layer(x, (h, h.cos()) if isinstance(layer, nn.LSTM) else h)
        else:
            y, last = layer(x)
        y = y if layer.batch_first else y.transpose(0, 1)
        last = torch.cat(last, 2) if isinstance(last, tuple) else last
        return torch.cat([y.flatten(1), last.transpose(0, 1).flatten(1)], 1)


def check(model: nn.Module, x: torch.Tensor) -> None:
    plain = copy.deepcopy(model).double()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(plain(y[None]).sin().sum(), parameters)]
        )
        for y in x.double()
    ]
    truth = torch.stack(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no layer is run again for each example
        ours = PrivateModule(model, "sum")
    ours(x).sin().sum().backward()
    norms = truth.norm(dim=1)
    found = ours.norms(len(x))
    assert (found >= norms * (1 - 1e-6)).all()
    torch.testing.assert_close(found, norms, rtol=1.1e-3, atol=0)
    ours.add(Flat(1e6))
    total = truth.sum(0)
    torch.testing.assert_close(
        ours.finish()[0], total, rtol=0, atol=1e-5 * float(total.abs().max())
    )


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.random.manual_seed(1)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_backward_an_example(kind: str) -> None:
    for ways, layers, first, starts, bias in itertools.product(
        (False, True), (1, 2), (False, True), (False, True), (False, True)
    ):
        layer = KINDS[kind](WIDTH, 4, layers, bias=bias, batch_first=first, bidirectional=ways)
        check(Whole(layer, starts), torch.randn(N, STEPS, WIDTH))


def test_by_gram_matrices_in_float32_whose_first_state_is_zero() -> None:
    check(Whole(nn.LSTM(60, 90, batch_first=True), False), torch.randn(N, 25, 60))


def test_a_frozen_weight_has_no_gradient() -> None:
    layer = nn.LSTM(WIDTH, 4, batch_first=True)
    layer.weight_hh_l0.requires_grad_(False)
    layer.bias_ih_l0.requires_grad_(False)
    check(Whole(layer, False), torch.randn(N, STEPS, WIDTH))


def test_outputs_that_are_changed_in_place() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(WIDTH, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)[0].mul_(2)
            return y

    check(Doubled(), torch.randn(N, STEPS, WIDTH))


def test_sequences_first_are_refused_where_examples_are_expected() -> None:
    ours = PrivateModule(nn.Sequential(nn.Linear(3, 3), First()), "sum")
    with pytest.raises(RootnoiseError, match=r"layer 1\.layer must take one row an example"):
        ours(torch.randn(N, STEPS, WIDTH)).sum().backward()


class First(nn.Module):
    """A layer over (steps, examples, width) that is given (examples, steps, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)[0]
        return y


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_weights_of_half_precision(kind: str) -> None:
    """Gradients are made in float32; each example's clipped one is at most the clip norm."""
    layer = KINDS[kind](WIDTH, 4, 2, batch_first=True, bidirectional=True)
    x = torch.randn(N, STEPS, WIDTH).bfloat16()
    plain = Whole(copy.deepcopy(layer).bfloat16().float(), False)
    truth = []
    for row in x.float():
        plain.zero_grad()
        plain(row[None]).sum().backward()
        truth.append(torch.cat([p.grad.flatten() for p in plain.parameters()]).norm())
    ours = PrivateModule(Whole(layer.bfloat16(), False), "sum")
    ours(x).sum().backward()
    found = ours.norms(N)
    torch.testing.assert_close(found, torch.stack(truth).double(), rtol=0.02, atol=0)
    ours.add(Flat(0.1))
    assert float(ours.finish()[0].norm()) <= N * 0.1


def test_weights_that_are_made_of_others_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has a newer `weight_norm`; ours: run one by one
        layer = nn.utils.weight_norm(nn.LSTM(WIDTH, 4, batch_first=True), "weight_hh_l0")
        ours = PrivateModule(Whole(layer, False), "sum")
    with pytest.raises(RootnoiseError, match=r"^parameter layer\.weight_hh_l0_g must be used by"):
        ours(torch.randn(N, STEPS, WIDTH)).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_no_example_moves_the_sum_by_more_than_the_clip_norm(kind: str, scale: float) -> None:
    """Also where the gates saturate, and where gradients are not those of float64 any more."""
    layer = KINDS[kind](WIDTH, 4, 2, batch_first=True, bidirectional=True)
    ours = PrivateModule(Whole(layer, False), "sum", guarded=True)
    x = torch.randn(N, STEPS, WIDTH)
    x[0] *= scale
    x[1], x[2] = 0, torch.nan

    def total(rows: torch.Tensor) -> torch.Tensor:
        (1e4 * ours(rows)).sum().backward()
        assert all(p.grad is None for p in layer.parameters())
        ours.norms(len(rows))
        ours.add(Flat(1e-3))
        found = ours.finish()[0]
        assert bool(found.isfinite().all())
        return found

    whole = total(x)
    for i in range(N):
        assert float(total(x[i : i + 1]).norm()) <= 1e-3
        rest = total(torch.cat([x[:i], x[i + 1 :]]))
        assert float((whole - rest).norm()) <= 1e-3 * (1 + 1e-5)  # float32 products may round anew
