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
    SLACK,
    TERMS,
    check_size,
    gram_squares,
)
from rootnoise.training.clip.layers import Products


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
