"""One record moves the clipped sum by at most the clip norm, exactly, whatever the others are."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootnoise._check import RootnoiseError, clip_range
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import SingleParticipation
from rootnoise.training.clipping import (
    ROOM,
    SLACK,
    Clip,
    NonFiniteGradientWarning,
    clip_scale,
    row_norms,
    scaled_sum,
)
from rootnoise.workload import prefix_sum

NORMS = [1e-10, 0.3, 1.0, 7.0, 1e10]


def clipped_sums(gradients, clip):
    """Each parameter's clipped sum in grid units, as a step makes it; how many are not finite."""
    scale, bad = clip_scale(row_norms(gradients), clip, t=0)
    return [scaled_sum(scale, g, bad) for g in gradients], bad


def units(gradients, clip):
    """The sums as Python integers, which they must be."""
    sums, _ = clipped_sums([g.float() for g in gradients], clip)
    joined = torch.cat(sums)
    assert joined.dtype == torch.float64
    whole = [int(v) for v in joined.tolist()]
    assert whole == joined.tolist()
    assert max(map(abs, whole), default=0) <= 2**52
    return np.array(whole, dtype=object)


def moved(gradients, clip, i):
    """The exact square of how far record i moves the sum, in clip norms."""
    rest = [torch.cat([g[:i], g[i + 1 :]]) for g in gradients]
    change = units(gradients, clip) - units(rest, clip)
    return (
        Fraction(sum(v * v for v in change)) * Fraction(clip.grid) ** 2 / Fraction(clip.norm) ** 2
    )


