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

from rootnoise import RootnoiseError, accounting
from rootnoise.accounting import estimate, gaussian
from rootnoise.accounting.bins import Bins
from rootnoise.accounting.confidence import upper
from rootnoise.accounting.cost import MonteCarlo
from rootnoise.accounting.separated import band_rows
from rootnoise.causal import Toeplitz
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, MinSepPoisson
from rootnoise.participation import SingleParticipation as Single
from rootnoise.sampling import MinSepPoissonSampler


def inverted(sigma: float, q: float, rounds: int, delta: float, add: bool) -> float:
    """Invert the moment generating function of the exact loss along a line through the saddle.

    delta(eps) = 1/(2 pi) int M(z)^n e^(-z eps) / (z (1 + z)) dt, z = theta + i t; M by trapezoid.
    """
    x = np.linspace(-14 * sigma, 14 * sigma + 1, 1501)
    zero = np.exp(-(x**2) / 2 / sigma**2) / sigma / math.sqrt(2 * math.pi) * (x[1] - x[0])
    excess = q * np.expm1((2 * x - 1) / 2 / sigma**2)
    loss = np.log1p(excess)
    upper_, loss = (zero, -loss) if add else (zero * (1 + excess), loss)

    def log_m(z):
        # log of 1 + E (e^(z L) - 1): near 1 the sum of the masses must not matter.
        return np.log1p(np.expm1(np.multiply.outer(z, loss)) @ upper_)

    def chernoff(theta):
        peak = theta * math.log(theta) - (1 + theta) * math.log1p(theta)  # of (1 - e^-x) e^-theta x
        return (rounds * float(log_m(np.array([theta]))[0]) + peak - math.log(delta)) / theta

    thetas = np.geomspace(1e-2, 3e2, 400)
    with np.errstate(over="ignore"):  # beyond the largest theta that these losses allow
        theta = float(min(thetas, key=chernoff))
    h = 1e-3 * theta
    curve = float(log_m(np.array([theta + h, theta, theta - h])) @ [1, -2, 1]) / h**2
    t = np.linspace(-30, 30, 4001) / math.sqrt(rounds * curve)
    z = theta + 1j * t
    power = rounds * log_m(z)

    def excess_delta(epsilon):
        terms = np.exp(power - z * epsilon - (power[2000].real - theta * epsilon)) / (z * (1 + z))
        total = float(terms.sum().real) * (t[1] - t[0]) / 2 / math.pi
        return math.exp(power[2000].real - theta * epsilon - math.log(delta)) * total - 1

    centre = chernoff(theta)
    return float(brentq(excess_delta, centre * 0.7, centre))


@pytest.mark.parametrize(
    ("sigma", "q", "rounds", "delta", "known", "slack"),
    [
        (1.0, 1e-4, 10**6, 1e-10, 0.7657, 1e-2),
        (2.0, 0.01, 10**5, 1e-11, 12.3798, 1e-3),
        (1.0, 1e-4, 10**5, 1e-12, 0.27, 0.06),
        (1.0, 0.01, 2000, 1e-5, 2.5838, 1e-3),
    ],
)
def test_composition_is_an_upper_bound_where_rounding_drowned_the_tail(
    sigma, q, rounds, delta, known, slack
):
    if q > 1e-3:  # where q is less, the inversion along a line does not converge: known value
        exact = max(inverted(sigma, q, rounds, delta, add) for add in (False, True))
        assert exact == pytest.approx(known, rel=2e-4)
    else:
        exact = known * (1 - 1e-4)
    found = gaussian.poisson_epsilon(sigma, q, rounds, delta)
    assert exact <= found <= exact * (1 + slack)


@pytest.mark.parametrize(
    ("sigma", "rounds", "delta"), [(1000.0, 10**6, 1e-12), (4.0, 16, 1e-15), (30.0, 900, 1e-9)]
)
def test_composed_grids_are_above_exact_gaussians(sigma, rounds, delta):
    exact = gaussian.gaussian_epsilon(sigma / math.sqrt(rounds), delta)
    found = gaussian._on_grid(sigma, 1.0, rounds, delta, 1e-2 / 4**4)
    assert exact * (1 - 1e-9) <= found <= exact * 1.001
    stated = gaussian.poisson_epsilon(sigma, 1.0, rounds, delta)
    assert exact <= stated <= exact * (1 + 1e-9)


