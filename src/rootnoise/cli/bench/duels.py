"""Ours beside theirs, one measurement at a time: what is smaller is better in each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean, stdev
from typing import Any, NamedTuple

OURS = "rootnoise"
MARGIN = 1.1  # measured amounts that are closer than this count as equal
NOTICED = 1.001  # and computed ones, which errors and epsilons are

MODELS = {
    "perceptron": "perceptron, 1e6 parameters",
    "cnn": "CNN, 4e5 parameters",
    "transformer": "transformer, 9e5 parameters",
}
Row = Mapping[str, Any]


class Duel(NamedTuple):
    """One measurement of ours and of one other.

    Args:
        section: where it was asked.
        label: what was measured.
        side: the other.
        ours: amount, in `unit`.
        theirs: amount, in `unit`.
        unit: "s", "MB", or "" for errors and epsilons, which are computed.
    """

    section: str
    label: str
    side: str
    ours: float
    theirs: float
    unit: str

    @property
    def ratio(self) -> float:
        """Theirs over ours."""
        return self.theirs / self.ours

    @property
    def margin(self) -> float:
        """The ratio up to which both count as equal."""
        return MARGIN if self.unit else NOTICED


def label(q: Row) -> str:
    """Return a question in words."""
    what: str = q["what"]
    if what in ("epsilon", "calibrate"):
        how = "Poisson" if q["groups"] == 1 else f"cyclic Poisson, {q['groups']} groups"
        if what == "epsilon":
            return f"epsilon at noise multiplier {q['sigma']:g}, {how}"
        return f"noise multiplier at epsilon {q['target']:g}, {how}"
    if what == "noise":
        return f"noise, {size(q['d'])} values, {q['bands']} band{'s' * (q['bands'] > 1)}"
    if what == "factors":
        bands = f", {q['bands']} bands" if q["bands"] else ""
        momentum = f", momentum {q['momentum']:g}" if q["momentum"] else ""
        return f"{q['mechanism']}{bands}{momentum}"
    if what == "plan_time":
        return f"BSR planned, {size(q['n'])} steps, {q['k']} participations"
    if what == "draw":
        return f"a Poisson batch of {size(q['n_examples'])} records"
    way = ", ghost clipping" if what.startswith("ghost") else ""
    way = ", not private" if what.startswith("plain") else way
    return f"{MODELS[q['model']]}, batch {q['n']}{way}"


def size(number: float) -> str:
    """Return a size in short.

    >>> size(64), size(1000), size(2.5e5)
    ('64', '1e3', '2.5e5')
    """
    if number < 1000:
        return f"{number:g}"
    mantissa, exponent = f"{number:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def duels(result: Mapping[str, Any]) -> list[Duel]:
    """Return every measurement that both we and another have, the other at its best way."""
    found: dict[tuple[str, str, str, str], Duel] = {}
    for row in result["rows"]:
        for duel in _of_row(row, result["rows"]):
            key = (duel.section, duel.label, duel.side, duel.unit)
            if key not in found or duel.theirs < found[key].theirs:
                found[key] = duel
    return list(found.values())


def _of_row(row: Row, rows: list[Row]) -> Iterator[Duel]:
    question, section = row["question"], row["section"]
    ours: Mapping[str, Any] = row["answers"].get(OURS, {})
    if question["what"] in ("ghost", "ghost_memory"):  # another way to the same step
        plain = {**question, "what": "step" if question["what"] == "ghost" else "memory"}
        same = [other for other in rows if other["question"] == plain]
        ours = same[0]["answers"].get(OURS, {}) if same else {}
        question = plain
    if section == "accuracy" or question["what"] == "plain_memory":
        return
    units = {"MB": "MB", "again": "s", "seconds": "s", "rmse": "", "value": ""}
    for side, answer in row["answers"].items():
        for name, unit in units.items():
            if side != OURS and name in ours and name in answer:
                yield Duel(section, label(question), side, ours[name], answer[name], unit)


class Accuracy(NamedTuple):
    """Test accuracies in per cent over seeds, at the learning rate of the best mean."""

    rate: float
    values: list[float]

    @property
    def mean(self) -> float:
        """Their mean."""
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """Their standard deviation."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def beats(self, other: Accuracy) -> bool:
        """Return whether the means are more than two standard errors apart, this one higher."""
        errors = [a.deviation**2 / len(a.values) for a in (self, other)]
        noticed: float = 2 * sum(errors) ** 0.5
        return self.mean - other.mean > noticed


def accuracies(rows: list[Row], side: str) -> dict[tuple[float, str], Accuracy]:
    """Return the best accuracies of a side, by epsilon and by what was asked of its noise."""
    by_rate: dict[tuple[float, str], dict[float, list[float]]] = {}
    for row in rows:
        q, answer = row["question"], row["answers"].get(side, {})
        if row["section"] == "accuracy" and "value" in answer:
            rates = by_rate.setdefault((q["target"], q.get("noise", "default")), {})
            rates.setdefault(q["lr"], []).append(100 * answer["value"])
    return {
        key: Accuracy(*max(rates.items(), key=lambda item: mean(item[1])))
        for key, rates in by_rate.items()
    }
