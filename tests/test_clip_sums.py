"""Where sums and arrays lie decides memory alone: sums in parts, and arrays that are made twice."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise.training.clip import Flat, PrivateModule, bounds, products
from rootnoise.training.clip.bounds import ROWS, WAITING, Sum, add_outer_
from rootnoise.training.clip.layers import row_of
from rootnoise.training.clip.products import Products
from rootnoise.training.clip.sums import Sums
from rootnoise.training.clipping import Clip


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int, *layers: tuple[type[nn.Module], tuple[int, ...]]) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return nn.Sequential(*(kind(*sizes) for kind, sizes in layers))


def perceptron(dtype: torch.dtype) -> nn.Sequential:
    wide, last = (nn.Linear, (70, 100)), (nn.Linear, (100, 3))
    return seeded(0, wide, (nn.Tanh, ()), (nn.LayerNorm, (100,)), last).to(dtype)


def added(module: PrivateModule, x: torch.Tensor) -> torch.Tensor:
    """Add one micro-batch, and return its norms."""
    out = module(x)
    out.square().flatten(1).sum(1).mean().backward()
    norms = module.norms(len(x))
    module.add(Flat(1.0))
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(4,), (4, 1, 3), (60,), (30, 30), (4, 60, 4)])
@pytest.mark.parametrize("size", [1, 333, 10**6])
def test_a_sum_in_parts_is_the_whole_one(
    dtype: torch.dtype, sizes: tuple[int, ...], size: int
) -> None:
    """Products that wait, those that are too large to, and what is added beside them."""
    module, x = PrivateModule(perceptron(dtype), "mean"), drawn(1, sum(sizes), 70).to(dtype)
    for _ in range(2):  # the second in the memory of the first
        found = []
        for way in ("whole", "parts"):
            for part in x.split(sizes):
                added(module, part)
            if way == "whole":
                found.append(module.finish()[0].clone())
                continue
            parts, bad = module.finish_in_parts(size)
            assert bad == 0
            kept = [part.clone() for part in parts]
            assert all(len(part) <= max(size, 100) for part in kept)
            found.append(torch.cat(kept))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-13)
        assert float(found[0].norm()) > 0.5


def test_the_sum_in_parts_of_no_examples_is_zero() -> None:
    module = PrivateModule(perceptron(torch.float32))
    module.norms(0)
    module.add(Flat(1.0))
    assert not torch.cat(list(module.finish_in_parts(50)[0])).any()


def test_a_sum_in_parts_is_refused_before_it_is_whole() -> None:
    module = PrivateModule(perceptron(torch.float32))
    module(drawn(1, 2, 70)).sum().backward()
    with pytest.raises(RootnoiseError, match="micro-batch must be added before the step is fin"):
        module.finish_in_parts(50)


def test_parts_of_a_sum_that_nobody_reads_are_in_no_later_one() -> None:
    module, x = PrivateModule(perceptron(torch.float32)), drawn(1, 2, 70)
    added(module, x)
    module.finish_in_parts(50)
    module.norms(0)
    module.add(Flat(1.0))
    assert not module.finish()[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_are_overwritten_after_their_pass_change_no_sum(dtype: torch.dtype) -> None:
    """Their products may still wait, and nothing has measured what is written then."""
    module, x = PrivateModule(perceptron(dtype)), drawn(2, 4, 70).to(dtype)
    added(module, x)
    expected = module.finish()[0].clone()
    added(module, x)
    x.fill_(1e6)
    torch.testing.assert_close(
        torch.cat([p.clone() for p in module.finish_in_parts(500)[0]]), expected
    )


def test_no_waiting_product_has_more_terms_than_the_theorem_of_sums_allows() -> None:
    d, tokens = 400, 30
    waits = Sum(torch.empty(d * d, dtype=torch.float64), waits=True)
    never = Sum(torch.empty(d * d, dtype=torch.float64))
    for i in range(9):  # with the seventh, factors would be larger than the vector
        a, g = drawn(i, tokens, 1, 1, d), drawn(20 + i, tokens, 1, 1, d)
        scale = torch.full((tokens,), 0.5, dtype=torch.float64)
        for total in (waits, never):
            add_outer_(total, a, g, scale)
        terms = sum(left.shape[1] for left, _ in waits.waiting)
        assert terms <= min(ROWS, d / 2)
        assert not never.waiting
    assert waits.waiting
    found = torch.cat([part.clone() for part in waits.parts(4 * d)])
    torch.testing.assert_close(found, never.whole(), rtol=0, atol=1e-10)


def test_a_product_of_many_terms_does_not_wait() -> None:
    total = Sum(torch.empty(10**4, dtype=torch.float64), waits=True)
    for terms, waits in [(WAITING, True), (WAITING + 1, False)]:
        assert total.wait(torch.ones(100, terms), torch.ones(terms, 100)) is waits


def test_products_wait_up_to_the_most_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "ROWS", 8)
    total = Sum(torch.empty(10**4, dtype=torch.float64), waits=True)
    left, right = torch.ones(100, 3).double(), torch.ones(3, 100).double()
    assert [total.wait(left, right) for _ in range(3)] == [True, True, False]
    assert total.whole().unique().tolist() == [6.0]


def test_parts_of_another_length_are_refused() -> None:
    clip, noise = Clip.fit(1.0, 4), torch.zeros(5)
    with pytest.raises(RootnoiseError, match="parts of a sum must make up 5 numbers, got 4"):
        clip.mean_(noise, iter([torch.zeros(4).double()]), noise, 2)


def test_a_vector_is_used_again() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    sums = Sums(weights)
    place = sums.of(weights[0]).vector.data_ptr()
    assert [len(part) for part in sums.parts(2)] == [2, 2, 1]
    assert sums.of(weights[0]).vector.data_ptr() == place


# ------------------------------------------------------------------------------ arrays made twice


class Calls(nn.Module):
    """One layer, called once for each of some numbers of tokens."""

    def __init__(self, *tokens: int) -> None:
        super().__init__()
        self.layer, self.tokens = seeded(3, (nn.Linear, (60, 60))), tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.layer(part) for part in x.split(self.tokens, 1)], 1)


def convolution() -> nn.Sequential:
    return seeded(4, (nn.Conv2d, (30, 30, 3, 1, 1)))  # 8,100 numbers, of 25 tokens of 300


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "tokens", [(24,), (24, 24, 25), (35, 24, 24), (5, 26), ()], ids=str
)  # none: a convolution
def test_arrays_that_are_made_twice_have_the_bits_of_those_held(
    monkeypatch: pytest.MonkeyPatch, rows: int, tokens: tuple[int, ...]
) -> None:
    """Or one record more, by which they become too many, would change all others'."""
    conv = not tokens
    x = drawn(5, rows, 30, 5, 5) if conv else drawn(5, rows, sum(tokens), 60)
    found = []
    for held in (0, 10**9):
        monkeypatch.setattr(products, "HELD", held)
        module = PrivateModule(convolution() if conv else Calls(*tokens), "mean")
        module(x).square().flatten(1).sum(1).mean().backward()
        assert bool(module._single) is (held == 0 and len(tokens) < 2)
        norms = module.norms(rows)
        made = sum(x.numel() for x in module._grads.values())
        assert made == (0 if held == 0 and len(tokens) < 2 else rows * (8130 if conv else 3660))
        module.add(Flat(1.0))
        found.append((norms, module.finish()[0]))
    (norms, total), (expected, other) = found
    assert torch.equal(norms, expected)
    torch.testing.assert_close(total, other, rtol=0, atol=1e-12 * rows)


