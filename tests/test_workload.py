"""Workloads against SGD itself, run step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from rootnoise import RootnoiseError, workload
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum

UNIT = st.floats(0, 1, allow_nan=False)


@given(st.integers(1, 40), UNIT.filter(lambda b: b < 1), UNIT.filter(lambda a: a > 0))
def test_matrix_is_what_sgd_does(n, momentum, decay):
    made = SGD(n, momentum, decay)
    np.testing.assert_allclose(
        made.matrix.dense(), oracle.sgd_matrix(n, momentum, decay), rtol=1e-12, atol=1e-300
    )


@given(st.integers(1, 40), UNIT.filter(lambda b: b < 1), UNIT.filter(lambda a: a > 0))
def test_square_root_squares_to_the_matrix(n, momentum, decay):
    made = SGD(n, momentum, decay)
    root = oracle.lower_toeplitz(made.square_root(n), n)
    np.testing.assert_allclose(root @ root, made.matrix.dense(), rtol=1e-12, atol=1e-300)


def test_square_root_is_the_triangular_one():
    made = SGD(30, 0.7, 0.95)
    root = oracle.square_root(made.matrix.dense())
    np.testing.assert_allclose(made.square_root(30), root[:, 0], rtol=1e-12)
    np.testing.assert_allclose(
        ToeplitzWorkload(made.matrix.column(0)).square_root(30), root[:, 0], rtol=1e-12
    )


def test_prefix_sum_is_plain_sgd():
    assert prefix_sum(5) == SGD(5, 0.0, 1.0)
    np.testing.assert_array_equal(prefix_sum(3).matrix.dense(), np.tril(np.ones((3, 3))))


@pytest.mark.parametrize("made", [SGD(9, 0.5, 0.9), ToeplitzWorkload([2, 1, 0.5, 0])])
def test_round_trip(made):
    again = workload.from_dict(made.to_dict())
    assert (type(again), again.n_steps) == (type(made), made.n_steps)
    np.testing.assert_array_equal(again.matrix.dense(), made.matrix.dense())


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: SGD(0), "n_steps must be >= 1, got 0"),
        (lambda: SGD(2.5), "n_steps must be an integer, got 2.5"),
        (lambda: SGD(5, 1.0), "momentum must be a finite number >= 0 and < 1, got 1.0"),
        (lambda: SGD(5, -0.1), "momentum must be a finite number >= 0 and < 1, got -0.1"),
        (lambda: SGD(5, 0, 0), "decay must be a finite number > 0 and <= 1, got 0.0"),
        (lambda: SGD(5, 0, float("nan")), "decay must be a finite number > 0 and <= 1, got nan"),
        (lambda: ToeplitzWorkload([]), "^n_steps must be >= 1, got 0$"),
        (lambda: ToeplitzWorkload([0, 1]), "coefficients must start with a non-zero one, got 0.0"),
        (lambda: ToeplitzWorkload([-1, 1]), "coefficients must start with a positive one, got -1"),
        (lambda: ToeplitzWorkload([1, np.inf]), "coefficients must be finite, got 1 NaN"),
        (lambda: workload.from_dict({"type": "magic"}), "workload must be of a known type, got"),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


def test_a_long_toeplitz_workload_is_written_as_it_was_given():
    a = 1 + np.random.default_rng(0).random(2100)  # longer ones are convolved by FFT, which rounds
    fields = ToeplitzWorkload(a).to_dict()
    assert fields["coefficients"] == a.tolist()
    assert workload.from_dict(fields).to_dict() == fields


PULL = 5.0


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_contracted_sgd_by_running_it(momentum):
    """The parameters keep exp(-c / n) of what they moved, or a part by the rate of the step."""
    n, rng = 9, np.random.default_rng(0)
    gradients, rates = rng.standard_normal(n), np.linspace(1.0, 0.2, n)
    for work, chi, keep in (
        (SGD(n, momentum, 0.9), np.ones(n), 0.9 * np.exp(-PULL / n * np.ones(n))),
        (ScheduledSGD(rates, momentum), rates, np.exp(-PULL * rates / rates.sum())),
    ):
        theta = velocity = 0.0
        moved = []
        for t in range(n):
            velocity = momentum * velocity + gradients[t]
            theta = keep[t] * theta + chi[t] * velocity
            moved.append(theta)
        found = work.contracted(PULL)
        np.testing.assert_allclose(found.matrix.apply(gradients), moved, rtol=1e-12)
        assert type(found) is type(work)


def test_contracted_entries():
    """Of coefficients and matrices each entry falls with its lag."""
    a = np.array([1.0, 1.5, 1.75])
    fall = np.exp(-PULL / 3 * np.arange(3))
    found = ToeplitzWorkload(a).contracted(PULL).matrix.dense()
    np.testing.assert_allclose(found[:, 0], a * fall)
    dense = np.array([[2.0, 0, 0], [3, 4, 0], [5, 6, 7]])
    found = MatrixWorkload(dense).contracted(PULL).matrix.dense()
    expected = dense * [[1, 0, 0], [fall[1], 1, 0], [fall[2], fall[1], 1]]
    np.testing.assert_allclose(found, expected)


def test_no_contraction_is_the_workload_itself():
    for work in (SGD(3), ToeplitzWorkload([1.0, 1]), MatrixWorkload(np.eye(2))):
        assert work.contracted(0) is work
    with pytest.raises(RootnoiseError, match="contraction must be a finite number >= 0, got -1"):
        SGD(3).contracted(-1)
