"""Learning curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from rootnoise._check import extra
from rootnoise._files import write_whole
from rootnoise.runs.palette import COLOURS, MARKERS


def check() -> None:
    """Refuse to draw without matplotlib; a run calls this before it trains."""
    extra("matplotlib.figure", "plots", "a picture of the curves")


def learning_curves(
    path: Path,
    curves: Mapping[str, Sequence[Sequence[float]]],
    title: str,
    legend: str | None = None,
) -> None:
    """Draw test accuracy in per cent after epochs 1, 2, ... as a PNG file.

    Args:
        path: the file to write.
        curves: for each label (at most 8) one or more repetitions, each a list of accuracies in
            [0, 1] by epoch. Their mean is drawn, and the range from lowest to highest is shaded.
        title: title of the picture.
        legend: title of the legend.
    """
    check()
    from matplotlib.figure import Figure  # without pyplot: no global figures, no display needed
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (label, runs), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        percent = 100 * np.array(runs)
        epochs = np.arange(1, percent.shape[1] + 1)
        axes.plot(epochs, percent.mean(0), color=colour, marker=marker, markersize=5, label=label)
        if len(percent) > 1:
            low, high = percent.min(0), percent.max(0)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, title=legend, alignment="left")
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_whole(path, picture.getvalue())
