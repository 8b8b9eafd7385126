"""`rootnoise plan` as a user types it: the table, the JSON, the page, and every refusal."""

from __future__ import annotations

import json
import math
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rootnoise import accounting, participation
from rootnoise._check import RootnoiseError
from rootnoise.factorization import Factorization, factorize
from rootnoise.mechanism import Mechanism
from rootnoise.planner import CONTRACTION, Job, Plan
from rootnoise.planner import plan as planned
from rootnoise.runs.config import make_mechanism, make_sampler
from rootnoise.workload import SGD, ScheduledSGD, learning_rates

JOB = "plan --dataset-size 100 --batch-size 25 --epochs 3 --epsilon 6 --delta 1e-5 --memory-rows 3"


@pytest.fixture
def call(call_in_folder):
    return lambda line: call_in_folder(*line.split())


def test_json_has_every_row_and_what_it_needs_to_be_run_again(call):
    status, out, err = call(JOB + " --momentum 0.9 --json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    result = json.loads(out)
    assert result["n_steps"] == 12
    expected = planned(SGD(12, 0.9), Job(100, 25, 3, 6.0, 1e-5, 3))
    assert len(result["rows"]) == len(expected.rows)
    for row, other in zip(result["rows"], expected.rows, strict=True):
        assert list(row) == [
            "mechanism",
            "options",
            "bands",
            "noise_multiplier",
            "epsilon",
            "sensitivity",
            "rmse_per_example",
            "gap",
            "memory_rows",
            "note",
            "certain",
            "sampling",
            "participation",
            "learning_rate",
        ]
        assert row["learning_rate"] == pytest.approx(0.02 / row["rmse_per_example"], rel=0.06)
        assert row["sampling"] == other.sampling
        who = participation.from_dict(row["participation"])
        split = factorize(SGD(12, 0.9), who, row["mechanism"], **row["options"])
        aim = SGD(12, 0.9).contracted(result["contraction"])
        aimed = Factorization(row["mechanism"], aim, split.strategy)
        error = row["noise_multiplier"] * aimed.rmse(who) / 25
        assert row["rmse_per_example"] == pytest.approx(error)
        assert accounting.privacy_cost(who, 12, row["noise_multiplier"], 1e-5).epsilon <= 6
        assert row["memory_rows"] <= 3
    assert result["contraction"] == expected.contraction == CONTRACTION
    assert result["take"] == expected.place_to_take + 1
    assert result["left_out"] == expected.left_out
    names = [finding["name"] for finding in result["diagnostics"]]
    assert names == [finding.name for finding in expected.findings]


def test_the_table_shows_the_best_and_says_what_they_count_on(call):
    status, out, err = call(JOB + " --top 4")
    assert (status, err) == (0, "")
    assert "more rows" in out
    assert "* secret random sampling needed" in out
    assert "left out: square-root: memory_rows must be >= 11, got 3" in out
    assert "more rows" not in call(JOB + " --top 99")[1]
    assert max(len(line) for line in out.splitlines() if line[:1] in "│┃") <= 80


def test_what_holds_of_some_rows_is_said_of_these(call):
    line = "plan --dataset-size 400 --batch-size 20 --epochs 1 --epsilon 2 --delta 1e-4 --top 99"
    line += " --momentum 0.9"
    _, out, _ = call(line)
    rows = json.loads(call(f"{line} --json")[1])["rows"]
    unsure = [row for row in rows if not row["certain"]]
    assert {row["sampling"] for row in unsure} == {"balls-in-bins"}
    said = " ".join(out.split())
    name = unsure[0]["mechanism"]
    assert f"epsilon is an upper confidence bound: {name}, balls-in-bins." in said
    assert "added or removed. batches in any order" in said
    assert said.count("confidence") == 1
    assert "confidence" not in call(f"{line} --no-bins")[1]


@pytest.mark.parametrize(
    "more", ["", " --contraction 0 --momentum 0.9 --schedule linear --warmup 2 --final 0.1"]
)
def test_the_command_of_a_row_trains_with_that_row(call, monkeypatch, more):
    """Participation, bands, noise, epsilon and error, to the last digit."""
    line = "plan --dataset-size 1442 --batch-size 200 --epochs 2 --epsilon 4 --delta 1e-5" + more
    result = json.loads(call(line + " --json")[1])
    rows, configs = result["rows"], []

    def remember(config, *_, **__):
        configs.append(config)
        raise RootnoiseError("enough")

    monkeypatch.setattr("rootnoise.runs.run.run", remember)
    made_once: list[Plan] = []

    def once(*arguments, **options):  # one plan for all rows
        made_once[:] = made_once or [planned(*arguments, **options)]
        return made_once[0]

    monkeypatch.setattr("rootnoise.planner.plan", once)
    for i, row in enumerate(rows, 1):
        status, out, err = call(f"{line} --train-args {i}")
        assert (status, err, out.count("\n")) == (0, "", 1)
        words = shlex.split(out)
        assert words[:6] == ["rootnoise", "train", "--dataset", "DATASET", "--out", "OUT"]
        assert call(shlex.join(words[1:]).replace("DATASET", "digits"))[2] == "error: enough\n"
        sampler = make_sampler(configs[-1], 1442)
        assert sampler.participation == participation.from_dict(row["participation"])
        made = make_mechanism(configs[-1], sampler)
        assert made.strategy.bands == row["bands"]
        assert made.noise_multiplier == row["noise_multiplier"]
        assert made.epsilon == row["epsilon"] <= 4
        aim = made.workload.contracted(result["contraction"])
        rmse = Factorization(made.name, aim, made.strategy).rmse(made.participation)
        if not result["contraction"]:
            assert rmse == pytest.approx(made.rmse, rel=1e-12)
        error = made.noise_multiplier * rmse / 200
        assert error == pytest.approx(row["rmse_per_example"], rel=1e-9)


def test_two_commands_from_a_plan_to_a_trained_model(call):
    """1442 digits to train on: the row to take, which is what `--mechanism auto` chooses."""
    job = "--batch-size 400 --epochs 2 --epsilon 3 --delta 1e-5 --memory-rows 64"
    line = f"plan --dataset-size 1442 {job} --momentum 0.9"
    result = json.loads(call(line + " --json")[1])
    row = result["rows"][result["take"] - 1]
    assert f"Most should take row {result['take']}, as auto does." in call(line)[1]
    command = call(f"{line} --train-args {result['take']}")[1].split()[1:]
    command[command.index("DATASET")], command[command.index("OUT")] = "digits", "planned"
    auto = f"train --dataset digits --out auto {job} --mechanism auto".split()
    for words, out in ((command, "planned"), (auto, "auto")):
        status, text, err = call(shlex.join([*words, "--model", "logistic", "--json"]))
        assert (status, err) == (0, "")
        result = json.loads(text)
        made = Mechanism.load(Path(out) / "mechanism.json")
        assert participation.to_dict(made.participation) == row["participation"]
        for name in ("noise_multiplier", "bands", "epsilon"):
            assert result[name] == row[name]
        assert (made.noise_multiplier, made.epsilon) == (row["noise_multiplier"], row["epsilon"])
        assert result["n_steps"] == 8
        assert call(f"audit {out} --json")[0] == 0
    kept = json.loads(Path("auto/config.json").read_text())
    assert kept["mechanism"] == ("dpsgd" if row["sampling"] == "poisson" else row["mechanism"])
    assert kept["memory_rows"] is None
    # Both took the rate of the plan: no --lr was given.
    planned_rate = row["learning_rate"]
    assert kept["lr"] == result["lr"] == planned_rate
    said = f"Start it at learning rate {planned_rate:g} with clip norm 1, as train does."
    assert said in call(line)[1]


def test_a_rate_is_advised_where_it_was_found_to_hold(call):
    """Errors of other contractions, iterates and optimizers are other numbers."""
    rates = {}
    for more in (
        "",
        " --schedule cosine",
        " --schedule cosine --lr 0.2",
        " --contraction 0",
        " --objective last",
        " --optimizer sgd --lr 1",
    ):
        rates[more] = json.loads(call(JOB + more + " --json")[1])["rows"][0]["learning_rate"]
        assert ("Start it at" in call(JOB + more)[1]) == (rates[more] is not None)
    constant, cosine, scaled, *others = rates.values()
    assert others == [None] * 3
    assert constant < cosine
    assert scaled == pytest.approx(cosine, rel=0.06)  # errors are 0.2 times those


def test_a_narrow_terminal_keeps_error_and_gap(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    status, out, err = call(JOB + " --top 4")
    assert (status, err) == (0, "")
    frame = [line for line in out.splitlines() if line[:1] in "┏│┃"]
    assert max(map(len, frame)) <= 50
    heading = next(line for line in frame if "mechanism" in line)
    assert "error" in heading
    assert "gap" in heading
    assert "left out, as the terminal is narrow: bands, noise, memory" in out
    best = json.loads(call(JOB + " --json")[1])["rows"][0]
    row = next(line for line in frame if line.startswith("│"))
    assert f"{best['rmse_per_example']:.4g}" in row
    assert f"{best['gap']:.1%}" in row


def test_a_schedule_is_planned_for(call):
    line = JOB + " --schedule linear --warmup 4 --momentum 0.5 --json"
    result = json.loads(call(line)[1])
    work = ScheduledSGD(learning_rates("linear", 12, 4), 0.5)
    expected = planned(work, Job(100, 25, 3, 6.0, 1e-5, 3))
    assert [row["rmse_per_example"] for row in result["rows"]] == pytest.approx(
        [row.rmse_per_example for row in expected.rows]
    )


def test_a_workload_from_a_file_is_planned_for(call):
    np.save("a.npy", SGD(12, 0.9).matrix.column(0))
    line = JOB + " --contraction 0 --workload a.npy --json"
    ours = json.loads(call(line)[1])["rows"][0]
    best = planned(SGD(12, 0.9), Job(100, 25, 3, 6.0, 1e-5, 3), contraction=0).rows[0]
    assert ours["rmse_per_example"] == pytest.approx(best.rmse_per_example)


class Page(HTMLParser):
    """Counts tags, and remembers whatever would be loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for name, v in attributes if name in ("src", "href", "xlink:href")]


def test_the_page_and_the_json_say_what_was_planned_for(call):
    line = JOB + " --momentum 0.9 --schedule linear --warmup 2 --html plan.html --json"
    said = json.loads(call(line)[1])["workload"]
    assert said == {"momentum": 0.9, "decay": 1.0, "schedule": "linear", "warmup": 2}
    text = Path("plan.html").read_text()
    assert "momentum 0.9, decay 1, schedule linear, warmup 2." in text
    assert json.loads(call(JOB + " --optimizer adam --json")[1])["workload"] == {
        "optimizer": "adam"
    }


def test_the_row_to_take_is_marked_and_dpsgd_is_named(call):
    line = "plan --dataset-size 800 --batch-size 10 --epochs 2 --epsilon 12 --delta 1e-5"
    line += " --decay 0.97 --contraction 0"
    rows = json.loads(call(line + " --html plan.html --json")[1])["rows"]
    text = Path("plan.html").read_text()
    assert (rows[0]["mechanism"], rows[0]["memory_rows"]) == ("dense", 159)
    price = {
        i: math.log(row["rmse_per_example"])
        + 0.02 * (row["sampling"] != "fixed-cycle")
        + 0.005 * math.log2(1 + row["memory_rows"])
        for i, row in enumerate(rows, 1)
    }
    take = min(price, key=price.__getitem__)
    assert take == 11
    assert f"Most should take row {take}: {rows[take - 1]['mechanism']} with" in text
    assert f'<tr class="take"><td>{take}</td>' in text
    assert "less error and keeps 159." in text
    assert text.count("take this one") == 1
    best: dict[int, float] = {}
    for row in rows:
        best.setdefault(row["memory_rows"], row["rmse_per_example"])
    lean = [
        m for m, e in best.items() if all(e < other for memory, other in best.items() if memory < m)
    ]
    assert text.count("best for its memory") == len(lean) - (rows[take - 1]["memory_rows"] in lean)
    assert "dpsgd (identity)" in text


def test_numbers_of_a_column_have_the_same_decimals(call):
    status, out, _ = call(JOB + " --top 99")
    assert status == 0
    rows = [line.split("│")[5:7] for line in out.splitlines() if line.startswith("│")]
    for column in zip(*rows, strict=True):
        decimals = {len(cell.strip().partition(".")[2]) for cell in column if cell.strip()}
        assert len(decimals) == 1


def test_every_point_of_the_picture_has_its_name():
    from matplotlib.figure import Figure

    from rootnoise.cli import _plots

    made = planned(SGD(12, 0.9), Job(100, 25, 3, 6.0, 1e-5))
    shown = [
        row
        for row in made.rows
        if row.rmse_per_example <= _plots.FARTHEST * made.rows[0].rmse_per_example
    ]
    axes = Figure().add_subplot()
    _plots.numbered(axes, made.rows)
    numbers: list[int] = []
    for each in axes.texts:
        for part in each.get_text().split(", "):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    assert sorted(numbers) == list(range(1, len(shown) + 1))
    axes = Figure().add_subplot()
    _plots.errors(axes, made.rows, [(i, row.mechanism) for i, row in enumerate(made.rows)], 8)
    assert len(axes.texts) == len(shown)
    inverse = axes.transData.inverted()
    line = inverse.transform((0, 10))[1] / inverse.transform((0, 0))[1]
    columns: dict[float, list[float]] = {}
    for each in axes.texts:
        x, y = each.get_position()
        columns.setdefault(x, []).append(np.log(y))
    for places in columns.values():  # no text is on another, or on the frame
        assert np.diff(np.sort(places)).min(initial=9) > 0.9 * np.log(line) * 0.8


def test_the_page_holds_everything_itself(call):
    status, out, _ = call(JOB + " --html plan.html --plot plan.png --json")
    assert status == 0
    text = Path("plan.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == 1
    assert page.tags.count("tr") == 1 + len(json.loads(out)["rows"])
    assert all(link.startswith("#") for link in page.links)
    assert "<?xml" not in text
    assert "secret random sampling needed" in text
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "line"),
    {
        "--epsilon 0": "epsilon must be a finite number > 0, got 0.0",
        "--delta 1": "delta must be a finite number > 0 and < 1, got 1.0",
        "--dataset-size 0": "n_examples must be >= 1, got 0",
        "--batch-size 500": "batch_size must be in [1, n_examples=100], got 500",
        "--epochs 0": "epochs must be >= 1, got 0",
        "--memory-rows -1": "memory_rows must be >= 0, got -1",
        "--top 0": "top must be >= 1, got 0",
        "--momentum 1": "momentum must be a finite number >= 0 and < 1, got 1.0",
        "--workload a.npy": "steps must be 5, as many as a.npy has, got 12",
        "--train-args 0": "train-args must be >= 1, got 0",
        "--train-args 99": "train-args must be in [1, rows=",
        "--train-args 1 --json": "json must be left out with --train-args, got --train-args 1",
        "--train-args 1 --optimizer adam": "optimizer must be left out with --train-args (train h",
        "--train-args 1 --workload b.npy": "workload must be left out with --train-args (train",
        "--train-args 1 --schedule b.npy": "schedule must be one that train has with --train-ar",
        "--html no/plan.html": "html must be writable, got no/plan.html: No such file",
        "--plot no/plan.png": "plot must be a picture that can be written, got no/plan.png",
    }.items(),
)
def test_refusals(call, more, line):
    np.save("a.npy", np.ones(5))
    np.save("b.npy", np.ones(12))
    status, out, err = call(f"{JOB} {more}")
    assert (status, out) == (2, "")
    assert err.startswith("error: " + line)
    assert err.count("\n") == 1


def test_missing_options_are_named(call):
    assert "Missing option '--dataset-size'" in call("plan")[2]
