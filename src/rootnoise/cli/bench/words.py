"""What a page may say of a result: sentences that are made of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from rootnoise.cli.bench.duels import OURS, Accuracy, Duel, accuracies, duels
from rootnoise.cli.bench.tables import figures

Result = Mapping[str, Any]
AMOUNTS = {"s": "time", "MB": "memory", "": "value"}
PLACES = {
    "account": "Accounting",
    "noise": "Noise",
    "step": "A private step",
    "memory": "Memory",
    "factors": "Factorizations",
    "growth": "Growth",
}
IDLE = 0.7  # load that a machine has which nobody uses, rounding up


def words(result: Result) -> dict[str, str]:
    """Return every passage, by name."""
    every = duels(result)
    return {
        "measured": _measured(result),
        "better": _better(result, every),
        **{name: _score([d for d in every if d.section == name]) for name in PLACES},
        "accuracy": _accuracy(result),
        "wrong": _wrong(result),
    }


def _measured(result: Result) -> str:
    said = [f"Measured by `{result['command']}`"] if "command" in result else ["Measured"]
    said = [f"{said[0]} on {result['date']}: {result['machine']}; one thread each."]
    before, after = (*result.get("load", ()), None, None)[:2]
    if before is None:
        said.append("How busy the machine was is not known.")
    elif before <= IDLE:
        said.append(f"The machine was otherwise idle: load {before} before, {after} after.")
    else:
        said.append(
            f"Others used the machine (load {before} before, {after} after), and with it its caches"
            " and its clock: read nothing out of differences below a half."
        )
    if "seconds" in result:
        said.append(f"The run took {figures(result['seconds'] / 60)} minutes.")
    stopped = [
        (row, side)
        for row in result["rows"]
        for side, answer in row["answers"].items()
        if "stopped" in answer
    ]
    if "limit" in result:
        many = f"in this run {len(stopped)}" if stopped else "in this run none"
        said.append(f"An answer that takes longer than {result['limit']:g} s is stopped: {many}.")
    return " ".join(said) + "\n"


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{figures(1e3 * value)} ms" if value < 1 else f"{figures(value)} s"
    return f"{value:.0f} MB" if unit else f"{value:.4f}"


def _better(result: Result, every: list[Duel]) -> str:
    """Return a list for each other side of all in which it is ahead, or that there is nothing."""
    lines = []
    for side in result["versions"]:
        if side == OURS or "missing" in result["versions"][side]:
            continue
        ahead = [d for d in every if d.side == side and d.ratio * d.margin < 1]
        lines.append(f"**{side}**, measured:\n\n")
        items = [
            f"- {d.label}{_against(d)}: {_amount(d.theirs, d.unit)},"
            f" rootnoise {_amount(d.ours, d.unit)}"
            for d in ahead
        ]
        theirs, ours = accuracies(result["rows"], side), accuracies(result["rows"], OURS)
        for key, their in theirs.items():
            if key in ours and their.beats(ours[key]):
                items.append(f"- test accuracy at epsilon {key[0]:g}: {_two(their, ours[key])}")
        lines.append("\n".join(items or ["- ahead in no measurement of this page"]) + "\n\n")
    return "".join(lines).rstrip("\n") + "\n" if lines else "No other library was asked.\n"


def _against(duel: Duel) -> str:
    if duel.section == "account":
        return ", time" if duel.unit else ", value"
    if duel.section == "factors":
        return ", time" if duel.unit else ", error"
    return {"step": ", a step", "memory": ", memory"}.get(duel.section, "")


def _two(their: Accuracy, our: Accuracy) -> str:
    return (
        f"{their.mean:.1f} ± {their.deviation:.1f} %,"
        f" rootnoise {our.mean:.1f} ± {our.deviation:.1f} %"
    )


def _score(chosen: list[Duel]) -> str:
    """Return in how many questions ours is the least of all, and how far the best other is off."""
    said = []
    for unit, name in AMOUNTS.items():
        best: dict[str, Duel] = {}
        for duel in (d for d in chosen if d.unit == unit):
            if duel.label not in best or duel.theirs < best[duel.label].theirs:
                best[duel.label] = duel
        if not best:
            continue
        ratios = [d.ratio for d in best.values()]
        less = sum(d.ratio > d.margin for d in best.values())
        more = sum(d.ratio * d.margin < 1 for d in best.values())
        equal = len(best) - less - more
        span = f"{_times(min(ratios), unit)} to {_times(max(ratios), unit)}"
        said.append(
            f"By {name}, rootnoise is ahead of every other in {less} of {len(best)}, behind one in"
            f" {more}, level in {equal}; the best other has {span} times ours, median"
            f" {_times(median(ratios), unit)}."
        )
    return " ".join(said) + "\n" if said else "Nothing to compare in this run.\n"


def _times(ratio: float, unit: str) -> str:
    return figures(ratio) if unit else f"{ratio:.4f}"


def _accuracy(result: Result) -> str:
    said = []
    ours = accuracies(result["rows"], OURS)
    for side in result["versions"]:
        for key, their in accuracies(result["rows"], side).items() if side != OURS else ():
            for (target, noise), our in ours.items():
                if target != key[0]:
                    continue
                what = "by its own choice" if noise == "default" else "asked for independent noise"
                how = "ahead of" if our.beats(their) else "level with"
                how = "behind" if their.beats(our) else how
                said.append(
                    f"At epsilon {target:g} rootnoise {what} is {how} {side}:"
                    f" {our.mean:.1f} against {their.mean:.1f} %."
                )
    return " ".join(said) + "\n" if said else "Not measured in this run.\n"


def _wrong(result: Result) -> str:
    """Return in how many of the cases of each library the wrong came out."""
    said = []
    for side, cases in result.get("wrong", {}).items():
        wrong = sum(case["wrong"] for case in cases)
        said.append(f"{side}: {wrong or 'none'} of {len(cases)} came out wrong.")
    return " ".join(said) + "\n" if said else "Not tried in this run.\n"
