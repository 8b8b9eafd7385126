"""The page about a run, and about several: whole, self-contained, and of nothing that is secret."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rootnoise._check import RootnoiseError
from rootnoise.cli import main
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, MinSeparation
from rootnoise.runs import pictures, report
from rootnoise.runs.audit import audit
from rootnoise.runs.config import RunConfig
from rootnoise.runs.run import run
from rootnoise.workload import SGD, prefix_sum

SMALL = RunConfig(dataset="digits", model="logistic", epsilon=4.0, epochs=2, batch_size=200, lr=0.2)


class Page(HTMLParser):
    """What a browser would make of a page: open tags, ids, and what it would load."""

    VOID = ("meta", "br", "img", "use", "path", "image", "line", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.labels = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag == "svg":
            self.labels.append(given.get("aria-label"))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    run(SMALL, out)
    return out


@pytest.fixture(scope="module")
def text(folder):
    return report.page(report.read(folder))


def test_the_page_says_what_the_folder_claims(folder, text):
    stated = json.loads((folder / "privacy.json").read_text())
    mechanism = Mechanism.load(folder / "mechanism.json")
    for said in (stated["claim"], mechanism.fingerprint, stated["seal"]):
        assert escape(said) in text
    accuracy = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    assert f"<b>{100 * accuracy:.1f} %</b>test accuracy" in text
    assert f"<b>{mechanism.epsilon:.4g}</b>epsilon" in text
    assert "<b>16 of 16</b>steps" in text


def test_it_is_whole_and_loads_nothing(text):
    page = Page(text)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "<script" not in text
    assert "url(http" not in text
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    assert used <= set(page.ids)
    assert len(page.labels) == 6
    assert all(label and label.endswith(".") for label in page.labels)


def test_its_ink_is_that_of_the_page(text):
    assert pictures.INK not in text
    assert "currentColor" in text
    assert "fill: #ffffff" not in text  # no white slab on a dark page


def test_it_is_the_same_each_time(folder, text):
    assert report.page(report.read(folder)) == text


def test_nothing_on_it_is_of_the_ledger(folder, text, tmp_path):
    copy = tmp_path / "first"
    shutil.copytree(folder, copy)
    (copy / "ledger.bin").unlink()
    assert report.page(report.read(copy)) == text


def test_its_command_makes_the_run_again(text):
    config = dataclasses.replace(SMALL, mechanism="banded", momentum=0.5, seed=7, bands=3)
    for made in (SMALL, config, RunConfig(mechanism="dpsgd", epsilon=1.0, lr=0.5)):
        words = shlex.split(report.command(made))
        assert words[:2] == ["rootnoise", "train"]
        given = dict(zip(words[2::2], words[3::2], strict=True))
        del given["--out"]
        fields = {f.name: f.default for f in dataclasses.fields(RunConfig)}
        fields |= {name[2:].replace("-", "_"): value for name, value in given.items()}
        types = {"epochs": int, "batch_size": int, "seed": int, "bands": int, "epsilon": float}
        types |= {"lr": float, "momentum": float}
        read = {
            n: types[n](v) if isinstance(v, str) and n in types else v for n, v in fields.items()
        }
        assert RunConfig(**read) == made
    assert "rootnoise train --dataset digits" in text


@pytest.mark.parametrize("name", ["config.json", "privacy.json", "mechanism.json"])
def test_edited_folders_have_no_page(folder, tmp_path, name):
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    (copy / name).write_text((copy / name).read_text().replace("4", "3", 1))
    if name == "config.json":
        (copy / name).write_text("{")
    with pytest.raises(RootnoiseError, match=r"must be readable|as it was sealed|must match"):
        report.read(copy)


def test_a_mechanism_of_another_run_has_no_page(folder, tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    cycle = FixedCycle(8, 2)
    split = factorize(SGD(16), cycle, "identity")
    made = Mechanism.calibrate(split, cycle, epsilon=4.0, delta=1e-5)
    made.save(copy / "mechanism.json", overwrite=True)
    with pytest.raises(RootnoiseError, match=r"privacy\.json must describe mechanism\.json"):
        report.read(copy)


def test_folders_without_a_run_are_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    line = f"run must be readable, got {tmp_path}: config.json: No such file or directory"
    assert line in capsys.readouterr().err


def test_runs_without_privacy_and_unfinished_ones_have_a_page(tmp_path):
    none = dataclasses.replace(SMALL, mechanism="none", epsilon=None, epochs=1, sampling="auto")
    run(none, tmp_path / "none")
    text = report.page(report.read(tmp_path / "none"))
    assert "No privacy is claimed" in text
    assert Page(text).labels[0].startswith("Test accuracy by step")

    def stop(t, n_steps, accuracy):
        if t == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path / "half", on_step=stop)
    assert "<b>8 of 16</b>steps" in report.page(report.read(tmp_path / "half"))


def test_commands_write_one_page_each(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert main(["compare", str(folder), str(folder), "--out", str(out)]) == 0
    text = out.read_text()
    assert "2 runs compared" in text
    assert "first (1)" in text
    assert not Page(text).open
    capsys.readouterr()
    assert main(["report", str(folder), "--out", "/dev/full/x"]) == 2
    assert "out must be writable" in capsys.readouterr().err


def test_a_name_cannot_break_out_of_the_page(folder):
    hostile = dataclasses.replace(report.read(folder), name="<script>alert(1)</script>")
    assert "<script" not in report.page(hostile)
    assert "<script" not in report.comparison([hostile, hostile])


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("who", "name"),
    [
        (FixedCycle(10, 4), "bsr"),
        (FixedCycle(10, 4), "blt"),
        (FixedCycle(10, 4), "tree"),
        (FixedCycle(10, 4), "epoch-scaled"),
        (CyclicPoisson(4, 0.1), "bsr"),
        (MinSeparation(10, 4), "identity"),
    ],
)
def test_pictures_are_drawn_of_every_kind(who, name):
    split = factorize(prefix_sum(40), who, name)
    made = Mechanism.calibrate(split, who, noise_multiplier=2.0, delta=1e-5)
    inverse = np.linalg.inv(made.strategy.dense())
    assert pictures.corner(made, 16) == pytest.approx(inverse[:16, :16], abs=1e-9)
    for draw in (pictures.heatmap, pictures.autocorrelation, pictures.participation):
        assert draw(made).startswith("<svg ")
    assert "Epsilon over delta" in pictures.privacy(made, [])
    assert f"{name} ends at" in pictures.errors(made, None)


def test_sampled_epsilons_are_drawn_as_stated():
    who = BallsInBins(4, 2)
    split = factorize(prefix_sum(8), who, "bsr")  # of independent noise epsilon is certain
    made = Mechanism.calibrate(split, who, noise_multiplier=2.0, delta=1e-3)
    said = [{"delta": 1e-5, "epsilon": 3.0}, {"delta": 1e-2, "epsilon": 1.0}]
    assert "from 1 at delta 0.01 to 3 at 1e-05" in pictures.privacy(made, said)


def test_every_colour_is_of_the_one_palette():
    root, palette = Path(__file__).parents[1], Path("src/rootnoise/runs/palette.py")
    files = [file for top in ("src", "papers", "benchmarks") for file in (root / top).rglob("*.py")]
    named = re.compile(r"#[0-9A-Fa-f]{6}\b|\btab:\w+")
    found = {file.relative_to(root): set(named.findall(file.read_text())) for file in files}
    assert len(found.pop(palette)) == 9
    assert set().union(*found.values()) == {pictures.INK}  # a placeholder


# --------------------------------------------------------------------------------- the end of train


def test_train_leaves_the_report_under_the_seal(tmp_path):
    out = tmp_path / "run"
    run(SMALL, out, report=True)
    left = (out / "report.html").read_text()
    stated = json.loads((out / "privacy.json").read_text())
    assert "report.html" in stated["files"]
    assert escape(stated["claim"]) in left
    assert "<b>16 of 16</b>steps" in left
    assert not Page(left).open
    made = report.page(report.read(out))
    row = f"<tr><td>seal of the folder</td><td>{stated['seal']}</td></tr>\n"
    assert row in made
    assert made.replace(row, "") == left  # only the seal is not on the page that it seals
    assert all(check.held for check in audit(out))
    (out / "report.html").write_text(left.replace("(4, 1e-05)", "(1, 1e-05)"))
    assert [check.name for check in audit(out) if not check.held] == ["report.html"]


def test_a_report_that_cannot_be_drawn_keeps_no_run_from_its_end(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no ink")

    monkeypatch.setattr("rootnoise.runs.release.page", broken)
    with pytest.warns(UserWarning, match=r"report.html is left out \(no ink\): rootnoise report"):
        run(SMALL, tmp_path / "run", report=True)
    assert (tmp_path / "run/result.json").exists()
    assert not (tmp_path / "run/report.html").exists()
    assert all(check.held for check in audit(tmp_path / "run"))


def test_numbers_of_privacy_are_rounded_up(folder):
    class Almost:
        epsilon, delta, noise_multiplier = 2.00049, 1e-5, 1.0

    made = dataclasses.replace(report.read(folder), mechanism=Almost())
    assert "<li><b>2.001</b>epsilon</li>" in list(report._numbers(made))
