"""What an untuned run loses: the advised rate at other widths and clip norms, and against tuning.

Trainings are those of `benchmarks/prediction.py`, many rates and budgets at once. Results are
appended to a file, and what it has is not run again:

    python benchmarks/untuned.py --data-dir FOLDER_OF_FASHION_MNIST
    python benchmarks/untuned.py --table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prediction import DELTA, METHODS, TASKS, Arrays, Runs, Task, arrays, train

from rootnoise import Factorization, Mechanism, Participation, Trials, tuned_noise_multiplier
from rootnoise.accounting import noise_multiplier
from rootnoise.cli import _progress
from rootnoise.planner import learning_rate
from rootnoise.planner.advice import contracted_error

POISSON, CYCLE = "independent, Poisson", "bandmf for contraction 16"
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 32.0)
# Learning rates over 1 - momentum, at clip norm 1.
RATES = tuple(2.0**i for i in range(-7, 6))
NORMS = (0.1, 0.3, 1.0, 3.0, 10.0)
WIDTHS = {f"digits {h}": Task("digits", 1442, h, 128, 20, 0.9) for h in (0, 16, 64, 256)}
FASHION = ("fashion, logistic", "fashion, perceptron")
ALL = TASKS | WIDTHS
# What `tune` has: 10 trials on average, of shape 1.
TRIALS, FACTORS = Trials(mean=10), (0.5, 1.0, 2.0)
BUDGETS, OLD = (1.0, 2.0, 4.0), 0.5  # the default rate before there was advice
TUNED = ("digits 0", "digits 64")
SPLITS = 4  # of the digits, into those to train on and to test; trials of one tuning have one


@dataclass(frozen=True)
class Part:
    """Runs of one task, method and seed; all rates and budgets at once."""

    part: str
    task: str
    label: str
    seed: int
    clip: float = 1.0

    @property
    def split(self) -> int:
        """Seed of the part of the digits to test on."""
        return self.seed % SPLITS if self.part == "tune" else self.seed


def parts(seeds: int) -> Iterator[Part]:
    """Yield what is to be trained, seed by seed."""
    for seed in range(seeds):
        for task in (*WIDTHS, *FASHION):
            for label in (POISSON, CYCLE):
                yield Part("widths", task, label, seed)
        for task in (*TUNED, FASHION[0]):
            for clip in NORMS:
                yield Part("clip", task, CYCLE, seed, clip)
    for seed in range(10 * SPLITS):
        for task in TUNED:
            yield Part("tune", task, CYCLE, seed)


@cache
def planned(name: str, label: str) -> tuple[Factorization, Participation, float]:
    """Return how a method splits a task, who takes part, and the error at noise multiplier 1."""
    task, method = ALL[name], METHODS[label]
    split, who = method.split(task), method.who(task.job())
    made = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=DELTA)
    return split, who, contracted_error(made, task.batch_size)


@cache
def sigma(name: str, label: str, epsilon: float, trials: Trials | None = None) -> float:
    """Return the noise multiplier of a run, or of each of several trials."""
    _, who, _ = planned(name, label)
    n = ALL[name].job().n_steps
    if trials is not None:
        return tuned_noise_multiplier(who, n, epsilon, DELTA, trials)
    return noise_multiplier(who, n, epsilon, DELTA)


def pairs(part: Part) -> list[tuple[float, float]]:
    """Return noise multiplier and learning rate of each run of a part."""
    task, error = ALL[part.task], planned(part.task, part.label)[2]
    grid = [rate * (1 - task.momentum) / part.clip for rate in RATES]
    if part.part != "tune":
        return [(sigma(part.task, part.label, e), rate) for e in EPSILONS for rate in grid]
    found = []
    for epsilon in BUDGETS:
        own, each = (sigma(part.task, part.label, epsilon, trials) for trials in (None, TRIALS))
        found += [(own, rate) for rate in (learning_rate(own * error), OLD, *grid)]
        found += [(each, factor * learning_rate(each * error)) for factor in FACTORS]
    return found


def measure(part: Part, data: Arrays) -> dict[str, Any]:
    """Train a part; accuracies are (half of the test set, run)."""
    task, (split, who, error) = ALL[part.task], planned(part.task, part.label)
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=DELTA)
    made = pairs(part)
    noise, rates = torch.tensor(made, dtype=torch.float32).T
    sampler = task.job().sampler(who, part.seed)
    found = train(task, mechanism, sampler, data, noise, rates, part.seed, part.clip)
    size = Runs(data[0].shape[1], task.hidden, noise, rates, 0.0, 0).n_parameters
    return asdict(part) | {
        "n_params": size,
        "errors": [noise * error for noise, _ in made],
        "rates": [rate for _, rate in made],
        "accuracy": found["last"]["accuracy"],
    }


def run(path: Path, data_dir: Path | None, seeds: int, only: str | None) -> None:
    """Train what the file lacks."""
    done = {Part(**{f: row[f] for f in Part.__annotations__}) for row in read(path)}
    left = [p for p in parts(seeds) if p not in done and only in (None, p.part)]
    with _progress.pieces("train", quiet=False) as update:
        for i, part in enumerate(left):
            update(i, len(left), f"{part.part}: {part.task}")
            row = measure(part, arrays(ALL[part.task], part.split, data_dir))
            with path.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return what a file has."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def means(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return errors (budget,), rates (rate,) and mean accuracies (budget, rate) in points."""
    shape = len(EPSILONS), len(RATES)
    right = np.mean([np.mean(row["accuracy"], 0) for row in rows], 0).reshape(shape)
    errors, rates = (np.reshape(rows[0][name], shape) for name in ("errors", "rates"))
    return errors[:, 0], rates[0], 100 * right


