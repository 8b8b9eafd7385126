"""The pictures of a run's report, as SVG that takes its text colour from the page."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from rootnoise._check import extra
from rootnoise.accounting.rounding import round_up
from rootnoise.factorization import Factorization, error, factorize
from rootnoise.participation import CyclicPoisson, FixedCycle
from rootnoise.runs.palette import BLUE, COLOURS, DASHES, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rootnoise.mechanism import Mechanism

INK = "#010203"  # placeholder, replaced by the colour of the page's text
SIZE = (5.0, 3.2)  # inches: on a phone of 360 pixels, labels of 9 points are 9 pixels high
CORNER = 48  # rows and columns of C^-1 that are drawn
LAGS = 40
STEPS = 256  # the autocorrelation is that of this step, or of the last one of a shorter run
POINTS = 400  # most points of a curve
DISTINCT = 4  # colours of curves, repeated with other dashes
RECORDS = 8  # records whose steps are drawn


def drawn(alt: str, draw: Callable[[Axes], None]) -> str:
    """Return a picture as an SVG element with a text alternative.

    Args:
        alt: describes the picture for readers who cannot see it.
        draw: draws on the axes that it is given.
    """
    extra("matplotlib.figure", "plots", "a picture")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    style |= {"svg.fonttype": "none", "svg.hashsalt": alt, "font.size": 9}
    with mpl.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are global to the page, so those of two pictures must differ.
    tag = f"p{abs(hash_of(alt)):x}"
    svg = re.sub(r'\bid="', f'id="{tag}-', svg)
    svg = re.sub(r"url\(#", f"url(#{tag}-", svg)
    svg = re.sub(r'href="#', f'href="#{tag}-', svg)
    title = f'<svg role="img" aria-label="{escape(alt)}"><title>{escape(alt)}</title>'
    return re.sub(r"<svg([^>]*)>", lambda m: f"{title[:4]}{m[1]}{title[4:]}", svg, count=1)


def hash_of(text: str) -> int:
    """Return a short hash of a text, the same in every process."""
    return zlib.crc32(text.encode())


def accuracy(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw test accuracy by step, for one run or for several by label."""
    ends = "; ".join(
        f"{label} ends at {100 * history[-1]['test_accuracy']:.1f} % after {history[-1]['step']} "
        "steps"
        for label, history in curves.items()
        if history
    )

    def draw(axes: Axes) -> None:
        for i, (label, history) in enumerate(curves.items()):
            steps = [entry["step"] for entry in history]
            percent = [100 * entry["test_accuracy"] for entry in history]
            dashes = DASHES[i // DISTINCT % len(DASHES)]
            colour = COLOURS[i % DISTINCT]
            axes.plot(steps, percent, color=colour, linestyle=dashes, marker="o", ms=3, label=label)
        axes.set(xlabel="step", ylabel="test accuracy (%)")
        if len(curves) > 1:
            axes.legend(frameon=False)

    return drawn(f"Test accuracy by step: {ends or 'no evaluation yet'}.", draw)


def privacy(mechanism: Mechanism, stated: Sequence[Mapping[str, float]]) -> str:
    """Draw epsilon over delta; for Monte Carlo accounting, only at the stated points."""
    deltas = np.geomspace(mechanism.delta / 100, min(0.1, mechanism.delta * 1e4), 13)
    points = [(cost["delta"], cost["epsilon"]) for cost in stated]
    if mechanism.privacy.monte_carlo is None:
        points = [(d, replace(mechanism, delta=float(d)).epsilon) for d in deltas]
    points = sorted((d, e) for d, e in points if np.isfinite(e))

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", ms=3)
        axes.plot([mechanism.delta], [mechanism.epsilon], "s", color=ORANGE, label="the claim")
        axes.set(xscale="log", xlabel="delta", ylabel="epsilon", ylim=(0, None))
        # matplotlib sets powers of ten as formulas: half of the picture's time.
        axes.xaxis.set_major_formatter(lambda delta, _: f"{delta:g}")
        axes.minorticks_off()
        axes.legend(frameon=False)

    alt = (
        f"Epsilon over delta: from {points[-1][1]:.3g} at delta {points[-1][0]:.1g} to "
        f"{points[0][1]:.3g} at {points[0][0]:.1g}; the claim is "
        f"{round_up(mechanism.epsilon, 4)} at {mechanism.delta:g}."
    )
    return drawn(alt, draw)


def errors(mechanism: Mechanism, lower_bound: float | None) -> str:
    """Draw each step's expected error, with that of independent noise and the lower bound."""
    own = error.per_step(_split(mechanism).decoder, mechanism.sensitivity.value)
    plain = factorize(mechanism.workload, mechanism.participation, "identity")
    other = error.per_step(plain.decoder, plain.sensitivity(mechanism.participation).value)
    shown = np.unique(np.linspace(0, mechanism.n_steps - 1, POINTS).astype(int))

    def draw(axes: Axes) -> None:
        axes.plot(shown + 1, other[shown], color=GREY, label="independent noise")
        axes.plot(shown + 1, own[shown], color=BLUE, label=mechanism.name)
        if lower_bound is not None:
            axes.axhline(
                lower_bound, color=ORANGE, linestyle="--", label="bound on any root mean square"
            )
        axes.set(xlabel="step", ylabel="error at noise multiplier 1", ylim=(0, None))
        axes.legend(frameon=False)

    alt = (
        f"Expected error of the iterates by step: {mechanism.name} ends at {own[-1]:.3g}, "
        f"independent noise at {other[-1]:.3g}, at the same privacy."
    )
    return drawn(alt, draw)


def _split(mechanism: Mechanism) -> Factorization:
    return Factorization(mechanism.name, mechanism.workload, mechanism.strategy)


def corner(mechanism: Mechanism, m: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the first m rows and columns of C^-1."""
    noising = mechanism.noising
    m, s = min(m, noising.n_steps), noising.state_size
    return noising.block(0, m)[:m, s:]


def heatmap(mechanism: Mechanism) -> str:
    """Draw the first rows and columns of C^-1: the weight of each draw in each step's noise."""
    entries = corner(mechanism, CORNER)
    most = float(np.abs(entries).max())
    from matplotlib.colors import LinearSegmentedColormap

    def draw(axes: Axes) -> None:
        fading = LinearSegmentedColormap.from_list(
            "fading", [BLUE, f"{BLUE}00", f"{ORANGE}00", ORANGE]
        )
        image = axes.imshow(entries, cmap=fading, vmin=-most, vmax=most, interpolation="none")
        axes.set(xlabel="draw Z of step", ylabel="noise of step")
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.8)
        bar.outline.set_visible(False)
        bar.ax.patch.set_visible(False)

    below = entries[1:, 0]
    what = (
        "the diagonal alone, for the noise is independent"
        if not below.any()
        else f"{entries[0, 0]:.2f} on the diagonal and {below[0]:.2f} just below it: each step "
        "takes back part of the noise before it"
    )
    return drawn(f"Heat map of C inverse, first {len(entries)} steps: {what}.", draw)


def autocorrelation(mechanism: Mechanism) -> str:
    """Draw the correlation of a step's noise with the noise of the steps before it."""
    rows = corner(mechanism, STEPS)
    last, lags = rows[-1], np.arange(min(LAGS, len(rows)))
    norms = np.linalg.norm(rows, axis=1)
    values = [rows[-1 - lag] @ last / (norms[-1 - lag] * norms[-1]) for lag in lags]

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.vlines(lags, 0, values, color=BLUE)
        axes.plot(lags, values, "o", color=BLUE, ms=3)
        axes.set(xlabel="steps before", ylabel="correlation of the noise")

    least = int(np.argmin(values)) if len(values) > 1 else 0
    alt = (
        f"Correlation of the noise of step {len(rows)} with that of earlier steps: 1 with itself, "
        f"least {values[least]:.2f} with {least} steps before."
    )
    return drawn(alt, draw)


def participation(mechanism: Mechanism) -> str:
    """Draw the steps at which some records may take part: as planned, not as it happened."""
    who, n = mechanism.participation, mechanism.n_steps
    n_shown = min(n, 5 * who.period) if isinstance(who, FixedCycle) else min(n, 100)
    period = who.period if isinstance(who, FixedCycle) else None
    if isinstance(who, CyclicPoisson):
        period = who.groups

    def draw(axes: Axes) -> None:
        for record in range(RECORDS):
            start = 0 if period is None else record * period // RECORDS
            steps = np.arange(start, n_shown, period or 1)
            marker = "|" if period is None or isinstance(who, CyclicPoisson) else "s"
            colour = (BLUE, ORANGE)[record % 2]
            axes.plot(steps + 1, np.full(len(steps), record + 1), marker, color=colour, ms=6)
        axes.set(xlabel="step", ylabel="one of the records", xlim=(0, n_shown + 1))
        axes.set_yticks(range(1, RECORDS + 1))

    return drawn(f"Steps at which {RECORDS} of the records may take part: {who}.", draw)
