"""Answers as tables: for a terminal, and between the marks of a page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from rootnoise._check import RootnoiseError

Row = Mapping[str, Any]
Answer = Mapping[str, Any]
MARK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Table(NamedTuple):
    """A title, headings, and rows of cells."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table as Markdown, without its title."""
        if not self.rows:
            return "Not measured in this run.\n"
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Return every table of a result, by name; a section that was not asked has no rows."""
    sides = list(result["versions"])
    made = [_account, _noise, _step, _memory, _factors, _growth, _accuracy]
    return {"versions": _versions(result), "wrong": _wrong(result)} | {
        build.__name__[1:]: build(result["rows"], sides, result["versions"]) for build in made
    }


def fill(page: str, result: Mapping[str, Any]) -> str:
    r"""Return the page with each table that it marks written anew.

    Raises:
        RootnoiseError: a mark that names no table.

    >>> result = {"versions": {}, "rows": [], "date": "", "machine": "", "quick": True}
    >>> print(fill("<!-- table noise -->\n<!-- end -->", result))
    <!-- table noise -->
    Not measured in this run.
    <!-- end -->
    """
    found = tables(result)

    def write(mark: re.Match[str]) -> str:
        if mark[2] not in found:
            raise RootnoiseError(f"table must be one of {', '.join(found)}, got {mark[2]}")
        return mark[1] + found[mark[2]].markdown() + mark[3]

    return MARK.sub(write, page)


def _versions(result: Mapping[str, Any]) -> Table:
    rows = []
    for name, answer in result["versions"].items():
        said = ", ".join(f"{key} {value}" for key, value in answer.items())
        rows.append([name, "not installed" if "missing" in answer else said])
    length = "quick" if result["quick"] else "full"
    rows.append(["measured", f"{result['date']}, {result['machine']}, {length} run"])
    return Table("Who was asked", ["side", "versions"], rows)


def _wrong(result: Mapping[str, Any]) -> Table:
    rows = [
        [side, case["input"], case["right"], case["found"]]
        for side, cases in result.get("wrong", {}).items()
        for case in cases
    ]
    return Table("Tried on others", ["library", "input", "right", "found"], rows)


def _cell(answer: Answer, said: Answer, show: Callable[[Answer], str]) -> str:
    if "missing" in answer:
        return "not installed" if "missing" in said else "-"
    return "fails" if "refused" in answer else show(answer)


def _grid(
    title: str,
    first: str,
    chosen: Iterable[Row],
    label: Callable[[Row], str],
    show: Callable[[Answer], str],
    sides: Sequence[str],
    versions: Mapping[str, Answer],
) -> Table:
    rows = []
    for row in chosen:
        cells = [_cell(row["answers"][side], versions[side], show) for side in sides]
        rows.append([label(row["question"]), *cells])
    return Table(title, [first, *sides], rows)


def _asked(rows: Iterable[Row], section: str, *whats: str) -> list[Row]:
    return [r for r in rows if r["section"] == section and r["question"]["what"] in whats]


def _figures(value: float, digits: int = 2) -> str:
    """Return about `digits` significant figures, never with an exponent."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def _account(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    def label(q: Row) -> str:
        how = "Poisson" if q["groups"] == 1 else f"cyclic Poisson, {q['groups']} groups"
        if q["what"] == "epsilon":
            return f"epsilon at noise multiplier {q['sigma']:g}, {how}"
        return f"noise multiplier at epsilon {q['target']:g}, {how}"

    return _grid(
        "Accounting: value, and seconds",
        "asked",
        _asked(rows, "account", "epsilon", "calibrate"),
        label,
        lambda a: f"{a['value']:.4f} in {_figures(a['seconds'])} s",
        sides,
        versions,
    )


