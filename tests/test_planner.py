"""The planner: every row within its epsilon and memory, ranked as recomputed, and honest."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import oracle
from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise.bounds.certificate import lower_bound
from rootnoise.factorization import Factorization, factorize, mechanisms
from rootnoise.mechanism import Mechanism
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, SingleParticipation
from rootnoise.participation.samplers import CyclicPoissonSampler, FixedCycleSampler
from rootnoise.planner import (
    AFFORDABLE,
    AFFORDABLE_IN_GENERAL,
    AMPLIFIED,
    CONTRACTION,
    SLIGHT,
    WORTH,
    Job,
    bins,
    candidates,
    groups,
    plan,
    samplings,
    search,
)
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, learning_rates

JOB = Job(n_examples=100, batch_size=15, epochs=4, epsilon=2.0, delta=1e-5)  # 28 steps
WORK = SGD(28, momentum=0.9)
TINY = replace(JOB, memory_rows=0)
CALLS: list[tuple[int, int, str]] = []


@pytest.fixture(scope="module", params=[0.0, CONTRACTION])
def made(request):
    """Return the plan of the job above, and what its progress said."""
    CALLS.clear()
    return plan(WORK, JOB, lambda *said: CALLS.append(said), contraction=request.param)


def sampler(row, job, seed=0):
    if row.sampling == "fixed-cycle":
        return FixedCycleSampler(job.n_examples, job.batch_size, job.epochs, seed=seed)
    groups = row.participation.groups
    return CyclicPoissonSampler(job.n_examples, job.batch_size, job.n_steps, groups, seed=seed)


def cheat(made):
    """Take a row with a little less noise than was planned."""
    row = made.rows[0]
    made.take(replace(row, noise_multiplier=row.noise_multiplier / 1.1))


def dense_error(row, work, job, contraction=0.0):
    """Return sigma * sens * |B|_F / sqrt(n) / batch size by dense algebra and every pattern."""
    split = factorize(work, row.participation, row.mechanism, **row.options)
    a, c = work.contracted(contraction).matrix.dense(), split.strategy.dense()
    b = oracle.decoder(a, c)
    if isinstance(row.participation, FixedCycle):
        cycle = row.participation
        patterns = [np.arange(i, len(a), cycle.period) for i in range(cycle.period)]
        gram = np.abs(c.T @ c)
        sens = max(gram[np.ix_(p, p)].sum() for p in patterns) ** 0.5
    else:
        sens = np.linalg.norm(c, axis=0).max()
    rmse = sens * np.linalg.norm(b) / len(a) ** 0.5
    return row.noise_multiplier * rmse / job.batch_size, sens


def test_each_row_by_dense_algebra(made):
    aim = WORK.contracted(made.contraction)
    once = lower_bound(aim, SingleParticipation())
    cycle = lower_bound(aim, FixedCycle(7, 4))
    for row in made.rows:
        error, sens = dense_error(row, WORK, JOB, made.contraction)
        assert row.rmse_per_example == pytest.approx(error, rel=1e-6), row
        assert row.sensitivity == pytest.approx(sens, rel=1e-6), row
        bound = once if isinstance(row.participation, CyclicPoisson) else cycle
        rmse = error * JOB.batch_size / row.noise_multiplier
        assert row.gap == pytest.approx(rmse / bound.value - 1, rel=1e-5, abs=1e-6), row
        assert row.gap >= 0


def test_rows_spend_at_most_epsilon(made):
    for who, sigma in {(row.participation, row.noise_multiplier) for row in made.rows}:
        spent = accounting.privacy_cost(who, JOB.n_steps, sigma, JOB.delta).epsilon
        assert 0.98 * JOB.epsilon <= spent <= JOB.epsilon


def test_a_plan_is_made_once_a_process(monkeypatch):
    first = plan(WORK, TINY)
    for mapping in (first.rows[0].options, first.left_out):
        assert isinstance(mapping, dict)
        mapping["bands"] = 99
    other = plan(SGD(28, momentum=0.8), TINY), plan(WORK, replace(TINY, epsilon=3.0))
    assert all(p.rows[0].rmse_per_example != first.rows[0].rmse_per_example for p in other)

    def refuse(*_):
        raise AssertionError("made again")

    monkeypatch.setattr("rootnoise.planner.search._made", refuse)
    again = plan(WORK, TINY)
    assert [row.rmse_per_example for row in again.rows] == [r.rmse_per_example for r in first.rows]
    assert "bands" not in again.rows[0].options
    assert "bands" not in again.left_out
    with pytest.raises(AssertionError, match="made again"):
        plan(WORK, TINY, bins=True)


def test_few_plans_are_kept():
    for epochs in range(1, 11):
        plan(SGD(epochs), Job(5, 5, epochs, 8.0, 1e-5, memory_rows=0))
    assert len(search._KEPT) == search.MOST_KEPT


def test_rows_are_ranked_by_error(made):
    errors = [row.rmse_per_example for row in made.rows]
    assert errors == sorted(errors)
    assert len({(r.mechanism, r.participation, r.bands, r.memory_rows) for r in made.rows}) == len(
        made.rows
    )


def test_every_mechanism_is_ranked_or_left_out_with_a_reason(made):
    ranked = {row.mechanism for row in made.rows}
    assert ranked | set(made.left_out) == set(mechanisms())
    assert not ranked & set(made.left_out)
    assert all("got" in reason or "must" in reason for reason in made.left_out.values())


def test_no_candidate_takes_longer_than_is_allowed():
    job = Job(n_examples=600, batch_size=600, epochs=600, epsilon=8, delta=1e-5, memory_rows=1)
    left = plan(SGD(600), job).left_out
    assert left["dense"] == "n_steps must be at most 512 for an answer in seconds"
    assert set(AFFORDABLE) <= set(AFFORDABLE_IN_GENERAL) <= set(mechanisms())


def test_long_runs_of_any_workload_have_few_bands(monkeypatch):
    """Errors would take O(n^2) time there: bands are cut, and what has no bands is left out."""
    monkeypatch.setattr(search, "LONG", 20)
    monkeypatch.setattr(search, "MOST_SCALED", 3)
    monkeypatch.setattr(search, "AFFORDABLE_IN_GENERAL", {"workload": 27, "square-root": 28})
    work = ScheduledSGD(learning_rates("linear", 28), 0.9)
    made = plan(work, JOB)
    assert made.left_out["workload"] == "n_steps must be at most 27 for an answer in seconds"
    assert "square-root" in {row.mechanism for row in made.rows}
    cut = {row.options["bands"] for row in made.rows if "bands" in row.options}
    assert cut == {2, 3}
    assert max(row.bands for row in plan(WORK, JOB).rows if row.mechanism == "bsr") > 3


def test_free_bands_beat_scaled_ones_where_the_rate_falls():
    """By 1 % in a fixed cycle, and come within 1 % of every factorization; their row trains."""
    job = Job(n_examples=150, batch_size=10, epochs=4, epsilon=8.0, delta=1e-5)
    made = plan(ScheduledSGD(learning_rates("cosine", 60), 0.9), job)
    cycles = [row for row in made.rows if row.sampling == "fixed-cycle"]
    least = {
        name: min(r.rmse_per_example for r in cycles if r.mechanism == name)
        for name in ("bandmf", "epoch-scaled", "banded")
    }
    assert least["bandmf"] < 0.99 * least["epoch-scaled"] < 0.99 * 0.9 * least["banded"]
    [free] = [row for row in cycles if row.mechanism == "bandmf"]
    assert free.gap is not None
    assert free.gap < 0.01
    assert made.take(free).mechanism.epsilon <= 8.0


def test_rows_can_be_run(made):
    """The participation is the sampler's own, and every split calibrates to the same mechanism."""
    for row in made.rows:
        drawn = sampler(row, JOB)
        assert drawn.participation == row.participation
        assert drawn.n_steps == JOB.n_steps
        split = factorize(WORK, row.participation, row.mechanism, **row.options)
        sigma = row.noise_multiplier
        ready = Mechanism.calibrate(
            split, row.participation, noise_multiplier=sigma, delta=JOB.delta
        )
        assert ready.epsilon == row.epsilon <= JOB.epsilon
        assert (ready.strategy.bands, split.memory_rows) == (row.bands, row.memory_rows)
        assert ready.workload == WORK
        aimed = Factorization(row.mechanism, WORK.contracted(made.contraction), split.strategy)
        rmse = aimed.rmse(row.participation)
        assert rmse * sigma / JOB.batch_size == pytest.approx(row.rmse_per_example)
        if not made.contraction:
            assert ready.rmse == pytest.approx(rmse)
        again = Mechanism.calibrate(split, row.participation, epsilon=2.0, delta=JOB.delta)
        assert again.noise_multiplier == sigma
        taken, batches = made.take(row, clip_norm=0.5, seed=3)
        assert taken.fingerprint == replace(again, clip_norm=0.5).fingerprint
        assert batches.participation == row.participation
        np.testing.assert_array_equal(batches.batch(5), sampler(row, JOB, seed=3).batch(5))


