"""The dense optimum: reference values, its certified gap, and every kind of workload."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from rootnoise._check import RootnoiseError
from rootnoise.bounds.certificate import lower_bound
from rootnoise.factorization import factorize
from rootnoise.factorization.dense import reverse_cholesky
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum
from strategies import participations

ONCE = SingleParticipation()
VALUES = json.loads((Path(__file__).parent / "reference" / "values.json").read_text())


@pytest.mark.parametrize("name", ["AOF_optimum_single", "AOF_optimum_fixed_epoch"])
def test_reference(name):
    checked = 0
    for item in VALUES:
        i = item["inputs"]
        if item["name"] == name and i["n"] <= 128:
            who = FixedCycle(i["b"], i["k"]) if "k" in i else ONCE
            made = factorize(SGD(i["n"], i["beta"], i["alpha"]), who, "dense", tolerance=1e-6)
            assert made.rmse(who) == pytest.approx(item["value"], rel=1.1e-6)
            assert made.sensitivity(who).exact
            assert made.sensitivity(who).value == pytest.approx(1, rel=1e-12)
            checked += 1
    assert checked >= 8


def test_min_separation_reference():
    # The best over all patterns by brute force, printed to six digits.
    for item in VALUES:
        i = item["inputs"]
        if item["name"] == "AOF_optimum_min_sep_bruteforce":
            who = MinSeparation(i["b"], i["k"])
            made = factorize(SGD(i["n"], i["beta"], i["alpha"]), who, "dense", tolerance=1e-6)
            assert -1e-6 < made.rmse(who) / item["value"] - 1 < 1e-3
            sens = oracle.sensitivity(made.strategy.dense(), i["b"], i["k"], fixed=False)
            assert made.sensitivity(who).value == pytest.approx(sens, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "who"), [(1024, ONCE), (256, FixedCycle(32, 8))], ids=["single", "fixed-cycle"]
)
def test_certified_gap(n, who):
    reports = []
    made = factorize(
        prefix_sum(n),
        who,
        "dense",
        tolerance=1e-3,
        progress=lambda iteration, gap: reports.append((iteration, gap)),
    )
    iterations, gaps = zip(*reports, strict=True)
    assert iterations == tuple(range(1, len(gaps) + 1))
    assert list(gaps) == sorted(gaps, reverse=True)
    assert gaps[-1] <= 1e-3 < min(gaps[:-1])
    # The reported gap is honest: another route bounds the true one.
    assert lower_bound(prefix_sum(n), who).gap(made.rmse(who)) < 1e-2


@pytest.mark.parametrize(
    ("workload", "who"),
    [
        (MatrixWorkload(np.tri(12) * np.linspace(1, 2, 12)), FixedCycle(4, 3)),
        (MatrixWorkload(np.tri(12) + np.diag(np.arange(12.0))), ONCE),
        (ScheduledSGD(np.linspace(1, 0.01, 30), momentum=0.9), FixedCycle(10, 3)),
        # Nobody sees the last gradient.
        (ScheduledSGD(np.linspace(1, 0, 12), momentum=0.9), ONCE),
        (ScheduledSGD(np.linspace(1, 0, 12), momentum=0.9), FixedCycle(4, 3)),
        (ToeplitzWorkload(np.arange(1.0, 31) ** -0.5), FixedCycle(7, 5)),
        (SGD(30, 0.9), FixedCycle(8, 4)),
        (SGD(30, 0.9), FixedCycle(30, 1)),
        (SGD(30, 0.9), MinSeparation(3, 1)),
        (SGD(30, 0.9), CyclicPoisson(30, 0.1)),
    ],
    ids=str,
)
def test_any_workload_and_partial_cycles(workload, who):
    made = factorize(workload, who, "dense", tolerance=1e-5)
    assert lower_bound(workload, who, "tight").gap(made.rmse(who)) < 5e-5
    assert made.strategy.bands <= workload.n_steps
    assert made.sensitivity(who).exact


def test_sensitivity_of_partial_cycles_by_brute_force():
    who = FixedCycle(4, 3)
    strategy = factorize(SGD(10, 0.5), who, "dense").strategy.dense()
    assert oracle.sensitivity_by_ascent(strategy, 4, 3, fixed=True) == pytest.approx(1, rel=1e-9)
    assert oracle.sensitivity_at_most(strategy, 4, 3, fixed=True) == pytest.approx(1, rel=1e-9)


@settings(max_examples=40)
@given(st.data(), st.integers(1, 24), st.floats(0, 0.95), st.floats(0.3, 1))
def test_never_worse_than_bsr(data, n, momentum, decay):
    who = data.draw(participations(n))
    workload = SGD(n, momentum, decay)
    dense = factorize(workload, who, "dense").rmse(who)
    assert dense <= factorize(workload, who, "bsr").rmse(who)


@pytest.mark.parametrize(
    ("who", "bands", "at_most"),
    [
        (MinSeparation(16, 4), 16, 4.4885),  # 1.8 % above what the fixed cycle allows
        (MinSeparation(16, 2), 16, 3.2425),  # more windows than participations: equal norms
        (MinSeparation(1, 64), 1, 43.142),
        (CyclicPoisson(8, 0.1), 8, 2.6206),
    ],
    ids=str,
)
def test_bands(who, bands, at_most):
    errors = []
    made = factorize(
        prefix_sum(64), who, "dense", progress=lambda iteration, rmse: errors.append(rmse)
    )
    assert made.mechanism == "dense"
    assert made.strategy.bands == bands
    assert made.rmse(who) < at_most
    assert np.diff(errors, prepend=99).max() < 1e-12
    sens = made.sensitivity(who)
    assert (sens.exact, sens.method) in [
        (True, "orthogonal columns"),
        (True, "largest column norm"),
    ]


def test_deterministic():
    who = FixedCycle(10, 3)
    first, second = (factorize(SGD(30, 0.9), who, "dense") for _ in range(2))
    assert np.array_equal(first.strategy.dense(), second.strategy.dense())


def test_reverse_cholesky():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(6, 9))
    c = reverse_cholesky(half @ half.T)
    assert np.array_equal(c, np.tril(c))
    np.testing.assert_allclose(c.T @ c, half @ half.T)


def test_refusals():
    with pytest.raises(RootnoiseError, match=r"n_steps must be in \[1, 4096\], got 4097"):
        factorize(prefix_sum(4097), ONCE, "dense")
    with pytest.raises(RootnoiseError, match=r"tolerance must be .* > 0 and < 1, got 0.0"):
        factorize(prefix_sum(4), ONCE, "dense", tolerance=0)
    with pytest.raises(RootnoiseError, match="bands must be left out for mechanism 'dense'"):
        factorize(prefix_sum(4), ONCE, "dense", bands=2)
