"""Sums and noise are whole numbers of a grid's unit, and are added up exactly."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rootnoise._check import RootnoiseError, clip_range
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import SingleParticipation
from rootnoise.training.clipping import PART, ROOM, Clip, divide_
from rootnoise.workload import prefix_sum

FIT = PART["cpu"]


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


def noised(clip, units, z):
    units = units.clone()
    clip.add_noise_(units, z)
    return units


@given(seed=st.integers(0, 2**32), size=st.integers(1, 2**18), parts=st.integers(1, 5))
def test_the_noise_is_in_after_the_exact_sum(seed, size, parts):
    """On every rank count and in every order: round(sum + z), post-processing of the sum."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, generator=generator) * 5
    z[: size // 2] *= 2.0**-30  # of these float32 has digits below the grid
    clip = Clip.fit(1.0, 64, noise_std=5.0)
    whole = (torch.randn(parts, size, generator=generator).double() / clip.grid).round_()
    found = noised(clip, whole.sum(0), z)
    for i in torch.randint(size, (20,), generator=generator).tolist():
        total = sum(int(v) for v in whole[:, i].tolist())
        assert found[i] == round(total + Fraction(z[i].item()) / Fraction(clip.grid))
    order = torch.randperm(parts, generator=generator)
    other = noised(clip, whole[order[0]], z)
    for i in order[1:].tolist():
        other += whole[i]
    assert torch.equal(other, found)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 1000, FIT - 1, FIT, FIT + 1, 2 * FIT + 7]),
    by=st.sampled_from([1, 3, 64, 255.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    place=st.sampled_from(["noise", "sum", "new"]),
)
def test_a_mean_is_the_exact_sum_plus_noise_rounded_once(seed, size, by, dtype, place):
    """Whatever memory it is written to; against rational numbers, at random and last places."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, generator=generator) * 5
    z[: size // 2] *= 2.0**-30
    clip = Clip.fit(1.0, 64, noise_std=5.0)
    units = torch.randn(size, generator=generator).double() / clip.grid
    places = [0, size - 1, *torch.randint(size, (20,), generator=generator).tolist()]
    noise = z if dtype == torch.float32 else z.double()
    grid = Fraction(clip.grid)
    exact = [(Fraction(float(units[i])), Fraction(float(z[i])) / grid) for i in places]
    totals = [round(s) + round(drawn) for s, drawn in exact]
    expected = torch.tensor([float(x * grid / Fraction(by)) for x in totals], dtype=torch.float64)
    assert torch.equal(noised(clip, units.round(), z)[places].long(), torch.tensor(totals))
    summed = noised(clip, units.round(), z)
    out = torch.empty(size, dtype=dtype)
    if place == "noise":
        out = noise
    if place == "sum" and dtype == torch.float64:
        out = units
    clip.mean_(out, units, noise, by)
    assert torch.equal(out[places], expected.to(dtype))
    clip.mean_(out, summed, None, by)
    assert torch.equal(out[places], expected.to(dtype))


def test_a_rank_may_hold_nothing():
    nothing = torch.zeros(0)
    Clip.fit(1.0, 4).mean_(nothing, nothing.double(), nothing, 3)


@given(x=st.floats(-1e30, 1e30), power=st.integers(-1000, 1000), factor=st.sampled_from([1.0, 3.0]))
def test_quotients_are_those_of_a_division(x, power, factor):
    by = factor * 2.0**power
    one = torch.tensor([x], dtype=torch.float64)
    assert torch.equal(divide_(one.clone(), by), one / by)


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
