"""Convolutions whose windows are not copied, and lengths of float32 arrays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rootnoise.training.clip import Flat
from rootnoise.training.clip.bounds import (
    CHUNK,
    KEPT,
    PIECES,
    SINGLE,
    Sum,
    _square,
    gram_squares,
    row_squares,
    single,
)
from rootnoise.training.clip.convolutions import CONVOLUTIONS, Convolution, KeptConvolution
from rootnoise.training.clip.products import Products
from test_clip_engine import check, private


@st.composite
def layers(draw: Any, most: int = 6) -> tuple[Any, torch.Tensor]:
    """Return a convolution whose weight is large beside its places, and an input."""
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2)))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    stride, dilation = ([draw(st.integers(1, 2)) for _ in range(dims)] for _ in range(2))
    mode = draw(st.sampled_from(("zeros", "zeros", "circular", "replicate")))
    padding: Any = [draw(st.integers(0, 2)) for _ in range(dims)]
    if stride == [1] * dims and draw(st.booleans()):
        padding = "same"
    size = [draw(st.integers(1, most)) + d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    size = [max(x, 3) for x in size]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    with torch.random.fork_rng():
        torch.random.manual_seed(draw(st.integers(0, 2**31)))
        wide = [groups * draw(st.integers(8, 40)) for _ in range(2)]  # sums that do not cancel
        bias = draw(st.booleans())
        kind: Any = CONVOLUTIONS[dims - 1]
        layer = kind(*wide, kernel, **options, padding_mode=mode, bias=bias)
        return layer, torch.randn(draw(st.integers(1, 4)), wide[0], *size)


@settings(max_examples=60, deadline=None)
@given(made=layers())
def test_convolutions_of_any_shape(made: tuple[nn.Module, torch.Tensor]) -> None:
    check(*made, 2e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("places", "channels"), [(4, 80), (6, 128), (8, 160)])
def test_convolutions_that_keep_taps(places: int, channels: int, bias: bool) -> None:
    """Below and above the number of places from which arrays are made one by one."""
    with torch.random.fork_rng():
        torch.random.manual_seed(places)
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        x = torch.randn(3, channels, places, places)
        row = Convolution(layer, ["weight", "bias"] if bias else ["weight"])
        taps = {"input": x}, layer(x).detach()
        assert not row.small([taps])
        assert type(row.kept([taps])) is KeptConvolution
        assert row.singly(*taps) is (places**2 >= SINGLE)
        check(layer, x)
        check(nn.Sequential(layer, nn.ReLU(inplace=True), layer), x)  # a layer called twice


@settings(max_examples=60, deadline=None)
@given(made=layers())
def test_gram_matrices_of_windows_are_sums_of_those_of_pixels(
    made: tuple[Any, torch.Tensor],
) -> None:
    layer, x = made[0].double(), made[1].double()
    g = torch.zeros_like(layer(x))
    row = Convolution(layer, ["weight"])
    windows, _ = row.tokens(({"input": x}, g))
    padded = row.padded(x)
    size = padded.shape[2:]
    pixels = padded.reshape(len(x), row.groups, -1, math.prod(size)).mT
    kept = row.kept([({"input": x}, g)])
    assert isinstance(kept, KeptConvolution)
    found = kept._fold(size, g.shape[2:])(pixels @ pixels.mT)
    torch.testing.assert_close(found, windows @ windows.mT, rtol=1e-12, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    places=st.integers(2, 8),
    channels=st.integers(1, 150),
    cancel=st.floats(-9, 0),
    large=st.floats(-25, 25),
    seed=st.integers(0, 2**31),
)
def test_no_norm_by_pixels_is_too_small(
    places: int, channels: int, cancel: float, large: float, seed: int
) -> None:
    """Places that cancel to a relative 10^cancel, mutated towards the worst of them."""
    source = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(channels, 30, 3, padding=1, bias=False, device="meta")
    row = Convolution(layer, ["weight"])
    a = torch.randn(1, channels, 1, 1, generator=source).expand(8, -1, places, places)
    g = torch.randn(8, 30, places, places, generator=source)
    g = (g - (1 - 10**cancel) * g.mean((2, 3), keepdim=True)) * 10**large
    for _ in range(3):
        a = a * (1 + 10**cancel * torch.randn(a.shape, generator=source))
        g = g * (1 + 10**cancel * torch.randn(g.shape, generator=source))
        kept = row.kept([({"input": a}, g)])
        windows, outputs = row.tokens(({"input": a.double()}, g.double()))
        true = (outputs.mT @ windows).square().sum((1, 2, 3))
        lengths = (windows.norm(dim=3) * outputs.norm(dim=3)).sum(2).square().sum(1)
        score = (true * (1 - 1e-9) - kept.squares()) / lengths
        assert (score <= 0).all()
        best = int(score.argmax())
        a, g = a[best].expand(8, *a.shape[1:]), g[best].expand(8, *g.shape[1:])


def test_norms_by_pixels_are_within_a_thousandth_and_of_zeros_zero() -> None:
    source = torch.Generator().manual_seed(2)
    layer = nn.Conv2d(200, 100, 3, padding=1, device="meta")
    row = Convolution(layer, ["weight", "bias"])
    a, g = (torch.randn(4, n, 8, 8, generator=source) for n in (200, 100))
    a[0, :, 3, 3], g[1], a[2, :, 0] = 0, 0, 1e-20
    a[3, 0, 0, 0] = math.nan
    kept = row.kept([({"input": a}, g)])
    windows, outputs = row.tokens(({"input": a}, g))
    exact = gram_squares(windows.double(), outputs.double(), True, True)
    found = kept.squares()
    assert (found[:3] >= exact[:3] * (1 - 1e-9)).all()
    assert (found[:3] <= exact[:3] * 1.002).all()
    assert found[1] == 0
    assert bool(found[3].isnan())


def test_an_array_longer_than_its_bound_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a convolution in float32 returns, one example adds at most C."""
    source = torch.Generator().manual_seed(3)
    layer = nn.Conv2d(160, 160, 3, padding=1)
    row = Convolution(layer, ["weight", "bias"])
    a, g = (torch.randn(2, 160, 8, 8, generator=source) for _ in range(2))
    right = Convolution.weight_gradient
    for size, wrong in ((1.0, 1.0), (1.0, 1.5), (1e25, 1.0)):
        monkeypatch.setattr(Convolution, "weight_gradient", lambda *x, by=wrong: right(*x).mul_(by))
        kept = row.kept([({"input": a * size}, g)])
        factors = Flat(1.0).factors(kept.squares()[None])[0]
        for i in range(2):
            scale = factors.clone()
            scale[1 - i] = 0
            sizes = {n: getattr(layer, n).numel() for n in ("weight", "bias")}
            sums = {n: Sum(torch.empty(k, dtype=torch.float64)) for n, k in sizes.items()}
            kept.add_(sums, scale, None)
            norm = float(torch.cat([x.whole() for x in sums.values()]).norm())
            assert 1 - 2e-3 < norm <= 1


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 700),
    large=st.floats(-40, 38),
    spread=st.floats(0, 20),
    even=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_no_row_is_longer_than_its_float32_length(
    size: int, large: float, spread: float, even: bool, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, size, generator=source)
    rows = torch.ones_like(rows) * 1.0000001 if even else rows
    rows = (rows * 10 ** (large - spread * torch.rand(rows.shape, generator=source))).float()
    exact = rows.double().square().sum(1)
    for found in (row_squares(rows), torch.tensor([_square(x) for x in rows], dtype=torch.float64)):
        finite = exact.isfinite()
        assert (found[finite] >= exact[finite] * (1 - 1e-13)).all()
        assert (found[finite] <= exact[finite] * (1 + PIECES)).all()