def plain(gradients, norm):
    """Float32 throughout: what this file is about."""
    scale = (norm / (row_norms(gradients) * (1 + SLACK))).clamp(max=1).float()
    return scale @ gradients[0]


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    norm=st.sampled_from(NORMS),
    log_size=st.floats(-6, 6),
)
def test_no_record_moves_the_sum_by_more_than_the_clip_norm(seed, rows, sizes, norm, log_size):
    generator = torch.Generator().manual_seed(seed)
    size = norm * 10**log_size
    gradients = [torch.randn(rows, n, generator=generator) * size for n in sizes]
    clip = Clip.fit(norm, n_examples=rows)
    i = seed % rows
    assert moved(gradients, clip, i) <= 1
    alone = units([g[i : i + 1] for g in gradients], clip)
    rest = units([torch.cat([g[:i], g[i + 1 :]]) for g in gradients], clip)
    assert (rest + alone == units(gradients, clip)).all()


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(2, 60),
    norm=st.sampled_from(NORMS),
)
def test_order_and_ranks_do_not_matter(seed, rows, norm):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(rows, 50, generator=generator) * norm
    clip = Clip.fit(norm, n_examples=rows)
    whole = units([g], clip)
    order = torch.randperm(rows, generator=generator)
    assert (units([g[order]], clip) == whole).all()
    cuts = sorted({0, rows, seed % rows, seed // 7 % rows})
    parts = [units([g[a:b]], clip) for a, b in pairwise(cuts)]
    assert (sum(parts) == whole).all()


def test_sixty_thousand_rows_where_float32_fails():
    """The worst of 64 records; float32 sums are 0.4 % over, however the slack is set."""
    generator = torch.Generator().manual_seed(0)
    g = torch.rand(65_536, 8, generator=generator) + 1
    clip = Clip.fit(1.0, n_examples=len(g))
    whole, wide = units([g], clip), plain([g], 1.0).double()
    worst, worst_plain = Fraction(0), 0.0
    for i in torch.randint(0, len(g), (64,), generator=generator).tolist():
        rest = torch.cat([g[:i], g[i + 1 :]])
        change = whole - units([rest], clip)
        worst = max(worst, Fraction(sum(v * v for v in change)) * Fraction(clip.grid) ** 2)
        worst_plain = max(worst_plain, float((wide - plain([rest], 1.0).double()).norm()))
    assert worst_plain > 1.0005
    assert (1 - 2 * SLACK) ** 2 < worst <= 1


def test_a_climb_towards_the_largest_change():
    """Search by small changes of all records for one that moves the sum the most."""
    rng = np.random.default_rng(0)
    clip = Clip.fit(1.0, n_examples=16)
    best = torch.from_numpy(rng.normal(size=(16, 5))).float()
    score = moved([best], clip, 0)
    for _ in range(200):
        step = torch.from_numpy(rng.normal(size=(16, 5)) * 10 ** rng.uniform(-7, 0)).float()
        other = best + step
        found = moved([other], clip, 0)
        assert found <= 1
        if found >= score:
            best, score = other, found
    assert score > Fraction(9999, 10000)


@pytest.mark.parametrize("norm", NORMS)
def test_what_cutting_loses(norm):
    """Less than a unit a coordinate and example, and a unit is below 2^-50 n clip norms."""
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(100, 400, generator=generator) * norm
    clip = Clip.fit(norm, n_examples=1000)
    assert clip.grid <= 1000 * norm * 2.0**-50
    (found,), _ = clipped_sums([g], clip)
    wide = g.double()
    factor = (norm / (wide.norm(dim=1) * (1 + SLACK))).clamp(max=1)
    lost = (factor @ wide - found * clip.grid).abs()
    # The factor and the product round once each; the norm is 7.7e-6 off at most.
    assert float(lost.max()) < 100 * clip.grid + 9e-6 * norm * 100 / 20


@given(
    norm=st.floats(1e-10, 1e10),
    n=st.integers(1, 2**32),
    std=st.floats(0, 1e14),
)
def test_the_grid_is_exact_for_all_partial_sums_and_the_noise(norm, n, std):
    grid = Fraction(Clip.fit(norm, n, std).grid)
    assert grid.numerator == 1 or grid.denominator == 1
    largest = max(Fraction(norm) * n, ROOM * Fraction(std))
    assert 2**51 * grid <= largest <= 2**52 * grid


def test_the_noise_is_in_after_the_exact_sum():
    """On every rank count: round(sum + z), so that a release is post-processing of it."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(64, 1000, generator=generator)
    z = torch.randn(1000, generator=generator) * 5
    z[:500] *= 2.0**-30  # of these float32 has digits below the grid
    clip = Clip.fit(1.0, 64, noise_std=5.0)
    (whole,), _ = clipped_sums([g], clip)
    expected = [
        round(int(s) + Fraction(v) / Fraction(clip.grid))
        for s, v in zip(whole.tolist(), z.tolist(), strict=True)
    ]
    assert clip.noised(whole, z).tolist() == expected
    (first,), _ = clipped_sums([g[:20]], clip)
    (second,), _ = clipped_sums([g[20:]], clip)
    assert torch.equal(clip.noised(first, z) + second, clip.noised(whole, z))


def test_coordinates_are_cut_towards_zero():
    """Each is 0.8 units: rounded to the nearest they had norm 1.25 together."""
    clip = Clip.fit(1.0, n_examples=1, noise_std=2.0**40)
    assert clip.grid == 0.125
    for sign in (1, -1):
        assert not units([torch.full((1, 100), sign * 0.0999)], clip).any()
        assert units([torch.full((1, 30), sign * 0.15)], clip).tolist() == [sign] * 30


@pytest.mark.parametrize("size", [1e17, 1e30, 3e38])
def test_huge_gradients_are_clipped_or_count_as_zero(size):
    g = torch.full((2, 600), float(size))
    g[1] = 0.01
    clip = Clip.fit(1.0, n_examples=2)
    if size < 1e18:
        assert moved([g], clip, 0) <= 1
        assert moved([g], clip, 0) > Fraction(9999, 10000)
        return
    with pytest.warns(NonFiniteGradientWarning, match="1 of 2 per-sample gradients of step 0"):
        both = units([g], clip)
    assert (both == units([g[1:]], clip)).all()


def test_no_clipped_gradient_exceeds_the_clip_norm():
    clip = Clip.fit(1.0, n_examples=24)
    # torch's own float32 norm of this row is 0.8 % too small, its clip factor 0.8 % too large.
    row = torch.full((1, 10_000_000), 0.1)
    true = float(row[0, 0].double()) * row.numel() ** 0.5
    assert float(torch.linalg.vector_norm(row)) < true * (1 - SLACK)
    assert float(row_norms([row])) == pytest.approx(true, rel=SLACK / 10)
    for g in (row, torch.full((1, 300), 1e-3), torch.full((1, 3), 0.57735028)):
        (clipped,), bad = clipped_sums([g], clip)
        assert float((clipped * clip.grid).norm()) <= 1
        assert bad == 0
    (small,), _ = clipped_sums([torch.full((1, 300), 1e-3)], clip)
    assert torch.equal(
        (small * clip.grid).float(), torch.full((300,), 1e-3)
    )  # below the clip norm nothing changes


def test_one_bad_row_spoils_no_other():
    g = torch.full((3, 4), 0.1)
    g[1] = torch.nan
    clip = Clip.fit(1.0, n_examples=3)
    with pytest.warns(NonFiniteGradientWarning):
        scale, bad = clip_scale(row_norms([g]), clip, t=0)
    assert bad == 1
    assert torch.equal(scaled_sum(scale, g, bad), 2 * scaled_sum(scale[:1], g[:1], 0))


@pytest.mark.parametrize("norm", [1e-22, 9.9e-11, 1.1e10, 1e300])
def test_clip_norms_that_float32_cannot_clip_to(norm):
    rule = r"^clip_norm must be a finite number >= 1e-10 and <= 1e\+10, got "
    with pytest.raises(RootnoiseError, match=rule):
        clip_range(norm)
    split = factorize(prefix_sum(4), SingleParticipation(), "identity")
    with pytest.raises(RootnoiseError, match=rule):
        Mechanism.calibrate(
            split, SingleParticipation(), noise_multiplier=1.0, delta=1e-5, clip_norm=norm
        )


def test_tiny_gradients_are_clipped_to_a_tiny_norm():
    """Where squares vanish altogether the whole gradient is below the smallest clip norm."""
    clip = Clip.fit(1e-10, n_examples=1)
    for size in (1e-9, 1e-12, 1e-18, 1e-20, 1e-30):
        assert moved([torch.full((1, 100_000), size)], clip, 0) <= 1