def test_both_directions_count(monkeypatch):
    """Where the add direction alone is given a heavy tail, it decides."""
    made = privacy_loss_distribution.from_gaussian_mechanism
    few = made(2.0, sampling_prob=0.1, value_discretization_interval=1e-2)
    many = made(1.0, sampling_prob=0.1, value_discretization_interval=1e-2)
    for remove, add in ((few, many), (many, few)):
        few_many = type(few)(remove._pmf_remove, add._pmf_remove)
        monkeypatch.setattr(
            privacy_loss_distribution,
            "from_gaussian_mechanism",
            lambda *a, both=few_many, **k: both,
        )
        found = gaussian._on_grid(1.0, 0.1, 10, 1e-5, 1e-2)
        assert found == pytest.approx(many.self_compose(10).get_epsilon_for_delta(1e-5), rel=1e-3)


# ------------------------------------------------------------------------------ one Gaussian


def exact_log_delta(sigma: float, epsilon: float) -> mpmath.mpf:
    with mpmath.workdps(90):
        mu, e = 1 / mpmath.mpf(sigma), mpmath.mpf(epsilon)
        a = e / mu - mu / 2
        tail = [mpmath.erfc(x / mpmath.sqrt(2)) / 2 for x in (a, a + mu)]
        return mpmath.log(tail[0] - mpmath.exp(e) * tail[1])


@given(st.floats(-20, 6), st.floats(-30, -0.31))
def test_gaussian_calibration_is_on_the_private_side_at_every_epsilon(log_epsilon, log_delta):
    epsilon, delta = 10**log_epsilon, 10**log_delta
    excess = exact_log_delta(gaussian.gaussian_multiplier(epsilon, delta), epsilon)
    assert -1e-7 < excess - mpmath.log(delta) <= 0


@given(st.floats(-2, 10), st.floats(-40, -0.31))
def test_gaussian_epsilon_is_on_the_private_side(log_sigma, log_delta):
    sigma, delta = 10**log_sigma, 10**log_delta
    epsilon = gaussian.gaussian_epsilon(sigma, delta)
    excess = exact_log_delta(sigma, epsilon) - mpmath.log(delta)
    assert excess <= 0
    assert epsilon == 0 or excess > -1e-9


@given(st.floats(1e-300, 1e300))
def test_shown_numbers_are_never_below_the_computed_ones(value):
    for digits in (6, 9):
        assert (
            value <= float(accounting.round_up(value, digits)) <= value * (1 + 10 ** (2 - digits))
        )


# ------------------------------------------------------------------------------ what is refused


BANDED = Toeplitz(np.ones(12), 24)


@pytest.mark.parametrize("ask", [accounting.privacy_cost, accounting.noise_multiplier])
@pytest.mark.parametrize(
    ("who", "n", "line"),
    [
        (CyclicPoisson(1, 0.01), 24, r"bands must be in \[1, groups=1\] under cyclic Poisson"),
        (MinSepPoisson(3, 0.01), 24, r"bands must be in \[1, min_sep=3\] under min-sep Poisson"),
        (CyclicPoisson(12, 0.01), 36, "strategy must have n_steps=36, got 24"),
        (FixedCycle(12, 3), 36, "strategy must have n_steps=36, got 24"),
        (BallsInBins(12, 3), 36, "strategy must have n_steps=36, got 24"),
        (Single(), 23, "strategy must have n_steps=23, got 24"),
        (Single(), 0, "n_steps must be >= 1, got 0"),
    ],
)
def test_every_entry_refuses_a_strategy_that_does_not_fit(ask, who, n, line):
    with pytest.raises(RootnoiseError, match=f"^{line}"):
        ask(who, n, 1.0, 1e-5, strategy=BANDED)


