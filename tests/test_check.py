"""Every refusal of the argument checks, with its whole line."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest

from rootnoise import RootnoiseError, _check
from rootnoise.cli import main
from rootnoise.runs.config import RunConfig
from rootnoise.runs.run import run


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: _check.integer("p", 0, 1, 9, high_name="n"), "p must be in [1, n=9], got 0"),
        (lambda: _check.integer("p", 10, 1, 9), "p must be in [1, 9], got 10"),
        (lambda: _check.integer("p", 0, 1), "p must be >= 1, got 0"),
        (lambda: _check.integer("p", 10, None, 9), "p must be <= 9, got 10"),
        (lambda: _check.integer("p", 1.5), "p must be an integer, got 1.5"),
        (lambda: _check.integer("p", True), "p must be an integer, got True"),
        (lambda: _check.integer("p", None), "p must be an integer, got None"),
        (lambda: _check.integer("p", 10**5000, 1, 9), "p must be in [1, 9], got one of 16610 bits"),
        (lambda: _check.real("s", 10**400), "s must be a finite number, got one beyond 1e308"),
        (lambda: _check.real("s", math.nan), "s must be a finite number, got nan"),
        (lambda: _check.real("s", math.inf, above=0), "s must be a finite number > 0, got inf"),
        (lambda: _check.real("s", 0, above=0), "s must be a finite number > 0, got 0.0"),
        (
            lambda: _check.real("s", 1, at_least=0, below=1),
            "s must be a finite number >= 0 and < 1, got 1.0",
        ),
        (lambda: _check.real("s", 2, at_most=1), "s must be a finite number <= 1, got 2.0"),
        (lambda: _check.real("s", "1"), "s must be a number, got '1'"),
        (lambda: _check.real("s", None), "s must be a number, got None"),
        (lambda: _check.real("s", True), "s must be a number, got True"),
        (lambda: _check.vector("a", []), "a must be a non-empty 1-D array, got shape (0,)"),
        (lambda: _check.vector("a", [[1]]), "a must be a non-empty 1-D array, got shape (1, 1)"),
        (lambda: _check.vector("a", ["x"]), "a must be an array of numbers, got ['x']"),
        (
            lambda: _check.vector("a", [1, math.nan, math.inf]),
            "a must be finite, got 2 NaN or infinite entries",
        ),
        (lambda: _check.matrix("a", [[1, 2]]), "a must be square, got shape (1, 2)"),
    ],
)
def test_one_line(call, line):
    with pytest.raises(RootnoiseError, match=f"^{re.escape(line)}$"):
        call()


def test_good_values_pass():
    assert _check.integer("p", np.int64(3), 1, 9) == 3
    assert type(_check.integer("p", np.int64(3))) is int
    assert _check.real("s", np.float32(0.5), above=0, below=1) == 0.5
    assert [_check.integer("p", value, 1, 9) for value in (1, 9)] == [1, 9]
    assert [_check.real("s", value, at_least=0, at_most=1) for value in (0, 1)] == [0, 1]
    assert _check.real("s", -2) == -2


def test_matrices_need_not_be_square_where_that_is_said():
    assert _check.matrix("a", [[1, 2]], square=False).shape == (1, 2)
    assert _check.matrix("a", [[1, 2], [3, 4]]).shape == (2, 2)


def test_arrays_are_private_and_read_only():
    given = np.ones(3)
    kept = _check.vector("a", given)
    assert _check.vector("a", [1, 2]).dtype == np.float64
    given[0] = 7
    assert kept[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 2


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    need = "needs matplotlib: pip install 'rootnoise[plots]'"
    assert main(["factorize", "--steps", "9", "--plot", str(tmp_path / "plot.png")]) == 2
    assert capsys.readouterr().err == f"error: a plot {need}\n"
    with pytest.raises(RootnoiseError, match=f"^a picture of the curves {re.escape(need)}$"):
        run(RunConfig(dataset="digits", mechanism="none"), tmp_path / "run")
    assert not any(tmp_path.iterdir())
