"""Sides answer, errors are judged alike, and the page of the comparison is what its JSON says."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest

from rootnoise import SGD, FixedCycle, RootnoiseError, factorize
from rootnoise.cli import main
from rootnoise.cli.bench import ours, questions, tables, with_opacus
from rootnoise.cli.bench.clock import Side

DOCS = Path(__file__).parents[1] / "docs"
# A rival that imports nothing of rootnoise.
RIVAL = """
import os
from clock import paired, seconds, serve
def value(x):
    print("what a library says of its own")
    return {"value": x / (x - 1)}
def end():
    os._exit(1)
versions = lambda: {"rival": "1"}
serve({"versions": versions, "value": value, "end": end})
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
    page = (DOCS / "comparison.md").read_text()
    result = json.loads((DOCS / "comparison.json").read_text())
    assert tables.fill(page, result) == page
    assert {name for _, name, _ in tables.MARK.findall(page)} == set(tables.tables(result))
    assert {row["section"] for row in result["rows"]} >= {"account", "noise", "accuracy"}
    assert result["date"] in page
    with pytest.raises(RootnoiseError, match=r"^table must be one of versions, .*, got speed$"):
        tables.fill("<!-- table speed -->\n<!-- end -->", result)
