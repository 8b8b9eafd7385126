"""Free bands: the gradient, published errors, exact sensitivity, and never worse than the start."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adversary
import oracle
from rootnoise import RootnoiseError
from rootnoise.bounds.certificate import lower_bound
from rootnoise.factorization import banded_energy, factorize
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum
from strategies import participations

ONCE = SingleParticipation()
SCHEDULE = ScheduledSGD(np.linspace(1, 0.01, 23), momentum=0.9, nesterov=True)


@pytest.mark.parametrize("work", [SGD(23, 0.9, 0.99), prefix_sum(23), SCHEDULE], ids=str)
@pytest.mark.parametrize("p", [1, 2, 7, 23])
@pytest.mark.parametrize("least", [1, 4, 32])
def test_energy_and_gradient_two_ways_and_by_differences(monkeypatch, work, p, least):
    monkeypatch.setattr(banded_energy, "LEAST", least)  # many blocks, few, and one
    rng = np.random.default_rng(p)
    diagonals = rng.normal(size=(p, 23)) / 3
    diagonals[0] = rng.uniform(1, 2, 23)
    outside = np.add.outer(np.arange(p), np.arange(23)) >= 23
    diagonals[outside] = 0.0
    energy, gradient = banded_energy.by_blocks(work.recurrence, p)(diagonals)
    dense = banded_energy.by_products(work.matrix.dense(), p)
    assert energy == pytest.approx(dense(diagonals)[0], rel=1e-12)
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(gradient, dense(diagonals)[1], atol=1e-12 * scale)
    assert not gradient[outside].any()
    way = np.where(outside, 0.0, rng.normal(size=diagonals.shape)) * 1e-5
    slope = (dense(diagonals + way)[0] - dense(diagonals - way)[0]) / 2
    assert np.vdot(gradient, way) == pytest.approx(slope, rel=1e-5)
    c = sum(np.diag(diagonals[j, : 23 - j], -j) for j in range(p))
    b = oracle.decoder(work.matrix.dense(), c)
    assert energy == pytest.approx(np.sum(b**2), rel=1e-11)


# JAX-Privacy 2.0, banded.optimize, column-normalised: the rmse that it reaches for prefix sums.
@pytest.mark.parametrize(("n", "bands", "rmse"), [(100, 20, 2.50642)])
def test_published_errors(n, bands, rmse):
    made = factorize(prefix_sum(n), ONCE, "bandmf", bands=bands)
    assert made.rmse(ONCE) <= rmse * (1 + 1e-5)
    assert made.rmse(ONCE) < factorize(prefix_sum(n), ONCE, "banded", bands=bands).rmse(ONCE)
    assert made.sensitivity(ONCE).exact
    assert made.memory_rows == bands - 1


@pytest.mark.parametrize(
    ("who", "norms"), [(ONCE, 1), (FixedCycle(16, 4), 64), (MinSeparation(16, 4), 4)], ids=str
)
def test_long_and_short_runs_take_different_routes_to_the_same_end(monkeypatch, who, norms):
    work = SGD(64, 0.5)
    by_blocks = factorize(work, who, "bandmf", bands=8)
    monkeypatch.setattr(banded_energy, "MOST", 0)
    by_products = factorize(work, who, "bandmf", bands=8)
    assert by_blocks.rmse(who) == pytest.approx(by_products.rmse(who), rel=1e-5)
    assert len(set(by_blocks.strategy.column_norms().round(12))) == norms


def test_in_a_fixed_cycle_everybody_moves_the_sum_by_as_much():
    """The columns of one person have squares of sum 1, in a short last epoch too."""
    who = FixedCycle(10, 4)
    norms = factorize(SGD(37, 0.9), who, "bandmf", bands=6).strategy.column_norms()
    squares = np.bincount(np.arange(37) % 10, norms**2)
    np.testing.assert_allclose(squares, 1.0, rtol=1e-12)


@pytest.mark.parametrize("rates", [np.ones(60), np.linspace(1, 0.02, 60)], ids=["steady", "fall"])
def test_a_period_of_bands_comes_close_to_the_certified_optimum(rates):
    who = FixedCycle(15, 4)
    work = ScheduledSGD(rates, momentum=0.9).contracted(12)
    made = factorize(work, who, "bandmf", tolerance=1e-3)
    assert lower_bound(work, who, "tight").gap(made.rmse(who)) < 0.005


def test_it_is_the_best_band_where_that_is_known():
    # With n bands it is the dense optimum, whose gap is certified.
    made = factorize(prefix_sum(48), ONCE, "bandmf", bands=48)
    assert lower_bound(prefix_sum(48), ONCE, "tight").gap(made.rmse(ONCE)) < 1e-4


@settings(max_examples=40)
@given(st.data(), st.integers(1, 20), st.floats(0, 0.95), st.floats(0.3, 1))
def test_never_worse_than_where_it_starts_and_exact(data, n, momentum, decay):
    who = data.draw(participations(n))
    work = SGD(n, momentum, decay)
    made = factorize(work, who, "bandmf")
    assert made.rmse(who) <= factorize(work, who, "epoch-scaled").rmse(who) * (1 + 1e-12)
    assert made.sensitivity(who).exact
    b = oracle.decoder(work.matrix.dense(), made.strategy.dense())
    sens = made.sensitivity(who).value
    assert made.rmse(who) == pytest.approx(sens * np.linalg.norm(b) / n**0.5, rel=1e-9)


@pytest.mark.parametrize(
    "work", [SCHEDULE, ToeplitzWorkload(np.arange(1.0, 24) ** -0.3), MatrixWorkload(np.tri(23))]
)
@pytest.mark.parametrize("who", [ONCE, FixedCycle(6, 4), CyclicPoisson(5, 0.1)], ids=str)
def test_any_workload(work, who):
    made = factorize(work, who, "bandmf", bands=4)
    assert made.strategy.bands == 4
    assert made.rmse(who) < factorize(work, who, "epoch-scaled", bands=4).rmse(who)


@pytest.mark.parametrize("who", [MinSeparation(3, 4), MinSeparation(4, 2), FixedCycle(3, 4)])
def test_no_person_exceeds_the_sensitivity(who):
    made = factorize(SGD(12, 0.9), who, "bandmf")
    sens = made.sensitivity(who)
    assert adversary.worst(made.strategy.dense(), who) == pytest.approx(sens.value, rel=1e-9)


def test_progress_is_reported():
    seen = []
    made = factorize(
        prefix_sum(30), ONCE, "bandmf", bands=4, progress=lambda count, rmse: seen.append(rmse)
    )
    assert np.diff(seen).max() < 1e-12
    assert seen[-1] == pytest.approx(made.rmse(ONCE), rel=1e-12)


def test_refusals():
    with pytest.raises(RootnoiseError, match=r"n_steps must be in \[1, 4096\], got 4097"):
        factorize(prefix_sum(4097), ONCE, "bandmf")
    with pytest.raises(RootnoiseError, match=r"^bands must be in \[1, n_steps=9\], got 10$"):
        factorize(prefix_sum(9), ONCE, "bandmf", bands=10)
    with pytest.raises(RootnoiseError, match=r"^bands must be in \[1, separation=3\], got 4$"):
        factorize(prefix_sum(9), FixedCycle(3, 3), "bandmf", bands=4)
    with pytest.raises(RootnoiseError, match=r"tolerance must be .* > 0 and < 1, got 0.0"):
        factorize(prefix_sum(4), ONCE, "bandmf", tolerance=0)
