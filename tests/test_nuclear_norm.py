"""Nuclear norms against singular values; every route errs to the low side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootnoise.bounds import nuclear_norm
from rootnoise.causal import Toeplitz
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum

VALUES = json.loads((Path(__file__).parent / "reference" / "values.json").read_text())


def singular_values(workload):
    return float(np.linalg.svd(workload.matrix.dense(), compute_uv=False).sum())


@given(st.integers(1, 60), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_min=True))
def test_sgd_is_right_to_nine_digits_and_never_above(n, momentum, decay):
    exact = singular_values(SGD(n, momentum, decay))
    found = nuclear_norm.sgd(n, momentum, decay)
    assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-13)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_prefix_sums_in_closed_form(n):
    assert nuclear_norm.prefix_sum(n) == pytest.approx(singular_values(prefix_sum(n)), rel=1e-13)


@pytest.mark.parametrize("n", [10**3, 10**6])
def test_the_integral_meets_the_closed_form(n):
    assert nuclear_norm.sgd(n, 0.0, 1.0) == pytest.approx(nuclear_norm.prefix_sum(n), rel=1e-10)


def test_reference():
    checked = 0
    for item in VALUES:
        i = item["inputs"]
        if item["name"] == "uniform_dual_lower_bound_single":
            norm, _ = nuclear_norm.nuclear_norm(SGD(i["n"], i["beta"], i["alpha"]))
        elif item["name"] == "uniform_dual_prefix_closed_form":
            norm, _ = nuclear_norm.nuclear_norm(prefix_sum(i["n"]))
        else:
            continue
        assert norm / i["n"] == pytest.approx(item["value"], rel=1e-9)
        checked += 1
    assert checked == 20


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(0, 10))
def test_circulant_is_never_above(tail, zeros):
    coefficients = np.append(1.0, tail)
    a = Toeplitz(coefficients, coefficients.size + zeros)
    exact = np.linalg.svd(a.dense(), compute_uv=False).sum()
    assert 0.5 * exact < nuclear_norm.circulant(a) <= exact * (1 + 1e-13)


@pytest.mark.parametrize(
    ("workload", "method"),
    [
        (prefix_sum(5), "closed form"),
        (SGD(5, 0.5), "log-determinant integral"),
        (ToeplitzWorkload([1.0, 0.5, 0.1]), "singular values"),
        (MatrixWorkload(np.tri(3)), "singular values"),
        (ToeplitzWorkload(1 / np.arange(1.0, 1100)), "circulant"),
        (ScheduledSGD(np.ones(1100)), "none"),
    ],
)
def test_routes(workload, method):
    norm, how = nuclear_norm.nuclear_norm(workload)
    assert how == method
    assert norm <= singular_values(workload) * (1 + 1e-12)