def test_the_best_row_is_taken_in_one_call(made):
    mechanism, batches = made.best()
    assert mechanism.fingerprint == made.take(made.recommended()).mechanism.fingerprint
    assert batches.n_steps == mechanism.n_steps
    for other in ("fixed-cycle", "poisson"):
        taken = made.best(sampling=other).sampler.participation
        assert taken == made.recommended(other).participation
    assert made.first("cyclic-poisson", "poisson").sampling in ("cyclic-poisson", "poisson")


def test_amplified_rows_say_what_they_count_on(made):
    amplified = [row for row in made.rows if isinstance(row.participation, CyclicPoisson)]
    assert {row.sampling for row in amplified} == {"poisson", "cyclic-poisson"}
    for row in made.rows:
        assert row.note.startswith(AMPLIFIED) == (row in amplified)
    assert "secret random sampling needed" in AMPLIFIED
    assert "added or removed" in AMPLIFIED
    [poisson] = [row for row in amplified if row.sampling == "poisson"]
    assert (poisson.mechanism, poisson.memory_rows) == ("identity", 0)
    for row in amplified:
        assert row.bands <= row.participation.groups
        assert row.participation.probability == row.participation.groups * 15 / 100


@pytest.mark.parametrize("memory", [0, 1, 3])
def test_rows_obey_the_memory_limit(made, memory):
    job = Job(100, 15, 4, 2.0, 1e-5, memory)
    rows = plan(WORK, job, contraction=made.contraction).rows
    assert max(row.memory_rows for row in rows) <= memory
    # What fits is as good as without a limit.
    best = min(r.rmse_per_example for r in made.rows if r.memory_rows <= memory)
    assert rows[0].rmse_per_example <= best * (1 + 1e-9)


