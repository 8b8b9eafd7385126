"""The pictures of docs/comparison.md, out of docs/comparison.json; run.py draws them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rootnoise.cli.bench.duels import OURS, Duel, duels, size
from rootnoise.cli.bench.tables import exponent, growth
from rootnoise.runs.palette import COLOURS, GREY, MARKERS

Result = Mapping[str, Any]


def figure(result: Result, rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of some panels, stamped with what made it."""
    made = Figure(figsize=(8.4, height), layout="constrained", dpi=150)
    axes: list[Axes] = list(made.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    stamp = f"benchmarks/comparison/pictures.py, {result['date']}, {result['machine']}"
    made.supxlabel(stamp, fontsize=7, color=GREY)
    return made, axes


def styles(result: Result) -> dict[str, dict[str, Any]]:
    """Return the colour and marker of each side that is installed."""
    sides = [name for name, found in result["versions"].items() if "missing" not in found]
    return {
        name: {"color": COLOURS[i], "marker": MARKERS[i], "label": name}
        for i, name in enumerate(sides)
    }


def ratios(result: Result) -> Figure:
    """Draw every measured amount of theirs over ours."""
    every = [d for d in duels(result) if d.unit]
    lines: dict[str, list[Duel]] = {}
    for duel in every:
        more = {"step": ", a step", "memory": ", memory", "factors": " factorized"}
        lines.setdefault(duel.label + more.get(duel.section, ""), []).append(duel)
    made, (panel,) = figure(result, 1, 1, 1.2 + 0.21 * len(lines))
    for side, style in styles(result).items():
        places = enumerate(lines.values())
        chosen = [(d.ratio, y) for y, line in places for d in line if d.side == side]
        if side != OURS and chosen:
            panel.plot(*zip(*chosen, strict=True), linestyle="none", markersize=6, **style)
    panel.axvline(1, color=GREY, linewidth=1)
    panel.set_yticks(range(len(lines)), list(lines), fontsize=7.5)
    panel.set(xscale="log", ylim=(len(lines) - 0.5, -0.5), xlabel="theirs over ours (at 1: equal)")
    panel.grid(axis="y", linewidth=0.4, alpha=0.5)
    made.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return made


def growths(result: Result) -> Figure:
    """Draw how times grow, with the fitted exponents."""
    looks = styles(result)
    axes = growth(result["rows"], list(looks))
    made, panels = figure(result, (len(axes) + 1) // 2, 2, 2.6 * ((len(axes) + 1) // 2))
    for panel, axis in zip(panels, axes, strict=False):
        for side, points in axis.points.items():
            if len(points) > 1:
                style = {**looks[side], "label": f"{side}, {exponent(points):.2f}"}
                panel.plot(list(points), [1e3 * t for t in points.values()], **style)
        panel.set(xscale="log", yscale="log", ylabel="ms")
        sizes = sorted({number for points in axis.points.values() for number in points})
        panel.set_xticks(sizes, [size(number) for number in sizes])
        panel.minorticks_off()
        panel.margins(y=0.1)
        panel.set_title(axis.title, fontsize=8.5)
        panel.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for panel in panels[len(axes) :]:
        panel.remove()
    return made


def draw(result: Result, folder: Path) -> None:
    """Write both pictures."""
    for name, make in (("ratios", ratios), ("growth", growths)):
        path = folder / f"comparison-{name}.png"
        make(result).savefig(path, bbox_inches="tight", metadata={"Software": None})
