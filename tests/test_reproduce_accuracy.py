"""Accuracy in the paper's page: the grid, what is planned, and the verdicts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from parts import accuracy, compared, grid
from parts.grid import TUNING_SEED, Grid
from parts.methods import AMPLIFIED, BINS, BSR, CYCLIC, FIRST, METHODS, MIN_SEP
from parts.part import BEYOND, NOT, NOT_OURS, PARTLY, PARTLY_OURS, SMALLER
from parts.studies import HERE, STUDIES, Study
from rootnoise import SGD, Job, RootnoiseError, plan
from rootnoise.planner import MEMORY_ROWS
from rootnoise.runs.config import RunConfig, make_mechanism, make_sampler, planned

# ---------------------------------------------------------------------------- verdicts


def cell(method, mean, std, **fields):
    same = {"study": "s", "dataset": "d", "model": "m", "epochs": 1, "batch_size": 2, "n_steps": 3}
    same |= {"epsilon": 1.0, "lr": 1.0, "rmse": 1.0, "seeds": 3}
    same |= {"mechanism": method, "sampling": "fixed-cycle"} | fields
    return {"method": method, "mean": mean, "std": std} | same


@pytest.mark.parametrize(
    ("std", "verdict", "words"),
    [(0.01, SMALLER, "in 1 of 1 settings"), (0.1, NOT, "within it in 1")],
)
def test_a_gain_within_one_deviation_is_no_gain(std, verdict, words):
    rows = [cell("BSR", 0.8, std), cell("A·Id", 0.75, std)]
    (claim,) = accuracy.claims({"accuracy": rows})
    assert claim.verdict == verdict
    assert words in claim.evidence
    # Two independent means differ by sqrt(2) of their deviations.
    ((gain, deviation),) = compared.compare(rows, "BSR", "A·Id")
    assert gain == pytest.approx(0.05)
    assert deviation == pytest.approx(std * 2**0.5)


def test_a_loss_is_reported_as_one():
    (claim,) = accuracy.claims(
        {"accuracy": [cell("BSR", 0.7, 0.01), cell("A·Id amplified", 0.8, 0.01)]}
    )
    assert claim.verdict == NOT
    assert "in 0 of 1 settings (0 of 1 at epsilon 1), worse in 1, within it in 0" in claim.evidence
    assert "on average by -10.0 points" in claim.evidence


@pytest.mark.parametrize(("other", "verdict"), [(0.8, PARTLY), (0.9, NOT), (0.7, SMALLER)])
def test_a_gain_in_most_settings_is_reproduced_in_part(other, verdict):
    rows = [cell("BSR", 0.8, 0.01), cell("A·Id", 0.7, 0.01)]
    rows += [cell("BSR", 0.8, 0.01, epsilon=2.0), cell("A·Id", other, 0.01, epsilon=2.0)]
    (claim,) = accuracy.claims({"accuracy": rows})
    assert claim.verdict == verdict
    assert f"(1 of 1 at epsilon 1, {int(other == 0.7)} of 1 at epsilon 2)" in claim.evidence


def chosen(mine, other, best=BSR, **fields):
    """Return the planner's choice beside amplified DP-SGD, at 0.7, and one other method."""
    values = {FIRST: mine, AMPLIFIED: 0.7, best: other}
    return [cell(name, value, 0.01, **fields) for name, value in values.items()]


@pytest.mark.parametrize(
    ("first", "second", "verdict", "words"),
    [
        (0.81, 0.8, BEYOND, "2 of 2 settings; it is better"),  # 0.014 is within
        (0.79, 0.8, BEYOND, "2 of 2 settings; it is better"),
        (0.77, 0.8, NOT_OURS, "0 of 2 settings; it is better"),
    ],
)
def test_the_planners_choice_is_held_against_the_best_other_method(first, second, verdict, words):
    rows = chosen(first, second) + chosen(first, second, CYCLIC, epsilon=2.0)
    level, better = accuracy.claims({"accuracy": rows})[-2:]
    assert (level.verdict, better.verdict) == (verdict, BEYOND)
    assert words in level.evidence
    behind = "Behind: s (3 steps, epsilon 1) 3.0 points behind BSR, s (3 steps, epsilon 2) 3.0"
    assert (behind in level.evidence) == (verdict == NOT_OURS)
    assert "in 2 of 2 settings (1 of 1 at epsilon 1, 1 of 1 at epsilon 2)" in better.evidence


