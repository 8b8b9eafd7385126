"""The small dual problem: never above the optimum of the whole one, and not far below it."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootnoise.bounds import dual, long_runs
from rootnoise.factorization import factorize
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum
from strategies import participations

ONCE = SingleParticipation()


def bound(problem, iterations=12):
    return max(point.value for point in islice(dual.ascend(problem), iterations))


def whole(workload, who, iterations=40):
    a = workload.matrix.dense()
    return bound(dual.Problem(a[:, :, None], dual.patterns(len(a), who)), iterations)


def schedule(n, momentum=0.9):
    return ScheduledSGD(1.1 + np.cos(np.linspace(0, 3, n)), momentum=momentum)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 40), st.integers(4, 40), st.floats(0, 0.99), st.floats(0.1, 1))
def test_never_above_what_a_strategy_reaches(data, n, size, momentum, decay):
    who = data.draw(participations(n))
    workload = data.draw(
        st.sampled_from(
            [
                SGD(n, momentum, decay),
                schedule(n, momentum),
                ToeplitzWorkload(np.append(1.0, np.full(n - 1, decay))),
                ToeplitzWorkload(np.append([1.0, momentum][:n], np.zeros(max(0, n - 2)))),
            ]
        )
    )
    small = long_runs.compress(workload, who, size)
    assert small.a.shape[0] <= max(size, 2 * small.a.shape[1])
    reached = factorize(workload, who, "dense").rmse(who)
    assert bound(small, 6) / np.sqrt(n) <= reached * (1 + 1e-9)


@pytest.mark.parametrize(
    ("workload", "who", "loss"),
    [
        (prefix_sum(320), ONCE, 0.03),
        (SGD(320, 0.9), ONCE, 0.02),
        (schedule(320), ONCE, 0.02),
        (prefix_sum(320), FixedCycle(32, 10), 0.03),
        (SGD(320, 0.9, 0.999), FixedCycle(32, 10), 0.02),
        (schedule(320), FixedCycle(32, 10), 0.03),
        (prefix_sum(310), FixedCycle(43, 8), 0.04),
        (prefix_sum(320), MinSeparation(64, 5), 0.05),
        (prefix_sum(320), MinSeparation(64, 2), 0.04),
    ],
    ids=str,
)
def test_loses_little_with_a_third_of_the_rows(workload, who, loss):
    small = long_runs.compress(workload, who, 110)
    assert len(small.a) <= 110
    ratio = bound(small) / whole(workload, who, 15)
    assert 1 - loss < ratio <= 1 + 1e-9


def test_tied_epochs():
    # 200 epochs in 20 rows: the constant part of everybody's noise is still there.
    workload, who = prefix_sum(400), FixedCycle(2, 200)
    small = long_runs.compress(workload, who, 20)
    assert small.a.shape[1] == 20
    assert 0.95 < bound(small) / whole(workload, who, 6) <= 1


def test_long_blocks_take_the_triangle_inequality(monkeypatch):
    # Blocks of 625 steps and one more: nu is bounded, at a loss of less than one in a hundred.
    small = long_runs.compress(SGD(10_001, 0.5), ONCE, 160)
    assert small.patterns[0].size == 16
    monkeypatch.setattr(long_runs, "SHORT", 1000)
    dearer = long_runs.compress(SGD(10_001, 0.5), ONCE, 160)
    assert np.all(np.asarray(small.gain) <= np.asarray(dearer.gain))
    assert bound(small) > 0.99 * bound(dearer)


def test_a_toeplitz_workload_of_few_bands_is_swept():
    workload = ToeplitzWorkload(np.append([1.0, 0.5], np.zeros(98)))
    assert long_runs.sweeps(workload)
    assert not long_runs.sweeps(ToeplitzWorkload(np.ones(100)))
    assert not long_runs.sweeps(MatrixWorkload(np.tri(100)))
    assert bound(long_runs.compress(workload, ONCE, 40)) > 0.8 * whole(workload, ONCE)


def test_other_workloads_are_applied():
    workload = ToeplitzWorkload(1 / np.sqrt(np.arange(1.0, 201)))
    small = long_runs.compress(workload, ONCE, 50)
    assert not small.gain.any()
    assert 0.5 * whole(workload, ONCE) < bound(small) < whole(workload, ONCE)


def test_poisson_is_one_participation():
    poisson = long_runs.compress(prefix_sum(100), CyclicPoisson(10, 0.1), 32)
    assert bound(poisson) == bound(long_runs.compress(prefix_sum(100), ONCE, 32))


def test_too_many_blocks():
    assert long_runs.compress(prefix_sum(2**18), FixedCycle(1, 2**18), 100) is None
    # Too many to tie: two participations in 600 periods are spread out.
    small = long_runs.compress(prefix_sum(1200), MinSeparation(2, 2), 64)
    assert max(p.shape[1] for p in small.patterns) == 2
