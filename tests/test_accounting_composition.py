"""Composed losses at small delta, against exact Gaussians and Fourier inversion without a grid."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from rootnoise.accounting import composition, gaussian, subsampled


def step_losses(sigma, q, add, furthest):
    """Return log masses, losses and masses of one step by the trapezoid, to x = furthest."""
    x = np.linspace(-14 * sigma, furthest, 6001)
    t = (2 * x - 1) / 2 / sigma**2
    logs = -((x / sigma) ** 2) / 2 + math.log((x[1] - x[0]) / sigma / math.sqrt(2 * math.pi))
    loss = np.logaddexp(math.log1p(-q), math.log(q) + t)
    near = np.abs(t) < 30
    loss[near] = np.log1p(q * np.expm1(t[near]))
    logs, loss = (logs, -loss) if add else (logs + loss, loss)
    return logs, loss, np.exp(logs)


def log_m(z, logs, loss, masses):
    """Return log E e^(z L) as log of 1 + E (e^(z L) - 1): the sum of the masses must not matter."""
    e = np.multiply.outer(z, loss)
    small = np.abs(e) < 1
    with np.errstate(over="ignore"):
        far = np.exp(np.where(small, -800, logs + e)) - masses
    return np.log1p(np.where(small, masses * np.expm1(np.where(small, e, 0)), far).sum(axis=-1))


def inverted(sigma, q, rounds, delta, add, theta):
    """Invert the moment generating function of the exact loss along the line Re z = theta.

    delta(eps) = 1/(2 pi) int M(z)^n e^(-z eps) / (z (1 + z)) dt, z = theta + i t. Any theta > 0
    will do: M must be known as far as e^(theta L) carries mass, and the line be followed in steps
    short enough for the sums that few large losses reach, and until |M|^n is far below delta.
    """
    furthest = 14 * sigma + 1 + (0 if add else theta + 30)
    one = step_losses(sigma, q, add, furthest)

    def size(t):
        return rounds * float(log_m(np.array([theta + 1j * t]), *one)[0].real)

    level = size(0.0)
    h = 1e-3 * theta
    curve = (log_m(np.array([theta + h, theta, theta - h]), *one) @ [1, -2, 1]).real / h**2
    end = 1 / math.sqrt(rounds * curve)
    while size(end) > math.log(delta) - 12:
        end *= 1.2
    step = 2 * math.pi / (60 * math.sqrt(rounds * curve) + 20 / theta + 12)
    t = np.arange(0, math.ceil(end / step) + 1) * step
    z = theta + 1j * t
    power = rounds * np.concatenate(
        [log_m(part, *one) for part in np.array_split(z, 8 + t.size // 100)]
    )

    def excess_delta(epsilon):
        terms = np.exp(power - level - 1j * t * epsilon) / (z * (1 + z))
        total = (2 * float(terms.sum().real) - float(terms[0].real)) * step / 2 / math.pi
        return math.exp(level - theta * epsilon - math.log(delta)) * total - 1

    chernoff = (
        level - (1 + theta) * math.log1p(theta) + theta * math.log(theta) - math.log(delta)
    ) / theta
    return float(brentq(excess_delta, 0.0, chernoff))


@pytest.mark.parametrize(
    ("sigma", "q", "rounds", "delta", "known", "thetas", "slack"),
    [
        (1.0, 1e-4, 10**6, 1e-10, 0.765695, (13.0, 40.0), 1e-3),
        (2.0, 0.01, 10**5, 1e-11, 12.37979, (4.0, 4.0), 1e-4),
        (1.0, 1e-4, 10**5, 1e-12, 0.26816, (13.0, 60.0), 1.5e-3),
        (1.0, 0.01, 2000, 1e-5, 2.583841, (5.0, 8.0), 1e-4),
    ],
)
def test_composition_is_a_tight_upper_bound_where_rounding_drowned_the_tail(
    sigma, q, rounds, delta, known, thetas, slack
):
    exact = max(
        inverted(sigma, q, rounds, delta, add, theta)
        for add, theta in zip((False, True), thetas, strict=True)
    )
    error = 1e-4  # of the inversion, seen where theta is varied
    assert exact == pytest.approx(known, rel=error)
    found = gaussian.poisson_epsilon(sigma, q, rounds, delta)
    assert known * (1 - error / 2) <= found <= known * (1 + slack)


@pytest.mark.parametrize(
    ("sigma", "rounds", "delta"), [(1000.0, 10**6, 1e-12), (4.0, 16, 1e-15), (30.0, 900, 1e-9)]
)
def test_composed_grids_are_above_exact_gaussians(sigma, rounds, delta):
    exact = gaussian.gaussian_epsilon(sigma / math.sqrt(rounds), delta)
    found = gaussian._on_grid(sigma, 1.0, rounds, delta, 1e-2 / 4**4)
    assert exact * (1 - 1e-9) <= found <= exact * 1.001
    stated = gaussian.poisson_epsilon(sigma, 1.0, rounds, delta)
    assert exact <= stated <= exact * (1 + 1e-9)


@pytest.mark.parametrize("heavy", [False, True])
def test_both_directions_count(monkeypatch, heavy):
    """Whichever direction is given the heavier losses decides."""
    made = subsampled.losses

    def lighter(sigma, q, width, log_cut, *, add):
        return made(1.0 if add == heavy else 2.0, 0.1, width, log_cut, add=False)

    expected = made(1.0, 0.1, 1e-2, -40.0, add=False).epsilon(10, 1e-5)
    monkeypatch.setattr(subsampled, "losses", lighter)
    found = gaussian._on_grid.__wrapped__(1.0, 0.1, 10, 1e-5, 1e-2)  # not from its cache
    assert found == pytest.approx(expected, rel=1e-6)


def exact_delta(sigma, q, epsilon, add):
    """Return the hockey-stick divergence of one subsampled Gaussian, to 60 digits."""
    with mpmath.workdps(60):
        s, q, e = mpmath.mpf(sigma), mpmath.mpf(q), mpmath.mpf(epsilon)
        ratio = mpmath.exp(-e if add else e)  # mixture over N(0), where the loss is epsilon
        if ratio <= 1 - q:
            return mpmath.mpf(0) if add else 1 - mpmath.exp(e)
        x = s**2 * mpmath.log((ratio - 1 + q) / q) + mpmath.mpf(1) / 2

        def beyond(shift):
            z = (x - shift) / s * (-1 if add else 1)
            return mpmath.erfc(z / mpmath.sqrt(2)) / 2

        mixture = (1 - q) * beyond(0) + q * beyond(1)
        return beyond(0) - mpmath.exp(e) * mixture if add else mixture - mpmath.exp(e) * beyond(0)


@given(
    st.floats(-1.2, 3),
    st.floats(-8, -1e-3) | st.sampled_from([-1e-9, 0.0]),
    st.floats(-3.5, -1),
    st.booleans(),
    st.floats(0, 1),
)
def test_one_step_on_a_grid_is_never_below_the_exact_one_and_close(
    log_sigma, log_q, log_width, add, part
):
    sigma, q = 10**log_sigma, 10**log_q
    span = gaussian._span(sigma, q)
    width = max(10**log_width, span / 20_000)
    step = subsampled.losses(sigma, q, width, -60.0, add=add)
    places = width * (step.first + np.arange(step.masses.size))
    # Exact at the points of the grid, but for what rounding costs.
    point = float(places[round(part * (places.size - 1))])
    found = float(-np.expm1(np.minimum(point - places, 0)) @ step.masses) + step.infinity
    exact = exact_delta(sigma, q, point, add)
    paid = 4 * step.excess + 1e-11
    assert exact_delta(sigma, q, point + step.excess, add) <= found * (1 + 1e-12) + 1e-300
    assert found <= exact + paid * (1 + abs(float(exact))) + 1e-26


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.01), (0.5, 0.1), (5.0, 0.5), (1.0, 1.0)])
def test_one_step_agrees_with_dp_accounting(sigma, q):
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=1e-2
    )
    for add, pmf in ((False, loss._pmf_remove), (True, loss._pmf_add)):
        step = subsampled.losses(sigma, q, 1e-2, -50.0, add=add)
        places = 1e-2 * (step.first + np.arange(step.masses.size))
        for point in (0.0, 0.05, 0.1):
            found = float(-np.expm1(np.minimum(point - places, 0)) @ step.masses)
            assert found == pytest.approx(pmf.get_delta_for_epsilon(point), rel=1e-9, abs=1e-20)


def test_delta_far_below_rounding_has_a_bound():
    found = gaussian.poisson_epsilon(0.5, 0.5, 1, 1e-300)
    assert (
        exact_delta(0.5, 0.5, found, False) <= 1e-300 < exact_delta(0.5, 0.5, found - 1e-2, False)
    )


@given(st.integers(1, 6), st.integers(1, 2000), st.integers(0, 2**32))
def test_the_error_of_a_transform_is_below_its_bound(log_size, rounds, seed):
    """Against the same power by squaring in extended precision."""
    size = 2 ** (log_size + 3)
    r = np.random.default_rng(seed).random(size) ** 8
    r /= r.sum()
    found, error = composition._power(r, rounds)
    square, left = r.astype(np.longdouble), rounds
    exact = np.zeros(size, np.longdouble)
    exact[0] = 1

    def product(a, b):
        return np.array([a @ np.roll(b[::-1], k + 1) for k in range(size)])

    while left:
        if left % 2:
            exact = product(exact, square)
        square, left = product(square, square), left // 2
    assert float(np.sqrt(((found - exact) ** 2).sum())) <= error
    assert error <= 1e-13 * rounds
