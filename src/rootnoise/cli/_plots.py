"""Pictures that commands draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rootnoise._check import RootnoiseError, extra
from rootnoise._files import write_whole
from rootnoise.runs.palette import BLUE, COLOURS, GREY, MARKERS, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rootnoise.factorization import Factorization
    from rootnoise.participation import Participation
    from rootnoise.planner import Row

SAMPLINGS = ("fixed-cycle", "cyclic-poisson", "poisson", "balls-in-bins")
# Rows with more than this many times the least error are not shown, to separate the good ones.
FARTHEST = 8
# Coefficients after this many are too small to be visible.
SHOWN = 64
# A curve of more points looks the same.
POINTS = 2000


def save(path: Path, draw: Callable[[str], bytes]) -> None:
    """Write a picture in the format of the file's suffix, or as PNG without one."""
    extra("matplotlib.figure", "plots", "a plot")
    try:
        write_whole(path, draw(path.suffix[1:] or "png"))
    except (OSError, ValueError) as reason:  # ValueError: an unknown format
        raise RootnoiseError(
            f"plot must be a picture that can be written, got {path}: {reason}"
        ) from None


def factorization(made: Factorization, who: Participation, kind: str) -> bytes:
    """Draw the first columns of C and C^-1, and every step's error with that of identity."""
    from rootnoise.factorization import error, factorize

    figure, (left, right) = _figure(2)
    lags = np.arange(min(SHOWN, made.n_steps))
    left.axhline(0, color=GREY, linewidth=0.8)
    for matrix, label, colour, marker in (
        (made.strategy, "strategy C", BLUE, "o"),
        (made.noising, "noise $C^{-1}$", ORANGE, "s"),
    ):
        column = matrix.column(0)[: lags.size]
        left.plot(lags, column, color=colour, marker=marker, markersize=3, label=label)
    left.set(xlabel="steps later", title="first column")
    independent = factorize(made.workload, who, "identity")
    shown = np.unique(np.linspace(0, made.n_steps - 1, POINTS).astype(int))
    for split, label, colour in (
        (independent, "independent noise", GREY),
        (made, made.mechanism, BLUE),
    ):
        errors = error.per_step(split.decoder, split.sensitivity(who).value)
        right.plot(shown + 1, errors[shown], color=colour, label=label)
    right.set(xlabel="step", title="expected error of the iterate", ylim=(0, None))
    return _finished(figure, (left, right), kind)


def plan(rows: Sequence[Row], kind: str) -> bytes:
    """Draw the error of each row of a plan against its memory."""
    figure, (axes,) = _figure(1, width=7.2, height=4.2)
    best = float("inf")
    for sampling, colour, marker in zip(SAMPLINGS, COLOURS, MARKERS, strict=False):
        own = [row for row in rows if row.sampling == sampling]
        if own:
            x, y = [row.memory_rows for row in own], [row.rmse_per_example for row in own]
            axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.75, label=sampling)
    for row in sorted(rows, key=lambda row: (row.memory_rows, row.rmse_per_example)):
        if row.rmse_per_example < best * 0.98:  # nothing with less memory is as good
            best = row.rmse_per_example
            axes.annotate(
                row.mechanism,
                (row.memory_rows, best),
                xytext=(0, -11),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    fixed = [row for row in rows if row.sampling == "fixed-cycle"]
    if fixed:
        bound = fixed[0].rmse_per_example / (1 + fixed[0].gap)
        label = "no factorization in a fixed cycle is below"
        axes.axhline(bound, color=GREY, linewidth=1, linestyle="--", label=label)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.set(
        xlabel="memory (noise vectors of the model's size)",
        ylabel="expected error of the iterates per clip norm",
        xlim=(-0.2, None),
        ylim=(None, FARTHEST * min(row.rmse_per_example for row in rows)),
    )
    return _finished(figure, (axes,), kind)


def _figure(panels: int, width: float = 4.8, height: float = 3.6) -> tuple[Any, list[Axes]]:
    # Without pyplot: no global figures, no display needed.
    figure = extra("matplotlib.figure", "plots", "a plot").Figure(
        figsize=(width * panels, height), layout="constrained"
    )
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _finished(figure: Any, panels: tuple[Axes, ...], kind: str) -> bytes:
    """Give all panels the same style, and return the picture."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format=kind)
    return picture.getvalue()
