"""The common style of all figures: panels with shared labels, a legend above, distinct colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from rootnoise.runs.palette import COLOURS, MARKERS

Points = NDArray[np.float64]
# The same method looks the same in every figure.
STYLES = {
    "BSR": 0, "BSR (p = b)": 0, "BSR (best p)": 0,
    "A·Id": 1, "A·Id (DP-SGD)": 1, "BISR": 1,
    "AOF": 2, "AOF (dense)": 2, "BandInvMF": 2,
    "A·Id amplified": 3, "square root": 3,
    "Id·A": 4, "tree": 4,
    "bsr-gamma": 5, "BLT": 5, "cyclic Poisson": 5,
    "epoch-scaled bsr-gamma": 6, "planner's choice": 6,
    "BandMF (Toeplitz)": 7, "balls in bins": 7,
}  # fmt: skip


class Panels:
    """A figure of `rows` x `columns` axes; `done` adds a common legend."""

    def __init__(self, rows: int, columns: int, x: str, y: str) -> None:
        size = (max(6.4, 3.3 * columns), 3.1 * rows + 0.9)
        self.figure = Figure(figsize=size, layout="constrained", dpi=130)
        axes = self.figure.subplots(rows, columns, squeeze=False)
        self.panels: list[Axes] = list(axes.flat)
        for panel in self.panels:
            panel.grid(alpha=0.25, linewidth=0.7)
            panel.spines[["top", "right"]].set_visible(False)
        self.figure.supxlabel(x, fontsize=11)
        self.figure.supylabel(y, fontsize=11)

    def done(self) -> Figure:
        """Return the figure with its legend."""
        found: dict[str, Any] = {}
        for panel in self.panels:
            handles, labels = panel.get_legend_handles_labels()
            found |= dict(zip(labels, handles, strict=True))
        # A character takes about a twelfth of an inch, a handle as much as five.
        columns = int(12 * self.figure.get_figwidth() / (max(map(len, found)) + 5))
        self.figure.legend(
            found.values(),
            found.keys(),
            loc="outside upper center",
            ncols=max(1, min(columns, len(found))),
            frameon=False,
        )
        return self.figure


def style(label: str, index: int = 0) -> dict[str, Any]:
    """Return colour and marker of a method, or those of the index-th line."""
    number = STYLES.get(label, index)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "label": label,
    }


def line(axes: Axes, x: Points, y: Points, label: str, index: int = 0) -> None:
    """Draw one line, or nothing if there are no points."""
    if len(x):
        axes.plot(x, y, markersize=4, linewidth=1.4, **style(label, index))


def plain(axis: Axis, ticks: Sequence[float]) -> None:
    """Label a logarithmic axis at these values, as plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_ticks([tick for tick in ticks if low <= tick <= high])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
