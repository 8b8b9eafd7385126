"""Sides answer, errors are judged alike, and the page of the comparison is what its JSON says."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest

from rootnoise import SGD, FixedCycle, RootnoiseError, factorize
from rootnoise.cli import main
from rootnoise.cli.bench import ours, page, questions, tables, with_opacus
from rootnoise.cli.bench.clock import Side, quickest
from rootnoise.cli.bench.words import words

DOCS = Path(__file__).parents[1] / "docs"
# A rival that imports nothing of rootnoise.
RIVAL = """
import os, time
from clock import paired, seconds, serve
def slow():
    time.sleep(60)
def value(x):
    print("what a library says of its own")
    return {"value": x / (x - 1)}
def end():
    os._exit(1)
versions = lambda: {"rival": "1"}
serve({"versions": versions, "value": value, "end": end, "slow": slow})
"""


@pytest.fixture
def rival():
    side = Side("rival", [sys.executable, "-c", RIVAL])
    yield side
    side.close()


def test_a_side_answers_in_a_process_of_its_own(rival):
    assert rival.ask({"what": "value", "x": 2}) == {"value": 2.0}
    assert rival.ask({"what": "value", "x": 1}) == {
        "refused": "ZeroDivisionError: division by zero"
    }
    assert rival.ask({"what": "other"}) == {"missing": True}
    assert rival.ask({"what": "end"}) == {"refused": "its process ended"}
    assert rival.ask({"what": "value", "x": 3}) == {"value": 1.5}
    rival.limit = 0.2
    assert rival.ask({"what": "slow"}) == {"stopped": 0.2}
    rival.limit = 60
    assert rival.ask({"what": "value", "x": 3}) == {"value": 1.5}  # a slow row costs itself alone


def test_the_quickest_way_is_found():
    ways = {"slow": lambda: lambda: sum(range(10**6)), "quick": lambda: lambda: None}
    assert quickest(ways)[0] == "quick"


def test_who_is_not_installed_is_said_so(rival, monkeypatch):
    asked = [{"what": "epsilon", "sigma": 1.0, "groups": 1}]
    monkeypatch.setattr(questions, "questions", lambda section, quick: asked)
    result = questions.ask([rival, Side("absent", None)], sections=["account"])
    (row,) = tables.tables(result)["account"].rows
    assert row[1:] == ["-", "not installed"]
    with pytest.raises(RootnoiseError, match=r"^section must be one of account, .*, got speed$"):
        questions.ask([], sections=["speed"])


@pytest.mark.parametrize("quick", [True, False])
def test_every_question_fits_whom_it_is_put_to(quick):
    for section in questions.SECTIONS:
        for question in questions.questions(section, quick):
            put = {**question, "data": "digits"} if section == "accuracy" else dict(question)
            what = put.pop("what")
            sides = [s.MEASURES[what] for s in (ours, with_opacus) if what in s.MEASURES]
            assert sides
            for measure in sides:
                inspect.signature(measure).bind(**put)


def test_measures_answer():
    short = {"q": 0.1, "n": 10, "delta": 1e-5, "groups": 1}
    assert ours.epsilon(sigma=1.0, **short)["value"] > ours.epsilon(sigma=2.0, **short)["value"] > 0
    assert ours.calibrate(target=4.0, **short)["value"] == pytest.approx(0.7, abs=0.3)
    for measures in (ours, with_opacus):
        assert measures.noise(d=1000, bands=1)["seconds"] > 0
        assert measures.draw(n_examples=1000)["seconds"] > 0
    assert with_opacus.noise(d=1000, bands=2) == {"missing": True}  # it has independent noise alone


@pytest.mark.parametrize(("mechanism", "bands"), [("bsr", 8), ("blt", None), ("bandmf", 8)])
def test_errors_of_all_sides_are_judged_as_ours(mechanism, bands):
    who = FixedCycle(8, 4)
    answer = ours.factors(mechanism, n=32, k=4, bands=bands, momentum=0.9)
    answers = {"rootnoise": answer, "absent": {"missing": True}}
    questions._judge({"n": 32, "k": 4, "momentum": 0.9}, answers)
    expected = factorize(SGD(32, momentum=0.9), who, mechanism, bands=bands).rmse(who)
    assert answer["rmse"] == pytest.approx(expected, rel=1e-9)
    assert "strategy" not in answer


def test_the_command_prints_tables_or_json(rival, monkeypatch, capsys, tmp_path):
    asked = [{"what": "epsilon", "sigma": 1.0, "groups": 1}]
    monkeypatch.setattr(questions, "own_sides", lambda: [rival])
    monkeypatch.setattr(questions, "questions", lambda section, quick: asked)
    out = tmp_path / "bench.json"
    assert main(["bench", "--section", "account", "--out", str(out)]) == 0
    assert "epsilon at noise multiplier 1, Poisson" in capsys.readouterr().out
    assert main(["bench", "--section", "account", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == json.loads(out.read_text())["rows"]


def test_the_page_says_what_its_json_says():
    text = (DOCS / "comparison.md").read_text()
    result = json.loads((DOCS / "comparison.json").read_text())
    assert page.fill(text, result) == text
    marked = {(kind, name) for _, kind, name, _ in page.MARK.findall(text)}
    made = {("table", name) for name in tables.tables(result)}
    assert marked == made | {("words", name) for name in words(result)}
    assert {row["section"] for row in result["rows"]} >= {"account", "noise", "accuracy"}
    assert result["date"] in text
    with pytest.raises(RootnoiseError, match=r"^table must be one of versions, .*, got speed$"):
        page.fill("<!-- table speed -->\n<!-- end -->", result)


def result(**answers):
    """Return a result whose one step is answered so."""
    asked = {"what": "step", "model": "cnn", "n": 64}
    row = {"section": "step", "question": asked, "answers": answers}
    versions = {name: {"version": "1"} for name in answers}
    about = {"date": "2026-01-01", "machine": "M", "quick": True, "load": [0.2, 1.0], "limit": 60}
    return {"versions": versions, "rows": [row], **about}


def step(seconds):
    return {"seconds": seconds, "ratio": 2 * seconds, "plain": 0.5, "micro": "8"}


def test_words_follow_from_the_numbers():
    behind = words(result(rootnoise=step(1.2), rival=step(1.0)))
    assert "- CNN, 4e5 parameters, batch 64, a step: 1.0 s, rootnoise 1.2 s" in behind["better"]
    assert "ahead of every other in 0 of 1, behind one in 1, level in 0" in behind["step"]
    assert "otherwise idle: load 0.2" in behind["measured"]
    level = words(result(rootnoise=step(1.05), rival=step(1.0)))
    assert "ahead in no measurement" in level["better"]
    assert "level in 1" in level["step"]
    ahead = words(result(rootnoise=step(0.5), rival=step(1.0), slow={"stopped": 60.0}))
    assert "ahead of every other in 1 of 1" in ahead["step"]
    assert "is stopped: in this run 1." in ahead["measured"]
    assert "Nothing to compare" in ahead["memory"]


def test_what_was_stopped_or_failed_is_said_so():
    answers = {"rootnoise": step(1.0), "slow": {"stopped": 60.0}, "ends": {"refused": "it ended"}}
    (row,) = tables.tables(result(**answers))["step"].rows
    assert row[1:] == ["2.00 (1000 ms, by 8)", "stopped after 60 s", "fails"]
