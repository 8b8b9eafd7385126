"""Pictures that commands draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rootnoise._check import RootnoiseError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rootnoise.factorization import Factorization
    from rootnoise.participation import Participation

# Told apart in grey too, and by the colour-blind (Okabe & Ito, 2008).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
# Coefficients beyond are too small to be seen.
SHOWN = 64
# A curve of more points looks the same.
POINTS = 2000


def factorization(path: Path, made: Factorization, who: Participation) -> None:
    """Draw the first columns of C and C^-1, and every step's error beside that of identity."""
    from rootnoise import error
    from rootnoise.factorization import factorize

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
    _finish(figure, (left, right), path)


def _figure(panels: int, height: float = 3.6) -> tuple[Any, list[Axes]]:
    from matplotlib.figure import Figure  # without pyplot: no global figures, no display needed

    figure = Figure(figsize=(4.8 * panels, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _finish(figure: Any, panels: tuple[Axes, ...], path: Path) -> None:
    """Give all panels one look, and write the picture."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as reason:
        raise RootnoiseError(
            f"plot must be a picture that can be written, got {path}: {reason}"
        ) from None
