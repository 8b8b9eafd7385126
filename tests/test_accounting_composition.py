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
from rootnoise.accounting import composition, confidence, dominating, gaussian, subsampled
from rootnoise.accounting import monte_carlo as estimate
from rootnoise.accounting.balls_in_bins import Bins
from rootnoise.accounting.confidence import upper
from rootnoise.accounting.cost import MonteCarlo
from rootnoise.accounting.dominating import magnitudes
from rootnoise.accounting.min_sep_poisson import band_rows
from rootnoise.batches.samplers import MinSepPoissonSampler
from rootnoise.causal import Dense, Toeplitz
from rootnoise.cli import main
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, MinSepPoisson
from rootnoise.participation import SingleParticipation as Single
from rootnoise.workload import prefix_sum


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
    found = gaussian._on_grid(1.0, 0.1, 10, 1e-5, 1e-2)
    assert found == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------ one step on a grid


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


@given(st.floats(1e-290, 1e290))
def test_noise_is_never_shown_above_the_computed_one(value):
    shown = float(accounting.round_down(value))
    assert value * (1 - 1e-8) <= shown <= value * (1 + 2e-12)
    assert float(accounting.exactly(value)) == value


def test_methods_say_what_was_done():
    def method(q, sigma):
        return accounting.privacy_cost(CyclicPoisson(1, q), 100, sigma, 1e-9).method

    alone = "analytic Gaussian of 100 rounds, not amplified, for independent noise"
    assert method(1.0, 20.0) == alone
    assert method(0.01, 2.0) == "PLD of 100 Poisson-subsampled Gaussians, for independent noise"
    # Below the finest grid the noise is that without amplification, and said to be.
    assert (
        method(0.01, accounting.noise_multiplier(CyclicPoisson(1, 0.01), 100, 1e-7, 1e-9)) == alone
    )


def account(capsys, line):
    status = main(["account", *line.split()])
    out, err = capsys.readouterr()
    return status, " ".join(out.replace("\u2502", " ").split()), err


def test_account_shows_numbers_on_the_private_side(capsys):
    _, out, _ = account(capsys, "--epsilon 1e-300 --delta 1e-5")
    assert "(1e-300, 1e-05)-differential" in out
    assert "epsilon 0" not in out
    _, out, _ = account(capsys, "--noise-multiplier 2.123456789012 --delta 1.0000004e-5")
    assert out.count("2.123456789012") == 2
    assert "1.0000004e-05)-differential" in out
    _, out, _ = account(capsys, "--epsilon 2 --delta 1e-5")
    needed = accounting.noise_multiplier(Single(), 1, 2.0, 1e-5)
    shown = out.split("noise multiplier ")[1].split()[0]
    assert needed <= float(shown) <= needed * (1 + 1e-8)


def test_account_refuses_bands_that_sampling_cannot_amplify(capsys, tmp_path):
    """Both ways, in one line: 12 bands, and one group that may be drawn at every step."""
    path = tmp_path / "mechanism.json"
    cycle = FixedCycle(12, 2)
    made = factorize(prefix_sum(24), cycle, "bsr", bands=12)
    Mechanism.calibrate(made, cycle, epsilon=2, delta=1e-5).save(path)
    for goal in ("--noise-multiplier 1", "--epsilon 1"):
        line = f"{goal} --delta 1e-5 --mechanism-file {path} --sampling-probability 0.01"
        status, out, err = account(capsys, line)
        assert status == 2
        assert out == ""
        assert err.count("\n") == 1
        assert "bands must be in [1, groups=1] under cyclic Poisson" in err
        assert "got 12" in err


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


@pytest.mark.parametrize("ask", [accounting.privacy_cost, accounting.noise_multiplier])
def test_a_hundred_bands_are_not_amplified(ask):
    """They once got epsilon 0.718, where delta is 0.03 at epsilon 1."""
    wide = Toeplitz(np.ones(100), 100)
    with pytest.raises(RootnoiseError, match=r"^bands must be in \[1, groups=1\].*got 100"):
        ask(CyclicPoisson(1, 0.01), 100, 1.0, 1e-5, strategy=wide)


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


@pytest.mark.parametrize("mean", [0.0, 1e-6, 0.01, 0.3, 0.9])
def test_hoeffding_against_many_digits(mean):
    """The root of size KL(mean | m) = ln(1 / f), never below it, and within 2e-11."""
    size, failure = 500, 1e-3
    with mpmath.workdps(40):
        p, level = mpmath.mpf(mean), mpmath.log(1 / mpmath.mpf(failure)) / size

        def excess(m):
            first = p * mpmath.log(p / m) if mean else 0
            return first + (1 - p) * mpmath.log((1 - p) / (1 - m)) - level

        high = min(p + mpmath.sqrt(level), 1 - mpmath.mpf(10) ** -30)
        exact = mpmath.findroot(excess, (p, high), solver="anderson", tol=1e-30)
        assert 0 < confidence._hoeffding(mean, size, failure) / exact - 1 < 2e-11
    # The least of both, each with half of failure; of rare large samples it is this one.
    for largest in (0.01, 7.0):
        found = upper(largest * mean, largest**2 * mean, size, largest, 2 * failure)
        assert found == pytest.approx(largest * float(exact), rel=1e-10)


def test_few_samples_or_large_ones_bound_nothing():
    """No m below 1 is unlikely enough: the bound is the largest sample."""
    assert confidence._hoeffding(1.0, 1000, 1e-6) == confidence._hoeffding(0.5, 1, 1e-300) == 1.0
    assert upper(0.02, 4e-4, 1000, 0.02, 1e-6) == 0.02
    assert upper(0.03, 9e-4, 1000, 0.02, 1e-6) == 0.02  # a mean above it by rounding


def test_how_to_sample_is_held_to_its_range():
    assert MonteCarlo() == MonteCarlo(250_000, 0, 1e-6)
    exact = MonteCarlo(1000, 0, 0.5)
    assert (exact.samples, exact.seed, exact.failure) == (1000, 0, 0.5)
    for wrong, line in (
        ({"samples": 999}, "samples must be >= 1000, got 999"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"failure": 0.0}, "failure must be a finite number > 0 and <= 0.5, got 0.0"),
        ({"failure": 0.51}, "failure must be a finite number > 0 and <= 0.5, got 0.51"),
    ):
        with pytest.raises(RootnoiseError, match=line.replace(".", r"\.")):
            MonteCarlo(**wrong)


def test_magnitudes_of_any_strategy(monkeypatch):
    matrix = np.tril(np.arange(9.0).reshape(3, 3) - 4.0) + 9 * np.eye(3)
    np.testing.assert_array_equal(magnitudes(Dense(matrix)).dense(), np.abs(matrix))
    found = magnitudes(Toeplitz(np.array([1.0, -0.5]), 4))
    np.testing.assert_array_equal(found.coefficients, [1.0, 0.5])
    monkeypatch.setattr(dominating, "DENSE", 3)
    magnitudes(Dense(matrix))
    monkeypatch.setattr(dominating, "DENSE", 2)
    with pytest.raises(RootnoiseError, match=r"^n_steps must be at most 2 where steps are random"):
        magnitudes(Dense(matrix))
