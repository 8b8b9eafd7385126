"""Norms that a search cannot bring below the true ones, and sums that one example cannot move."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rootnoise import RootnoiseError
from rootnoise.training.clip import Flat, PerLayer, PrivateModule
from rootnoise.training.clip.bounds import (
    EXAMPLES,
    FLOOR,
    GRAM,
    RATIO,
    ROWS,
    SINGLE,
    SLACK,
    TERMS,
    Sum,
    add_each_,
    check_size,
    gram_squares,
    single,
)
from rootnoise.training.clip.products import Products


def worst(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return (true square - bound) / S^2 of each example; positive breaks the theorem."""
    made = torch.einsum("nkti,nktj->nij", g.double(), a.double())
    lengths = (a.double().norm(dim=-1) * g.double().norm(dim=-1)).sum((1, 2))
    excess = made.square().sum((1, 2)) * (1 - 1e-9) - gram_squares(a, g, True, False)
    score: torch.Tensor = excess / lengths.square()
    return score


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(2, 12),
    d_in=st.integers(1, 60),
    d_out=st.integers(1, 60),
    cancel=st.floats(-9, 0),
    large=st.floats(-12, 12),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_hill_climbing_finds_no_norm_that_is_too_small(
    tokens: int, d_in: int, d_out: int, cancel: float, large: float, half: bool, seed: int
) -> None:
    """Pairs of tokens that cancel to a relative 10^cancel, mutated towards the worst of them."""
    source = torch.Generator().manual_seed(seed)
    kept = torch.bfloat16 if half else torch.float32
    a = torch.randn(1, 1, 1, d_in, generator=source).expand(64, 1, tokens, d_in)
    g = torch.randn(64, 1, tokens, d_out, generator=source)
    g = (g - g.mean(2, keepdim=True)) * 10**large
    step = 10**cancel
    for _ in range(6):
        a = (a * (1 + step * torch.randn(a.shape, generator=source))).to(kept).float()
        g = (g * (1 + step * torch.randn(g.shape, generator=source))).to(kept).float()
        score = worst(a, g)
        assert (score <= 0).all()
        best = int(score.argmax())
        a, g = a[best].expand(64, 1, tokens, d_in), g[best].expand(64, 1, tokens, d_out)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(SINGLE, 70),
    widths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    cancel=st.floats(-9, 0),
    large=st.floats(-25, 25),
    seed=st.integers(0, 2**31),
)
def test_float32_products_make_no_norm_too_small(
    tokens: int, widths: tuple[int, int], cancel: float, large: float, seed: int
) -> None:
    """From far below the numbers whose products float32 holds to far above them."""
    source = torch.Generator().manual_seed(seed)
    a = torch.randn(1, 1, 1, widths[0], generator=source).expand(8, 1, tokens, widths[0])
    g = torch.randn(8, 1, tokens, widths[1], generator=source)
    g = (g - (1 - 10**cancel) * g.mean(2, keepdim=True)) * 10**large
    for _ in range(3):
        a = a * (1 + 10**cancel * torch.randn(a.shape, generator=source))
        g = g * (1 + 10**cancel * torch.randn(g.shape, generator=source))
        score = worst(a, g)
        assert single(a, g, tokens)
        assert (score <= 0).all()
        best = int(score.argmax())
        a, g = a[best].expand(8, *a.shape[1:]), g[best].expand(8, *g.shape[1:])


def test_float32_norms_of_tokens_that_do_not_cancel_are_within_a_thousandth() -> None:
    source = torch.Generator().manual_seed(6)
    a, g = (torch.randn(9, 1, 64, n, generator=source) for n in (96, 150))
    a[0, 0, 5], g[1] = 0, 0  # a token, and an example, of zeros
    for bias in (False, True):
        found, exact = (gram_squares(*x, True, bias) for x in ((a, g), (a.double(), g.double())))
        assert (found >= exact * (1 - 1e-9)).all()
        assert (found <= exact * 1.002).all()
    g = g - 0.9 * g.mean(2, keepdim=True)  # tokens that cancel, with which float32 says too little
    a = 1 + 0.01 * a
    found, exact = (gram_squares(*x, True, False) for x in ((a, g), (a.double(), g.double())))
    assert (found <= exact * (1 + 1e-9)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e30])
