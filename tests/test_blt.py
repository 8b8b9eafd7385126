"""Buffered linear Toeplitz strategies: the map, its closed forms, the search, a million steps."""

from __future__ import annotations

import math

import numpy as np
import pytest

import oracle
from rootnoise import causal
from rootnoise._check import RootnoiseError
from rootnoise.causal import series
from rootnoise.causal.buffered import BufferedToeplitz
from rootnoise.factorization import blt as module
from rootnoise.factorization import factorize
from rootnoise.participation import (
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    Participation,
    SingleParticipation,
)
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum

DECAYS, WEIGHTS = np.array([0.3, 0.999, 0.9]), np.array([0.05, 0.2, 0.3])


def who(n: int, b: int, k: int) -> Participation:
    return SingleParticipation() if k == 1 else MinSeparation(b, k)


# ---------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize("n", [1, 2, 30])
def test_the_map_is_its_coefficients(n):
    rng = np.random.default_rng(7)
    c = BufferedToeplitz(DECAYS, WEIGHTS, n)
    powers = DECAYS ** np.arange(n - 1)[:, np.newaxis]
    expected = oracle.lower_toeplitz(np.append(1, powers @ WEIGHTS), n)
    np.testing.assert_allclose(c.coefficients, expected[:, 0], rtol=1e-14)
    np.testing.assert_allclose(c.dense(), expected, atol=1e-15)
    x = rng.normal(size=(n, 3))
    for y in (x, x[:, 0]):
        np.testing.assert_allclose(c.apply(y), expected @ y, atol=1e-14)
        np.testing.assert_allclose(c.solve(expected @ y), y, atol=1e-13)
    np.testing.assert_allclose(c.inverse().dense(), np.linalg.inv(expected), atol=1e-14)
    np.testing.assert_allclose(c.column_norms(), np.linalg.norm(expected, axis=0))
    assert (c.bands, c.state_size, c.is_toeplitz) == (n, 3, True)
    np.testing.assert_array_equal(causal.from_dict(c.to_dict()).dense(), c.dense())


@pytest.mark.parametrize("m", [1, 4, 30])
def test_both_ways_stream_with_a_row_a_buffer(m):
    rng = np.random.default_rng(7)
    c = BufferedToeplitz(DECAYS, WEIGHTS, 30)
    for matrix in (c, c.inverse()):
        assert matrix.state_size == 3
        x = rng.normal(size=(30, 2))
        np.testing.assert_allclose(oracle.streamed(matrix, x, m), matrix.dense() @ x, atol=1e-13)


def test_poles_and_zeros_interlace():
    c = BufferedToeplitz(DECAYS, WEIGHTS, 5)
    alternating = np.ravel([c.decays, c.zeros], order="F")
    assert np.all(np.diff(alternating) < 0)
    assert alternating[-1] > 0


def test_a_million_steps_forwards_and_backwards():
    rng = np.random.default_rng(7)
    c = BufferedToeplitz([1 - 1e-6, 0.99993, 0.998, 0.77], [0.003, 0.007, 0.03, 0.3], 10**6)
    x = rng.normal(size=10**6)
    np.testing.assert_allclose(c.solve(c.apply(x)), x, atol=1e-10)
    assert np.all(np.diff(c.coefficients) < 0)
    assert sensitivity(c, MinSeparation(1000, 1000)).exact


# ----------------------------------------------------------------------------------- the objective

WORKLOADS = [SGD(60), SGD(60, 0.9), SGD(60, 0.5, 0.98), SGD(60, 0.9, 0.9), SGD(61, 0.3)]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
@pytest.mark.parametrize(("b", "k"), [(60, 1), (20, 3), (17, 3), (1, 30)])
def test_the_objective_is_the_rmse_by_either_route(workload, b, k):
    n, participation = workload.n_steps, who(60, b, k)
    general = ToeplitzWorkload(workload.matrix.column(0))
    for d in (1, 3):
        fast, slow = (module._Objective(w, participation) for w in (workload, general))
        u = module._arcsine(fast, d)
        gaps, decays = module._gaps(u)
        c = BufferedToeplitz(decays, module._weights(gaps), n)
        np.testing.assert_allclose(c.zeros, 1 - gaps[1::2], atol=1e-12)
        b_norm = np.linalg.norm(oracle.decoder(workload.matrix.dense(), c.dense()))
        expected = sensitivity(c, participation).value * b_norm / math.sqrt(n)
        for objective in (fast, slow):
            value, slope = objective(u)
            assert math.exp(value / 2) == pytest.approx(expected, rel=1e-12)
            step = 1e-5 * np.eye(u.size)
            numeric = [(objective.value(u + e) - objective.value(u - e)) / 2e-5 for e in step]
            np.testing.assert_allclose(slope, numeric, atol=1e-7)


def test_one_step_is_nothing_but_noise():
    assert factorize(prefix_sum(1), mechanism="blt").rmse(SingleParticipation()) == 1.0


# -------------------------------------------------------------------------------------- the search

# JAX-Privacy 2.0 (`optimize_loss`, mean error) finds the same to 9 digits, in 20 to 120 s each.
FOUND = {
    (500, 0.0, 100, 5, 2): 7.16182412201,
    (1000, 0.0, 100, 10, 2): 12.1938515655,
    (1000, 0.9, 100, 10, 2): 92.0222438304,  # ours alone
    (1000, 0.0, 1000, 1, 3): 3.05108177189,
    (10_000, 0.0, 100, 100, 2): 86.8064000769,
}


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_the_search_finds_the_known_best(case):
    n, beta, b, k, buffers = case
    participation = who(n, b, k)
    split = factorize(SGD(n, beta), participation, "blt", buffers=buffers)
    assert split.sensitivity(participation).exact
    assert split.memory_rows <= buffers
    assert split.rmse(participation) == pytest.approx(FOUND[case], rel=1e-7)