def test_what_is_recommended_has_least_error_but_for_what_else_is_asked_of_it(made):
    """Public batches are worth 2 % more error, half the memory half a per cent: each decides."""
    error = made.rows[0].rmse_per_example
    row = replace(made.first("fixed-cycle"), rmse_per_example=error, memory_rows=7)
    secret = replace(made.first("poisson"), rmse_per_example=error, memory_rows=7)

    def at(more, memory=7, like=row):
        return replace(like, rmse_per_example=error * math.exp(more), memory_rows=memory)

    def taken(*rows):
        return replace(made, rows=rows).recommended()

    assert taken(row) is row
    assert taken(secret, row) is row
    assert taken(secret, near := at(0.99 * WORTH)) is near
    assert taken(secret, at(1.01 * WORTH)) is secret
    assert taken(row, half := at(0.9 * SLIGHT, 3)) is half
    assert taken(row, at(1.01 * SLIGHT, 3)) is row
    assert taken(row, half, none := at(2.95 * SLIGHT, 0)) is half
    assert taken(row, none) is none
    assert taken(row, at(3.01 * SLIGHT, 0)) is row
    assert taken(row, replace(row, mechanism="bsr")) is row
    assert replace(made, rows=(secret, row)).recommended("poisson") is secret
    places = made.place_to_take, replace(made, rows=(secret, at(2 * WORTH), row)).place_to_take
    assert places == (made.rows.index(made.recommended()), 2)


