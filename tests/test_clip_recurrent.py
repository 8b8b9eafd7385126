"""torch's recurrent layers, unrolled: gradients are those of one backward an example."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from rootnoise import RootnoiseError
from rootnoise.training.clip import Flat, PrivateModule, cells
from rootnoise.training.clip.recurrent import unrolls

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
            h = rows[None, :, None] * torch.arange(1, cells + 1)[:, None, None].to(x.dtype)
            h = h.expand(-1, -1, layer.hidden_size).contiguous()
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
    wide = x.double().requires_grad_()
    (below,) = torch.autograd.grad(plain(wide).sin().sum(), wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no layer is run again for each example
        ours = PrivateModule(model, "sum")
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(ours(x).sin().sum(), x)
    most = 1e-5 * float(below.abs().max())
    torch.testing.assert_close(found, below.to(x.dtype), rtol=0, atol=most)
    norms = truth.norm(dim=1)
    found = ours.norms(len(x))
    assert (found >= norms * (1 - 1e-6)).all()
    torch.testing.assert_close(found, norms, rtol=1.1e-3, atol=0)
    ours.add(Flat(1e6))
    for part in (x[:1], x[1:]):  # and once more, in micro-batches
        ours(part).sin().sum().backward()
        ours.norms(len(part))
        ours.add(Flat(1e6))
    total = 2 * truth.sum(0)
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


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    n=st.integers(2, 4),
    steps=st.integers(1, 5),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    layers=st.integers(1, 3),
    options=st.tuples(*[st.booleans()] * 4),
    frozen=st.sets(st.integers(0, 7)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_any_trainable_parameters(
    kind: str,
    n: int,
    steps: int,
    widths: tuple[int, int],
    layers: int,
    options: tuple[bool, ...],
    frozen: set[int],
    seed: int,
) -> None:
    bias, first, ways, starts = options
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        layer = KINDS[kind](*widths, layers, bias=bias, batch_first=first, bidirectional=ways)
        parameters = list(layer.parameters())
        for i in frozen - {0}:  # one at least is trained
            if i < len(parameters):
                parameters[i].requires_grad_(False)
        check(Whole(layer, starts), torch.randn(n, steps, widths[0]))


@pytest.mark.parametrize("steps", [6, 25])  # in float64, and in float32
@pytest.mark.parametrize("kind", KINDS)
def test_by_gram_matrices_in_which_the_first_state_is_zero(kind: str, steps: int) -> None:
    check(Whole(KINDS[kind](60, 90, batch_first=True), False), torch.randn(N, steps, 60))


@pytest.mark.parametrize("steps", [6, 25])
def test_by_gram_matrices_of_some_parameters(steps: int) -> None:
    layer = nn.LSTM(60, 90, 2, batch_first=True, bidirectional=True)
    layer.weight_ih_l0.requires_grad_(False)
    layer.bias_hh_l0.requires_grad_(False)
    layer.weight_hh_l1_reverse.requires_grad_(False)
    check(Whole(layer, True), torch.randn(3, steps, 60))


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_float32_where_torch_has_no_onednn(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "ONEDNN", False)
    check(Whole(KINDS[kind](WIDTH, 4, 2, batch_first=True), True), torch.randn(N, STEPS, WIDTH))


def test_a_frozen_weight_has_no_gradient() -> None:
    layer = nn.LSTM(WIDTH, 4, batch_first=True)
    layer.weight_hh_l0.requires_grad_(False)
    layer.bias_ih_l0.requires_grad_(False)
    check(Whole(layer, False), torch.randn(N, STEPS, WIDTH))


@pytest.mark.parametrize("width", [4, 90])
def test_a_layer_that_is_called_twice(width: int) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(width, width, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(self.layer(x)[0])[0]
            return y

    check(Twice(), torch.randn(N, STEPS, width))


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = (nn.LSTM(60, 60, batch_first=True) for _ in range(2))
            self.last.weight_hh_l0 = self.first.weight_hh_l0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.first(x)[0])[0]
            return y

    check(Tied(), torch.randn(N, STEPS, 60))


def test_checkpoints_and_what_is_below() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.layer = nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, 4, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: Any = checkpoint(self.layer, self.below(x), use_reentrant=False)
            y: torch.Tensor = made[0]
            return y

    check(Checked(), torch.randn(N, STEPS, WIDTH))


def test_outside_of_its_steps_the_layer_is_torchs_own() -> None:
    layer = nn.LSTM(WIDTH, 4, batch_first=True)
    x, plain = torch.randn(N, STEPS, WIDTH), copy.deepcopy(layer)
    ours = PrivateModule(Whole(layer, False), "sum")
    whole = Whole(plain, False)
    torch.testing.assert_close(ours(x), whole(x), rtol=0, atol=0)
    ours.zero_grad()
    with torch.no_grad():
        assert torch.equal(ours(x), whole(x))
    copied = copy.deepcopy(layer)
    torch.nn.init.zeros_(layer.weight_ih_l0)
    assert torch.equal(copied(x)[0], plain(x)[0])
    copied(x)[0].sum().backward()
    assert copied.weight_ih_l0.grad is not None


def test_gradients_of_inputs_of_a_dropped_forward() -> None:
    layer = nn.LSTM(WIDTH, 4, 2, batch_first=True)
    plain = copy.deepcopy(layer)
    ours = PrivateModule(Whole(layer, False), "sum", guarded=True)
    x, other = (torch.randn(N, STEPS, WIDTH, requires_grad=True) for _ in range(2))
    dropped = ours(x)
    ours(other).sum().backward()
    dropped.sum().backward()
    assert x.grad is not None
    kept, *_ = torch.autograd.grad(Whole(plain, False)(x).sum(), [x])
    torch.testing.assert_close(x.grad, kept, rtol=1e-4, atol=1e-6)
    rows = torch.stack([_flat_gradient(Whole(plain, False), row[None]) for row in other.detach()])
    torch.testing.assert_close(ours.norms(N), rows.norm(dim=1).double(), rtol=1e-3, atol=0)


def _flat_gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    made = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    return torch.cat([g.flatten() for g in made])


class Own(nn.LSTM):
    """A layer whose forward may be another."""


def test_which_layers_are_unrolled() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of dropout in one layer, which has no effect
        assert unrolls(nn.LSTM(3, 4, dropout=0.5))
    assert unrolls(nn.GRU(3, 4, 2))
    assert not unrolls(nn.GRU(3, 4, 2, dropout=0.5))
    assert not unrolls(nn.LSTM(3, 4, proj_size=2))
    assert not unrolls(Own(3, 4))
    assert not unrolls(nn.LSTMCell(3, 4))


def test_a_second_backward_is_refused() -> None:
    ours = PrivateModule(Whole(nn.LSTM(WIDTH, 4, batch_first=True), False), "sum")
    loss = ours(torch.randn(N, STEPS, WIDTH)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RootnoiseError, match=r"^backward must run once a micro-batch, got"):
        loss.backward()


def test_a_sequence_without_a_batch_is_refused() -> None:
    ours = PrivateModule(nn.GRU(WIDTH, 4, batch_first=True), "sum")
    with pytest.raises(
        RootnoiseError, match=r"^layer model must take a batch of sequences, got 2 dimensions$"
    ):
        ours(torch.randn(N, WIDTH))


@pytest.mark.parametrize("kind", KINDS)
def test_models_in_float64(kind: str) -> None:
    layer = KINDS[kind](WIDTH, 4, 2, batch_first=True).double()
    x = torch.randn(N, STEPS, WIDTH, dtype=torch.float64)
    check(Whole(copy.deepcopy(layer), True), x)
    ours = PrivateModule(Whole(layer, True), "sum")
    ours(x).sum().backward()
    assert {made.dtype for made in ours.left} == {torch.float64}


def test_an_empty_batch() -> None:
    """As a rank may have; the layer's own forward takes it, and so does ours."""
    layer = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), Whole(nn.LSTM(WIDTH, 4, batch_first=True), False)
    )
    ours = PrivateModule(layer, "sum", guarded=True)
    ours(torch.randn(0, STEPS, WIDTH)).sum().backward()
    ours.norms(0)
    ours.add(Flat(1.0))
    assert not ours.finish()[0].any()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_last_states_alone(kind: str, layers: int) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = KINDS[kind](WIDTH, 4, layers, batch_first=True, bidirectional=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            last = self.layer(x)[1]
            y: torch.Tensor = last[1] if isinstance(last, tuple) else last
            return y.transpose(0, 1)

    check(Last(), torch.randn(N, STEPS, WIDTH))


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
    assert {made.dtype for made in ours.left} == {torch.float32}
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


@pytest.mark.parametrize("width", [4, 90])
def test_gradients_in_other_rows_are_refused(width: int) -> None:
    """Kept as gradients of examples or, of wide layers, as taps."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(60, width, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)[0].flip(0)
            return y

    ours = PrivateModule(Turned(), "sum")
    with pytest.raises(RootnoiseError, match=r"^layer layer must keep the examples apart, each in"):
        ours(torch.randn(N, STEPS, 60)).sum().backward()
