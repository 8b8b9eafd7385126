"""Unit columns and epoch scales, against reference values, dense optima and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

import adversary
import oracle
from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize, scaled
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum

TEN = MinSeparation(100, 10)


# E_column_normalised_sqrt_prefix_single of the reference values.
@pytest.mark.parametrize(
    ("n", "rmse"),
    [(16, 1.7090874657923467), (100, 2.2652372397705998), (1000, 2.9839078634236382)],
)
def test_column_normalised_square_root(n, rmse):
    who = SingleParticipation()
    made = factorize(prefix_sum(n), who, "column-normalised")
    assert made.rmse(who) == pytest.approx(rmse, rel=1e-12)
    assert made.rmse(who) < factorize(prefix_sum(n), who, "square-root").rmse(who)
    np.testing.assert_allclose(made.strategy.column_norms(), 1.0, rtol=1e-14)


# E_epoch_scaled_bsr of the reference values, p = b.
@pytest.mark.parametrize(
    ("decay", "momentum", "n", "k", "rmse"),
    [
        (1.0, 0.0, 64, 4, 4.580045761547266),
        (1.0, 0.0, 100, 10, 9.233580658038687),
        (0.999, 0.0, 1000, 10, 9.899558648785604),
        (1.0, 0.9, 500, 5, 46.79419955748846),
        (0.9999, 0.9, 1000, 10, 83.38373301081842),
        (1.0, 0.0, 500, 5, 6.781914632889653),
    ],
)
def test_epoch_scaled_bsr(decay, momentum, n, k, rmse):
    work = SGD(n, momentum, decay)
    for who in (MinSeparation(n // k, k), FixedCycle(n // k, k)):
        made = factorize(work, who, "epoch-scaled")
        if isinstance(who, MinSeparation):
            assert made.rmse(who) == pytest.approx(rmse, rel=1e-10)
        assert made.rmse(who) <= rmse * (1 + 1e-10)  # a fixed cycle has more scales to choose
        assert made.sensitivity(who).exact
        assert made.memory_rows == n // k - 1


# Digits of an independent search, with the gamma of least error after scaling.
@pytest.mark.parametrize(
    ("work", "base", "rmse"),
    [
        (prefix_sum(1000), "bsr-gamma", 11.3411),
        (prefix_sum(1000), "banded", 11.3016),
        (SGD(1000, 0.9), "bsr-gamma", 85.01),
        (SGD(1000, 0.9), "banded", 84.349),
        (SGD(1000, 0.0, 0.999), "banded", 9.7065),
    ],
)
def test_epoch_scales_of_better_bases(work, base, rmse):
    made = factorize(work, TEN, "epoch-scaled", base=base)
    assert made.rmse(TEN) < rmse * (1 + 1e-5) < factorize(work, TEN, base).rmse(TEN)


WORKLOADS = {
    "sum": prefix_sum(40),
    "sgd": SGD(40, 0.9),
    "any": ToeplitzWorkload(2.0 / (1 + np.arange(40)) ** 0.7),
    "scheduled": ScheduledSGD(np.linspace(1, 0.1, 40), momentum=0.5),
    "matrix": MatrixWorkload(np.tri(40)),
}


@pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS.keys())
@pytest.mark.parametrize("who", [MinSeparation(10, 4), FixedCycle(10, 4)], ids=str)
def test_scales_are_the_best_of_all_of_their_kind(work, who):
    made = factorize(work, who, "epoch-scaled")
    plain = factorize(work, who, "bsr")
    assert made.rmse(who) < factorize(work, who, "column-normalised").rmse(who) < plain.rmse(who)
    c, a = plain.strategy.dense(), work.matrix.dense()

    people = 10 if isinstance(who, FixedCycle) else 1  # with scales of their own in each epoch

    def error(log_scales):
        scales = np.exp(log_scales.reshape(4, people))
        scales /= np.linalg.norm(scales, axis=0)
        scaled = c / np.linalg.norm(c, axis=0) * np.repeat(scales.ravel(), 10 // people)
        return np.log(np.sum(oracle.decoder(a, scaled) ** 2))

    best = minimize(error, np.zeros(4 * people), method="BFGS", options={"gtol": 1e-9})
    assert made.rmse(who) == pytest.approx((np.exp(best.fun) / 40) ** 0.5, rel=1e-8)


@pytest.mark.parametrize("n", [95, 100])
def test_parts_of_an_epoch_have_scales_of_their_own(monkeypatch, n):
    """All of them are used, and each person's squares have the same sum, in a short epoch too."""
    who, work = FixedCycle(25, 4), ScheduledSGD(np.linspace(1, 0.02, n), momentum=0.9)
    errors = []
    for parts in (1, 5, 25):
        monkeypatch.setattr(scaled, "PARTS", parts)
        made = factorize(work, who, "epoch-scaled", bands=8)
        errors.append(made.rmse(who))
        norms = made.strategy.column_norms()
        assert np.unique(norms.round(9)).size == {1: 4, 5: -(-n // 5), 25: n}[parts]
        whole = np.bincount(np.arange(n) % 25, norms**2)[: n - 75]
        np.testing.assert_allclose(whole, 4.0, rtol=1e-12)
        assert made.sensitivity(who).value == pytest.approx(2.0, rel=1e-12)
    assert errors[2] < 0.999 * errors[1] < 0.999 * 0.995 * errors[0]


def test_falling_learning_rates_gain_most():
    rates = 1.01 + np.cos(np.pi * np.arange(200) / 200)
    who = MinSeparation(20, 10)
    work = ScheduledSGD(rates, momentum=0.9)
    scaled, plain = (factorize(work, who, name).rmse(who) for name in ("epoch-scaled", "bsr"))
    assert scaled < 0.9 * plain


def test_more_windows_than_participations_share_the_last_scale():
    who = MinSeparation(10, 2)
    made = factorize(prefix_sum(45), who, "epoch-scaled")
    scales = made.strategy.column_norms()
    np.testing.assert_allclose(scales[:10], scales[0])
    np.testing.assert_allclose(scales[10:], scales[10])
    assert made.sensitivity(who).value == pytest.approx(2**0.5, rel=1e-12)
    assert made.rmse(who) < factorize(prefix_sum(45), who, "bsr").rmse(who)


@pytest.mark.parametrize("who", [MinSeparation(10, 4), FixedCycle(10, 4)], ids=str)
def test_a_base_that_fits_better_as_it_is_stays(who):
    work = MatrixWorkload(np.tri(40) * np.linspace(1, 0.1, 40))  # its root has falling columns
    plain, scaled = (factorize(work, who, name).rmse(who) for name in ("bsr", "column-normalised"))
    assert scaled == plain


@pytest.mark.parametrize("n", [31, 35, 39])
@pytest.mark.parametrize("mechanism", ["column-normalised", "epoch-scaled"])
@pytest.mark.parametrize("who", [MinSeparation(10, 4), FixedCycle(10, 4)], ids=str)
def test_a_short_last_epoch_is_never_a_loss(n, mechanism, who):
    base = factorize(prefix_sum(n), who, "banded")
    scaled = factorize(prefix_sum(n), who, mechanism, base="banded")
    assert scaled.rmse(who) <= base.rmse(who)
    assert scaled.mechanism == mechanism


@pytest.mark.parametrize("mechanism", ["column-normalised", "epoch-scaled"])
@pytest.mark.parametrize("who", [SingleParticipation(), CyclicPoisson(10, 0.1)], ids=str)
def test_one_participation_has_unit_columns(mechanism, who):
    made = factorize(prefix_sum(40), who, mechanism)
    np.testing.assert_allclose(made.strategy.column_norms(), 1.0, rtol=1e-14)
    assert made.rmse(who) < factorize(prefix_sum(40), who, "bsr").rmse(who)


@pytest.mark.parametrize("mechanism", ["column-normalised", "epoch-scaled"])
def test_columns_that_overlap_are_refused(mechanism):
    message = r"^bands must be in \[1, 10\] for scaled columns, got 11 \(bsr\)$"
    with pytest.raises(RootnoiseError, match=message):
        factorize(prefix_sum(40), MinSeparation(10, 4), mechanism, bands=11)
    message = r"^bands must be in \[1, 10\] for scaled columns, got 40 \(bisr\)$"
    with pytest.raises(RootnoiseError, match=message):
        factorize(prefix_sum(40), MinSeparation(10, 4), mechanism, base="bisr", bands=3)


def test_errors_of_quadratic_time_are_refused():
    message = r"^bands must be in \[1, 2048\] for scaled columns of n_steps=100000, got 100000"
    with pytest.raises(RootnoiseError, match=message):
        factorize(prefix_sum(10**5), mechanism="column-normalised")


def test_unknown_bases_are_refused():
    with pytest.raises(
        RootnoiseError, match=r"^mechanism must be one of .*, got 'bst': perhaps bsr$"
    ):
        factorize(prefix_sum(40), mechanism="epoch-scaled", base="bst")


def test_the_scaled_noise_streams_as_the_dense_one():
    who = MinSeparation(10, 4)
    made = factorize(SGD(40, 0.9), who, "epoch-scaled", base="banded")
    z = np.random.default_rng(0).standard_normal((40, 3))
    expected = np.linalg.solve(made.strategy.dense(), z)
    np.testing.assert_allclose(oracle.streamed(made.noising, z, 8), expected, atol=1e-13)


def test_progress_is_reported():
    seen = []
    made = factorize(
        prefix_sum(40),
        MinSeparation(10, 4),
        "epoch-scaled",
        progress=lambda count, least: seen.append((count, least)),
    )
    assert [count for count, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == made.rmse(MinSeparation(10, 4))


@pytest.mark.parametrize(
    "who", [MinSeparation(3, 4), MinSeparation(4, 2), FixedCycle(3, 4)], ids=str
)
@pytest.mark.parametrize("base", ["bsr", "bsr-gamma", "banded"])
@pytest.mark.parametrize("mechanism", ["column-normalised", "epoch-scaled"])
def test_no_person_exceeds_the_sensitivity(mechanism, base, who):
    made = factorize(SGD(12, 0.9), who, mechanism, base=base)
    sens = made.sensitivity(who)
    assert sens.exact
    worst = adversary.worst(made.strategy.dense(), who)
    assert worst <= sens.value * (1 + 1e-12)
    assert worst == pytest.approx(sens.value, rel=1e-9)