def test_curvature_that_forgets_old_noise_favours_sampling():
    """The digits at epsilon 1 (docs/planning.md): independent noise there trains further."""
    job = Job(1442, 128, 20, 1.0, 1e-5, memory_rows=1)
    linear, pulled = (plan(SGD(240, 0.9), job, contraction=c) for c in (0, CONTRACTION))
    gains = []
    for made in (linear, pulled):
        plain = made.first("poisson").rmse_per_example
        gains.append(plain / made.first("fixed-cycle").rmse_per_example)
    assert gains[0] > 0.99
    assert gains[1] < 0.95
    assert pulled.recommended().sampling == "poisson"


def test_memory_that_nothing_fits_is_independent_noise():
    found = plan(WORK, Job(100, 15, 4, 2.0, 1e-5, 0))
    assert {row.mechanism for row in found.rows} == {"identity"}
    assert found.left_out["bsr"] == "memory_rows must be >= 1, got 0"
    assert found.left_out["dense"] == "memory_rows must be >= 27, got 0"
    assert set(found.left_out) | {"identity"} == set(mechanisms())


def test_sampling_wins_where_epsilon_is_small_and_correlation_where_it_is_large():
    jobs = [Job(1000, 20, 2, epsilon, 1e-5, memory_rows=1) for epsilon in (0.5, 2.0)]
    tight, loose = (plan(SGD(100, momentum=0.9), job, contraction=0).rows[0] for job in jobs)
    assert tight.sampling != "fixed-cycle"
    assert loose.sampling == "fixed-cycle"


def test_samplings_cover_all_groups_that_amplify():
    groups = [who.groups for who in samplings(JOB)[1:]]
    assert groups == [1, 2, 4]  # 8 * 15 > 100
    assert samplings(Job(100, 100, 3, 1.0, 1e-5)) == [FixedCycle(1, 3)]


@pytest.mark.parametrize(
    ("job", "momentum"),
    [
        (Job(600, 10, 4, 1.0, 1e-5), 0.9),
        (Job(900, 12, 2, 4.0, 1e-5), 0.0),
        (Job(600, 10, 4, 4.0, 1e-5, memory_rows=12), 0.9),
    ],
)
def test_the_best_number_of_groups_is_found(job, momentum):
    """Within 0.5 % of every number of groups tried with every factorization of `candidates`."""
    work = SGD(job.n_steps, momentum)
    least = np.inf
    for g in range(2, groups.most(job) + 1):
        who = groups.cyclic(job, g)
        sigma = accounting.noise_multiplier(who, job.n_steps, job.epsilon, job.delta, 0.01)
        for name in ("bsr", "banded"):
            rmse = factorize(work, who, name, bands=g).rmse(who)
            least = min(least, sigma * rmse / job.batch_size)
    first = plan(work, job).first("cyclic-poisson")
    assert first.rmse_per_example <= least * 1.005
    assert first.memory_rows <= (job.memory_rows or 998)