def test_left_overs_of_a_backward_are_watched_where_arrays_are_made_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "HELD", 0)
    module = PrivateModule(Calls(24))
    module(drawn(5, 3, 24, 60)).sum().backward()
    assert [t.shape for t in module.left] == [(3, 24, 60)] * 2
    module.zero_grad()
    assert not module.left


def test_non_finite_arrays_that_are_made_twice_touch_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "HELD", 0)
    module, x, sums = PrivateModule(Calls(24)), drawn(5, 3, 24, 60), []
    for value in (0.0, math.nan):
        (module(x) * torch.tensor([1.0, value, 1.0])[:, None, None]).sum().backward()
        module.norms(3)
        module.add(Flat(1.0))
        sums.append(module.finish())
    assert [bad for _, bad in sums] == [0, 1]
    torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-9, atol=1e-12)


def test_arrays_no_larger_than_taps_are_always_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "HELD", 0)
    module = PrivateModule(Calls(30))
    module(drawn(5, 3, 30, 60)).sum().backward()
    assert not module._single
    assert module._grads


@pytest.mark.parametrize("layer", [nn.Linear(300, 200), nn.Conv2d(8, 32, 5, padding=2)])
def test_arrays_are_made_twice_in_the_blocks_of_those_held(layer: nn.Module) -> None:
    row = row_of(layer, ["weight", "bias"])
    assert isinstance(row, Products)
    shape = (8, 30, 30) if isinstance(layer, nn.Conv2d) else (30, 300)
    x = torch.randn(150, *shape)
    g = torch.randn_like(layer(x))
    blocks = list(row.blocks(({"input": x}, g)))
    assert 1 < len(blocks) < 150
    for part in blocks:  # one alone makes the same call
        size = part.stop - part.start
        assert list(row.blocks(({"input": x[part]}, g[part]))) == [slice(0, size)]
    assert [p.start for p in blocks[1:]] == [p.stop for p in blocks[:-1]]


# ----------------------------------------------------------------------- memory that is used again


@pytest.mark.parametrize("tokens", [(24,), (24, 24, 25), ()], ids=str)
@pytest.mark.parametrize("held", [0, 10**9])
def test_memory_of_arrays_is_used_again_and_no_number_in_it(
    monkeypatch: pytest.MonkeyPatch, tokens: tuple[int, ...], held: int
) -> None:
    """Of one module, micro-batches of other sizes have the bits of a module of their own."""
    monkeypatch.setattr(products, "HELD", held)

    def made() -> PrivateModule:
        return PrivateModule(Calls(*tokens) if tokens else convolution(), "mean")

    module = made()
    for rows in (7, 40, 1, 12, 40):
        x = drawn(rows, rows, *((sum(tokens), 60) if tokens else (30, 5, 5)))
        (norms, total), (expected, other) = (
            (added(m, x), m.finish()[0].clone()) for m in (module, made())
        )
        assert torch.equal(norms, expected)
        assert torch.equal(total, other)
    spaces = list(module._spaces())
    assert [s._used for s in spaces] == [False]
    assert all(s._memory is not None for s in spaces)


