"""How much of a claim the empirical audits see: lower bounds, true and with half the noise.

Prints the table of docs/auditing.md and, given a path, draws its picture.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from rootnoise import CyclicPoisson, FixedCycle, Mechanism, Participation, factorize, prefix_sum
from rootnoise.auditing.attack import Attack
from rootnoise.auditing.empirical import distinguish, one_run
from rootnoise.runs.palette import BLUE, GREY, ORANGE

N_STEPS, CANARIES, DELTA = 24, 4000, 1e-5
EPSILONS = (1.0, 2.0, 4.0, 8.0)
MECHANISMS: dict[str, tuple[str, Participation, int | None]] = {
    "bsr, p = 6, fixed cycle of 6": ("bsr", FixedCycle(6, 4), 6),
    "blt, fixed cycle of 6": ("blt", FixedCycle(6, 4), None),
    "dp-sgd, q = 1/8": ("identity", CyclicPoisson(1, 0.125), None),
    "bsr, p = 4, cyclic Poisson, q = 1/4": ("bsr", CyclicPoisson(4, 0.25), 4),
}
Row = tuple[str, float, list[float]]


def rows() -> list[Row]:
    """Return name, claimed epsilon, and the bounds: true and broken, each by both audits."""
    found = []
    for name, (factorization, participation, bands) in MECHANISMS.items():
        split = factorize(prefix_sum(N_STEPS), participation, factorization, bands=bands)
        for epsilon in EPSILONS:
            claimed = Mechanism.calibrate(split, participation, epsilon=epsilon, delta=DELTA)
            half = replace(claimed, noise_multiplier=claimed.noise_multiplier / 2)
            shown = []
            for run in (claimed, half):
                attack = Attack(claimed, CANARIES, seed=0, run=run)
                shown += [distinguish(attack).lower_bound, one_run(attack).lower_bound]
            found.append((name, epsilon, shown))
    return found


def draw(found: list[Row], path: str) -> None:
    """Draw the bounds of true claims, and of half the noise, over the claimed epsilon."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True).flat
    styles = [(BLUE, "o-"), (BLUE, "s--"), (ORANGE, "o-"), (ORANGE, "s--")]
    labels = ["distinguishing", "one run", "half the noise: distinguishing", "half: one run"]
    for axes, name in zip(grid, MECHANISMS, strict=True):
        mine = [row for row in found if row[0] == name]
        for i, ((colour, line), label) in enumerate(zip(styles, labels, strict=True)):
            bounds = [row[2][i] for row in mine]
            axes.plot(EPSILONS, bounds, line, color=colour, markersize=4, label=label)
        axes.plot(EPSILONS, EPSILONS, color=GREY, label="the claim")
        axes.set(title=name, xscale="log", yscale="symlog", xlabel="claimed epsilon")
        axes.set(ylabel="lower bound", xticks=EPSILONS, xticklabels=[f"{e:g}" for e in EPSILONS])
        axes.set(yticks=[0, 1, 2, 5, 10, 20], yticklabels=["0", "1", "2", "5", "10", "20"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    start = time.perf_counter()
    found = rows()
    print(
        "| mechanism | claimed | distinguishing | one run | half: distinguishing | half: one run |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, epsilon, shown in found:
        marked = [f"{x:.2f}" + (" **refuted**" if x > epsilon else "") for x in shown]
        print(f"| {name} | {epsilon:g} | " + " | ".join(marked) + " |")
    print(f"{time.perf_counter() - start:.0f} s")
    for path in sys.argv[1:]:
        draw(found, path)
