"""Does the planned error foretell the accuracy? Rank correlation and regret of each objective.

Five jobs, thirteen mechanisms, four budgets and twelve learning rates are trained, all rates and
budgets of a mechanism at once: they share batches, noise (but for its scale) and initial weights.
Noise and batches are the library's own streams and samplers; `tests/test_prediction.py` holds a run
to `PrivateOptimizer`, step by step. Results are appended to a file, and what it has is not run
again:

    python benchmarks/prediction.py --out prediction.jsonl --data-dir FOLDER_OF_FASHION_MNIST
    python benchmarks/prediction.py --out prediction.jsonl --table

Every mechanism has its own rate. It is chosen on one half of the test set and judged on the other,
then the other way round, so that no choice is judged by what it was made on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.nn import functional

from rootnoise import SGD, Factorization, FixedCycle, Key, Mechanism, NoiseStream, factorize
from rootnoise.accounting import noise_multiplier
from rootnoise.cli import _progress
from rootnoise.participation import Participation
from rootnoise.participation.samplers import Sampler
from rootnoise.planner import CONTRACTION, Job
from rootnoise.planner.groups import cyclic
from rootnoise.runs.data import load

EPSILONS = (0.5, 1.0, 2.0, 8.0)
DELTA = 1e-5
# Learning rates over 1 - momentum.
RATES = tuple(2.0**i for i in range(-6, 6))
TAIL = 4  # the last 1 / TAIL of the iterates are averaged too


@dataclass(frozen=True)
class Task:
    """What is trained, but for the budget.

    Attributes:
        dataset: digits, or fashion-mnist in 14 x 14 pixels.
        n_examples: the first so many of its training part.
        hidden: units of the hidden layer, 0 for none.
        batch_size, epochs, momentum: of the training.
    """

    dataset: str
    n_examples: int
    hidden: int
    batch_size: int
    epochs: int
    momentum: float

    def job(self, epsilon: float = 1.0) -> Job:
        """Return what the planner is asked."""
        return Job(self.n_examples, self.batch_size, self.epochs, epsilon, DELTA)


TASKS = {
    "digits, perceptron": Task("digits", 1442, 64, 128, 20, 0.9),
    "fashion, logistic": Task("fashion-mnist", 60_000, 0, 500, 4, 0.9),
    "fashion, perceptron": Task("fashion-mnist", 10_000, 32, 200, 8, 0.0),
    "fashion, logistic, 12 epochs": Task("fashion-mnist", 20_000, 0, 500, 12, 0.0),
    "digits, logistic": Task("digits", 1442, 0, 150, 24, 0.9),
}


@dataclass(frozen=True)
class Method:
    """A mechanism: in fixed cycles, or under cyclic Poisson sampling of so many groups.

    `contraction` is that of the workload that it is optimised for, over the whole run: the factor
    on the parameters is exp(-contraction / n) a step.
    """

    mechanism: str
    groups: int | None = None
    bands: int | None = None
    contraction: float = 0.0

    def who(self, job: Job) -> Participation:
        """Return who takes part when."""
        if self.groups is None:
            return FixedCycle(job.period, job.epochs)
        return cyclic(job, self.groups)

    def split(self, task: Task) -> Factorization:
        """Return the factorization."""
        job = task.job()
        work = SGD(job.n_steps, task.momentum, float(np.exp(-self.contraction / job.n_steps)))
        bands = min(64, job.period) if self.bands == 0 else self.bands
        return factorize(work, self.who(job), self.mechanism, bands=bands)


METHODS = {
    "independent, Poisson": Method("identity", 1),
    "banded, Poisson 1/2": Method("banded", 2),
    "banded, Poisson 1/4": Method("banded", 4),
    "banded, Poisson 1/8": Method("banded", 8),
    "banded for contraction 16, Poisson 1/4": Method("banded", 4, contraction=16),
    "independent": Method("identity"),
    "bandmf": Method("bandmf", bands=0),
    "banded of 4": Method("banded", bands=4),
    "banded inverse of 4": Method("banded-inverse", bands=4),
    "lambda-cgd": Method("lambda-cgd"),
    "bandmf for contraction 4": Method("bandmf", bands=0, contraction=4),
    "bandmf for contraction 16": Method("bandmf", bands=0, contraction=16),
    "bandmf for contraction 64": Method("bandmf", bands=0, contraction=64),
}

Arrays = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def arrays(task: Task, seed: int, data_dir: Path | None) -> Arrays:
    """Return inputs and labels to train on, and those to test on; digits are split by the seed."""
    data = load(task.dataset, None if task.dataset == "digits" else data_dir)
    x, y, test_x, test_y = (
        data.train_inputs,
        data.train_labels,
        data.test_inputs,
        data.test_labels,
    )
    if task.dataset == "digits":
        order = torch.randperm(len(y) + len(test_y), generator=torch.Generator().manual_seed(seed))
        x, y = torch.cat([x, test_x])[order], torch.cat([y, test_y])[order]
        n = task.n_examples
        x, y, test_x, test_y = x[:n], y[:n], x[n:], y[n:]
    else:
        x, test_x = functional.avg_pool2d(x, 2), functional.avg_pool2d(test_x, 2)
    n = task.n_examples
    return x[:n].flatten(1), y[:n], test_x.flatten(1), test_y


class Runs:
    """Many runs of one classifier at once: the same batches and noise, other scales and rates.

    Args:
        inputs: length of an input.
        hidden: units of the hidden layer, 0 for none.
        noise: factors on the noise, shape (r,).
        rates: learning rates, shape (r,).
        momentum: of SGD.
        seed: of the initial weights, those of `torch.nn.Linear`.
        clip_norm: of the gradients; noise is in its units.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        noise: torch.Tensor,
        rates: torch.Tensor,
        momentum: float,
        seed: int,
        clip_norm: float = 1.0,
    ) -> None:
        with torch.random.fork_rng():
            torch.random.manual_seed(seed)
            sizes = [(inputs, hidden), (hidden, 10)] if hidden else [(inputs, 10)]
            layers = [torch.nn.Linear(*size) for size in sizes]
        self.r, self._noise, self._rates = len(rates), clip_norm * noise, rates
        self._momentum, self._clip_norm = momentum, clip_norm
        self._sizes = sizes
        flat = torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])
        # Weights are (inputs + 1, r, outputs): the last input is 1.
        self.weights = [
            part.expand(-1, self.r, -1).contiguous() for part in self._parts(flat.clone())
        ]
        self._velocity = [torch.zeros_like(w) for w in self.weights]

    @property
    def n_parameters(self) -> int:
        """Length of the flattened parameters of one run."""
        return sum((i + 1) * o for i, o in self._sizes)

    def _parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return a vector in the order of `parameters()` as weights of shape (inputs + 1, 1, o)."""
        parts, at = [], 0
        for i, o in self._sizes:
            weight, bias = flat[at : at + i * o].view(o, i), flat[at + i * o : at + (i + 1) * o]
            parts.append(torch.cat([weight.T, bias[None]])[:, None])
            at += (i + 1) * o
        return parts

    def flat(self, run: int) -> torch.Tensor:
        """Return the parameters of one run in the order of `parameters()`."""
        return torch.cat([x for w in self.weights for x in (w[:-1, run].T.flatten(), w[-1, run])])

    def _forward(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the inputs of each layer, with ones, and the scores, shape (r, batch, 10)."""
        first = torch.cat([x, torch.ones(len(x), 1)], 1)
        out = (first @ weights[0].flatten(1)).view(len(x), self.r, -1).transpose(0, 1)
        if len(weights) == 1:
            return [first], out
        ones = torch.ones(self.r, len(x), 1)
        second = torch.cat([functional.relu(out), ones], 2)
        return [first, second], second @ weights[1].transpose(0, 1)

    def step(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, batch_size: int) -> None:
        """Step by the sum of clipped gradients, and the noise z times its factors."""
        inputs, scores = self._forward(x, self.weights)
        slopes = [functional.softmax(scores, 2)]
        slopes[0][:, torch.arange(len(y)), y] -= 1
        squares = slopes[0].square().sum(2) * inputs[-1].square().sum(-1)
        if len(inputs) == 2:
            back = slopes[0] @ self.weights[1][:-1].permute(1, 2, 0)
            slopes.insert(0, back * (inputs[1][:, :, :-1] > 0))
            squares = squares + slopes[0].square().sum(2) * inputs[0].square().sum(-1)
        factors = (self._clip_norm * squares.rsqrt()).clamp(max=1).unsqueeze(2)
        for layer, noise in enumerate(self._parts(z)):
            slope = slopes[layer] * factors
            if layer == 0:
                sums = (inputs[0].T @ slope.transpose(0, 1).flatten(1)).view_as(self.weights[0])
            else:
                sums = (inputs[layer].transpose(1, 2) @ slope).transpose(0, 1)
            sums = sums + noise * self._noise[:, None]
            self._velocity[layer].mul_(self._momentum).add_(sums, alpha=1 / batch_size)
            self.weights[layer] -= self._velocity[layer] * self._rates[:, None]

    def judge(
        self, x: torch.Tensor, y: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return accuracy and mean loss of each run on both halves, shape (2, r)."""
        right, loss = [], []
        for half in (slice(0, None, 2), slice(1, None, 2)):
            scores = self._forward(x[half], weights)[1]
            right.append((scores.argmax(2) == y[half]).double().mean(1))
            wrong = functional.cross_entropy(
                scores.flatten(0, 1), y[half].repeat(self.r), reduction="none"
            )
            loss.append(wrong.view(self.r, -1).mean(1))
        return torch.stack(right), torch.stack(loss)


def train(
    task: Task,
    mechanism: Mechanism,
    sampler: Sampler,
    data: Arrays,
    noise: torch.Tensor,
    rates: torch.Tensor,
    seed: int,
    clip_norm: float = 1.0,
) -> dict[str, Any]:
    """Return accuracies and losses of the last iterates and of the mean of the last quarter."""
    x, y, *test = data
    runs = Runs(x.shape[1], task.hidden, noise, rates, task.momentum, seed, clip_norm)
    stream = NoiseStream(mechanism, runs.n_parameters, Key.from_seed(seed))
    first = sampler.n_steps - sampler.n_steps // TAIL
    means = [torch.zeros_like(w) for w in runs.weights]
    for t in range(sampler.n_steps):
        chosen = torch.from_numpy(sampler.batch(t))
        runs.step(x[chosen], y[chosen], stream.next(), task.batch_size)
        if t >= first:
            pairs = zip(means, runs.weights, strict=True)
            means = [mean + (weights - mean) / (t - first + 1) for mean, weights in pairs]
    found = {}
    for name, weights in (("last", runs.weights), ("averaged", means)):
        right, loss = runs.judge(test[0], test[1], weights)
        found[name] = {
            "accuracy": right.numpy().round(5).tolist(),
            "loss": loss.double().numpy().round(5).tolist(),
        }
    return found


@cache
def planned(name: str, label: str) -> tuple[Factorization, Participation, tuple[float, ...]]:
    """Return how a method splits a task, who takes part, and its noise multiplier by budget."""
    task, method = TASKS[name], METHODS[label]
    job = task.job()
    who = method.who(job)
    sigmas = tuple(noise_multiplier(who, job.n_steps, epsilon, DELTA) for epsilon in EPSILONS)
    return method.split(task), who, sigmas


def measure(name: str, label: str, seed: int, data_dir: Path | None) -> dict[str, Any]:
    """Train a method of a task at all budgets and rates; arrays are (half, budget, rate)."""
    task = TASKS[name]
    split, who, sigmas = planned(name, label)
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=DELTA)
    shape = 2, len(EPSILONS), len(RATES)
    noise = torch.tensor(sigmas, dtype=torch.float32).repeat_interleave(len(RATES))
    rates = torch.tensor(RATES) * (1 - task.momentum)
    found = train(
        task,
        mechanism,
        task.job().sampler(who, seed),
        arrays(task, seed, data_dir),
        noise,
        rates.repeat(len(EPSILONS)),
        seed,
    )
    for which in found.values():
        for kind, values in which.items():
            which[kind] = np.reshape(values, shape).tolist()
    return {"task": name, "method": label, "seed": seed, "sigmas": sigmas, **found}


def read(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return what a file has."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["task"], row["method"], row["seed"]): row for row in rows}


def run(path: Path, seeds: int, data_dir: Path | None, tasks: Iterable[str]) -> None:
    """Train what the file lacks, seed by seed."""
    keys = [(name, label, seed) for seed in range(seeds) for name in tasks for label in METHODS]
    done = read(path)
    with _progress.pieces("train", quiet=False) as update:
        for i, key in enumerate(keys):
            update(i, len(keys), f"{key[0]}: {key[1]}")
            if key not in done:
                row = measure(*key, data_dir)
                with path.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")


CONTRACTIONS = (0, 2, 4, 8, 12, 16, 32, 64)
STATISTICS = ("rmse", "last", "tail", "max", "mean of tail")


def errors(split: Factorization, who: Participation, momentum: float) -> dict[str, list[float]]:
    """Return the planned errors at noise multiplier 1, by statistic and contraction."""
    n, noising = split.n_steps, split.noising.dense()
    sens = split.sensitivity(who).value
    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for contraction in CONTRACTIONS:
        decoder = sens * SGD(n, momentum).contracted(contraction).matrix.dense() @ noising
        rows, tail = np.linalg.norm(decoder, axis=1), slice(n - n // TAIL, n)
        found["rmse"].append(float(np.sqrt(np.mean(rows**2))))
        found["last"].append(float(rows[-1]))
        found["tail"].append(float(np.sqrt(np.mean(rows[tail] ** 2))))
        found["max"].append(float(rows.max()))
        found["mean of tail"].append(float(np.linalg.norm(decoder[tail].mean(0))))
    return found


def reached(rows: Sequence[Mapping[str, Any]], which: str) -> np.ndarray:
    """Return the accuracy by seed and budget, shape (seeds, budgets).

    The rate is that of the best mean over the seeds on one half of the test set; the other half
    judges it, and both ways are averaged.
    """
    right = np.array([row[which]["accuracy"] for row in rows])  # seed, half, budget, rate
    best = right.mean(0).argmax(-1)
    budgets = np.arange(len(EPSILONS))
    return (right[:, 1, budgets, best[0]] + right[:, 0, budgets, best[1]]) / 2


@dataclass(frozen=True)
class Study:
    """What was reached and planned, by task and method."""

    accuracy: Mapping[tuple[str, str], np.ndarray]
    errors: Mapping[tuple[str, str], dict[str, list[float]]]
    tasks: Sequence[str]

    @classmethod
    def of(cls, path: Path, which: str) -> Study:
        """Read a file; tasks of which some method is missing are left out."""
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for (name, label, _), row in read(path).items():
            rows.setdefault((name, label), []).append(row)
        tasks = [name for name in TASKS if all((name, label) in rows for label in METHODS)]
        keys = [(name, label) for name in tasks for label in METHODS]
        return cls(
            {key: reached(rows[key], which) for key in keys},
            {key: errors(*planned(*key)[:2], TASKS[key[0]].momentum) for key in keys},
            tasks,
        )

    def judged(self, statistic: str, place: int) -> tuple[float, float, float]:
        """Return mean rank correlation, and mean and largest regret in points, of an objective."""
        correlations, regrets = [], []
        for name in self.tasks:
            for budget in range(len(EPSILONS)):
                error = np.array([self.error(name, x, statistic, place, budget) for x in METHODS])
                right = np.array([self.accuracy[name, x][:, budget].mean() for x in METHODS])
                correlations.append(float(spearmanr(-error, right).statistic))
                regrets.append(100 * float(right.max() - right[error.argmin()]))
        return float(np.mean(correlations)), float(np.mean(regrets)), max(regrets)

    def error(self, name: str, label: str, statistic: str, place: int, budget: int) -> float:
        """Return the planned error per unit of clip norm."""
        sigma = planned(name, label)[2][budget]
        return self.errors[name, label][statistic][place] * sigma / TASKS[name].batch_size


def table(path: Path) -> None:
    """Print what each objective foretells, and planned errors beside reached accuracies."""
    for which in ("last", "averaged"):
        study = Study.of(path, which)
        print(f"\n{which} iterates: rank correlation, mean and largest regret in points")
        print("contraction  " + "".join(f"{name:>18}" for name in STATISTICS))
        for place, contraction in enumerate(CONTRACTIONS):
            cells = [study.judged(name, place) for name in STATISTICS]
            said = "".join(f"{r:8.2f}{m:5.2f}{most:5.1f}" for r, m, most in cells)
            print(f"{contraction:11}  {said}")
        for name in study.tasks:
            print(f"\n{name}: accuracy (s.d.) at epsilon {EPSILONS}, and planned error")
            for label in METHODS:
                right = 100 * study.accuracy[name, label]
                spread = right.mean(0), right.std(0)
                reach = [f"{x:5.1f} ({s:.1f})" for x, s in zip(*spread, strict=True)]
                place = CONTRACTIONS.index(int(CONTRACTION))
                error = [study.error(name, label, "rmse", place, e) for e in range(len(EPSILONS))]
                print(f"{label:40}{' '.join(reach)}  {' '.join(f'{x:8.4f}' for x in error)}")


def main() -> None:
    """Train, or print tables of what was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("prediction.jsonl"))
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="digits alone, one seed")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks = [*TASKS][:1] if arguments.quick else [*TASKS]
    if not arguments.table:
        run(arguments.out, 1 if arguments.quick else arguments.seeds, arguments.data_dir, tasks)
    table(arguments.out)


if __name__ == "__main__":
    main()
