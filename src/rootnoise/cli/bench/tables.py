"""Answers as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rootnoise.cli.bench.duels import accuracies, label, size

Row = Mapping[str, Any]
Answer = Mapping[str, Any]


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


def _versions(result: Mapping[str, Any]) -> Table:
    rows = []
    for name, answer in result["versions"].items():
        said = ", ".join(f"{key} {value}" for key, value in answer.items())
        rows.append([name, "not installed" if "missing" in answer else said])
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
    if "stopped" in answer:
        return f"stopped after {answer['stopped']:g} s"
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


def figures(value: float, digits: int = 2) -> str:
    """Return about `digits` significant figures, never with an exponent."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def _account(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    return _grid(
        "Accounting: value, and seconds",
        "asked",
        _asked(rows, "account", "epsilon", "calibrate"),
        label,
        lambda a: f"{a['value']:.4f} in {figures(a['seconds'])} s",
        sides,
        versions,
    )


def _noise(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    found = []
    for row in _asked(rows, "noise", "noise"):
        q, answers = row["question"], row["answers"]
        plain = answers["rootnoise"].get("plain", math.nan)

        def over(answer: Answer, plain: float = plain) -> str:
            # JAX has no torch beside it: ours, of the same minute.
            return figures(answer.get("ratio", answer["seconds"] / plain))

        cells = [_cell(answers[side], versions[side], over) for side in sides]
        found.append([f"{size(q['d'])}, {q['bands']}", figures(plain / q["d"] * 1e9), *cells])
    headings = ["values, bands", "torch.randn, ns a value", *sides]
    return Table("Noise of one step, over torch.randn", headings, found)


def _step(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    def show(a: Answer) -> str:
        parts = f", by {a['micro']}" if a.get("micro", "all") != "all" else ""
        return f"{figures(a['ratio'], 3)} ({figures(1e3 * a['seconds'])} ms{parts})"

    return _grid(
        "A private step: over the same step without privacy, and milliseconds",
        "model",
        _asked(rows, "step", "step", "ghost"),
        label,
        show,
        sides,
        versions,
    )


def _memory(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    return _grid(
        "Peak memory of three steps, MB",
        "model",
        _asked(rows, "memory", "plain_memory", "memory", "ghost_memory"),
        label,
        lambda a: f"{a['MB']:.0f}",
        sides,
        versions,
    )


def _factors(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    def show(a: Answer) -> str:
        return f"{a['rmse']:.4f}; {figures(a['first'])} s, {figures(a['again'])} s"

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


class Axis(NamedTuple):
    """What grows with what, and the seconds of each side at each size."""

    title: str
    points: dict[str, dict[float, float]]


def growth(rows: Iterable[Row], sides: Sequence[str]) -> list[Axis]:
    """Return the axes of growth that were measured."""
    every = [row for row in rows if row["section"] in ("growth", "noise")]

    def pick(title: str, what: str, field: str, **fixed: float) -> Axis:
        held = {"what": what, **fixed}
        # One band is independent noise, another way in most sides.
        chosen = [
            row
            for row in every
            if held.items() <= row["question"].items() and row["question"].get("bands") != 1
        ]
        chosen.sort(key=lambda row: row["question"][field])
        points = {
            side: {
                row["question"][field]: row["answers"][side]["seconds"]
                for row in chosen
                if "seconds" in row["answers"].get(side, {})
            }
            for side in sides
        }
        return Axis(title, points)

    axes = (
        pick("BSR, its sensitivity and error, over steps n", "plan_time", "n", k=10),
        pick("the same at n = 100000, over participations k", "plan_time", "k", n=10**5),
        pick("noise of 16 bands, over parameters d", "noise", "d", bands=16),
        pick("noise of 1e6 parameters, over bands p", "noise", "bands", d=10**6),
        pick("one Poisson batch of 64, over records", "draw", "n_examples"),
    )
    return [axis for axis in axes if any(axis.points.values())]


def _growth(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    def cell(side: str, points: Mapping[float, float]) -> str:
        if len(points) < 2:
            return _cell({"missing": True}, versions[side], str)
        (low, fast), *_, (high, slow) = points.items()
        ends = f"{size(low)}: {figures(1e3 * fast)} ms, {size(high)}: {figures(1e3 * slow)} ms"
        return f"{exponent(points):.2f}; {ends}"

    found = [
        [axis.title, *(cell(side, axis.points[side]) for side in sides)]
        for axis in growth(rows, sides)
    ]
    title = "Growth: fitted exponent; time at the smallest and at the largest size"
    return Table(title, ["time of", *sides], found)


def _accuracy(rows: Iterable[Row], sides: Sequence[str], versions: Mapping[str, Answer]) -> Table:
    """Each side at its own best learning rate: the one of the best mean over seeds."""
    asked = _asked(rows, "accuracy", "accuracy")
    best = {side: accuracies(asked, side) for side in sides}
    found = []
    for target, noise in dict.fromkeys(
        (row["question"]["target"], row["question"].get("noise", "default")) for row in asked
    ):
        cells = []
        for side in sides:
            got = best[side].get((target, noise))
            cells.append(
                f"{got.mean:.1f} ± {got.deviation:.1f} % (rate {got.rate:g},"
                f" {len(got.values)} seeds)"
                if got
                else _cell({"missing": True}, versions[side], str)
            )
        rates = sorted({r["question"]["lr"] for r in asked if r["question"]["target"] == target})
        tried = ", ".join(f"{rate:g}" for rate in rates)
        what = "its own choice" if noise == "default" else "asked for independent noise"
        found.append([f"epsilon {target:g}, {what}; rates {tried}", *cells])
    return Table("Test accuracy on the digits: mean and deviation", ["budget", *sides], found)