def test_the_planners_choice_in_most_settings():
    rows = [row for e in (1.0, 2.0, 4.0) for row in chosen(0.8 - 0.1 * (e == 4), 0.8, epsilon=e)]
    level, better = accuracy.claims({"accuracy": rows})[-2:]
    assert (level.verdict, better.verdict) == (PARTLY_OURS, PARTLY_OURS)
    shown = accuracy.views({"accuracy": rows})[accuracy.CHOICE]
    assert [row["gain"] for row in shown] == ["+0.0 (+0.0)", "+0.0 (+0.0)", "-10.0 (-7.1)"]
    assert [row["gain over A·Id amplified"] for row in shown][1:] == ["+10.0 (+7.1)", "+0.0 (+0.0)"]
    assert shown[2]["best other"] == "BSR 80.0 ± 1.0 (lr 1)"


def test_chance_leaves_equal_methods_behind():
    # Means of s seeds differ by T / sqrt(s) deviations, T of Student's law with 2 (s - 1) freedoms.
    for seeds in (3, 5):
        exact = stats.t.sf(seeds**0.5, 2 * (seeds - 1))
        assert compared.chance(seeds, 1) == pytest.approx(exact, abs=0.01)
    assert 3 * compared.chance(3, 1) < compared.chance(3, 8) < 8 * compared.chance(3, 1)
    assert compared.chance(1, 8) == compared.chance(3, 0) == 0


def test_a_method_is_no_rival_of_itself():
    rows = [cell(name, 0.8, 0.01, mechanism="banded") for name in (FIRST, CYCLIC)]
    assert compared.rivals(rows, FIRST) == []
    rows.append(cell(BSR, 0.7, 0.01))
    (pair,) = compared.rivals(rows, FIRST)
    assert (pair.best["method"], pair.others, pair.level) == (BSR, 1, True)


@pytest.mark.parametrize(("other", "verdict"), [(0.7, SMALLER), (0.8, SMALLER), (0.9, NOT)])
def test_on_par_is_what_is_not_worse(other, verdict):
    rows = [cell("BSR", 0.8, 0.01), cell("AOF", other, 0.01)]
    (claim,) = accuracy.claims({"accuracy": rows})
    assert (claim.text, claim.verdict) == ("BSR is on par with AOF.", verdict)


def test_larger_models_are_judged_apart():
    rows = [cell("BSR", 0.8, 0.01), cell("A·Id", 0.9, 0.01)]
    rows += [cell("BSR", 0.8, 0.01, model="cnn"), cell("A·Id", 0.7, 0.01, model="cnn")]
    every, larger = accuracy.claims({"accuracy": rows})
    assert (every.verdict, larger.verdict) == (NOT, SMALLER)
    assert larger.text == "The gain over A·Id carries over to larger models."
    assert "in 1 of 1 settings" in larger.evidence


def test_the_figure_has_a_panel_for_each_curve_or_else_for_each_study():
    one = [cell("BSR", 0.8, 0.01)]
    curve = [cell("BSR", 0.8, 0.01, study="t"), cell("BSR", 0.9, 0.01, study="t", epsilon=2.0)]
    steps = [cell("BSR", 0.8, None, study="u", n_steps=n) for n in (3, 6)]
    for rows, count in ((one, 1), (one + curve, 1), (one + curve + steps, 2)):
        figure = accuracy.draw({"accuracy": rows})["accuracy.png"]
        assert len(figure.axes) == count


def test_gains_over_amplified_dpsgd_are_drawn_where_there_is_a_choice():
    assert set(accuracy.draw({"accuracy": [cell("BSR", 0.8, 0.01)]})) == {"accuracy.png"}
    rows = chosen(0.8, 0.75) + chosen(0.7, 0.75, epsilon=2.0)
    (axes,) = accuracy.draw({"accuracy": rows})["planned.png"].axes
    drawn: dict[Any, Any] = {line.get_label(): line for line in axes.containers}
    assert set(drawn) == {BSR, FIRST}
    assert drawn[FIRST].lines[0].get_ydata() == pytest.approx([10, 0])
    (bars,) = drawn[FIRST].lines[2]
    assert np.ptp(bars.get_segments()[0][:, 1]) == pytest.approx(2 * 2**0.5)


def test_where_no_method_learns_none_is_better():
    rows = [cell("BSR", 0.13, 0.01), cell("A·Id", 0.1, 0.01)]
    (claim,) = accuracy.claims({"accuracy": rows})
    assert claim.verdict == NOT
    assert "No method learns here: m (3 steps), at most 13.0%." in claim.evidence


def test_settings_are_not_mixed():
    rows = [cell("BSR", 0.8, 0.01), cell("A·Id", 0.7, 0.01, epsilon=2.0)]
    assert compared.compare(rows, "BSR", "A·Id") == []


