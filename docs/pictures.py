"""The pictures and the numbers of docs/correlated-noise.md; `python docs/pictures.py` makes them.

One job throughout: plain SGD, 400 steps, every record once in each of 4 epochs, epsilon 4, delta
1e-5, clip norm 1. Noise is measured in clip norms, on the sum of a batch's clipped gradients.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

import rootnoise as rn
from rootnoise.factorization.error import per_step
from rootnoise.runs.palette import BLUE, GREY, ORANGE

FOLDER = Path(__file__).parent / "assets"
STEPS, EPOCHS = 400, 4
WORKLOAD = rn.SGD(n_steps=STEPS)
WHO = rn.FixedCycle(period=STEPS // EPOCHS, epochs=EPOCHS)
NAMES = {"identity": "independent noise (DP-SGD)", "bsr": "correlated noise (BSR)"}
COLOURS = {"identity": ORANGE, "bsr": BLUE}
CORNER = 24  # steps of C^-1 that are drawn


def mechanism(name: str) -> rn.Mechanism:
    """Return the mechanism of this name, calibrated for the job."""
    split = rn.factorize(WORKLOAD, WHO, name)
    return rn.Mechanism.calibrate(split, WHO, epsilon=4, delta=1e-5)


def in_a_step(made: rn.Mechanism) -> NDArray[np.float64]:
    """Return the standard deviation of the noise that each step adds."""
    return made.noise_std * made.noising.row_norms()


def in_the_sum(made: rn.Mechanism) -> NDArray[np.float64]:
    """Return the standard deviation of all noise so far, in the weights after each step."""
    split = rn.Factorization(made.name, WORKLOAD, made.strategy)
    return made.noise_std * per_step(split.decoder, 1.0)


def figure(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of some panels, stamped with what made it."""
    made = Figure(figsize=(8.4, height), layout="constrained", dpi=150)
    axes: list[Axes] = list(made.subplots(1, columns, squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    stamp = f"docs/pictures.py, rootnoise {rn.__version__}, NumPy {np.__version__}"
    made.supxlabel(f"{stamp}, {platform.system()} {platform.machine()}", fontsize=7, color=GREY)
    return made, axes


def iterates() -> Figure:
    """Draw the noise that five weights gather, under either noise."""
    made, panels = figure(2, 3.4)
    for panel, name in zip(panels, NAMES, strict=True):
        stream = rn.NoiseStream(mechanism(name), 5, rn.Key.from_seed(3), threads=1)
        noise = np.stack([stream.next().numpy() for _ in range(STEPS)])
        panel.plot(np.cumsum(noise, axis=0), color=COLOURS[name], linewidth=0.9, alpha=0.85)
        panel.axhline(0, color=GREY, linewidth=0.6)
        panel.set(title=NAMES[name], xlabel="step", ylim=(-70, 70))
    panels[0].set_ylabel("noise in a weight")
    return made


def heatmap() -> Figure:
    """Draw the first rows of C^-1: how far the draw of one step enters the noise of another."""
    made, panels = figure(2, 3.9)
    image: Any = None
    for panel, name in zip(panels, NAMES, strict=True):
        corner = mechanism(name).noising.dense()[:CORNER, :CORNER]
        image = panel.imshow(corner, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        panel.set(title=NAMES[name], xlabel="drawn in step", ylabel="added in step")
    made.colorbar(image, ax=panels, shrink=0.85, extend="max", label="share")
    return made


def errors() -> Figure:
    """Draw the noise that a step adds, and that of all steps so far, beside the least possible."""
    made, panels = figure(2, 3.4)
    for name, label in NAMES.items():
        for panel, values in zip(panels, (in_a_step, in_the_sum), strict=True):
            line = values(mechanism(name))
            panel.plot(np.arange(1, STEPS + 1), line, color=COLOURS[name], label=label)
    least = numbers()["least"]
    panels[1].axhline(
        least, color=GREY, linestyle="--", linewidth=1, label="no noise is lower on average"
    )
    panels[0].set(
        title="added by one step", ylim=(0, 5), xlabel="step", ylabel="standard deviation"
    )
    panels[1].set(title="in the weights", ylim=(0, 46), xlabel="step")
    panels[1].legend(frameon=False, fontsize=8, loc="upper left")
    return made


def numbers() -> dict[str, float]:
    """Return the numbers that the page quotes."""
    least = mechanism("bsr").noise_multiplier * rn.lower_bound(WORKLOAD, WHO).value
    found = {"least": least}
    for name in NAMES:
        made = mechanism(name)
        found[f"{name}: sensitivity"] = made.sensitivity.value
        found[f"{name}: step"] = in_a_step(made)[-1]
        found[f"{name}: last"] = in_the_sum(made)[-1]
        found[f"{name}: average"] = float(np.sqrt(np.mean(in_the_sum(made) ** 2)))
    return found


PICTURES = {"iterates": iterates, "noising": heatmap, "errors": errors}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        draw().savefig(FOLDER / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
    for name, value in numbers().items():
        print(f"{name}: {value:.2f}")