def interpolated(rate: float, rates: np.ndarray, right: np.ndarray) -> float:
    """Return the accuracy at a rate, between those that were tried."""
    return float(np.interp(np.log(rate), np.log(rates), right))


def tables(path: Path) -> None:
    """Print all three tables."""
    rows = read(path)
    print("advised rate against the best: rates, accuracy, by epsilon", EPSILONS)
    for task, label in sorted({(r["task"], r["label"]) for r in rows if r["part"] == "widths"}):
        some = [r for r in rows if (r["part"], r["task"], r["label"]) == ("widths", task, label)]
        errors, rates, right = means(some)
        advised = [learning_rate(error) for error in errors]
        reached = [interpolated(x, rates, y) for x, y in zip(advised, right, strict=True)]
        factor = [x / rates[y.argmax()] for x, y in zip(advised, right, strict=True)]
        print(
            f"{task:20}{label:27}{some[0]['n_params']:7}{len(some):3}"
            + "  below "
            + " ".join(f"{max(y) - x:4.1f}" for x, y in zip(reached, right, strict=True))
            + "  factor "
            + " ".join(f"{x:5.2f}" for x in factor)
        )
    print("\nclip norms", NORMS, "at advised rate; at the best rate of each; by epsilon")
    clips = [r for r in rows if r["part"] == "clip"]
    for task, label in sorted({(r["task"], r["label"]) for r in clips}):
        for place, epsilon in enumerate(EPSILONS):
            cells = []
            for clip in NORMS:
                key = task, label, clip
                some = [r for r in clips if (r["task"], r["label"], r["clip"]) == key]
                errors, rates, right = means(some)
                rate = learning_rate(errors[place], clip)
                cells.append((interpolated(rate, rates, right[place]), right[place].max()))
            said = "  ".join(" ".join(f"{x:5.1f}" for x in row) for row in zip(*cells, strict=True))
            print(f"{task:20}{label:27}{len(some)} {epsilon:5} {said}")
    print("\ndigits by epsilon: advised, old default, best rate, tuned at the same epsilon (s.d.)")
    for task in TUNED:
        some = [r for r in rows if r["part"] == "tune" and r["task"] == task]
        right = 100 * np.array([r["accuracy"] for r in some])  # seed, half, run
        right = right.reshape(*right.shape[:2], len(BUDGETS), -1)
        for place, epsilon in enumerate(BUDGETS):
            here = right[:, :, place]
            whole, each = here[..., : -len(FACTORS)].mean(1), here[..., -len(FACTORS) :]
            best = whole[:, 2:].mean(0).argmax() + 2
            places = [r["seed"] % SPLITS for r in some]
            tuned = np.concatenate([chosen(each[np.equal(places, i)]) for i in range(SPLITS)])
            cells = [whole[:, 0], whole[:, 1], whole[:, best], tuned]
            said = "  ".join(f"{np.mean(x):5.1f} ({np.std(x):.1f})" for x in cells)
            alone = " ".join(f"{x:.1f}" for x in each.mean((0, 1)))
            print(f"{task:12}{len(some):4} {epsilon:4} {said}  each trial {alone}")


def chosen(each: np.ndarray, draws: int = 2000) -> np.ndarray:
    """Return what the best of a random number of trials reaches, drawn from (seed, half, factor).

    It is the best on one half of the test set and judged on the other, both ways in turn. No trial
    is drawn twice, so that there are at most 30.
    """
    rng, found = np.random.default_rng(0), []
    flat = each.transpose(1, 0, 2).reshape(2, -1)
    for i in range(draws):
        # Shape 1: a geometric number of trials, of mean 10.
        number = min(rng.geometric(1 / TRIALS.mean), flat.shape[1])
        some = rng.choice(flat.shape[1], number, replace=False)
        found.append(flat[1 - i % 2, some[flat[i % 2, some].argmax()]])
    return np.array(found)


def main() -> None:
    """Train, or print tables of what was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("untuned.jsonl"))
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=("widths", "clip", "tune"), help="train this alone")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.table:
        run(arguments.out, arguments.data_dir, arguments.seeds, arguments.part)
    tables(arguments.out)


if __name__ == "__main__":
    main()
