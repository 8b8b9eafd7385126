"""What bounds by Monte Carlo are made of: streams, confidence bounds, rows of magnitudes."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from rootnoise import RootnoiseError, accounting
from rootnoise.accounting import confidence, dominating
from rootnoise.accounting import monte_carlo as estimate
from rootnoise.accounting.balls_in_bins import Bins
from rootnoise.accounting.confidence import upper
from rootnoise.accounting.cost import MonteCarlo
from rootnoise.accounting.dominating import magnitudes
from rootnoise.accounting.min_sep_poisson import band_rows
from rootnoise.causal import Dense, Toeplitz
from rootnoise.participation import BallsInBins
from rootnoise.participation.samplers import MinSepPoissonSampler


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
    strategy = Toeplitz(np.array([1.0, 0.9]), 8)  # of independent noise no samples are drawn
    settings = MonteCarlo(samples=20_000, failure=1e-3)
    ask = accounting.privacy_cost
    for sigma in (1.0, 1.5):
        ask(BallsInBins(4, 2), 8, sigma, 1e-5, strategy=strategy, monte_carlo=settings)
    bounds = [purpose for purpose in asked if purpose[0] > 0]
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
