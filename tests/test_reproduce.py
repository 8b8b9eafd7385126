"""The paper's numbers against independent ones; the parts, the page, the grid and its verdicts."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reproduce
from parts import accuracy, errors, grid, limits, runtime, tables
from parts.grid import TUNING_SEED, Grid
from parts.page import load
from parts.part import (
    BEYOND,
    FULL,
    NOT,
    PARTLY,
    REPRODUCED,
    SMALLER,
    Settings,
    Size,
    participation,
)
from parts.studies import HERE, METHODS, STUDIES, Study
from parts.tables import where
from reproduce import PARTS
from rootnoise import SGD, FixedCycle, RootnoiseError, factorize
from rootnoise.runs.config import RunConfig

PAPER = Path(__file__).parents[1] / "papers" / "kalinin-lampert-2024"
EXPECTED = json.loads((PAPER / "expected.json").read_text())
VERDICTS = (REPRODUCED, SMALLER, PARTLY, NOT, BEYOND)


def silent(number, count, label):
    pass


def main(arguments):
    """Return the exit status of the program."""
    with pytest.raises(SystemExit) as end:
        reproduce.app(arguments)
    return end.value.code


# ---------------------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize("table", ["errors", "bandwidth"])
def test_committed_numbers_agree_with_independent_ones(table):
    rows = tables.read(PAPER / f"errors-{table}.csv")
    values = where(EXPECTED["values"], table=table)
    assert len(values) > 30
    for value in values:
        (found,) = where(rows, **value["where"])
        assert found["rmse"] == pytest.approx(value["rmse"], rel=EXPECTED["tolerance"]), value


@pytest.mark.parametrize("kind", ["single", "repeated"])
def test_numbers_computed_now_agree_with_independent_ones(kind):
    checked = 0
    for alpha, beta in FULL.workloads:
        who = participation(kind, 200)
        for method, (name, options) in errors.methods(kind, 200, dense=200).items():
            key = {"alpha": alpha, "beta": beta, "participation": kind, "n": 200, "method": method}
            for value in EXPECTED["values"]:
                if value["where"] == key:
                    found = factorize(SGD(200, beta, alpha), who, name, **options).rmse(who)
                    assert found == pytest.approx(value["rmse"], rel=EXPECTED["tolerance"])
                    checked += 1
    assert checked >= 14


@pytest.mark.parametrize("name", PARTS)
def test_committed_tables_make_the_committed_page(name):
    """Every claim and every table on the page is what the CSV files say."""
    found = PARTS[name]
    kept = load(PAPER, name)
    page = (PAPER / "README.md").read_text()
    for claim in found.claims(kept):
        assert f"| {claim.text} | {claim.verdict} | {name} |" in page
        assert claim.evidence in page
    for rows in found.views(kept).values():
        assert not rows or tables.markdown(rows) in page
    for file, caption in found.CAPTIONS.items():
        assert f"![{caption}]({file})" in page
        assert (PAPER / file).read_bytes().startswith(b"\x89PNG")


def test_committed_accuracies_are_those_of_the_committed_runs():
    rows = accuracy.summarise(grid.read(PAPER / "runs.jsonl"))
    committed = tables.read(PAPER / "accuracy-accuracy.csv")
    assert len(rows) == len(committed)
    for row, kept in zip(rows, committed, strict=True):
        assert row == pytest.approx(dict(kept))


# ---------------------------------------------------------------------------- parts and the page


TINY = Size(
    workloads=((1.0, 0.0), (0.999, 0.0)),
    errors=(100, 500),
    dense=100,
    scan=500,
    bands=(1, 100),
    tight=0,
    single=(10, 100, 100_000),
    repeated=(200, 100_000),
    runtime=(50, 100, 200, 400),
    seconds=1.0,
    epsilons=(0.1, 8.0),
    epochs=(1,),
    structure=FixedCycle(10, 5),
    narrow=FixedCycle(20, 3),
    narrow_bands=(1, 4, 20),
    studies=("quick",),
)


@pytest.fixture
def small(monkeypatch):
    """Every part in a second or so."""
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    fake = {"n_steps": 8, "rmse": 1.0, "cpu_seconds": 0.0}
    better = {"bsr": 0.9, "dense": 0.9, "dpsgd": 0.8, "identity": 0.7, "workload": 0.5}
    monkeypatch.setattr(
        Grid, "_train", lambda _, c: fake | {"accuracy": better[c.mechanism] + c.seed % 2 / 100}
    )


def test_all_parts_leave_tables_figures_and_a_page(small, tmp_path, capsys):
    assert main(["--quick", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    page = (tmp_path / "README.md").read_text()
    assert printed["page"] == str(tmp_path / "README.md")
    assert {claim["part"] for claim in printed["claims"]} == set(PARTS)
    for claim in printed["claims"]:
        assert claim["verdict"] in VERDICTS
        assert f"| {claim['claim']} | {claim['verdict']} | {claim['part']} |" in page
    verdicts = {claim["claim"]: claim["verdict"] for claim in printed["claims"]}
    assert verdicts["BSR is on par with AOF."] == SMALLER
    assert verdicts["BSR is far better than the baselines A·Id and Id·A."] == REPRODUCED
    for name in PARTS:
        for file in PARTS[name].CAPTIONS:
            assert (tmp_path / file).stat().st_size > 10_000
            assert f"]({file})" in page
    again = grid.read(tmp_path / "runs.jsonl")
    assert len(again) == len({json.dumps(run["config"], sort_keys=True) for run in again})


def test_one_part_alone_makes_a_page_of_its_own(small, tmp_path, capsys):
    assert main(["runtime", "--quick", "--out", str(tmp_path)]) == 0
    assert "orders of magnitude" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "README.md").read_text()
    assert "## Runtime" in page
    assert "## Limits" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["errors", "--study", "digits"], "study must be left out for part errors, got 'digits'"),
        (["accuracy", "--study", "x"], "study must be one of digits, "),
        (["proofs"], "part must be one of errors, bounds, runtime, limits, accuracy, got 'proofs'"),
    ],
)
def test_refusals_of_the_command(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study", "x"], "study must be one of digits, "),
        (
            ["--study", "digits", "--study", "mnist"],
            "dataset mnist: train-images-idx3-ubyte not found in ",
        ),
        (["--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_part_runs(
    tmp_path, capsys, monkeypatch, arguments, message
):
    started = []
    monkeypatch.setattr(reproduce, "run", lambda name, *_: started.append(name))
    folders = ["--out", str(tmp_path / "out"), "--data-dir", str(tmp_path)]
    assert main([*arguments, *folders]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert started == list(tmp_path.iterdir()) == []


def test_the_program_runs_from_anywhere_and_refuses_without_loading_torch(tmp_path):
    """As a process: a wrong name costs no start-up of what trains."""
    check = (
        "import runpy, sys; sys.argv[1:] = ['--study', 'x', '--out', 'o']\n"
        f"sys.path.insert(0, {str(PAPER)!r})\n"
        f"try: runpy.run_path({str(PAPER / 'reproduce.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code == 2 and 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("error: study must be one of digits, ")
    assert not list(tmp_path.iterdir())


def test_the_program_uses_public_names_of_the_package_only():
    sources = [PAPER / "reproduce.py", *(PAPER / "parts").glob("*.py")]
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rootnoise"):
                names = [*str(node.module).split("."), *(name.name for name in node.names)]
                assert not [name for name in names if name.startswith("_")], source


def test_an_out_that_cannot_be_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RootnoiseError, match=r"^out must be a folder, got the file .*file$"):
        reproduce.run("runtime", Settings(file), silent)
    with pytest.raises(RootnoiseError, match=r"^out must be writable, got .*Not a directory$"):
        reproduce.run("runtime", Settings(file / "below"), silent)


def test_tables_survive_their_files(tmp_path):
    rows = [{"n": 10, "rmse": 0.1 + 0.2, "text": "A·Id", "none": None}, dict.fromkeys("n", 1)]
    tables.write(tmp_path / "t.csv", rows[:1])
    assert tables.read(tmp_path / "t.csv") == rows[:1]
    assert tables.markdown(rows[:1]).splitlines()[1] == "| ---: | ---: | :--- | ---: |"


# ---------------------------------------------------------------------------- verdicts


def cell(method, mean, std, **fields):
    same = {"study": "s", "dataset": "d", "model": "m", "epochs": 1, "batch_size": 2, "n_steps": 3}
    same |= {"epsilon": 1.0, "lr": 1.0, "rmse": 1.0, "seeds": 3} | fields
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
    ((gain, deviation),) = accuracy.compare(rows, "BSR", "A·Id")
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


def test_where_no_method_learns_none_is_better():
    rows = [cell("BSR", 0.13, 0.01), cell("A·Id", 0.1, 0.01)]
    (claim,) = accuracy.claims({"accuracy": rows})
    assert claim.verdict == NOT
    assert "No method learns here: m (3 steps), at most 13.0%." in claim.evidence


def test_settings_are_not_mixed():
    rows = [cell("BSR", 0.8, 0.01), cell("A·Id", 0.7, 0.01, epsilon=2.0)]
    assert accuracy.compare(rows, "BSR", "A·Id") == []


def test_summary_takes_the_sample_deviation_and_leaves_out_the_tuning_seed():
    config = {"dataset": "digits", "model": "mlp", "mechanism": "bsr", "epsilon": 1.0}
    config |= {"epochs": 1, "batch_size": 2, "lr": 0.5}
    runs = [
        {"study": "s", "n_steps": 3, "rmse": 2.0, "accuracy": value, "config": config | {"seed": s}}
        for s, value in ((TUNING_SEED, 0.0), (0, 0.5), (1, 0.7))
    ]
    (row,) = accuracy.summarise(runs)
    assert (row["mean"], row["std"], row["seeds"]) == (0.6, pytest.approx(0.02**0.5), 2)


def test_limits_measure_a_foreign_strategy_on_the_true_workload():
    who, n = FixedCycle(50, 5), 250
    (row,) = limits._mismatch(0.9, who)
    a, c = SGD(n, 0.9).matrix.dense(), factorize(SGD(n), who, "bsr").strategy.dense()
    sens = max(np.linalg.norm(c[:, i :: who.period].sum(1)) for i in range(who.period))
    dense = sens * np.linalg.norm(a @ np.linalg.inv(c)) / n**0.5
    assert row["for momentum 0"] == pytest.approx(dense, rel=1e-9)
    assert row["loss"] > 0


def test_the_exponent_of_the_runtime_is_fitted():
    rows = [{"method": "m", "n": n, "seconds": 3e-9 * n**2.5} for n in (50, 200, 400, 1000)]
    rows[0]["seconds"] = 1.0  # start-up is not part of the fit
    assert runtime.slope(rows) == pytest.approx(2.5)


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
    path.write_text('{"config": {}, "accuracy": 1}\n{"accuracy": 1}\n')
    with pytest.raises(RootnoiseError, match=r"runs\.jsonl line 2 must be a run, got \{\"accura"):
        grid.read(path)


def test_every_study_names_known_methods_models_and_data():
    for name, study in STUDIES.items():
        assert study.name == name
        cells = list(study.cells())
        assert len(cells) == len(set(cells)) > 0
    assert set(HERE) <= set(STUDIES)
    assert set(accuracy.METHODS) == set(METHODS)
