"""What people see at a terminal: progress, completion, and tables at any width."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from rootnoise.cli import _progress, _report, main
from rootnoise.cli.audit import _percent
from rootnoise.factorization import mechanisms
from rootnoise.runs.config import SAMPLINGS
from rootnoise.runs.data import _FROM_FILES
from rootnoise.runs.models import MODELS
from rootnoise.runs.settings import Settings
from rootnoise.workload.schedule import FINAL

RUN = ["train", "--dataset", "digits", "--model", "logistic", "--epsilon", "4", "--batch-size"]
RUN += ["400", "--epochs", "2", "--lr", "0.2"]


def at_a_terminal(width, *arguments):
    """Run a command line at a terminal of that width; return its status and what it showed."""
    terminal, theirs = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "rootnoise", *arguments],
        env=os.environ | {"TERM": "xterm", "COLUMNS": str(width), "OMP_NUM_THREADS": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the end, on Linux
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    status = process.wait()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    return status, re.split(r"[\r\n]+", text)


@pytest.mark.parametrize("width", [50, 100])
def test_progress_shows_accuracy_epsilon_spent_and_time_left(tmp_path, width):
    out = tmp_path / "run"
    status, lines = at_a_terminal(width, *RUN, "--out", str(out))
    assert status == 0
    shown = [line.strip() for line in lines if " of 4 " in line]
    last = shown[-1]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"8/8 accuracy {metrics[-1]['test_accuracy']:.3f}, epsilon 4 of 4 0" in last
    assert re.search(r"\d:\d\d$", last)
    assert ("bsr on digits" in last) == (width == 100)
    spent = {match[1] for line in shown if (match := re.search(r"epsilon (\S+) of 4", line))}
    assert max(map(float, spent)) == 4
    assert max(len(line) for line in lines) <= width


def test_no_epsilon_is_shown_where_none_is_claimed(tmp_path):
    more = ("--insecure-noise-seed", "1", "--epochs", "1", "--out", str(tmp_path / "run"))
    status, lines = at_a_terminal(100, *RUN, *more)
    shown = [line for line in lines if "accuracy" in line and "4/4" in line]
    assert status == 0
    assert shown
    assert not any("epsilon" in line for line in shown)


def test_secret_trials_show_neither_time_nor_count(monkeypatch):
    shown = io.StringIO()

    def console(**_):
        return Console(file=shown, force_terminal=True, width=80)

    monkeypatch.setattr(_progress, "Console", console)
    with _progress.waiting("private trials", quiet=False):
        pass
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "private trials" in text
    assert not re.search(r"\d", text)


def test_a_bar_says_what_it_was_told_and_before_that_the_accuracy():
    seen = []
    bar = _progress.Steps(lambda *step: seen.append(step), shown=True)
    bar.step(1, 3, None)
    bar.step(2, 3, 0.5)
    bar.say("epsilon 1")
    bar.step(3, 3, 0.75)
    assert seen == [(1, 3, ""), (2, 3, "accuracy 0.500"), (2, 3, "epsilon 1"), (3, 3, "epsilon 1")]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("rootnoise pre", {"predict"}),
        ("rootnoise tune --tri", {"--trials", "--trials-shape"}),
        ("rootnoise train --conf", {"--config"}),
        ("rootnoise train --mo", {"--model", "--momentum"}),
        ("rootnoise plan --ht", {"--html"}),
        ("rootnoise train --mechanism bsr", {"bsr", "bsr-gamma"}),
        ("rootnoise train --dataset mni", {"mnist", "mnist-5k"}),
    ],
)
def test_the_shell_completes_commands_and_options(words, offered):
    """As the script of --show-completion calls us."""
    asked = {
        "_ROOTNOISE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-c", "from rootnoise.cli import main; main()"]
    made = subprocess.run(
        command, check=True, env=os.environ | asked, capture_output=True, text=True
    )
    assert set(made.stdout.split()) == offered


def test_values_that_the_shell_completes_are_those_that_are_taken():
    completing = "autocompletion"
    own = [f for f in dataclasses.fields(Settings) if completing in f.metadata]
    offered = {f.name: f.metadata[completing] for f in own}
    known = {"model": list(MODELS), "dataset": ["digits", *_FROM_FILES], "schedule": list(FINAL)}
    known |= {
        "sampling": ["auto", *SAMPLINGS],
        "mechanism": ["none", "dpsgd", *mechanisms(), "auto"],
    }
    for name, values in known.items():
        assert sorted(offered[name]()) == sorted(values)


def test_the_help_names_completion(capsys):
    assert main(["--help"]) == 0
    assert "--install-completion" in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 50, 64, 80, 120])
def test_a_table_never_outgrows_the_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    heads = ("mechanism", "batches", "memory", "error", "gap")
    rows = [("column-normalised (banded)", "balls-in-bins*", "239", "0.009921", "1261.2%")]
    _report.table("a title", heads, rows, ("memory", "batches"))
    out = capsys.readouterr().out
    frame = [line for line in out.splitlines() if line[:1] in "┏│┃└"]
    assert max(map(len, frame)) <= width
    assert "0.009921" in out
    assert "1261.2%" in out
    assert ("239" in out) == ("left out" not in out or "memory" not in out.split("left out")[1])


def test_a_narrow_audit_lists_what_holds_and_shows_what_does_not(tmp_path):
    out = tmp_path / "run"
    assert main([*RUN, "--out", str(out)]) == 0
    status, lines = at_a_terminal(50, "audit", str(out))
    shown = " ".join(line.strip() for line in lines)
    assert status == 0
    assert "checks hold: seal, claim.txt, config.json," in shown
    assert "found" not in shown
    (out / "run.toml").write_text("")
    status, lines = at_a_terminal(50, "audit", str(out))
    shown = " ".join(line.strip() for line in lines)
    assert status == 1
    assert " NO " in shown
    assert "checks hold: seal, claim.txt" in shown
    path = [line for line in lines if str(out) in line]  # a word of its own length
    assert max(len(line) for line in lines if line not in path) <= 50


def test_an_audit_shows_a_gap_and_that_none_is_stated():
    assert [_percent("0.12"), _percent("None")] == ["12%", "None"]
