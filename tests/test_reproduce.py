"""The paper's numbers against independent ones; the parts, the page, the grid and its verdicts."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reproduce
from parts import accuracy, errors, grid, limits, runtime, tables
from parts.grid import Grid
from parts.page import load
from parts.part import (
    BEYOND,
    FULL,
    NOT,
    NOT_OURS,
    PARTLY,
    PARTLY_OURS,
    REPRODUCED,
    SMALLER,
    Settings,
    Size,
    participation,
)
from parts.tables import where
from reproduce import PARTS
from rootnoise import SGD, FixedCycle, RootnoiseError, factorize

PAPER = Path(__file__).parents[1] / "papers" / "kalinin-lampert-2024"
EXPECTED = json.loads((PAPER / "expected.json").read_text())
VERDICTS = (REPRODUCED, SMALLER, PARTLY, NOT, BEYOND, PARTLY_OURS, NOT_OURS)


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
        Grid,
        "_train",
        lambda _, c: fake | {"accuracy": better.get(c.mechanism, 0.9) + c.seed % 2 / 100},
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
    assert "The planner's choice is level with the best other method." in verdicts
    again = grid.read(tmp_path / "runs.jsonl")
    told = {json.dumps([run["method"], run["config"]], sort_keys=True) for run in again}
    assert len(again) == len(told)


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