def test_lengths_of_rows_that_float32_does_not_hold() -> None:
    rows = torch.ones(5, 3 * CHUNK)
    rows[0], rows[1], rows[2, 0], rows[3, 7] = 0, 1e-30, math.nan, math.inf
    found = row_squares(rows)
    assert found[0] == 0
    assert float(found[1]) == pytest.approx(3 * CHUNK * 1e-60)
    assert bool(found[2].isnan())
    assert bool(found[3].isinf())
    assert float(found[4]) == pytest.approx(3 * CHUNK, rel=1e-5)


def test_how_an_example_is_measured_does_not_depend_on_how_many_there_are() -> None:
    """Or one record more would change how all others are."""
    for layer, shape in (
        (nn.Linear(192, 576), (64, 192)),
        (nn.Linear(192, 576), (16, 192)),
        (nn.Linear(600, 600), (64, 600)),
        (nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8)),
    ):
        conv = isinstance(layer, nn.Conv2d)
        row = (Convolution if conv else Products)(layer, ["weight", "bias"])
        answers = set()
        for n in (1, 2, 1000):
            x = torch.zeros(1, *shape).expand(n, *shape)
            g = layer(x[:1]).detach().expand(n, *layer(x[:1]).shape[1:])
            answers.add(row.small([({"input": x}, g)]))
        assert len(answers) == 1


@pytest.mark.parametrize(("width", "small"), [(320, True), (321, False)])
def test_small_arrays_replace_taps_up_to_a_few_times_their_size(width: int, small: bool) -> None:
    assert width**2 <= KEPT * 64 * 2 * width or not small
    row = Products(nn.Linear(width, width, device="meta"), ["weight"])
    taps = {"input": torch.zeros(2, 64, width)}, torch.zeros(2, 64, width)
    assert single(taps[1], taps[1], 64)
    assert row.small([taps]) is small
    assert not row.small([({"input": taps[0]["input"].double()}, taps[1].double())])
    large = Products(nn.Linear(400, 400, device="meta"), ["weight"])
    taps = {"input": torch.zeros(2, 190, 400)}, torch.zeros(2, 190, 400)
    assert not large.small([taps])


def test_what_follows_may_overwrite_an_output_that_is_a_view() -> None:
    """And its gradient is not copied on the way to the tap."""
    with torch.random.fork_rng():
        torch.random.manual_seed(4)
        layers = nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 5), nn.Tanh()
        model, x = nn.Sequential(*layers), torch.randn(3, 4, 6)
        check(model, x)
    waiting, names = [private(model)(x).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    assert "TapBackward" in names
    kept = [private(nn.Linear(6, 9))(x).grad_fn]
    while kept:
        node = kept.pop()
        if node is not None:
            assert "CopySlices" not in node.name()
            kept += [following for following, _ in node.next_functions]


@pytest.mark.parametrize(("places", "channels"), [(4, 80), (8, 160), (8, 20)])
def test_non_finite_examples_of_a_convolution_touch_no_other(places: int, channels: int) -> None:
    """In each of the ways to a sum."""
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        ours = private(nn.Conv2d(channels, channels, 3, padding=1))
        x = torch.randn(3, channels, places, places)
    sums = []
    for value in (0.0, math.nan):
        given = x.clone()
        given[1, 3, 1, 1] = value
        (ours(given) * torch.tensor([1.0, value, 1.0])[:, None, None, None]).sum().backward()
        ours.norms(3)
        ours.add(Flat(1.0))
        sums.append(ours.finish())
    assert [bad for _, bad in sums] == [0, 1]
    torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-6, atol=1e-9)