def _noise(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    found = []
    for row in _asked(rows, "noise", "noise"):
        q, answers = row["question"], row["answers"]
        plain = answers["rootnoise"]["plain"]
        cells = [
            _cell(answers[s], versions[s], lambda a, t=plain: _figures(a["seconds"] / t))  # type: ignore[misc]
            for s in sides
        ]
        label = f"{q['d']:.0e}, {q['bands']}".replace("e+0", "e")
        found.append([label, _figures(plain / q["d"] * 1e9), *cells])
    headings = ["values, bands", "torch.randn, ns a value", *sides]
    return Table("Noise of one step, over torch.randn", headings, found)


MODELS = {
    "perceptron": "perceptron, 1e6 parameters",
    "cnn": "CNN, 4e5 parameters",
    "tokens": "Linear and LayerNorm on 64 tokens, 8e5 parameters",
}


def _model(q: Row) -> str:
    way = ", ghost clipping" if q["what"].startswith("ghost") else ""
    way = ", not private" if q["what"].startswith("plain") else way
    return f"{MODELS[q['model']]}, batch {q['n']}{way}"


def _step(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    return _grid(
        "A private step: over the same step without privacy, and milliseconds",
        "model",
        _asked(rows, "step", "step", "ghost"),
        _model,
        lambda a: f"{_figures(a['ratio'], 3)} ({_figures(1e3 * a['seconds'])} ms)",
        sides,
        versions,
    )


def _memory(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    return _grid(
        "Peak memory of three steps, MB",
        "model",
        _asked(rows, "memory", "plain_memory", "memory", "ghost_memory"),
        _model,
        lambda a: f"{a['MB']:.0f}",
        sides,
        versions,
    )


def _factors(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    def label(q: Row) -> str:
        bands = f", {q['bands']} bands" if q["bands"] else ""
        momentum = f", momentum {q['momentum']:g}" if q["momentum"] else ""
        return f"{q['mechanism']}{bands}{momentum}"

    def show(a: Answer) -> str:
        return f"{a['rmse']:.4f}; {_figures(a['first'])} s, {_figures(a['again'])} s"

    chosen = _asked(rows, "factors", "factors")
    steps = "".join(
        f", {r['question']['n']} steps in {r['question']['k']} epochs" for r in chosen[:1]
    )
    title = f"Factorization{steps}: rmse; seconds the first time, and again"
    return _grid(title, "mechanism", chosen, label, show, sides, versions)


def exponent(points: Mapping[float, float]) -> float:
    """Return the slope of log time over log size.

    >>> round(exponent({1: 2.0, 10: 200.0}), 6)
    2.0
    """
    x, y = np.log(list(points)), np.log(list(points.values()))
    return float(np.polyfit(x, y, 1)[0])


def _growth(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    every = [row for row in rows if row["section"] in ("growth", "noise")]

    def pick(what: str, size: str, **fixed: float) -> list[Row]:
        held = {"what": what, **fixed}
        chosen = [r for r in every if held.items() <= r["question"].items()]
        return sorted(chosen, key=lambda r: r["question"][size])

    axes = (
        ("BSR, its sensitivity and error, over steps n", "n", pick("plan_time", "n", k=10)),
        ("the same at n = 100000, over participations k", "k", pick("plan_time", "k", n=10**5)),
        ("noise of 16 bands, over parameters d", "d", pick("noise", "d", bands=16)),
        ("noise of 1e6 parameters, over bands p", "bands", pick("noise", "bands", d=10**6)),
        ("one Poisson batch of 64, over records", "n_examples", pick("draw", "n_examples")),
    )
    found = []
    for title, size, chosen in axes:
        if not chosen:
            continue
        cells = []
        for side in sides:
            # One band is independent noise, another way in most sides.
            points = {
                row["question"][size]: row["answers"][side]["seconds"]
                for row in chosen
                if "seconds" in row["answers"][side] and row["question"].get("bands") != 1
            }
            if len(points) < 2:
                cells.append(_cell({"missing": True}, versions[side], str))
                continue
            (low, fast), *_, (high, slow) = points.items()
            cells.append(
                f"{exponent(points):.2f}; {low:.3g}: {_figures(1e3 * fast)} ms,"
                f" {high:.3g}: {_figures(1e3 * slow)} ms"
            )
        found.append([title, *cells])
    title = "Growth: fitted exponent; time at the smallest and at the largest size"
    return Table(title, ["time of", *sides], found)


def _accuracy(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    """Each side at its own best learning rate: the one of the best mean over seeds."""
    asked = _asked(rows, "accuracy", "accuracy")
    found = []
    for target in sorted({row["question"]["target"] for row in asked}):
        cells = []
        for side in sides:
            by_rate: dict[float, list[float]] = {}
            for row in asked:
                answer = row["answers"][side]
                if row["question"]["target"] == target and "value" in answer:
                    by_rate.setdefault(row["question"]["lr"], []).append(100 * answer["value"])
            if not by_rate:
                cells.append(_cell({"missing": True}, versions[side], str))
                continue
            rate, values = max(by_rate.items(), key=lambda item: mean(item[1]))
            spread = stdev(values) if len(values) > 1 else 0.0
            cells.append(
                f"{mean(values):.1f} ± {spread:.1f} % (rate {rate:g}, {len(values)} seeds)"
            )
        rates = sorted({r["question"]["lr"] for r in asked if r["question"]["target"] == target})
        tried = ", ".join(f"{rate:g}" for rate in rates)
        found.append([f"epsilon {target:g}; rates {tried}", *cells])
    return Table("Test accuracy on the digits: mean and deviation", ["budget", *sides], found)