def test_what_is_assumed_of_a_missing_strategy_is_said():
    assert accounting.privacy_cost(CyclicPoisson(4, 0.1), 8, 2.0, 1e-5).method.endswith(
        ", for strategies of at most 4 bands"
    )
    assert accounting.privacy_cost(CyclicPoisson(1, 0.1), 8, 2.0, 1e-5).method.endswith(
        ", for independent noise"
    )


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: gaussian.gaussian_epsilon(1e-160, 1e-5), "noise_multiplier must be in .*1e-160"),
        (lambda: gaussian.gaussian_multiplier(1e300, 1e-5), "epsilon must have a .*got 1e\\+300"),
    ],
)
def test_beyond_the_floats(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


def test_far_too_little_noise_is_answered_by_what_holds_anyway():
    found = gaussian.poisson_epsilon(0.01, 0.5, 10, 1e-5)
    assert found == pytest.approx(gaussian.gaussian_epsilon(0.01 / math.sqrt(10), 1e-5), rel=1e-9)
    sigma = gaussian.poisson_multiplier(1e13, 0.5, 10, 1e-5)
    assert gaussian.poisson_epsilon(sigma, 0.5, 10, 1e-5) <= 1e13


# ------------------------------------------------------------------------------ Monte Carlo


def test_every_noise_multiplier_has_its_own_streams():
    settings = MonteCarlo(samples=1000)
    drawn = [
        estimate._stream(settings, purpose, number).random()
        for purpose in (0, 1, 2)
        for number in (0, 1, 2**32, 2**32 + 1)
    ]
    assert len(set(drawn)) == len(drawn)


# mypy: disable-error-code=func-returns-value


def test_bound_and_pilot_have_streams_and_failures_of_their_own(monkeypatch):
    asked: list[tuple[int, ...]] = []
    failures: list[tuple[int, float]] = []
    stream, remove, add = estimate._stream, estimate._remove, estimate._add
    monkeypatch.setattr(
        estimate, "_stream", lambda s, *purpose: asked.append(purpose) or stream(s, *purpose)
    )
    monkeypatch.setattr(
        estimate, "_remove", lambda m, r, n, t, f: failures.append((n, f)) or remove(m, r, n, t, f)
    )
    monkeypatch.setattr(
        estimate, "_add", lambda m, r, n, t, f: failures.append((n, f)) or add(m, r, n, t, f)
    )
    strategy = Toeplitz(np.ones(1), 8)
    settings = MonteCarlo(samples=20_000, failure=1e-3)
    ask = accounting.privacy_cost
    for sigma in (1.0, 1.5):
        ask(BallsInBins(4, 2), 8, sigma, 1e-5, strategy=strategy, monte_carlo=settings)
    bounds = [purpose for purpose in asked if len(purpose) == 2]
    assert [purpose[0] for purpose in bounds] == [1, 2, 1, 2]  # remove and add, none of the pilot's
    assert bounds[0][1] == bounds[1][1] != bounds[2][1] == bounds[3][1]
    assert {f for n, f in failures if n == settings.samples} == {1e-3 / 2 / 8}


def test_the_add_direction_can_decide(monkeypatch):
    """Its bound above the target moves epsilon."""
    gram = np.diag([1.2, 1.2])
    plain = estimate.epsilon(Bins(gram), 1e-5, MonteCarlo(20_000))
    add = estimate._add

    def heavier(*arguments):
        found = add(*arguments)
        return estimate._Delta(
            found.log_ratio, found.log_weight, lambda e: found.log_range(e) + 20, found.failure
        )

    monkeypatch.setattr(estimate, "_add", heavier)
    assert estimate.epsilon(Bins(gram), 1e-5, MonteCarlo(20_000)) > plain * 1.05


def test_empirical_bernstein_by_hand():
    """Maurer and Pontil's ln(2 / f), f half of failure; Hoeffding's is larger here."""
    mean, square, size, failure = 1e-3, 2e-6, 10**6, 1e-6
    log = math.log(2 / (failure / 2))
    expected = mean + math.sqrt(2 * square * log / (size - 1)) + 7 * log / 3 / (size - 1)
    assert upper(mean, square, size, 1.0, failure) == pytest.approx(expected, rel=1e-12)


def test_rows_of_bands_are_magnitudes():
    c = Toeplitz(np.array([1.0, -0.5, 0.25]), 5)
    rows = band_rows(c)
    np.testing.assert_array_equal(rows[1], [0.5, 0.5, 0.5, 0.5, 0])
    assert rows.min() >= 0


def test_waits_of_min_sep_sampling_have_their_rate():
    """False-alarm rate 1e-9: six deviations of about 200,000 first joins; 3 % would be 13."""
    n, b, p = 400_000, 2, 0.5
    sampler = MinSepPoissonSampler(
        n, batch_size=round(n * p / (1 + (b - 1) * p)), n_steps=3, min_sep=b, seed=0
    )
    p, rate = sampler.participation.probability, sampler.participation.rate
    first, second, third = (set(batch.tolist()) for batch in sampler)
    assert abs(len(first) - n * rate) < 6 * math.sqrt(n * rate * (1 - rate))
    # Stationary: who did not join step 0 joins step 1 as often as any step.
    pool, chance = n - len(first), rate / (1 - rate)
    assert abs(len(second) - pool * chance) < 6 * math.sqrt(pool * chance * (1 - chance))
    again = len(third & first)  # they sat out b - 1 = 1 step
    assert abs(again - len(first) * p) < 6 * math.sqrt(len(first) * p * (1 - p))
