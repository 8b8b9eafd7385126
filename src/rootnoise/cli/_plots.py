"""Pictures that commands draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError, extra
from rootnoise._files import write_whole
from rootnoise.runs.palette import BLUE, GREEN, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rootnoise.factorization import Factorization
    from rootnoise.participation import Participation
    from rootnoise.planner import Row

SAMPLINGS = {
    "fixed-cycle": (BLUE, "o"),
    "cyclic-poisson": (ORANGE, "s"),
    "poisson": (GREY, "^"),
    "balls-in-bins": (GREEN, "D"),
}
# Rows with more than this many times the least error are not shown, to separate the good ones.
FARTHEST = 8
# Points whose errors differ by less share one label of so many letters, where labels are numbers.
NEAR, LONGEST = 0.06, 7
TICKS = (1, 1.5, 2, 3, 5, 7)
LEADER = {"arrowstyle": "-", "linewidth": 0.6, "shrinkB": 1, "relpos": (0, 0.5)}
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
    """Draw the error of each row of a plan against its memory, with the names of all."""
    memories = len({row.memory_rows for row in rows})
    figure, (axes,) = _figure(1, width=max(7.2, 1.3 * memories), height=5.0)
    names = ["dpsgd" if row.sampling == "poisson" else row.mechanism for row in rows]
    errors(axes, rows, list(enumerate(names)), 8, coloured=True)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format=kind)
    return picture.getvalue()


def numbered(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the same small, with the numbers of the rows from 1 on; near points share a label."""
    spots: list[list[int]] = []
    for memory in {row.memory_rows for row in rows}:
        for sampling in SAMPLINGS:
            last = 0.0
            for i, row in enumerate(rows):
                if (row.memory_rows, row.sampling) == (memory, sampling):
                    near = row.rmse_per_example <= last * (1 + NEAR)
                    if near and len(ranges([*spots[-1], i + 1])) <= LONGEST:
                        spots[-1].append(i + 1)
                    else:
                        last = row.rmse_per_example
                        spots.append([i + 1])
    errors(axes, rows, [(spot[0] - 1, ranges(spot)) for spot in spots], 9)


def ranges(numbers: Sequence[int]) -> str:
    """Return rising numbers with runs of them joined.

    >>> ranges([1, 3, 4, 5, 8, 9])
    '1, 3-5, 8, 9'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs)
    return ", ".join(word for pair in words for word in pair)


def errors(
    axes: Axes,
    rows: Sequence[Row],
    labels: Sequence[tuple[int, str]],
    size: float,
    *,
    coloured: bool = False,
) -> None:
    """Draw the error of each row of a plan over its memory.

    Args:
        axes: where to draw.
        rows: the rows, the best first.
        labels: places of rows, each with what is written beside it.
        size: of their letters, in points.
        coloured: write them in the colour of their point, rather than in that of the page.
    """
    from matplotlib.ticker import NullLocator

    least = rows[0].rmse_per_example
    shown = [row for row in rows if row.rmse_per_example <= FARTHEST * least]
    memories = sorted({row.memory_rows for row in shown})
    place = {memory: i for i, memory in enumerate(memories)}
    fixed = next((row for row in rows if row.sampling == "fixed-cycle"), None)
    bound = None
    if fixed is not None and fixed.gap is not None:
        bound = fixed.rmse_per_example / (1 + fixed.gap)
    low = np.log(min(0.9 * least, 0.95 * (bound or least)))
    high = np.log(1.2 * shown[-1].rmse_per_example)
    # In logarithms: a line of text as a part of the height of the axes, about 0.7 of the figure's.
    height = 0.7 * 72 * axes.figure.bbox.height / axes.figure.dpi
    apart = 1.25 * size / height * (high - low)
    for sampling, (colour, marker) in SAMPLINGS.items():
        own = [row for row in shown if row.sampling == sampling]
        x, y = [place[row.memory_rows] for row in own], [row.rmse_per_example for row in own]
        if own:
            axes.scatter(x, y, s=26, color=colour, marker=marker, alpha=0.8, label=sampling)
    for memory in memories:
        beside = [
            (rows[i], said)
            for i, said in labels
            if rows[i].memory_rows == memory and rows[i].rmse_per_example <= FARTHEST * least
        ]
        beside.sort(key=lambda each: each[0].rmse_per_example)
        at = np.log([row.rmse_per_example for row, _ in beside])
        for (row, said), y in zip(beside, _spread(at, apart, low, high), strict=True):
            colour, _ = SAMPLINGS[row.sampling]
            axes.annotate(
                said,
                (place[memory], row.rmse_per_example),
                (place[memory] + 0.17, float(np.exp(y))),
                va="center",
                fontsize=size,
                color=colour if coloured else None,
                arrowprops=LEADER | {"color": colour},
            )
    if bound is not None:
        label = "no fixed-cycle mechanism is here"
        axes.axhspan(np.exp(low), bound, color=GREY, alpha=0.2, linewidth=0, label=label)
    axes.set_yscale("log")
    decades = 10.0 ** np.arange(np.floor(low / np.log(10)), np.ceil(high / np.log(10)))
    ticks = np.outer(decades, TICKS).ravel()
    ticks = ticks[(ticks >= np.exp(low)) & (ticks <= np.exp(high))]
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(memories)), [str(memory) for memory in memories])
    axes.set(
        xlabel="memory: noise vectors of the model's size",
        ylabel="expected error per clip norm",
        xlim=(-0.4, len(memories) - 0.1),
        ylim=(np.exp(low), np.exp(high)),
    )
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _spread(at: NDArray[np.float64], apart: float, low: float, high: float) -> NDArray[np.float64]:
    """Return places at least `apart` from each other, as near to rising ones as that allows."""
    from scipy.optimize import isotonic_regression

    if not at.size:
        return at
    steps = apart * np.arange(at.size)
    found: NDArray[np.float64] = np.asarray(isotonic_regression(at - steps).x) + steps
    found += max(0.0, low + apart / 2 - float(found[0]))
    found -= max(0.0, float(found[-1]) - high + apart / 2)
    return found


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