def test_more_buffers_are_never_worse_and_the_start_is_beaten():
    participation, workload = MinSeparation(25, 4), SGD(100, 0.5)
    rmse = [
        factorize(workload, participation, "blt", buffers=d).rmse(participation) for d in (1, 2, 4)
    ]
    assert rmse == sorted(rmse, reverse=True)
    objective = module._Objective(workload, participation)
    assert rmse[0] < math.exp(objective.value(module._arcsine(objective, 1)) / 2)


def test_without_a_number_buffers_stop_where_they_gain_little():
    n = 200
    auto = factorize(prefix_sum(n), mechanism="blt")
    more = factorize(prefix_sum(n), mechanism="blt", buffers=auto.memory_rows + 1)
    errors = [split.rmse(SingleParticipation()) for split in (auto, more)]
    assert errors[1] < errors[0] < errors[1] * (1 + 2 * module.GAIN)


@pytest.mark.parametrize("n", [10, 1000])
def test_the_quadrature_alone_is_nearly_the_square_root(n):
    objective = module._Objective(SGD(n), SingleParticipation())
    root = factorize(SGD(n), mechanism="square-root").rmse(SingleParticipation())
    assert math.exp(objective.value(module._arcsine(objective, 8)) / 2) < 1.01 * root


def test_it_reports_its_progress_and_repeats_itself():
    seen: list[tuple[int, float]] = []
    options = {"buffers": 2, "progress": lambda *at: seen.append(at)}
    first, second = (
        factorize(prefix_sum(50), FixedCycle(10, 5), "blt", **options) for _ in range(2)
    )
    assert first.strategy.to_dict() == second.strategy.to_dict()
    counts = [count for count, _ in seen]
    assert counts[:3] == [1, 2, 3]
    assert min(rmse for _, rmse in seen) == pytest.approx(first.rmse(FixedCycle(10, 5)), rel=1e-6)


def test_schedules_take_their_neighbour_and_other_toeplitz_workloads_are_fine():
    n, participation = 200, MinSeparation(50, 4)
    rates = np.linspace(1, 0.1, n)
    scheduled = ScheduledSGD(rates, momentum=0.9)
    neighbour = factorize(SGD(n, 0.9), participation, "blt", buffers=1)
    split = factorize(scheduled, participation, "blt", buffers=1)
    assert split.strategy.to_dict() == neighbour.strategy.to_dict()
    b = oracle.decoder(scheduled.matrix.dense(), split.strategy.dense())
    expected = split.sensitivity(participation).value * np.linalg.norm(b) / math.sqrt(n)
    assert split.rmse(participation) == pytest.approx(expected, rel=1e-11)
    averages = ToeplitzWorkload(np.ones(20) / 20)
    assert factorize(averages, mechanism="blt", buffers=2).rmse(SingleParticipation()) < 0.2


def test_a_million_steps():
    n, participation = 10**6, MinSeparation(1000, 1000)
    split = factorize(prefix_sum(n), participation, "blt", buffers=2)
    rmse = split.rmse(participation)
    assert split.sensitivity(participation).exact
    assert rmse == pytest.approx(781.67624, rel=1e-6)
    objective = module._Objective(prefix_sum(n), participation)
    strategy = split.strategy
    assert isinstance(strategy, BufferedToeplitz)
    u = module._logits(1 - strategy.decays, strategy.weights)
    assert math.exp(objective.value(u) / 2) == pytest.approx(rmse, rel=1e-8)


def test_the_first_coefficients_of_the_inverse_undo_the_strategy():
    c = factorize(SGD(300, 0.9), mechanism="blt", buffers=3).strategy
    assert c.coefficients is not None
    product = series.multiply(c.coefficients, c.inverse().column(0), 300)
    np.testing.assert_allclose(product, np.eye(300)[0], atol=1e-15)


def test_a_search_may_meet_a_buffer_that_never_forgets():
    # L-BFGS tries a decay of 1 - 4e-18 on the way: its logarithm must not be 0.
    cycle = FixedCycle(100, 2)
    assert factorize(SGD(200, momentum=0.9), cycle, "blt").rmse(cycle) < 23.4222


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: factorize(prefix_sum(9), mechanism="blt", buffers=0), r"in \[1, 16\], got 0"),
        (lambda: factorize(prefix_sum(9), mechanism="blt", buffers=17), r"in \[1, 16\], got 17"),
        (lambda: factorize(prefix_sum(9), mechanism="blt", bands=2), "bands must be left out"),
        (
            lambda: factorize(prefix_sum(9), CyclicPoisson(3, 0.5), "blt"),
            r"bands must be in \[1, groups=3\]",
        ),
        (
            lambda: factorize(MatrixWorkload(np.eye(3)), mechanism="blt"),
            "workload must be Toeplitz, or SGD with a schedule",
        ),
        (lambda: BufferedToeplitz([0.5], [0.1, 0.1], 9), "equally many, got 1 and 2"),
        (lambda: BufferedToeplitz([1.0], [0.1], 9), r"decays must be in \(0, 1\), got \[1.0\]"),
        (lambda: BufferedToeplitz([0.5], [-0.1], 9), r"weights must be > 0 .* got \[-0.1\]"),
        (lambda: BufferedToeplitz([0.5], [0.5], 9), r"< 1, got \[0.5\] with sum 1"),
        (lambda: BufferedToeplitz([0.5], [0.1], 0), "n_steps must be >= 1, got 0"),
        (
            lambda: causal.from_dict({"type": "buffered", "n_steps": 3}),
            "must be a known causal map",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()