def test_summary_takes_the_sample_deviation_and_leaves_out_the_tuning_seed():
    config = {"dataset": "digits", "model": "mlp", "mechanism": "bsr", "epsilon": 1.0}
    config |= {"epochs": 1, "batch_size": 2, "lr": 0.5}
    runs = [
        {"study": "s", "method": "BSR", "n_steps": 3, "rmse": 2.0, "accuracy": value}
        | {"config": config | {"seed": s}}
        for s, value in ((TUNING_SEED, 0.0), (0, 0.5), (1, 0.7))
    ]
    (row,) = accuracy.summarise(runs)
    assert (row["mean"], row["std"], row["seeds"]) == (0.6, pytest.approx(0.02**0.5), 2)


def test_what_was_trained_last_counts():
    config = {"mechanism": "bsr", "epsilon": 1.0}
    common = {"study": "s", "method": "BSR", "n_steps": 3, "rmse": 2.0}
    order = ((0.5, 0, 0.1), (1.0, 0, 0.2), (0.5, 1, 0.3))  # learning rate, seed, accuracy
    runs = [
        common | {"accuracy": value, "config": config | {"lr": lr, "seed": seed}}
        for lr, seed, value in order
    ]
    rows = accuracy.summarise(runs)
    assert [(row["lr"], row["mean"]) for row in rows] == [(1.0, 0.2), (0.5, 0.2)]
    assert rows[-1]["seeds"] == 2
    assert compared.latest(rows) == rows[-1:]


def test_a_page_shows_what_was_tuned_last():
    old, new = cell("BSR", 0.2, 0.01, lr=2.0), cell("BSR", 0.8, 0.01, seeds=10)
    tables = {"accuracy": [old, cell("A·Id", 0.5, 0.01, seeds=10), new]}
    (line,) = accuracy.views(tables)["s: d, m, 10 seeds"]
    assert line["BSR"] == "80.0 ± 1.0 (lr 1)"
    lines = [x.get_ydata() for x in accuracy.draw(tables)["accuracy.png"].axes[0].get_lines()]
    assert [20.0] not in [list(y) for y in lines]
    assert [80.0] in [list(y) for y in lines]


# ---------------------------------------------------------------------------- the grid


@pytest.fixture
def trained(monkeypatch):
    """A grid whose accuracy peaks at lr 1; and the runs it made, in order."""
    made = []

    def train(self, config):
        made.append(config)
        peak = -abs(np.log2(config.lr)) / 10
        return {"accuracy": 0.5 + peak, "n_steps": 8, "rmse": 1.0, "cpu_seconds": 0.0}

    monkeypatch.setattr(Grid, "_train", train)
    return made


STUDY = Study("s", "digits", "mlp", (1,), (200,), (1.0, 2.0), seeds=2, methods=("BSR",))


def test_learning_rates_are_climbed_on_a_seed_of_its_own(trained, tmp_path):
    Grid(tmp_path / "runs.jsonl").run(STUDY)
    first = [(c.lr, c.seed) for c in trained if c.epsilon == 1.0]
    tuning = [(lr, TUNING_SEED) for lr in (0.25, 0.125, 0.5, 1.0, 2.0)]
    assert first == [*tuning, (1.0, 0), (1.0, 1)]
    # The next cell starts where this one ended.
    assert [c.lr for c in trained if c.epsilon == 2.0] == [1.0, 0.5, 2.0, 1.0, 1.0]


def test_learning_rates_are_judged_by_the_mean_of_their_tuning_seeds(monkeypatch, tmp_path):
    # One seed alone would go to lr 0.5, the mean of both stays at 0.25.
    table = {(0.25, 0): 0.5, (0.25, 1): 0.9, (0.5, 0): 0.6, (0.5, 1): 0.1}
    made = []

    def train(self, config):
        made.append((config.lr, config.seed))
        value = table.get((config.lr, config.seed - TUNING_SEED), 0.0)
        return {"accuracy": value, "n_steps": 8, "rmse": 1.0, "cpu_seconds": 0.0}

    monkeypatch.setattr(Grid, "_train", train)
    study = replace(STUDY, epsilons=(1.0,), tuning=2)
    Grid(tmp_path / "runs.jsonl").run(study)
    tuning = [(lr, TUNING_SEED + i) for lr in (0.25, 0.125, 0.5) for i in range(2)]
    assert made == [*tuning, (0.25, 0), (0.25, 1)]
    (row,) = accuracy.summarise(grid.read(tmp_path / "runs.jsonl"))
    assert (row["seeds"], row["lr"]) == (2, 0.25)


def test_the_climb_ends(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "TRIES", 3)
    Grid(tmp_path / "runs.jsonl").run(STUDY)
    assert sum(c.seed == TUNING_SEED and c.epsilon == 1.0 for c in trained) == 3