def test_what_is_still_read_is_not_written_over() -> None:
    module, x = PrivateModule(Calls(24), "sum"), drawn(5, 3, 24, 60)
    module(x).sum().backward()
    (held,) = (rows for p, rows in module._grads.items() if p.dim() == 2)
    (space,) = module._spaces()
    assert space._used
    other = space.take(held.shape, held.dtype, held.device)
    assert held.data_ptr() != other.data_ptr()
    module.zero_grad()
    assert space.take(held.shape, held.dtype, held.device).data_ptr() == held.data_ptr()


def test_examples_gradients_are_neither_evaluated_nor_copied_nor_stored() -> None:
    module = PrivateModule(Calls(24))
    added(module, drawn(5, 3, 24, 60))
    (space,) = module._spaces()
    assert space._memory is not None
    for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):  # noqa: S301
        assert other._memory is None
        assert other.take([2], torch.float32, torch.device("cpu")).shape == (2,)
    assert module.train() is module
    assert space._memory is not None
    module.eval()
    assert space._memory is None
    added(module.train(), drawn(5, 3, 24, 60))
    assert space._memory is not None
    assert space.take([2], torch.float64, torch.device("cpu")).dtype == torch.float64


# --------------------------------------------------------------------- what comes after the norms


class Twice(nn.Module):
    """One layer called twice, in graphs that do not meet."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (self.layer(part) for part in x.split([24, 60], 1))
        return tuple(y[0] if isinstance(y, tuple) else y for y in (first, second))


@pytest.mark.filterwarnings("ignore:layer .* is not in the table", "ignore:There is a performance")
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 6), nn.LayerNorm(6), nn.LSTM(6, 4, batch_first=True), nn.Bilinear(6, 6, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_backward_that_goes_on_after_the_norms_is_refused(layer: nn.Module) -> None:
    """It would be added unclipped: of one example and clip norm 1 came a sum of length 18,000."""
    if isinstance(layer, nn.Bilinear):  # a layer that is run again for each example

        class Same(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = self.inner(x, x)
                return out

        layer = Same(layer)
    module, x = PrivateModule(Twice(layer), "sum"), drawn(8, 2, 84, 6)
    module._probed = True  # which would refuse the first of two backwards
    first, second = module(x)
    first.sum().backward()
    norms = module.norms(2)
    with pytest.raises(RootnoiseError, match=r"backward must end before norms are asked for, got"):
        (1e4 * second).sum().backward()
    assert torch.equal(module.norms(2), norms)
    module.add(Flat(1.0))
    assert module.finish()[0].norm() <= 2.0


@pytest.mark.parametrize("stage", ["backward", "norms", "added"])
@pytest.mark.parametrize("made", [True, False])
def test_what_is_not_noised_is_neither_copied_nor_stored(stage: str, made: bool) -> None:
    """Neither what a micro-batch has left nor the memory of those before it."""
    layer = Calls(24) if made else seeded(1, (nn.Linear, (60, 60)))
    module, x = PrivateModule(layer), drawn(9, 64, *((24, 60) if made else (60,)))
    expected = module(x).detach()
    module.zero_grad()
    added(module, x)
    module.finish()
    module(x[:3]).square().flatten(1).sum(1).mean().backward()
    if stage != "backward":
        module.norms(3)
    if stage == "added":
        module.add(Flat(1.0))
    file = io.BytesIO()
    torch.save(module, file)
    assert len(file.getbuffer()) < 4 * 60 * 60 + 12_000  # the weights, not 3 or 64 times as much
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):  # noqa: S301
        assert not other._grads
        assert not other._taps
        assert other._norms is None
        assert not other._sums._sums
        assert other._examples == 0
        torch.testing.assert_close(other(x), expected)
        with pytest.raises(RootnoiseError, match="gradients are missing"):
            other.norms(3)
    left = bool(module._grads or module._taps or module._kept)
    assert left is (stage != "added")  # its own are still there


def test_attention_of_no_examples() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            out: torch.Tensor = self.layer(x, x, x, attn_mask=mask)[0]
            return out

    plain, masks = Own(), [None, torch.zeros(5, 5), torch.zeros(2 * 3, 5, 5)]
    masks[2][:, :, 4] = -math.inf  # type: ignore[index]
    x = drawn(7, 3, 5, 8)
    expected = [plain(x, mask).detach() for mask in masks]
    module = PrivateModule(plain)
    for mask, known in zip(masks, expected, strict=True):
        torch.testing.assert_close(module(x, mask), known)
        module.zero_grad()
    assert module(x[:0]).shape == (0, 5, 8)
