"""Does the planned error foretell the best learning rate? What an advised rate loses.

The private runs of `papers/kalinin-lampert-2024/runs.jsonl` try learning rates in powers of two for
each setting and method. A rule advises a rate from what is known before training. It is judged by
how many points of accuracy the nearest rate that was tried is below the best one. The constants of
a rule are fitted without the study that it is judged on. Nothing is trained:

    python benchmarks/rates.py

`untuned.py` trains other settings at the advised rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rootnoise.factorization import factorize
from rootnoise.planner import CONTRACTION
from rootnoise.planner.advice import MOVED
from rootnoise.runs.config import RunConfig, make_sampler, make_workload
from rootnoise.runs.models import build
from rootnoise.workload import SGD

RUNS = Path(__file__).parents[1] / "papers" / "kalinin-lampert-2024" / "runs.jsonl"
# Seeds from here on chose the rate; the others were run at the rate chosen, and favour it.
TUNING_SEED = 1000
# Training examples, and the shape of an input.
DATA = {
    "digits": (1442, (1, 8, 8)),
    "mnist-5k": (4000, (1, 28, 28)),
    "fashion-mnist": (60_000, (1, 28, 28)),
}
# Noise multiplier, batch size, steps, rate and about how many parameters of published runs of
# DP-SGD without momentum, at clip norm 1 (jax-privacy at 22da50a,
# experiments/image_classification/configs).
PUBLISHED = {
    "WRN-16-4, CIFAR-10, epsilon 1": (10.0, 4096, 725, 2.0, 2.7e6),
    "NF-ResNet-50, ImageNet, epsilon 8": (2.5, 16384, 71589, 4.0, 25.6e6),
    "WRN-28-10, fine-tuned, epsilon 1": (21.1, 16384, 250, 1.0, 36.5e6),
}
OUTPUT = "workload"  # noise on the iterates themselves: far behind, and left out of the fits


@dataclass(frozen=True)
class Cell:
    """One setting and method, with the mean accuracy of every rate that was tried.

    Attributes:
        study: of the paper's page.
        kind: mechanism and sampling.
        errors: planned error per unit of clip norm, by contraction.
        n_params: of the model.
        accuracy: by learning rate.
    """

    study: str
    kind: str
    errors: dict[float, float]
    n_params: int
    accuracy: dict[float, float]

    @property
    def best(self) -> float:
        """The best of the rates that were tried."""
        return max(self.accuracy, key=self.accuracy.__getitem__)

    @property
    def peak(self) -> float:
        """The best rate, by the parabola through the best one tried and its neighbours."""
        rates = sorted(self.accuracy)
        i = rates.index(self.best)
        if i in (0, len(rates) - 1):
            return self.best
        left, top, right = (self.accuracy[rate] for rate in rates[i - 1 : i + 2])
        bend = left - 2 * top + right
        return float(self.best * 2 ** ((left - right) / (2 * bend) if bend < 0 else 0))

    def nearest(self, rate: float) -> float:
        """Return the rate that was tried and is nearest to one."""
        return min(self.accuracy, key=lambda tried: abs(np.log(tried / rate)))

    def regret(self, rate: float) -> float:
        """Return how many points of accuracy the nearest rate tried is below the best."""
        return 100 * (self.accuracy[self.best] - self.accuracy[self.nearest(rate)])


def read(path: Path, contractions: Iterable[float]) -> list[Cell]:
    """Return the cells of a file of runs in which three rates or more were tried."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        config = dict(run["config"])
        rate, seed, _ = (config.pop(name) for name in ("lr", "seed", "insecure_noise_seed"))
        key = run["study"], json.dumps(config, sort_keys=True)
        cell = found.setdefault(key, {"config": config, "run": run, "tried": {}})
        if seed >= TUNING_SEED:
            cell["tried"].setdefault(rate, {})[seed] = run["accuracy"]
    cells = []
    for (study, _), cell in found.items():
        config = RunConfig(**cell["config"])
        n_examples, shape = DATA[config.dataset]
        model = build(config.model, shape, 10, 0)
        cells.append(
            Cell(
                study,
                f"{config.mechanism}, {config.sampling}" + ", cyclic" * (config.groups > 1),
                errors(config, n_examples, cell["run"]["noise_multiplier"], contractions),
                sum(p.numel() for p in model.parameters()),
                {rate: float(np.mean([*by.values()])) for rate, by in cell["tried"].items()},
            )
        )
    return [cell for cell in cells if len(cell.accuracy) > 2]


def errors(
    config: RunConfig, n_examples: int, sigma: float, contractions: Iterable[float]
) -> dict[float, float]:
    """Return sigma x rmse / batch size of a run's strategy, with dense matrices."""
    sampler = make_sampler(config, n_examples)
    name = "identity" if config.mechanism == "dpsgd" else config.mechanism
    workload = make_workload(config, sampler.n_steps)
    split = factorize(workload, sampler.participation, name, **config.split)
    scale = sigma * split.sensitivity(sampler.participation).value / config.batch_size
    noising = split.noising.dense()
    decoders = {c: workload.contracted(c).matrix.dense() @ noising for c in contractions}
    return {c: scale * float(np.sqrt(np.mean((d**2).sum(1)))) for c, d in decoders.items()}


