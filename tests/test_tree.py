"""Binary trees: three estimators as square causal strategies, against the tree written out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import oracle
from rootnoise import causal
from rootnoise._check import RootnoiseError
from rootnoise.causal import streamed_norms
from rootnoise.causal.tree import ESTIMATORS, Tree, cycle_squares, error_variances, most_squares
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import FixedCycle, MinSeparation, SingleParticipation
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import SGD, ScheduledSGD, prefix_sum

VALUES = json.loads((Path(__file__).parent / "reference" / "values.json").read_text())
SIZES = [1, 2, 3, 4, 7, 8, 13, 16, 21]
each = pytest.mark.parametrize("estimator", ESTIMATORS)


def blocks(n: int) -> list[tuple[int, int]]:
    """Return height and start of all complete dyadic blocks."""
    return [(h, j) for h in range(n.bit_length()) for j in range(0, n - (1 << h) + 1, 1 << h)]


def tree_matrix(n: int) -> np.ndarray:
    """Return the rectangular strategy: one row a block, 1 at its steps."""
    rows = np.zeros((len(blocks(n)), n))
    for row, (h, j) in zip(rows, blocks(n), strict=True):
        row[j : j + (1 << h)] = 1
    return rows


def estimates(n: int, estimator: str) -> np.ndarray:
    """Return the decoder of prefix sums from the noisy block sums, as the estimators define it."""
    known = blocks(n)
    if estimator == "full":
        return np.tril(np.ones((n, n))) @ np.linalg.pinv(tree_matrix(n))
    weights: dict[tuple[int, int], np.ndarray] = {}
    variances: dict[int, float] = {}
    for i, (h, j) in enumerate(known):  # children come before their parents
        own = np.eye(len(known))[i]
        if h == 0 or estimator == "naive":
            weights[h, j], variances[h] = own, 1.0
            continue
        children = weights[h - 1, j] + weights[h - 1, j + (1 << h - 1)]
        below = 2 * variances[h - 1]
        weights[h, j] = (own * below + children) / (1 + below)
        variances[h] = below / (1 + below)
    decoder = np.zeros((n, len(known)))
    for t in range(n):
        start = 0
        for h in reversed(range(n.bit_length())):
            if (t + 1) >> h & 1:
                decoder[t] += weights[h, start]
                start += 1 << h
    return decoder


@each
@pytest.mark.parametrize("n", SIZES)
def test_the_errors_of_all_steps_together_are_those_of_the_tree(n, estimator):
    """Same joint covariance of all prefix sums, so the releases have the same distribution."""
    rectangular = estimates(n, estimator)
    noise = np.tril(np.ones((n, n))) @ Tree(n, estimator).inverse().dense()
    np.testing.assert_allclose(noise @ noise.T, rectangular @ rectangular.T, atol=1e-12)
    assert np.all(np.diag(noise) > 0)
    np.testing.assert_allclose(
        error_variances(n, estimator), np.square(rectangular).sum(axis=1), rtol=1e-12
    )


@pytest.mark.parametrize("n", SIZES)
def test_full_has_the_gram_matrix_of_the_tree_and_the_others_reveal_less(n):
    gram = tree_matrix(n).T @ tree_matrix(n)
    for estimator in ESTIMATORS:
        c = Tree(n, estimator).dense()
        rest = gram - c.T @ c
        assert np.linalg.eigvalsh(rest).min() > -1e-12
        if estimator == "full":
            np.testing.assert_allclose(rest, 0, atol=1e-12)


@each
@pytest.mark.parametrize("n", SIZES)
def test_the_map(n, estimator):
    c = Tree(n, estimator)
    dense = c.dense()
    assert not np.triu(dense, 1).any()
    x = np.random.default_rng(n).normal(size=(n, 2))
    for y in (x, x[:, 0]):
        np.testing.assert_allclose(c.apply(y), dense @ y, atol=1e-12)
        np.testing.assert_allclose(c.solve(dense @ y), y, atol=1e-11)
    np.testing.assert_allclose(c.column_norms(), np.linalg.norm(dense, axis=0), rtol=1e-12)
    np.testing.assert_allclose(streamed_norms.column_norms(c), c.column_norms(), rtol=1e-12)
    assert c.state_size == math.floor(math.log2(n))
    np.testing.assert_array_equal(causal.from_dict(c.to_dict()).dense(), dense)


@each
@pytest.mark.parametrize("m", [1, 3, 8, 21])
def test_both_ways_stream(estimator, m):
    c = Tree(21, estimator)
    for matrix in (c, c.inverse()):
        assert matrix.state_size == 4
        x = np.random.default_rng(m).normal(size=(21, 2))
        np.testing.assert_allclose(oracle.streamed(matrix, x, m), matrix.dense() @ x, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("E_tree_naive_prefix_single", "naive"),
        ("E_tree_online_honaker_prefix_single", "online"),
        ("E_tree_full_pinv_prefix_single", "full"),
    ],
)
def test_reference_values(name, estimator):
    """They take the sensitivity of the whole tree, which the online estimates do not release."""
    cases = [value for value in VALUES if value["name"] == name]
    assert cases
    for case in cases:
        n = case["inputs"]["n"]
        split = factorize(prefix_sum(n), mechanism="tree", estimator=estimator)
        tree_sens, b = math.sqrt(math.log2(n) + 1), split.decoder.row_norms()
        expected = tree_sens * math.sqrt(np.mean(b**2))
        assert expected == pytest.approx(case["value"], rel=1e-12)
        sens = split.sensitivity(SingleParticipation())
        assert sens.exact
        assert split.memory_rows == math.log2(n)
        rmse = split.rmse(SingleParticipation())
        if estimator == "online":
            assert rmse < 0.95 * case["value"]
        else:
            assert rmse == pytest.approx(case["value"], rel=1e-12)


@pytest.mark.parametrize(("n", "full", "online", "naive"), [(1024, 3.686, 5.650, 7.417)])
def test_the_known_errors_at_1024(n, full, online, naive):
    for estimator, expected in (("full", full), ("online", online), ("naive", naive)):
        error = math.sqrt(11 * error_variances(n, estimator).mean())
        assert error == pytest.approx(expected, abs=5e-4)


@each
def test_other_workloads_and_participations(estimator):
    n, participation = 40, FixedCycle(10, 4)
    split = factorize(SGD(n, 0.9, 0.99), participation, "tree", estimator=estimator)
    a, c = split.workload.matrix.dense(), split.strategy.dense()
    b = oracle.decoder(a, c)
    np.testing.assert_allclose(split.decoder.row_norms(), np.linalg.norm(b, axis=1), rtol=1e-11)
    sens = split.sensitivity(participation)
    assert sens.value == pytest.approx(oracle.sensitivity(c, 10, 4, True), rel=1e-12)
    assert sens.exact
    bound = split.sensitivity(MinSeparation(10, 4))
    assert bound.value >= sens.value * (1 - 1e-12)


SETTINGS = {
    "plain": {"momentum": 0.5, "decay": 0.9},
    "rates": {"learning_rates": np.linspace(1, 0.5, 30), "momentum": 0.5},
    "momentum": {"momentum": np.linspace(0, 0.9, 30)},
    "decay": {"decay": np.linspace(1, 0.9, 30)},
    "weight decay": {"momentum": 0.5, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.5, "nesterov": True},
}


@each
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_errors_of_any_settings_are_those_of_the_dense_decoder(estimator, settings):
    """The closed form is that of plain SGD, and taken for nothing else."""
    work = ScheduledSGD(**{"learning_rates": np.ones(30)} | settings)
    split = factorize(work, mechanism="tree", estimator=estimator)
    b = oracle.decoder(work.matrix.dense(), split.strategy.dense())
    np.testing.assert_allclose(split.decoder.row_norms(), np.linalg.norm(b, axis=1), rtol=1e-11)


@each
def test_a_million_steps_in_closed_form(estimator):
    n = 10**6
    rmse = factorize(prefix_sum(n), mechanism="tree", estimator=estimator).rmse(
        SingleParticipation()
    )
    known = {"full": 6.80044150581, "online": 9.53004935552, "naive": 14.0605824915}
    assert rmse == pytest.approx(known[estimator], rel=1e-10)


@each
@pytest.mark.parametrize(("momentum", "decay"), [(0, 0.9), (0.9, 1), (0.5, 0.5), (0.9, 0.7)])
def test_errors_of_sgd_in_closed_form(momentum, decay, estimator):
    for n in SIZES:
        b = SGD(n, momentum, decay).matrix.dense() @ Tree(n, estimator).inverse().dense()
        found = error_variances(n, estimator, momentum, decay)
        np.testing.assert_allclose(found, np.square(b).sum(axis=1), rtol=1e-13)


def test_a_loaded_mechanism_knows_its_errors():
    split = factorize(SGD(10**5, 0.9), mechanism="tree")
    made = Mechanism.calibrate(split, SingleParticipation(), epsilon=1.0, delta=1e-5)
    fields = made._definition()
    again = Mechanism(
        made.name,
        split.workload,
        SingleParticipation(),
        causal.from_dict(fields["strategy"]),
        made.noise_multiplier,
        made.delta,
    )
    assert again.rmse == made.rmse == split.rmse(SingleParticipation())


@pytest.mark.parametrize(("n", "b"), [(12, 3), (12, 4), (13, 2), (11, 5), (16, 4)])
def test_many_participations_are_counted_block_by_block(n, b):
    k = -(-n // b)
    gram = tree_matrix(n).T @ tree_matrix(n)
    sums = [gram[i::b, i::b].sum() for i in range(b)]
    np.testing.assert_array_equal(cycle_squares(n, b), sums)
    for most in range(1, k + 1):
        worst = max(gram[np.ix_(p, p)].sum() for p in oracle.patterns(n, b, most, False))
        assert worst <= most_squares(n, b, most) <= 2 * worst


@each
def test_the_sensitivity_of_a_million_steps(estimator):
    strategy = Tree(2**20, estimator)
    for who in (FixedCycle(2**17, 8), MinSeparation(2**17, 8)):
        found = sensitivity(strategy, who)
        # 18 levels with one step a block, then 2, 4 and 8 of them.
        assert found.value == pytest.approx(math.sqrt(18 * 8 + 4 * 4 + 2 * 16 + 64))
        assert found.exact == (estimator == "full")
    loose = sensitivity(strategy, MinSeparation(1000, 10))
    assert not loose.exact
    first = np.bincount(np.arange(0, 10000, 1000) >> 12)
    assert 10 * 10 + np.square(first).sum() < loose.value**2 < 1000


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: Tree(0), "n_steps must be >= 1, got 0"),
        (
            lambda: factorize(prefix_sum(4), mechanism="tree", estimator="best"),
            "estimator must be one of full, online, naive, got 'best'",
        ),
        (lambda: causal.from_dict({"type": "tree", "steps": 3}), "must be a known causal map"),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()
