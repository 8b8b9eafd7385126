"""What the tests of trials share: settings, public data, and trials whose number is known."""

from __future__ import annotations

import time

import pytest

from rootnoise.accounting import Trials
from rootnoise.participation import FixedCycle
from rootnoise.runs.config import RunConfig
from rootnoise.runs.data import load
from rootnoise.runs.trials import _Point
from rootnoise.runs.tuning import Tuning

GRID = {"lr": [0.05, 0.2], "clip_norm": [0.5, 1.0]}
SMALL = {"dataset": "digits", "model": "logistic", "epsilon": 4.0, "epochs": 2, "batch_size": 400}
CONFIG = RunConfig(**SMALL, lr=0.05, clip_norm=0.5, tuning=Tuning(GRID, trials=5.0))
LINE = ["tune", "--dataset", "digits", "--model", "logistic", "--epsilon", "4", "--epochs", "2"]
LINE += ["--batch-size", "400", "--lr", "0.05,0.2", "--clip-norm", "0.5,1"]
CYCLE = FixedCycle(4, 2)  # ceil(1442 / 400)


def other_digits():
    """Public data of the same kind: half of the digits, which stand for somebody else's."""
    digits = load("digits")
    parts = (digits.train_inputs, digits.train_labels, digits.test_inputs, digits.test_labels)
    return tuple(part[::2] for part in parts)


PUBLIC = f"{__name__}:other_digits"


@pytest.fixture
def drawn(monkeypatch):
    """Let the number of trials be known, and keep a copy of each trial."""
    made = []
    train = _Point.train

    def kept(self, data):
        made.append((self, train(self, data), time.time()))
        return made[-1][1]

    def number(k):
        monkeypatch.setattr(Trials, "draw", lambda self: k)
        monkeypatch.setattr(_Point, "train", kept)
        return made

    return number


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
