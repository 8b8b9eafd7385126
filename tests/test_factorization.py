"""Every registered factorization against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from rootnoise import RootnoiseError
from rootnoise.factorization import default_bands, error, factorize, mechanisms
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, ToeplitzWorkload, prefix_sum

WORKLOADS = {
    "prefix sum": prefix_sum(24),
    "momentum": SGD(24, 0.9),
    "decay": SGD(24, 0.5, 0.9),
    "equal roots": SGD(24, 0.8, 0.8),
    "any": ToeplitzWorkload(2.0 / (1 + np.arange(24)) ** 0.7),
}
each_workload = pytest.mark.parametrize("work", WORKLOADS.values(), ids=WORKLOADS.keys())
each_mechanism = pytest.mark.parametrize("mechanism", mechanisms())


@each_workload
@each_mechanism
@pytest.mark.parametrize("who", [SingleParticipation(), MinSeparation(6, 4), FixedCycle(8, 3)])
def test_strategy_decoder_and_errors_are_the_dense_ones(work, mechanism, who):
    made = factorize(work, who, mechanism)
    a, c = work.matrix.dense(), made.strategy.dense()
    b = oracle.decoder(a, c)
    np.testing.assert_allclose(made.decoder.dense(), b, atol=1e-12)
    np.testing.assert_allclose(made.decoder.dense() @ c, a, atol=1e-12)
    np.testing.assert_allclose(made.noising.dense() @ c, np.eye(24), atol=1e-12)
    sens = made.sensitivity(who).value
    assert made.rmse(who) == pytest.approx(sens * np.linalg.norm(b) / 24**0.5, rel=1e-12)
    worst = np.linalg.norm(b, axis=1).max()
    assert made.max_error(who) == pytest.approx(sens * worst, rel=1e-12)
    np.testing.assert_allclose(
        error.per_step(made.decoder, sens), sens * np.linalg.norm(b, axis=1), rtol=1e-11
    )
    rows = min(made.strategy.bands, made.noising.bands) - 1
    assert made.memory_rows <= rows or mechanism == "workload"


@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.floats(0, 0.99),
    st.floats(0.01, 1),
)
def test_bsr_is_the_banded_dense_root(n, bands, momentum, decay):
    bands = min(bands, n)
    made = factorize(SGD(n, momentum, decay), mechanism="bsr", bands=bands)
    root = oracle.banded(oracle.square_root(oracle.sgd_matrix(n, momentum, decay)), bands)
    np.testing.assert_allclose(made.strategy.dense(), root, rtol=1e-9, atol=1e-300)
    b = oracle.decoder(oracle.sgd_matrix(n, momentum, decay), root)
    np.testing.assert_allclose(made.decoder.dense(), b, rtol=1e-9, atol=1e-12)


def test_bsr_of_one_band_is_the_identity_and_of_n_bands_the_square_root():
    work, who = SGD(50, 0.9), MinSeparation(10, 5)
    by_name = {name: factorize(work, who, name).rmse(who) for name in ("identity", "square-root")}
    assert factorize(work, who, "bsr", bands=1).rmse(who) == pytest.approx(by_name["identity"])
    assert factorize(work, who, "bsr", bands=50).rmse(who) == pytest.approx(by_name["square-root"])


@pytest.mark.parametrize("scale", [0.01, 7.0])
def test_scaling_the_workload_scales_the_error(scale):
    a = prefix_sum(20).matrix.column(0)
    who = MinSeparation(5, 4)
    one, other = (factorize(ToeplitzWorkload(s * a), who, "bsr", bands=5) for s in (1.0, scale))
    assert other.rmse(who) == pytest.approx(scale * one.rmse(who), rel=1e-12)


def test_a_million_steps_in_seconds_without_a_square_array():
    who = FixedCycle(10**5, 10)
    work = SGD(10**6, 0.9)
    errors = {name: factorize(work, who, name).rmse(who) for name in ("square-root", "identity")}
    errors["bsr"] = factorize(work, who, "bsr", bands=64).rmse(who)
    assert errors["square-root"] < errors["bsr"] < errors["identity"]


@pytest.mark.parametrize(
    ("who", "bands"),
    [
        (SingleParticipation(), 12),
        (MinSeparation(4, 3), 4),
        (FixedCycle(5, 3), 5),
        (FixedCycle(40, 1), 12),
        (CyclicPoisson(3, 0.1), 3),
    ],
)
def test_default_bands(who, bands):
    assert default_bands(12, who) == bands


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: factorize(prefix_sum(9), mechanism="magic"), "mechanism must be one of .*'magic'"),
        (lambda: factorize(prefix_sum(9), bands=0), r"bands must be in \[1, n_steps=9\], got 0"),
        (lambda: factorize(prefix_sum(9), bands=10), r"bands must be in \[1, n_steps=9\], got 10"),
        (lambda: factorize(prefix_sum(9), bands=2.5), "bands must be an integer, got 2.5"),
        (
            lambda: factorize(prefix_sum(9), mechanism="identity", bands=2),
            "bands must be left out for mechanism 'identity', got 2",
        ),
        (
            lambda: factorize(prefix_sum(9), MinSeparation(3, 4), "bsr"),
            "max_participations must be in .*, got 4",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


@pytest.mark.parametrize("mechanism", ["bsr", "banded", "lambda-cgd", "epoch-scaled", "workload"])
def test_a_strategy_for_a_contracted_loss_serves_the_workload_itself(mechanism):
    work, who = SGD(12, momentum=0.9), FixedCycle(4, 3)
    made = factorize(work, who, mechanism, contraction=8.0)
    aimed = factorize(work.contracted(8.0), who, mechanism)
    assert made.workload is work
    np.testing.assert_array_equal(made.strategy.dense(), aimed.strategy.dense())
    b, c = made.decoder.dense(), made.strategy.dense()
    np.testing.assert_allclose(b @ c, work.matrix.dense(), atol=1e-12)
    assert not np.allclose(c, factorize(work, who, mechanism).strategy.dense())


@pytest.mark.parametrize("mechanism", ["identity", "tree"])
def test_strategies_that_are_the_same_for_every_workload_take_no_contraction(mechanism):
    with pytest.raises(RootnoiseError, match="contraction must be left out for mechanism"):
        factorize(SGD(12), None, mechanism, contraction=8.0)
