"""Optimised bands of C and of C^-1, against reference values, other optima, and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adversary
from rootnoise._check import RootnoiseError
from rootnoise.causal import Toeplitz, series
from rootnoise.factorization import Factorization, banded, banded_inverse, factorize
from rootnoise.factorization.base import Search
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum

TEN, FIVE = MinSeparation(100, 10), MinSeparation(100, 5)
ANY = ToeplitzWorkload(2.0 / (1 + np.arange(200)) ** 0.7)


def rmse(work, who, mechanism, **options):
    return factorize(work, who, mechanism, **options).rmse(who)


# Digits of an independent optimiser.
@pytest.mark.parametrize(
    ("work", "who", "expected", "digits"),
    [
        (SGD(1000, 0.9, 0.9999), TEN, 84.33612767662324, 1e-11),
        (prefix_sum(500), FIVE, 6.8658, 1e-5),
        (prefix_sum(1000), TEN, 11.5727, 1e-5),
        (SGD(1000, 0.0, 0.999), TEN, 9.8315, 1e-5),
        (SGD(1000, 0.9), TEN, 86.662, 1e-5),
    ],
)
def test_optimised_bands(work, who, expected, digits):
    made = factorize(work, who, "banded")
    assert made.rmse(who) == pytest.approx(expected, rel=digits)
    assert made.sensitivity(who).exact
    assert made.memory_rows == 99


@pytest.mark.parametrize("work", [prefix_sum(200), SGD(200, 0.9), ANY], ids=["sum", "sgd", "any"])
@pytest.mark.parametrize("bands", [1, 3, 20, 50])
@pytest.mark.parametrize(
    "who",
    [SingleParticipation(), MinSeparation(20, 10), FixedCycle(20, 10), CyclicPoisson(50, 0.1)],
    ids=str,
)
def test_banded_is_at_least_as_good_as_bsr_and_locally_best(work, who, bands):
    made = factorize(work, who, "banded", bands=bands)
    best = made.rmse(who)
    assert best <= rmse(work, who, "bsr", bands=bands)
    c = made.strategy.column(0)[: made.strategy.bands]
    if c.size == 1 or (bands > 20 and isinstance(who, FixedCycle)):
        return  # nothing is free, or coefficients have a bound
    generator = np.random.default_rng(0)
    for _ in range(5):
        moved = Toeplitz(c + 1e-3 * c.min() * generator.standard_normal(c.size), 200)
        assert best <= Factorization("moved", work, moved).rmse(who)


def test_more_bands_than_the_separation_pay_only_for_a_fixed_cycle():
    work = prefix_sum(600)
    narrow = rmse(work, MinSeparation(20, 30), "banded")
    wide = factorize(work, MinSeparation(20, 30), "banded", bands=60)
    assert wide.strategy.bands == 20
    assert wide.rmse(MinSeparation(20, 30)) == pytest.approx(narrow, rel=1e-12)
    cycle = factorize(work, FixedCycle(20, 30), "banded", bands=60)
    assert cycle.rmse(FixedCycle(20, 30)) < narrow * 0.999
    assert cycle.sensitivity(FixedCycle(20, 30)).exact


# BandInvMF, p = 4, of an independent optimiser that had to use the envelope of C.
@pytest.mark.parametrize(
    ("work", "who", "enveloped"),
    [
        (prefix_sum(500), FIVE, 7.921),
        (prefix_sum(1000), TEN, 13.403),
        (SGD(1000, 0.0, 0.999), TEN, 11.434),
        (SGD(500, 0.9), FIVE, 50.371),
    ],
)
def test_optimised_bands_of_the_inverse(work, who, enveloped):
    made = factorize(work, who, "banded-inverse", bands=4)
    assert made.rmse(who) < enveloped
    assert made.sensitivity(who).exact
    assert made.memory_rows == 3


@pytest.mark.parametrize("work", [prefix_sum(200), SGD(200, 0.9), ANY], ids=["sum", "sgd", "any"])
@pytest.mark.parametrize(
    "who", [SingleParticipation(), MinSeparation(20, 10), FixedCycle(20, 10)], ids=str
)
def test_banded_inverse_is_at_least_as_good_as_bisr_and_better_with_more_bands(work, who):
    errors = []
    for bands in (1, 2, 4, 8):
        made = factorize(work, who, "banded-inverse", bands=bands)
        assert made.rmse(who) <= rmse(work, who, "bisr", bands=bands) * (1 + 1e-12)
        errors.append(made.rmse(who))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("work", [prefix_sum(512), SGD(512, 0.9)], ids=["sum", "sgd"])
@pytest.mark.parametrize("who", [SingleParticipation(), FixedCycle(128, 4)], ids=str)
def test_many_bands_of_the_inverse_are_no_worse_than_half_as_many(work, who):
    errors = [rmse(work, who, "banded-inverse", bands=bands) for bands in (32, 64, 128)]
    assert errors[2] <= errors[1] <= errors[0]
    assert errors[2] <= rmse(work, who, "bisr", bands=128)
    if isinstance(who, SingleParticipation):  # the last bands gain less than the first
        assert errors[1] - errors[2] < errors[0] - errors[1]


def test_derivatives_of_the_inverse_bands_are_those_of_finite_differences():
    a, who = SGD(30, 0.9).matrix.column(0), FixedCycle(10, 3)
    smooth = banded_inverse._Smooth(a, 20, who, 1e-2)
    x, e = np.random.default_rng(0).standard_normal(19) / 9, 1e-6 * np.eye(19)
    slopes = [(smooth.value(x + h) - smooth.value(x - h)) / 2e-6 for h in e]
    np.testing.assert_allclose(smooth.gradient(x), slopes, rtol=1e-6, atol=1e-6)
    bends = [(smooth.gradient(x + h) - smooth.gradient(x - h)) / 2e-6 for h in e]
    np.testing.assert_allclose(smooth.hessian(x), bends, rtol=1e-5, atol=1e-5)


def test_newton_and_reflections_meet(monkeypatch):
    work, who = SGD(100, 0.9), SingleParticipation()
    newton = rmse(work, who, "banded-inverse", bands=6)
    monkeypatch.setattr(banded_inverse, "NEWTON_WORK", 0)
    assert rmse(work, who, "banded-inverse", bands=6) == pytest.approx(newton, rel=1e-8)


def test_banded_inverse_survives_starts_where_a_long_step_explodes():
    # A step of length 1 from BISR overflows after 5000 coefficients.
    who = MinSeparation(500, 10)
    assert rmse(SGD(5000, 0.9), who, "banded-inverse", bands=4) == pytest.approx(115.109, rel=1e-5)


def test_the_envelope_helps_where_the_first_pattern_is_not_the_worst(monkeypatch):
    work, who = prefix_sum(40), MinSeparation(4, 10)
    made = factorize(work, who, "banded-inverse", bands=8)
    monkeypatch.setattr(banded_inverse, "MISSED", np.inf)
    assert made.rmse(who) < 0.999 * rmse(work, who, "banded-inverse", bands=8)


def test_the_envelope_says_where_it_comes_from():
    magnitudes = np.array([3.0, 1.0, 2.0, 2.0, 0.5])
    np.testing.assert_array_equal(banded_inverse._envelope(magnitudes), [0, 2, 2, 3, 4])


def test_the_line_search_steps_back_from_an_overflow():
    work, who = prefix_sum(9), SingleParticipation()
    search = Search(lambda _: factorize(work), who)

    def objective(x):  # the first step, of length 1, ends at the pole
        return float(np.sum(-100 * x - np.log(1 - x))), 1 / (1 - x) - 100

    found = banded.minimise(objective, np.zeros(1), search)
    np.testing.assert_allclose(found, 0.99, rtol=1e-6)


def test_cyclic_poisson_sampling_needs_bands_of_the_strategy_itself():
    message = r"^bands must be in \[1, groups=5\] under cyclic Poisson sampling, got 20$"
    with pytest.raises(RootnoiseError, match=message):
        factorize(prefix_sum(20), CyclicPoisson(5, 0.1), "banded-inverse", bands=2)


# E_lambda_cgd_unnormalised of the reference values, k = 10 and b = 100 at n = 1000.
@pytest.mark.parametrize(
    ("decay", "momentum", "lam", "expected"),
    [
        (1.0, 0.0, 0.5, 40.967466767342756),
        (0.999, 0.0, 0.95, 13.202537266210737),
        (1.0, 0.9, 0.5, 403.3187577015763),
        (0.9999, 0.9, 0.95, 113.01935041523043),
    ],
)
def test_given_lambda(decay, momentum, lam, expected):
    work = SGD(1000, momentum, decay)
    made = factorize(work, TEN, "lambda-cgd", lam=lam)
    assert made.rmse(TEN) == pytest.approx(expected, rel=1e-12)
    assert made.memory_rows == 1
    best = factorize(work, TEN, "lambda-cgd")
    assert best.rmse(TEN) <= made.rmse(TEN)
    assert best.mechanism == "lambda-cgd"


@pytest.mark.parametrize(
    ("work", "expected"),
    [(prefix_sum(1000), 15.249), (SGD(1000, 0, 0.999), 13.092), (SGD(1000, 0.9), 92.13)],
)
def test_best_lambda(work, expected):
    best = factorize(work, TEN, "lambda-cgd")
    assert best.rmse(TEN) == pytest.approx(expected, rel=3e-5)
    lam = -best.noising.column(0)[1]
    for other in (lam - 1e-4, lam + 1e-4):
        assert best.rmse(TEN) < rmse(work, TEN, "lambda-cgd", lam=other)


@pytest.mark.parametrize("lam", [-0.1, 1.0, float("nan")])
def test_lambda_out_of_range_is_refused(lam):
    message = rf"^lam must be a finite number >= 0 and < 1, got {lam}$"
    with pytest.raises(RootnoiseError, match=message):
        factorize(prefix_sum(9), mechanism="lambda-cgd", lam=lam)


def test_one_step_is_the_identity():
    for mechanism in ("banded", "banded-inverse", "lambda-cgd"):
        assert factorize(prefix_sum(1), mechanism=mechanism).strategy.dense() == [[1.0]]


@pytest.mark.parametrize("mechanism", ["banded", "banded-inverse"])
@pytest.mark.parametrize("bands", [0, 10])
def test_bands_out_of_range_are_refused(mechanism, bands):
    message = rf"^bands must be in \[1, n_steps=9\], got {bands}$"
    with pytest.raises(RootnoiseError, match=message):
        factorize(prefix_sum(9), mechanism=mechanism, bands=bands)


@pytest.mark.parametrize("mechanism", ["banded", "banded-inverse"])
def test_optimisers_repeat_themselves_and_report(mechanism):
    who = MinSeparation(10, 5)
    seen: tuple[list, list] = [], []
    first, second = (
        factorize(
            prefix_sum(50),
            who,
            mechanism,
            bands=4,
            progress=lambda count, least, log=log: log.append((count, least)),
        )
        for log in seen
    )
    np.testing.assert_array_equal(first.strategy.column(0), second.strategy.column(0))
    assert seen[0] == seen[1]
    assert [count for count, _ in seen[0]] == list(range(1, len(seen[0]) + 1))
    assert seen[0][-1][1] == first.rmse(who)


@given(st.lists(st.floats(-0.95, 0.95), min_size=1, max_size=8))
def test_reflections_make_stable_series_and_come_back(reflections):
    r = np.array(reflections)
    d, _ = banded_inverse._from_reflections(r)
    assert np.all(np.abs(np.roots(d)) < 1)
    np.testing.assert_allclose(banded_inverse._reflections(d), r, atol=1e-7)


def test_unstable_starts_are_moved_inside():
    assert np.all(np.abs(banded_inverse._reflections(np.array([1.0, -3.0, 0.2]))) < 1)


def test_gradients_are_those_of_differences():
    generator = np.random.default_rng(1)
    r = generator.uniform(-0.7, 0.7, 5)
    v, weights = generator.standard_normal((2, 30))
    d, pull_reflections = banded_inverse._from_reflections(r)
    _, pull_back = banded.divide(v, d, 30)
    gradient = pull_reflections(pull_back(weights))

    def value(x):
        return weights @ banded.divide(v, banded_inverse._from_reflections(x)[0], 30)[0]

    numeric = [(value(r + e) - value(r - e)) / 2e-6 for e in 1e-6 * np.eye(5)]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("k", [1, 4])
def test_the_gradient_of_the_pattern_is_that_of_differences(k):
    c = np.random.default_rng(2).uniform(0.1, 1, 9)
    who = FixedCycle(3, 4) if k == 4 else SingleParticipation()
    _, gradient = banded.first_pattern(c, 10, who)
    numeric = [
        (banded.first_pattern(c + e, 10, who)[0] - banded.first_pattern(c - e, 10, who)[0]) / 2e-6
        for e in 1e-6 * np.eye(9)
    ]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-7)


def test_long_correlations_by_fft_are_those_of_dot_products(monkeypatch):
    x, y = np.random.default_rng(3).standard_normal((2, 100))
    direct = banded.correlate(x, y, 7)
    monkeypatch.setattr(series, "FILTER_WORK", 0)
    np.testing.assert_allclose(banded.correlate(x, y, 7), direct, atol=1e-13)


def test_schedules_are_optimised_for_their_toeplitz_neighbour():
    who = MinSeparation(10, 4)
    steady = ScheduledSGD(np.full(40, 2.0), momentum=0.5)
    for mechanism in ("banded", "banded-inverse"):
        expected = 2 * rmse(SGD(40, 0.5), who, mechanism, bands=5)
        assert rmse(steady, who, mechanism, bands=5) == pytest.approx(expected, rel=1e-9)


def test_workloads_without_such_a_neighbour_are_refused():
    message = r"^workload must be Toeplitz, or SGD with a schedule, for a Toeplitz strategy, "
    for mechanism in ("banded", "banded-inverse", "lambda-cgd"):
        with pytest.raises(RootnoiseError, match=message):
            factorize(MatrixWorkload(np.tri(5)), mechanism=mechanism)


@pytest.mark.parametrize("who", [MinSeparation(3, 4), FixedCycle(3, 4)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        ("banded", {}),
        ("banded", {"bands": 7}),
        ("banded-inverse", {"bands": 3}),
        ("banded-inverse", {"bands": 6}),  # C rises, and has negative entries
        ("lambda-cgd", {}),
    ],
)
def test_no_person_exceeds_the_sensitivity(mechanism, options, momentum, who):
    made = factorize(SGD(12, momentum), who, mechanism, **options)
    sens = made.sensitivity(who)
    worst = adversary.worst(made.strategy.dense(), who)
    assert worst <= sens.value * (1 + 1e-12)
    if sens.exact:
        assert worst == pytest.approx(sens.value, rel=1e-9)