def test_finished_runs_are_not_made_again(trained, tmp_path):
    path = tmp_path / "runs.jsonl"
    Grid(path).run(STUDY)
    whole = path.read_text()
    trained.clear()
    path.write_text("".join(whole.splitlines(keepends=True)[:4]))
    seen = []
    Grid(path, on_run=lambda *event: seen.append(event)).run(STUDY)
    assert path.read_text() == whole
    assert len(trained) == len(whole.splitlines()) - 4
    assert seen[-1] == (12, 12, "s, epsilon 2, BSR")


def test_a_real_cell_is_trained_and_told_by_its_settings(tmp_path):
    study = Study("s", "digits", "logistic", (1,), (400,), (8.0,), seeds=1, methods=("AOF",))
    Grid(tmp_path / "runs.jsonl").run(study)
    runs = grid.read(tmp_path / "runs.jsonl")
    config = RunConfig(**runs[-1]["config"])
    assert (config.mechanism, config.seed, config.insecure_noise_seed) == ("dense", 0, 0)
    assert (runs[-1]["n_steps"], runs[-1]["sampling"]) == (4, "fixed-cycle")
    assert runs[-1]["accuracy"] > 0.5
    assert {run["config"]["lr"] for run in runs} >= {0.125, 0.25, 0.5}


def test_runs_on_another_device_are_runs_of_their_own(trained, tmp_path):
    path = tmp_path / "runs.jsonl"
    Grid(path).run(STUDY)
    on_cpu = len(trained)
    Grid(path, device="cuda").run(STUDY)
    assert [config.device for config in trained[on_cpu:]] == ["cuda"] * on_cpu


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    whole = '{"method": "BSR", "config": {}, "accuracy": 1}'
    path.write_text(f'{whole}\n{{"accuracy": 1}}\n')
    with pytest.raises(RootnoiseError, match=r"runs\.jsonl line 2 must be a run, got \{\"accura"):
        grid.read(path)
    path.write_text('{"config": {}, "accuracy": 1}\n')  # whose run it is belongs to it
    with pytest.raises(RootnoiseError, match=r"runs\.jsonl line 1 must be a run, got \{\"config"):
        grid.read(path)


def test_every_study_names_known_methods_models_and_data():
    for name, study in STUDIES.items():
        assert study.name == name
        cells = list(study.cells())
        assert len(cells) == len(set(cells)) > 0
        assert set(study.methods) <= set(METHODS)
    assert set(HERE) <= set(STUDIES)


# ---------------------------------------------------------------------------- what is planned


def digits(epsilon):
    """Return the study's cell of this budget."""
    return next(replace(STUDIES["digits"], epsilons=(epsilon,)).cells())


def test_the_planners_choice_is_what_train_takes():
    for epsilon in (1.0, 8.0):
        assert METHODS[FIRST].settled(digits(epsilon), 1442) == planned(digits(epsilon), 1442)
    assert METHODS[AMPLIFIED].settled(digits(1.0), 1442).mechanism == "dpsgd"
    assert METHODS[BSR].settled(digits(1.0), 1442).sampling == "fixed-cycle"


def test_cyclic_poisson_has_the_groups_of_the_plan():
    cell = digits(4.0)
    job = Job(1442, 200, 10, 4.0, 1e-5, MEMORY_ROWS)
    row = plan(SGD(job.n_steps, 0.9, 0.9999), job).recommended("cyclic-poisson")
    own = METHODS[CYCLIC].settled(cell, 1442)
    assert own.sampling == "poisson"
    assert own.groups == row.participation.groups == own.bands
    assert own.groups > 1
    mechanism = make_mechanism(own, make_sampler(replace(own, insecure_noise_seed=0), 1442))
    assert mechanism.noise_multiplier == row.noise_multiplier
    apart = METHODS[MIN_SEP].settled(cell, 1442)
    assert apart == replace(own, sampling="min-sep-poisson", groups=1, separation=own.groups)


def test_balls_in_bins_are_planned():
    cell = replace(digits(8.0), epochs=1, batch_size=700)
    own = METHODS[BINS].settled(cell, 1442)
    assert (own.sampling, own.mechanism != "auto") == ("balls-in-bins", True)


def test_one_run_of_two_methods_is_trained_once_and_told_twice(trained, tmp_path, monkeypatch):
    same = METHODS[CYCLIC].settled(digits(8.0), 1442)
    alike = SimpleNamespace(start=-2, settled=lambda cell, n_examples: same)
    monkeypatch.setattr(grid, "METHODS", {"x": alike, "y": alike})
    path = tmp_path / "runs.jsonl"
    Grid(path).run(replace(STUDY, methods=("x", "y"), epsilons=(8.0,)))
    runs = grid.read(path)
    assert len(trained) == len(set(trained)) == 7
    assert [run["method"] for run in runs] == ["x"] * 7 + ["y"] * 2
    assert runs[-1]["config"] == runs[-3]["config"]
