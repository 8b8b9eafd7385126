"""Which iterates a plan counts: each objective by dense algebra, and what a plan makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise.factorization import Factorization, factorize
from rootnoise.participation import FixedCycle
from rootnoise.planner import CONTRACTION, OBJECTIVES, Job, groups, plan
from rootnoise.planner.objective import expected
from rootnoise.workload import (
    SGD,
    MatrixWorkload,
    ScheduledSGD,
    ToeplitzWorkload,
    Workload,
    learning_rates,
)

JOB = Job(n_examples=100, batch_size=15, epochs=4, epsilon=2.0, delta=1e-5)  # 28 steps
STEADY = SGD(28, momentum=0.9)
FALLING = ScheduledSGD(learning_rates("cosine", 28, warmup=3), 0.9)
OTHERS = [name for name in OBJECTIVES if name != "all"]
MECHANISMS = {
    "bsr": {"bands": 3},
    "banded": {"bands": 2},
    "bandmf": {"bands": 2},
    "epoch-scaled": {"bands": 2, "base": "banded"},
    "tree": {},
    "dense": {},
    "lambda-cgd": {},
    "identity": {},
}


def dense_error(split, who, objective, rates):
    """Return the error from dense B, each objective written out."""
    b = oracle.decoder(split.workload.matrix.dense(), split.strategy.dense())
    n = len(b)
    k = max(1, n // 4)
    squares = [row @ row for row in b]
    found = {
        "all": sum(squares) / n,
        "rates": sum(r * s for r, s in zip(rates, squares, strict=True)) / sum(rates),
        "last": squares[-1],
        "tail": sum(squares[-k:]) / k,
        "tail-average": np.square(b[-k:].mean(axis=0)).sum(),
    }
    return split.sensitivity(who).value * found[objective] ** 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(data=st.data(), n=st.integers(1, 40), momentum=st.sampled_from([0.0, 0.5, 0.9]))
def test_every_objective_is_that_of_dense_algebra(objective, data, n, momentum):
    period = data.draw(st.integers(1, n))
    who = FixedCycle(period, -(-n // period))
    kind = data.draw(st.sampled_from(["steady", "falling", "free"]))
    rates = np.ones(n)
    work: Workload = SGD(n, momentum)
    if kind != "steady":
        rates = np.linspace(1, 0.1, n) if kind == "falling" else 1 + np.arange(n) % 3
        work = ScheduledSGD(rates, momentum)
    aim = work.contracted(data.draw(st.sampled_from([0.0, CONTRACTION])))
    name = data.draw(
        st.sampled_from(["bsr", "banded", "identity", "lambda-cgd", "column-normalised"])
    )
    options = {} if name in ("identity", "lambda-cgd") else {"bands": min(2, period)}
    split = factorize(aim, who, name, **options)
    found = expected(split, who, objective)
    assert found == pytest.approx(dense_error(split, who, objective, rates), rel=1e-9)


@pytest.mark.parametrize("work", [STEADY, FALLING, MatrixWorkload(FALLING.matrix.dense())])
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_kind_of_strategy(work, name):
    who = FixedCycle(7, 4)
    options = MECHANISMS[name]
    if isinstance(work, MatrixWorkload) and name in ("banded", "lambda-cgd", "epoch-scaled"):
        name, options = "workload", {}  # those are made for other workloads
    split = factorize(work, who, name, **options)
    rates = np.ones(28) if work is STEADY else np.asarray(FALLING.learning_rates)
    for objective in OBJECTIVES:
        if objective == "rates" and isinstance(work, MatrixWorkload):
            continue
        error = dense_error(split, who, objective, rates)
        assert expected(split, who, objective) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("objective", OTHERS)
@pytest.mark.parametrize("work", [STEADY, FALLING])
def test_rows_are_ranked_by_it_and_claim_no_gap(work, objective):
    made = plan(work, JOB, objective=objective)
    assert made.objective == objective
    rates = np.ones(28) if work is STEADY else np.asarray(FALLING.learning_rates)
    errors = []
    for row in made.rows:
        split = made.split(row)
        aimed = Factorization(row.mechanism, work.contracted(CONTRACTION), split.strategy)
        error = dense_error(aimed, row.participation, objective, rates)
        errors.append(row.noise_multiplier * error / JOB.batch_size)
        assert row.rmse_per_example == pytest.approx(errors[-1], rel=1e-8), row
        assert row.gap is None
        assert row.epsilon <= JOB.epsilon
    assert errors == sorted(errors) or errors == pytest.approx(sorted(errors), rel=1e-8)
    assert made.take(made.recommended()).mechanism.epsilon <= JOB.epsilon


def test_objectives_do_not_share_a_plan():
    """Neither in the cache of the process nor in the order of rows."""
    made = {name: plan(STEADY, JOB, objective=name) for name in OBJECTIVES}
    least = {name: made[name].rows[0].rmse_per_example for name in OTHERS}
    assert len(set(least.values())) == len(least)
    assert plan(STEADY, JOB) == made["all"]
    assert all(row.gap is not None for row in made["all"].rows)
    # With a steady rate, weights by rate are those of all iterates.
    assert least["rates"] == pytest.approx(made["all"].rows[0].rmse_per_example, rel=1e-12)
    order = [[(r.mechanism, r.sampling, r.bands) for r in p.rows] for p in made.values()]
    assert order[0] != order[2]


def test_numbers_of_groups_are_compared_by_it(monkeypatch):
    asked = []
    for name in ("region", "best"):
        plain = getattr(groups, name)

        def remember(*arguments, _plain=plain):
            asked.append(arguments[-1])
            return _plain(*arguments)

        monkeypatch.setattr(groups, name, remember)
    plan(SGD(28, momentum=0.3), JOB, objective="last")
    assert asked == ["last", "last"]
    error = groups.errors(STEADY, JOB, "last")(4)
    who = groups.cyclic(JOB, 4)
    sigma = accounting.noise_multiplier(who, 28, JOB.epsilon, JOB.delta, groups.TOLERANCE)
    split = factorize(STEADY, who, "bsr", bands=4)
    assert error == pytest.approx(sigma * dense_error(split, who, "last", np.ones(28)))


@pytest.mark.parametrize("objective", ["last", "tail-average"])
def test_the_number_of_groups_is_the_best_for_it(objective):
    """Within 0.5 % of every number of groups, as for all iterates."""
    job, least = Job(300, 10, 4, 1.0, 1e-5), np.inf
    work = SGD(job.n_steps, 0.9)
    for g in range(2, groups.most(job) + 1):
        who = groups.cyclic(job, g)
        sigma = accounting.noise_multiplier(who, job.n_steps, job.epsilon, job.delta, 0.01)
        for name in ("bsr", "banded"):
            error = expected(factorize(work, who, name, bands=g), who, objective)
            least = min(least, sigma * error / job.batch_size)
    first = plan(work, job, contraction=0, objective=objective).first("cyclic-poisson")
    assert first.rmse_per_example <= least * 1.005


LINE = "plan --dataset-size 100 --batch-size 25 --epochs 3 --epsilon 6 --delta 1e-5 --memory-rows 3"


def test_the_command_says_what_the_error_is_of(call_in_folder):
    words = [*LINE.split(), "--objective", "last"]
    expected_rows = plan(SGD(12), Job(100, 25, 3, 6.0, 1e-5, 3), objective="last").rows
    status, out, err = call_in_folder(*words, "--json", "--html", "p.html", "--plot", "p.png")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result["objective"] == "last"
    assert [r["gap"] for r in result["rows"]] == [None] * len(expected_rows)
    errors = [row["rmse_per_example"] for row in result["rows"]]
    assert errors == pytest.approx([row.rmse_per_example for row in expected_rows])
    status, out, _ = call_in_folder(*words)
    assert status == 0
    assert "error: of the last iterate; no bound is known, hence no gap." in out
    gaps = {line.split("│")[-2].strip() for line in out.splitlines() if line[:1] == "│"}
    assert gaps == {"-", ""}  # empty where a name takes two lines
    assert "%" not in out
    assert json.loads(call_in_folder(*LINE.split(), "--json")[1])["objective"] == "all"
    assert "error: of" not in call_in_folder(*LINE.split())[1]


def test_refusals(call_in_folder):
    line = "objective must be one of all, rates, last, tail, tail-average, got 'lats': perhaps last"
    status, out, err = call_in_folder(*LINE.split(), "--objective", "lats")
    assert (status, out, err) == (2, "", f"error: {line}\n")
    work = ToeplitzWorkload(STEADY.matrix.column(0))
    refused = "objective must not be rates for a workload that names none, got ToeplitzWorkload"
    with pytest.raises(RootnoiseError, match=refused):
        plan(work, JOB, objective="rates")
    assert plan(work, replace(JOB, memory_rows=0), objective="tail").objective == "tail"
