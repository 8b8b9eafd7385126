"""Sums and noise are whole numbers of a grid's unit, and are added up exactly."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootnoise._check import RootnoiseError, clip_range
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import SingleParticipation
from rootnoise.training.clipping import ROOM, Clip, divide_
from rootnoise.workload import prefix_sum


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


@given(seed=st.integers(0, 2**32), size=st.integers(1, 2**18), parts=st.integers(1, 5))
def test_the_noise_is_in_after_the_exact_sum(seed, size, parts):
    """On every rank count and in every order: round(sum + z), post-processing of the sum."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, generator=generator) * 5
    z[: size // 2] *= 2.0**-30  # of these float32 has digits below the grid
    clip = Clip.fit(1.0, 64, noise_std=5.0)
    whole = (torch.randn(parts, size, generator=generator).double() / clip.grid).round_()
    noised = clip.noised(whole.sum(0), z)
    for i in torch.randint(size, (20,), generator=generator).tolist():
        total = sum(int(v) for v in whole[:, i].tolist())
        assert noised[i] == round(total + Fraction(z[i].item()) / Fraction(clip.grid))
    order = torch.randperm(parts, generator=generator)
    other = clip.noised(whole[order[0]], z)
    for i in order[1:].tolist():
        other += whole[i]
    assert torch.equal(other, noised)


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
