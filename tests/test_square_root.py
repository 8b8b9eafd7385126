"""BISR, powers of the workload, and automatic bands, against dense algebra and reference values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adversary
import oracle
from rootnoise._check import RootnoiseError
from rootnoise.causal import series
from rootnoise.factorization import factorize, square_root
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, ScheduledSGD, ToeplitzWorkload, learning_rates, prefix_sum

TEN = MinSeparation(100, 10)


@given(st.integers(1, 24), st.integers(1, 24), st.floats(0, 0.99), st.floats(0.01, 1))
def test_bisr_is_the_banded_inverse_of_the_dense_root(n, bands, momentum, decay):
    bands = min(bands, n)
    made = factorize(SGD(n, momentum, decay), mechanism="bisr", bands=bands)
    root = oracle.square_root(oracle.sgd_matrix(n, momentum, decay))
    noising = oracle.banded(np.linalg.inv(root), bands)
    np.testing.assert_allclose(made.noising.dense(), noising, atol=1e-12)
    assert made.memory_rows <= bands - 1


def test_bisr_of_any_toeplitz_workload():
    work = ToeplitzWorkload(2.0 / (1 + np.arange(24)) ** 0.7)
    made = factorize(work, mechanism="bisr", bands=5)
    noising = oracle.banded(np.linalg.inv(oracle.square_root(work.matrix.dense())), 5)
    np.testing.assert_allclose(made.noising.dense(), noising, atol=1e-13)


def test_bisr_with_all_bands_is_the_square_root():
    work = SGD(300, 0.9, 0.999)
    full, bisr = (factorize(work, mechanism=name) for name in ("square-root", "bisr"))
    who = SingleParticipation()
    np.testing.assert_allclose(bisr.strategy.column(0), full.strategy.column(0), rtol=1e-11)
    assert bisr.rmse(who) == pytest.approx(full.rmse(who), rel=1e-12)


# E_bisr of the reference values, k = 10 and b = 100 at n = 1000.
@pytest.mark.parametrize(
    ("decay", "momentum", "bands", "rmse"),
    [
        (1.0, 0.0, 2, 40.967466767342756),
        (1.0, 0.0, 64, 12.3658436665655),
        (0.999, 0.0, 100, 10.852458712537059),
        (1.0, 0.9, 16, 101.75632050736877),
        (0.9999, 0.9, 4, 110.57476042232494),
    ],
)
def test_bisr_errors(decay, momentum, bands, rmse):
    made = factorize(SGD(1000, momentum, decay), TEN, "bisr", bands=bands)
    assert made.rmse(TEN) == pytest.approx(rmse, rel=1e-12)
    assert made.sensitivity(TEN).exact


@pytest.mark.parametrize("mechanism", ["bsr", "bisr"])
def test_automatic_bands_are_the_best_of_all(mechanism):
    work, who = prefix_sum(60), MinSeparation(5, 12)
    auto = factorize(work, who, mechanism, bands="auto").rmse(who)
    errors = [factorize(work, who, mechanism, bands=p).rmse(who) for p in range(1, 61)]
    assert auto == min(errors)


@pytest.mark.parametrize("mechanism", ["bsr", "bisr"])
def test_automatic_bands_from_coarse_to_fine_are_within_a_thousandth(mechanism, monkeypatch):
    work, who = SGD(400, 0.5), MinSeparation(4, 100)
    scanned = factorize(work, who, mechanism, bands="auto").rmse(who)
    monkeypatch.setattr(square_root, "SCAN", 0)
    seen = []
    searched = factorize(
        work,
        who,
        mechanism,
        bands="auto",
        progress=lambda count, least: seen.append((count, least)),
    ).rmse(who)
    assert scanned <= searched <= scanned * 1.001
    assert [count for count, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) < 60
    assert seen[-1][1] == searched


@pytest.mark.parametrize("mechanism", ["bsr", "bisr"])
@pytest.mark.parametrize("period", [4, 30])
def test_automatic_bands_of_a_schedule_lose_at_most_a_thousandth(mechanism, period, monkeypatch):
    work = ScheduledSGD(learning_rates("cosine", 120), 0.5)
    who = FixedCycle(period, 120 // period)
    seen = []
    searched = factorize(
        work, who, mechanism, bands="auto", progress=lambda count, least: seen.append(count)
    ).rmse(who)
    assert len(seen) < 60
    monkeypatch.setattr(square_root, "SCAN_IN_GENERAL", 120)
    scanned = factorize(work, who, mechanism, bands="auto").rmse(who)
    assert scanned <= searched <= scanned * 1.001


@pytest.mark.parametrize(
    ("n", "k", "momentum", "bands"), [(128, 8, 0.0, 16), (64, 8, 0.9, 8), (250, 5, 0.0, 50)]
)
def test_automatic_bands_are_the_separation_for_few_participations(n, k, momentum, bands):
    made = factorize(SGD(n, momentum), MinSeparation(n // k, k), "bsr", bands="auto")
    assert made.strategy.bands == bands


def test_automatic_bands_keep_to_the_groups_of_cyclic_poisson_sampling():
    made = factorize(prefix_sum(60), CyclicPoisson(7, 0.1), "bsr", bands="auto")
    assert made.strategy.bands == 7


@pytest.mark.parametrize("mechanism", ["bsr", "bisr"])
def test_other_words_for_bands_are_refused(mechanism):
    with pytest.raises(RootnoiseError, match=r"^bands must be an integer, got 'best'$"):
        factorize(prefix_sum(9), mechanism=mechanism, bands="best")


@given(st.floats(0, 1), st.floats(0, 0.99), st.floats(0.01, 1), st.integers(1, 40))
def test_powers_of_any_series_are_those_of_sgd(exponent, momentum, decay, size):
    root = series.sgd_power(decay, momentum, 0.5, size)
    power = series.power(root, 2 * exponent, size)
    expected = series.sgd_power(decay, momentum, exponent, size)
    np.testing.assert_allclose(power, expected, atol=1e-12 * expected.max())


def test_powers_need_a_positive_start():
    message = r"^series must start with a positive coefficient to have powers, got -1.0$"
    with pytest.raises(RootnoiseError, match=message):
        series.power(np.array([-1.0, 2.0]), 0.5, 2)


@pytest.mark.parametrize(
    "work", [SGD(60, 0.9), ToeplitzWorkload(1 / (1 + np.arange(60)) ** 0.5)], ids=["sgd", "any"]
)
def test_gamma_half_is_bsr_and_one_is_the_workload(work):
    who = MinSeparation(20, 3)
    half = factorize(work, who, "bsr-gamma", gamma=0.5)
    bsr = factorize(work, who, "bsr")
    np.testing.assert_allclose(half.strategy.column(0), bsr.strategy.column(0), rtol=1e-12)
    whole = factorize(work, who, "bsr-gamma", bands=60, gamma=1.0)
    np.testing.assert_allclose(whole.strategy.dense(), work.matrix.dense(), rtol=1e-11)
    none = factorize(work, who, "bsr-gamma", gamma=0)
    np.testing.assert_allclose(none.strategy.dense(), np.eye(60), atol=1e-15)


# The best gamma and its error, to the digits of an independent search.
@pytest.mark.parametrize(
    ("work", "who", "rmse", "gamma"),
    [
        (prefix_sum(500), MinSeparation(100, 5), 6.8709, 0.54),
        (prefix_sum(1000), TEN, 11.6116, 0.58),
        (SGD(1000, 0.0, 0.999), TEN, 9.8560, None),
        (SGD(1000, 0.9), TEN, 86.999, 0.56),
    ],
)
def test_best_gamma(work, who, rmse, gamma):
    made = factorize(work, who, "bsr-gamma")
    assert rmse * 0.999 < made.rmse(who) < rmse * 1.00001
    assert made.rmse(who) < factorize(work, who, "bsr").rmse(who)
    assert made.sensitivity(who).exact
    if gamma is not None:
        found = made.strategy.column(0)[1] / (1 + work.momentum)
        assert found == pytest.approx(gamma, abs=0.006)


def test_the_search_for_gamma_repeats_itself_and_reports():
    seen = []
    first, second = (
        factorize(
            prefix_sum(50),
            FixedCycle(10, 5),
            "bsr-gamma",
            progress=lambda count, least: seen.append((count, least)),
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.strategy.column(0), second.strategy.column(0))
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert [least for _, least in seen[: len(seen) // 2]] == sorted(
        (least for _, least in seen[: len(seen) // 2]), reverse=True
    )


@pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan")])
def test_gamma_out_of_range_is_refused(gamma):
    message = rf"^gamma must be a finite number >= 0 and <= 1, got {gamma}$"
    with pytest.raises(RootnoiseError, match=message):
        factorize(prefix_sum(9), mechanism="bsr-gamma", gamma=gamma)


@pytest.mark.parametrize("mechanism", ["bsr", "bisr", "bsr-gamma"])
@pytest.mark.parametrize("bands", [0, 10])
def test_bands_out_of_range_are_refused(mechanism, bands):
    message = rf"^bands must be in \[1, n_steps=9\], got {bands}$"
    with pytest.raises(RootnoiseError, match=message):
        factorize(prefix_sum(9), mechanism=mechanism, bands=bands)


@pytest.mark.parametrize("who", [MinSeparation(3, 4), FixedCycle(3, 4)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        ("bisr", {"bands": 2}),
        ("bisr", {"bands": 7}),
        ("bsr-gamma", {}),
        ("bsr-gamma", {"bands": 5, "gamma": 0.9}),  # rises with momentum, and columns overlap
    ],
)
def test_no_person_exceeds_the_sensitivity(mechanism, options, momentum, who):
    made = factorize(SGD(12, momentum), who, mechanism, **options)
    sens = made.sensitivity(who)
    worst = adversary.worst(made.strategy.dense(), who)
    assert worst <= sens.value * (1 + 1e-12)
    if sens.exact:
        assert worst == pytest.approx(sens.value, rel=1e-9)