# Known numbers of a cell, of which a rule is a product of powers times one constant.
Rule = Sequence[tuple[Callable[[Cell], float], float | None]]  # None: a power to be fitted


def advised(rule: Rule, known: Sequence[Cell], cells: Sequence[Cell]) -> np.ndarray:
    """Return the rates of a rule for cells, its constant and free powers fitted on known ones."""

    def parts(some: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray]:
        logs = [(np.log([number(cell) for cell in some]), power) for number, power in rule]
        fixed = sum((power * log for log, power in logs if power is not None), np.zeros(len(some)))
        return fixed, np.column_stack(
            [np.ones(len(some)), *(x for x, power in logs if power is None)]
        )

    fixed, free = parts(known)
    peaks = np.log([cell.peak for cell in known])
    weights = np.linalg.lstsq(free, peaks - fixed, rcond=None)[0]
    fixed, free = parts(cells)
    return np.asarray(np.exp(fixed + free @ weights))


def held_out(rule: Rule, cells: Sequence[Cell]) -> np.ndarray:
    """Return the rates of a rule for cells, each fitted without the cell's study."""
    rates = np.empty(len(cells))
    for study in {cell.study for cell in cells}:
        there = np.array([cell.study == study for cell in cells])
        known = [cell for cell in cells if cell.study != study and OUTPUT not in cell.kind]
        rates[there] = advised(rule, known, [cell for cell in cells if cell.study == study])
    return rates


def judged(cells: Sequence[Cell], rates: Iterable[float]) -> str:
    """Return mean and worst regret, and how often a rate is within a factor 2 of the best."""
    pairs = list(zip(cells, rates, strict=True))
    regrets = [cell.regret(rate) for cell, rate in pairs]
    near = np.mean([0.5 <= rate / cell.peak <= 2 for cell, rate in pairs])
    bias = np.exp(np.mean([np.log(rate / cell.peak) for cell, rate in pairs]))
    return f"{np.mean(regrets):5.2f} {max(regrets):6.1f} {near:8.0%} {bias:8.2f} {len(pairs):6}"


def error(contraction: float) -> Callable[[Cell], float]:
    """Return the planned error with a contraction, as a number of a cell."""
    return lambda cell: cell.errors[contraction]


def n_params(cell: Cell) -> float:
    """Return the number of parameters."""
    return float(cell.n_params)


CONTRACTIONS = (0.0, 4.0, 8.0, CONTRACTION, 16.0)
RULES: dict[str, Rule] = {
    "one rate": [],
    **{f"R / error at contraction {c:g}": [(error(c), -1.0)] for c in CONTRACTIONS},
    "R / error / n_params^(1/4)": [(error(CONTRACTION), -1.0), (n_params, -0.25)],
    "R / error / n_params^(1/2)": [(error(CONTRACTION), -1.0), (n_params, -0.5)],
    "R / error^a": [(error(CONTRACTION), None)],
    "R / error^a / n_params^b": [(error(CONTRACTION), None), (n_params, None)],
}


def table(cells: Sequence[Cell]) -> None:
    """Print how good rules are, and the one that is used by study and by mechanism."""
    private = [cell for cell in cells if OUTPUT not in cell.kind]
    print(f"{'points below the best rate':45} mean  worst within 2  x best  cells")
    for rate in (0.1, 0.25, 0.5):
        print(f"{f'always {rate}':44}{judged(private, [rate] * len(private))}")
    for name, rule in RULES.items():
        print(f"{name:44}{judged(private, held_out(rule, private))}")
    used = [MOVED / cell.errors[CONTRACTION] for cell in private]
    print(f"{f'{MOVED} / error, in sample':44}{judged(private, used)}")
    fit = float(advised(RULES["one rate"], list(private), private[:1])[0])
    print(f"fitted: one rate {fit:.3f}", end="")
    moved = np.exp(np.mean([np.log(c.peak * c.errors[CONTRACTION]) for c in private]))
    print(f", R {moved:.4f} at contraction {CONTRACTION:g}\n")
    rooted = np.mean([np.log(c.peak * c.errors[CONTRACTION] * c.n_params**0.25) for c in private])
    for name, (sigma, batch, n, rate, size) in PUBLISHED.items():
        column = SGD(n).contracted(CONTRACTION).matrix.column(0)
        moved = sigma / batch * float(np.sqrt(np.mean(np.cumsum(column**2))))
        print(
            f"{name:44}has {rate:g}, {MOVED} / error {MOVED / moved:.2f}, "
            f"with n_params^(1/4) {np.exp(rooted) / moved / size**0.25:.2f}"
        )
    print()
    for what, those in (("study", private), ("kind", cells)):
        for name in sorted({getattr(cell, what) for cell in those}):
            some = [cell for cell in those if getattr(cell, what) == name]
            rates = [MOVED / cell.errors[CONTRACTION] for cell in some]
            print(f"{name:44}{judged(some, rates)}")
        print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS)
    arguments = parser.parse_args()
    table(read(arguments.runs, CONTRACTIONS))


if __name__ == "__main__":
    main()
