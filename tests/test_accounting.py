"""Every privacy number by two independent methods, and rounding to the private side."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from rootnoise import RootnoiseError, accounting
from rootnoise.accounting import gaussian
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation

ONCE = SingleParticipation()


def integrated_delta(sigma: float, epsilon: float) -> float:
    """Integrate (p - e^eps q)_+ for p = N(1, sigma^2), q = N(0, sigma^2): no closed form used."""
    edge = sigma**2 * epsilon + 0.5  # where the privacy loss (2x - 1) / (2 sigma^2) is epsilon

    def excess(x):
        return norm.pdf(x, 1, sigma) - math.exp(epsilon) * norm.pdf(x, 0, sigma)

    # Pieces, so that the quadrature sees the mass wherever it lies.
    ends = edge + sigma * np.array([0, 0.1, 0.3, 1, 3, 10, 40])
    pieces = [quad(excess, a, b, epsabs=0, epsrel=1e-12)[0] for a, b in pairwise(ends)]
    return float(sum(pieces))


GRID = [
    (0.4, 1e-5),
    (0.6, 1e-5),
    (1.0, 1e-5),
    (1.0, 1e-9),
    (3.73, 1e-5),
    (20.0, 1e-3),
    (50.0, 1e-6),
]


@pytest.mark.parametrize(("sigma", "delta"), GRID)
def test_gaussian_epsilon_agrees_with_direct_integration(sigma, delta):
    epsilon = accounting.privacy_cost(ONCE, 1, sigma, delta).epsilon
    root = brentq(lambda e: math.log(integrated_delta(sigma, e) / delta), epsilon / 2, epsilon * 2)
    assert epsilon == pytest.approx(root, rel=1e-6)
    assert epsilon >= root * (1 - 1e-9)


@pytest.mark.parametrize(("sigma", "delta"), GRID[:5])
def test_gaussian_epsilon_agrees_with_a_fine_pld(sigma, delta):
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=1e-4
    )
    epsilon = accounting.privacy_cost(ONCE, 1, sigma, delta).epsilon
    assert epsilon == pytest.approx(loss.get_epsilon_for_delta(delta), rel=1e-6)


@given(st.floats(0.01, 50), st.floats(1e-12, 0.1))
def test_calibration_and_cost_are_inverse_and_on_the_private_side(epsilon, delta):
    sigma = accounting.noise_multiplier(ONCE, 1, epsilon, delta)
    cost = accounting.privacy_cost(ONCE, 1, sigma, delta)
    assert cost.exact
    assert epsilon * (1 - 1e-6) <= cost.epsilon <= epsilon


@given(st.floats(0.2, 50), st.floats(1e-12, 0.1), st.floats(1.001, 3))
def test_more_noise_and_larger_delta_cost_less(sigma, delta, factor):
    cost = accounting.privacy_cost(ONCE, 1, sigma, delta).epsilon
    assert accounting.privacy_cost(ONCE, 1, sigma * factor, delta).epsilon <= cost
    assert accounting.privacy_cost(ONCE, 1, sigma, min(0.5, delta * factor)).epsilon <= cost


def test_without_sampling_neither_steps_nor_participation_matter():
    """They are in the sensitivity, which scales the noise: the run is ONE Gaussian mechanism."""
    costs = {
        accounting.privacy_cost(who, 100, 1.0, 1e-5).epsilon
        for who in (ONCE, MinSeparation(10, 10), FixedCycle(25, 4))
    }
    assert len(costs) == 1


def test_certain_sampling_is_the_composed_gaussian():
    """q = 1: T compositions of N(sigma) are exactly one N(sigma / sqrt T)."""
    composed = accounting.privacy_cost(CyclicPoisson(1, 1.0), 16, 4.0, 1e-5)
    exact = accounting.privacy_cost(ONCE, 1, 1.0, 1e-5)
    assert not composed.exact
    assert exact.epsilon <= composed.epsilon <= exact.epsilon * 1.001


def direct_poisson_delta(sigma: float, q: float, epsilon: float) -> float:
    """Integrate the one-step subsampled Gaussian in both directions; the larger delta counts."""
    x = np.linspace(-40 * sigma, 1 + 40 * sigma, 2_000_001)
    zero = norm.pdf(x, 0, sigma)
    mixed = (1 - q) * zero + q * norm.pdf(x, 1, sigma)
    step = x[1] - x[0]
    remove = np.maximum(mixed - math.exp(epsilon) * zero, 0).sum() * step
    add = np.maximum(zero - math.exp(epsilon) * mixed, 0).sum() * step
    return float(max(remove, add))


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.1), (0.7, 0.01), (2.0, 0.5)])
def test_one_poisson_step_agrees_with_direct_integration(sigma, q):
    cost = accounting.privacy_cost(CyclicPoisson(1, q), 1, sigma, 1e-5)
    root = brentq(lambda e: direct_poisson_delta(sigma, q, e) - 1e-5, 0, 2 * cost.epsilon + 1)
    assert root * (1 - 1e-6) <= cost.epsilon <= root * 1.001


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "groups"), [(1.0, 0.01, 2000, 1), (1.5, 0.2667, 2000, 16)]
)
def test_poisson_lies_between_a_fine_optimistic_pld_and_renyi(sigma, q, steps, groups):
    who = CyclicPoisson(groups, q)
    cost = accounting.privacy_cost(who, steps, sigma, 1e-5).epsilon
    rounds = -(-steps // groups)
    optimistic = privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        pessimistic_estimate=False,
        value_discretization_interval=1e-3,
        use_connect_dots=False,
    )
    assert cost >= optimistic.self_compose(rounds).get_epsilon_for_delta(1e-5)
    renyi = RdpAccountant()
    step = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
    renyi.compose(SelfComposedDpEvent(step, rounds))
    assert cost <= renyi.get_epsilon(1e-5)


@pytest.mark.parametrize(
    ("epsilon", "q", "steps"),
    [(8.0, 500 / 60000, 1200), (1.0, 0.1, 50), (0.3, 0.5, 4), (8.0, 1e-4, 10), (20.0, 0.9, 10)],
)
def test_poisson_calibration_is_on_the_private_side(epsilon, q, steps):
    who = CyclicPoisson(1, q)
    sigma = accounting.noise_multiplier(who, steps, epsilon, 1e-5)
    cost = accounting.privacy_cost(who, steps, sigma, 1e-5).epsilon
    assert epsilon * 0.999 <= cost <= epsilon
    assert sigma < accounting.noise_multiplier(ONCE, 1, epsilon, 1e-5) * steps**0.5
    rough = accounting.noise_multiplier(who, steps, epsilon, 1e-5, tolerance=0.01)
    assert sigma * (1 - 1e-6) <= rough <= sigma * 1.01
    assert epsilon * 0.99 <= accounting.privacy_cost(who, steps, rough, 1e-5).epsilon <= epsilon


def test_grids_hold_within_a_thousandth():
    """Ten times finer than where refinement stopped changes epsilon by less than promised."""
    sigma, q, steps = 10.0, 0.01, 2000  # a small epsilon needs the finest grids
    epsilon, grid = gaussian._refined(sigma, q, steps, 1e-5)
    finer = gaussian._on_grid(sigma, q, steps, 1e-5, grid / 10)
    assert finer * (1 - 1e-4) <= epsilon <= finer * 1.001


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: accounting.privacy_cost(ONCE, 1, 0, 0.1),
            "noise_multiplier must be .* > 0, got 0",
        ),
        (lambda: accounting.privacy_cost(ONCE, 1, -1, 0.1), "noise_multiplier must be .*, got -1"),
        (lambda: accounting.privacy_cost(ONCE, 1, 1, 0), "delta must be .* > 0 and < 1, got 0.0"),
        (lambda: accounting.privacy_cost(ONCE, 1, 1, 1), "delta must be .* > 0 and < 1, got 1.0"),
        (lambda: accounting.noise_multiplier(ONCE, 1, -2, 0.1), "epsilon must be .* > 0, got -2.0"),
        (
            lambda: accounting.noise_multiplier(ONCE, 1, math.nan, 0.1),
            "epsilon must be .*, got nan",
        ),
        (
            lambda: accounting.noise_multiplier(ONCE, 1, math.inf, 0.1),
            "epsilon must be .*, got inf",
        ),
        (lambda: accounting.noise_multiplier(ONCE, 1, 1, 2), "delta must be .* < 1, got 2.0"),
        (
            lambda: accounting.noise_multiplier(CyclicPoisson(1, 1e-3), 5, 1.0, 0.01),
            r"delta must be below the chance to be drawn, at most 0.005, got 0.01",
        ),
        (
            lambda: accounting.noise_multiplier(CyclicPoisson(1, 0.5), 5, 1.0, 0.01, 1e-4),
            "tolerance must be a finite number >= 0.001 and < 1, got 0.0001",
        ),
        (
            lambda: accounting.privacy_cost(FixedCycle(5, 2), 11, 1, 0.1),
            r"n_steps must be in \[6, period\*epochs=10\]",
        ),
        (
            lambda: accounting.noise_multiplier(FixedCycle(5, 2), 11, 1, 0.1),
            r"n_steps must be in .*, got 11",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()