def test_arrays_that_come_out_longer_than_their_bound_are_cut(
    transposed: bool, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a product in float32 returns, and beyond float32, one example adds at most C."""
    source = torch.Generator().manual_seed(7)
    a, g = (torch.randn(3, 1, 64, 150, generator=source) * size for _ in range(2))
    row = Products(nn.Linear(150, 150), ["weight", "bias"], transposed)
    kept = row.kept([({"input": a[:, 0]}, g[:, 0])])
    factors = Flat(1.0).factors(kept.squares()[None])[0]
    exact = torch.bmm(g[:, 0].double().mT, a[:, 0].double()) * factors[:, None, None]
    product = torch.bmm

    def wrong(left: torch.Tensor, right: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        return product(left, right, **options).mul_(1.5)

    for bmm in (product, wrong):
        monkeypatch.setattr(torch, "bmm", bmm)
        for i in range(3):
            bad, scale = torch.arange(3) != i, factors.clone()
            scale[bad] = 0
            sums = {n: Sum(torch.empty(k).double()) for n, k in (("weight", 22500), ("bias", 150))}
            kept.add_(sums, scale, bad)
            parts = [x.whole() for x in sums.values()]
            norm = float(torch.cat(parts).norm())
            assert 1 - 2e-3 < norm <= 1
            if bmm is product:
                made = parts[0].view(150, 150)
                error = (made.mT if transposed else made) - exact[i]
                assert float(error.norm()) < 1e-5


def test_float32_products_are_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, and where the user allows less precise products."""
    source = torch.Generator().manual_seed(8)
    a, g = (torch.randn(2, 1, 64, 150, generator=source) for _ in range(2))
    before, product = torch.get_float32_matmul_precision(), torch.bmm
    found = []

    def watched(*tensors: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        assert torch.get_float32_matmul_precision() == "highest"  # on many processors all are one
        return product(*tensors, **options)

    monkeypatch.setattr(torch, "bmm", watched)
    try:
        for precision, cast in (("highest", False), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            total = Sum(torch.empty(22500, dtype=torch.float64))
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                squares = gram_squares(a, g, True, False)
                make = Products(nn.Linear(150, 150), ["weight"]).maker(a, g)
                add_each_(total, make, None, torch.ones(2).double(), squares)
            found.append(torch.cat([squares, total.vector]))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(*found)


def test_tokens_that_cancel_wholly_bound_their_lengths() -> None:
    """What the theorem of sums needs: S is at most RATIO norms."""
    a, g = torch.ones(1, 1, 2, 9), torch.tensor([[[[1.0], [-1.0]]]])
    length = 2 * 3
    assert float(gram_squares(a, g, True, False)) == pytest.approx((length / RATIO) ** 2)
    assert float(gram_squares(torch.ones(1, 1, 2, 9), g.abs(), True, False)) == pytest.approx(
        length**2 * (1 + FLOOR), rel=1e-9
    )


def test_constants_leave_room_for_two_sums() -> None:
    """The proof's last lines, at every extreme of what is admitted."""
    u = 2.0**-53
    assert 2 * (GRAM + 4) * u < 0.9 * FLOOR
    for tokens in (1, ROWS, 2000, 50_000, TERMS):
        k = max(ROWS, tokens)
        n = min(EXAMPLES, TERMS // k)
        check_size(n, tokens)
        with pytest.raises(
            RootnoiseError, match=rf"step must have at most {n} examples \({tokens}"
        ):
            check_size(n + 1, tokens)
        one = u * math.hypot(2.02 * RATIO * k * n + n**2, 2 * n**2)
        assert 2 * one + 1e-8 < SLACK


def test_gradients_too_long_for_the_theorem_are_made() -> None:
    layer = nn.Linear(70_000, 70_000, device="meta")
    row = Products(layer, ["weight"])
    for tokens, made in ((30_000, False), (64_000, True)):
        assert tokens * 2 < 140_000  # cheaper to keep, or as cheap
        g = torch.empty(1, tokens, 70_000, device="meta")
        assert row.small([({}, g)]) is (made or tokens * 140_000 >= 70_000**2)
    assert not row.small([({}, torch.empty(1, 30_000, 70_000, device="meta"))])
    wide = Products(nn.Linear(400_000, 400_000, device="meta"), ["weight"])
    assert wide.small([({}, torch.empty(1, 64_000, 400_000, device="meta"))])


@pytest.mark.parametrize("shared", [False, True])
def test_one_cancelling_example_moves_a_sum_by_at_most_the_clip_norm(shared: bool) -> None:
    clip = 1.0
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        ours = PrivateModule(nn.Linear(30, 40), "sum")
        x = 1 + 1e-5 * torch.randn(65, 3, 30)
        g = 1e4 * torch.randn(65, 3, 40)
    if shared:
        g = g - g.mean(1, keepdim=True)
    sums = []
    for rows in (65, 64):
        (ours(x[:rows]) * g[:rows]).sum().backward()
        ours.norms(rows)
        ours.add(Flat(clip))
        sums.append(ours.finish()[0])
    assert float((sums[0] - sums[1]).norm()) <= clip


def test_groups_share_the_clip_norm_whatever_the_batch() -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(4)
        layers = [nn.Linear(9, 9, bias=False) for _ in range(4)]
        ours, x = PrivateModule(nn.Sequential(*layers)), 1e3 * torch.randn(1, 9).expand(6, 9)
    ours(x).square().mean().backward()
    ours.norms(6)
    ours.add(PerLayer(2.0))
    total = ours.finish()[0]  # six times the same vector, each group of which is clipped
    assert float(total.norm()) == pytest.approx(6 * 2.0, rel=1e-4)
    assert float(total.norm()) <= 6 * 2.0


def test_norms_of_a_mean_are_those_of_its_examples() -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        ours, x = PrivateModule(nn.Linear(9, 5, bias=False), "mean"), torch.randn(4, 9)
    (ours(x).sum() / 4).backward()
    torch.testing.assert_close(ours.norms(4), x.double().norm(dim=1) * 5**0.5)


def test_a_step_of_more_examples_is_refused_before_they_count() -> None:
    ours = PrivateModule(nn.Linear(30, 40))
    ours._examples = EXAMPLES - 1  # as many micro-batches would leave it
    ours(torch.ones(2, 3, 30)).mean().backward()
    ours.norms(2)
    with pytest.raises(RootnoiseError, match=f"at most {EXAMPLES} examples .3 tokens each., got"):
        ours.add(Flat(1.0))