@pytest.mark.parametrize(("n", "low", "high"), [(28, 4, 10), (100, 2, 2), (7, 1, 7), (999, 8, 300)])
def test_tight_numbers_of_groups(n, low, high):
    found = groups.tight(n, low, high)
    rounds = {-(-n // g) for g in range(low, high + 1)}
    every = sorted(
        {low, high} | {min(g for g in range(low, high + 1) if -(-n // g) == r) for r in rounds}
    )
    assert set(found) <= set(every)
    assert found == every or len(found) == groups.MOST
    assert (found[0], found[-1]) == (low, high)


def test_one_step_an_epoch_and_one_epoch():
    for job in (Job(100, 100, 3, 8.0, 1e-5), Job(100, 40, 1, 8.0, 1e-5), Job(5, 5, 1, 8.0, 1e-5)):
        gap = plan(SGD(job.n_steps, 0.5), job).rows[0].gap
        assert gap is not None
        assert gap >= -1e-9


def test_schedules_and_matrices_are_planned_too():
    work = ScheduledSGD(learning_rates("cosine", 28, warmup=5), 0.9)
    for pull in (CONTRACTION, 0.0):
        rows = plan(work, JOB, contraction=pull).rows
        error = dense_error(rows[0], work, JOB, pull)[0]
        assert rows[0].rmse_per_example == pytest.approx(error, rel=1e-6)
    matrix = plan(MatrixWorkload(work.matrix.dense()), JOB, contraction=0)
    assert "workload must be Toeplitz, or SGD with a schedule" in matrix.left_out["blt"]
    by_name = {(r.mechanism, r.sampling): r.rmse_per_example for r in rows}
    for row in matrix.rows:
        if row.mechanism == "identity":
            assert row.rmse_per_example == pytest.approx(by_name["identity", row.sampling])


BINS = Job(n_examples=12, batch_size=4, epochs=4, epsilon=4.0, delta=1e-3, memory_rows=2)


@pytest.fixture(scope="module")
def binned():
    """Return a plan with balls in bins, and what its progress said."""
    said: list[tuple[int, int, str]] = []
    return plan(SGD(12, momentum=0.9), BINS, lambda *each: said.append(each), bins=True), said


def test_balls_in_bins_are_tried_when_asked_for(binned):
    made, said = binned
    assert said[-1][0] + 1 == said[-1][1]
    assert "strategies for balls in bins" in {name for *_, name in said}
    bins = [row for row in made.rows if row.sampling == "balls-in-bins"]
    assert [name for *_, name in said].count(f"{bins[0].mechanism}, balls in bins") == 1
    assert len(bins) == 1
    assert "not calibrated, as forecasts from few samples" in made.left_out["balls in bins"]
    assert not {row.mechanism for row in bins} & set(made.left_out["balls in bins"].split(", "))
    for row in bins:
        assert row.participation == BallsInBins(3, 4)
        assert row.note.startswith(AMPLIFIED)
        assert row.memory_rows <= 2
        split = made.split(row)
        found = Mechanism.calibrate(split, row.participation, epsilon=4.0, delta=1e-3)
        assert (found.noise_multiplier, found.epsilon) == (row.noise_multiplier, row.epsilon)
        error = dense_error(row, SGD(12, momentum=0.9), BINS, CONTRACTION)[0]
        assert row.rmse_per_example == pytest.approx(error, rel=1e-6)
        assert made.take(row).mechanism.noise_multiplier == row.noise_multiplier
        assert row.epsilon <= 4.0


def test_balls_in_bins_are_tried_with_what_is_best_there(binned):
    """Calibrated, others have at least as much error; forecasts may be off by 2 %."""
    made, _ = binned
    who, work = BallsInBins(3, 4), SGD(12, momentum=0.9).contracted(CONTRACTION)
    errors = []
    for name, options in [("identity", {}), ("banded", {"bands": 2})]:
        split = factorize(work, who, name, **options)
        sigma = accounting.noise_multiplier(who, 12, 4.0, 1e-3, strategy=split.strategy)
        errors.append(sigma * split.rmse(who) / 4)
    best = min(r.rmse_per_example for r in made.rows if r.sampling == "balls-in-bins")
    assert best <= 1.02 * min(errors)
    assert max(errors) > 1.1 * best  # there is something to choose from


@pytest.mark.parametrize(
    ("epochs", "batch_size", "asked", "tried"),
    [
        (1, 10, None, True),
        (1, 10, False, False),
        (2, 20, None, False),
        (2, 20, True, True),
        (1, 40, None, False),  # a single step
    ],
)
def test_a_plan_of_one_epoch_tries_balls_in_bins_by_itself(epochs, batch_size, asked, tried):
    job = Job(40, batch_size, epochs, epsilon=1.0, delta=1e-3)
    rows = plan(SGD(job.n_steps), job, bins=asked).rows
    assert ("balls-in-bins" in {row.sampling for row in rows}) == tried


def test_in_bins_what_would_be_recommended_is_calibrated():
    def chosen(*near):
        looked = bins.Forecasts(Job(40, 10, 1, epsilon=1.0, delta=1e-3))
        looked._near = [(error, rows, (name, {})) for name, error, rows in near]
        return looked.chosen and looked.chosen[0]

    assert chosen(("heavy", 1.0, 7), ("half", 1.004, 3)) == "half"
    assert chosen(("heavy", 1.0, 7), ("half", 1.006, 3)) == "heavy"
    assert chosen(("light", 1.0, 1), ("heavy", 1.0, 8)) == "light"
    assert chosen() is None


def test_a_forecast_is_near_the_certain_epsilon():
    """Few samples against sums of log-normals, for strategies where those are tight."""
    for period, epochs, name, sigma in [(8, 1, "identity", 1.5), (8, 10, "identity", 1.6)]:
        who, n = BallsInBins(period, epochs), period * epochs
        c = factorize(SGD(n), who, name).strategy
        certain = accounting.privacy_cost(who, n, sigma, 1e-5, strategy=c)
        assert certain.lower_bound is not None
        assert certain.epsilon <= 1.02 * certain.lower_bound
        found = accounting.forecast(who, n, sigma, 1e-5, c)
        assert found == pytest.approx(certain.epsilon, rel=0.03)


@pytest.mark.parametrize("limit", ["MANY", "LARGE"])
def test_of_many_bins_few_strategies_are_tried(monkeypatch, limit):
    monkeypatch.setattr(bins, limit, 2)
    monkeypatch.setattr(search, "_calibrated", lambda *_: search.Cost(1.0, 1.0, True))
    search._KEPT.clear()
    made = plan(SGD(12, momentum=0.8), replace(BINS, memory_rows=1), bins=True)
    assert made.left_out["balls in bins"] == "few strategies are tried with so many bins"
    cycles = [row for row in made.rows if row.sampling == "fixed-cycle"]
    light = next(row for row in cycles if row.memory_rows <= 1)
    found = {row.mechanism for row in made.rows if row.sampling == "balls-in-bins"}
    assert found == {cycles[0].mechanism, light.mechanism}


def test_what_cannot_be_looked_at_in_bins_is_left_out(monkeypatch):
    def refuse(*_):
        raise RootnoiseError("n_steps must be small")

    monkeypatch.setattr(bins.Forecasts, "look", refuse)
    made = plan(SGD(12, momentum=0.7), BINS, bins=True)
    assert made.left_out["bsr, balls in bins"] == "n_steps must be small"
    assert "balls in bins" not in made.left_out
    assert "balls-in-bins" not in {row.sampling for row in made.rows}


def test_a_row_of_certain_epsilon_is_taken_before_one_of_confidence(binned):
    made, _ = binned
    row = replace(made.rows[0], participation=BallsInBins(3, 4), rmse_per_example=1.0)
    unsure = replace(row, certain=False, memory_rows=0, rmse_per_example=0.99)
    sure = replace(row, certain=True, memory_rows=0, rmse_per_example=0.99 * (1 + 0.99 * SLIGHT))
    assert replace(made, rows=(unsure, sure)).recommended() is sure
    far = replace(sure, rmse_per_example=0.99 * (1 + 1.01 * SLIGHT))
    assert replace(made, rows=(unsure, far)).recommended() is unsure


def test_a_row_says_whether_its_epsilon_is_certain(binned):
    made, _ = binned
    for row in made.rows:
        who, sigma = row.participation, row.noise_multiplier
        c = made.split(row).strategy
        spent = accounting.privacy_cost(who, 12, sigma, 1e-3, strategy=c)
        assert row.certain == (spent.monte_carlo is None)
        assert ("confidence bound" in row.note) == (spent.monte_carlo is not None)


def test_a_row_of_confidence_says_so(monkeypatch):
    who, split = BallsInBins(3, 4), factorize(SGD(12), BallsInBins(3, 4), "identity")
    sampled = accounting.PrivacyCost(4.0, 1e-3, False, "", monte_carlo=accounting.MonteCarlo())
    monkeypatch.setattr(accounting, "privacy_cost", lambda *_, **__: sampled)
    cost = search._calibrated(BINS, who, split.strategy)
    unsure = search._row(split, {}, BINS, who, cost, "all", None)
    assert unsure.note.endswith("; epsilon is an upper confidence bound")
    assert not unsure.certain


def test_findings_are_of_the_best_row_without_amplification():
    found = plan(WORK, Job(100, 15, 4, 0.5, 1e-5, memory_rows=1)).findings
    assert "amplification-would-win" in {finding.name for finding in found}


def test_progress_names_what_is_tried(made):
    first = len(candidates(JOB, samplings(JOB)[0]))
    of = sum(len(candidates(JOB, who)) for who in samplings(JOB))
    assert CALLS[0] == (0, of, "identity")
    assert CALLS.pop(first) == (first, of, "numbers of groups")
    assert [done for done, _, _ in CALLS] == list(range(len(CALLS)))
    assert {name for _, _, name in CALLS} == set(mechanisms())
    assert len(CALLS) == CALLS[-1][1]


def test_progress_counts_the_best_number_of_groups():
    said: list[tuple[int, int, str]] = []
    made = plan(SGD(60, 0.9), Job(200, 10, 3, 1.0, 1e-5), lambda *each: said.append(each))
    assert CyclicPoisson(3, 0.15) in {row.participation for row in made.rows}  # no power of two
    assert said[-1][0] + 1 == said[-1][1] > said[-4][1]


def test_progress_of_a_long_run_ends_where_it_said(monkeypatch):
    """Few numbers of groups are tried there: which is known once their region is."""
    monkeypatch.setattr(search, "LONG", 100)
    said: list[tuple[int, int, str]] = []
    job = Job(n_examples=2000, batch_size=10, epochs=1, epsilon=1.0, delta=1e-5, memory_rows=2000)
    plan(SGD(200), job, lambda *each: said.append(each))
    at = [name for _, _, name in said].index("numbers of groups")
    assert len({of for _, of, _ in said[: at + 1]}) == 1
    assert said[at + 1][1] < said[at][1]
    assert said[-1][0] + 1 == said[-1][1]


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: Job(0, 1, 1, 1, 0.1), "n_examples must be >= 1, got 0"),
        (lambda: Job(5, 6, 1, 1, 0.1), r"batch_size must be in \[1, n_examples=5\], got 6"),
        (lambda: Job(5, 5, 0, 1, 0.1), "epochs must be >= 1, got 0"),
        (lambda: Job(5, 5, 1, 0, 0.1), "epsilon must be a finite number > 0, got 0"),
        (lambda: Job(5, 5, 1, 1, 1), "delta must be a finite number > 0 and < 1, got 1.0"),
        (lambda: Job(5, 5, 1, 1, 0.1, -1), "memory_rows must be >= 0, got -1"),
        (lambda: plan(WORK, TINY).best(sampling="ring"), "sampling must be one that the plan has"),
        (lambda: JOB.sampler(FixedCycle(5, 4)), "participation must be one of this job's, got Fix"),
        (lambda: JOB.sampler(SingleParticipation()), "participation must be one of this job's"),
        (lambda: cheat(plan(WORK, TINY)), "row must spend at most epsilon=2, got 2"),
        (
            lambda: plan(WORK, JOB, contraction=-1),
            "contraction must be a finite number >= 0, got -1",
        ),
        (lambda: plan(SGD(29), JOB), r"workload's n_steps must be in \[28, 28\], got 29"),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()
