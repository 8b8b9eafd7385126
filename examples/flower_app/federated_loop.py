"""User-level privacy over 1,000 people with 60 images of Fashion-MNIST each, by a loop of our own.

    python examples/federated_loop.py [--mechanism blt] [--split shards] [--data-dir FOLDER]

A person's images lean towards a few classes: by Dirichlet weights, or by shards of the sorted
images, two a person, as if each photographed two things. The model is a softmax over images halved
to 14 x 14, trained by each person for one epoch. Started again with the same --out, a run goes on
where it was killed. `federated.py` trains the same with Flower.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

import rootnoise as rn
from rootnoise.federated import PrivateAggregator
from rootnoise.runs.data import load

IMAGES = 60  # of each person
BATCH = 20


@cache
def everything(data: str, data_dir: str | None) -> tuple[torch.Tensor, ...]:
    """Return training images and labels, test images and labels; images flat, in [-0.5, 0.5]."""
    raw = load(data, None if data_dir is None else Path(data_dir))
    parts = []
    for inputs, labels in (
        (raw.train_inputs, raw.train_labels),
        (raw.test_inputs, raw.test_labels),
    ):
        x = inputs if inputs.shape[-1] < 14 else nn.functional.avg_pool2d(inputs, 2)
        parts += [(x - x.min()) / (x.max() - x.min()) - 0.5, labels]
    return parts[0].flatten(1), parts[1], parts[2].flatten(1), parts[3]


def shares(labels: np.ndarray, people: int, split: str, seed: int) -> np.ndarray:
    """Return who has which images, shape (people, IMAGES); nobody shares one."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))[: people * IMAGES]
    if split == "shards":
        shards = order[np.argsort(labels[order], kind="stable")].reshape(2 * people, -1)
        return shards[rng.permutation(2 * people)].reshape(people, IMAGES)
    piles = [list(order[labels[order] == c]) for c in range(labels.max() + 1)]
    weights = rng.dirichlet([0.3] * len(piles), people)
    mine = np.empty((people, IMAGES), dtype=np.int64)
    for j in range(IMAGES):  # image by image, so that the last to choose find something of each
        for i in rng.permutation(people):
            left = weights[i] * [len(pile) > 0 for pile in piles]
            left = left if left.sum() > 0 else np.array([len(pile) for pile in piles], float)
            mine[i, j] = piles[rng.choice(len(piles), p=left / left.sum())].pop()
    return mine


@cache
def people_of(settings: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Return everybody's images, shape (people, IMAGES, pixels), and labels."""
    data, data_dir, people, split, seed = settings
    x, y, *_ = everything(data, data_dir)
    mine = torch.from_numpy(shares(y.numpy(), people, split, seed))
    return x[mine], y[mine]


def initial(settings: tuple) -> dict[str, torch.Tensor]:
    """Return the model that a run begins with: zeros."""
    x, y, *_ = everything(*settings[:2])
    classes = int(y.max()) + 1
    return {"weight": torch.zeros(classes, x.shape[1]), "bias": torch.zeros(classes)}


def train(weights: dict, x: torch.Tensor, y: torch.Tensor, rate: float) -> dict[str, torch.Tensor]:
    """Return the weights of several people, each after an epoch of SGD: all of them at once."""
    w, b = (weights[n].expand(len(x), *weights[n].shape).clone() for n in ("weight", "bias"))
    for at in range(0, x.shape[1], BATCH):
        part = x[:, at : at + BATCH]
        logits = part @ w.mT + b[:, None]
        error = logits.softmax(-1) - nn.functional.one_hot(y[:, at : at + BATCH], b.shape[1])
        w -= rate * error.mT @ part / BATCH
        b -= rate * error.mean(1)
    return {"weight": w, "bias": b}


def accuracy(weights: dict, settings: tuple) -> float:
    """Return the part of test images, which nobody owns, that are named rightly."""
    *_, x, y = everything(*settings[:2])
    return float(((x @ weights["weight"].T + weights["bias"]).argmax(1) == y).double().mean())


def mechanism_of(args: argparse.Namespace) -> rn.Mechanism:
    """Return the calibrated mechanism: everybody rests for as many rounds as the others fill.

    With --everyone, accounting as if all were in every round, which is what others assume.
    """
    min_sep = 1 if args.everyone else args.people // args.cohort
    who = rn.MinSeparation(min_sep=min_sep, max_participations=-(-args.rounds // min_sep))
    split = rn.factorize(rn.SGD(args.rounds, momentum=0.9), who, args.mechanism)
    return rn.Mechanism.calibrate(
        split, who, epsilon=args.epsilon, delta=args.delta, clip_norm=args.clip
    )


def server_of(args: argparse.Namespace, folder: str | Path) -> PrivateAggregator:
    """Return the server of a run, new or gone on with."""
    return PrivateAggregator(
        folder, mechanism_of(args), initial(settings_of(args)), cohort_size=args.cohort,
        learning_rate=args.server_rate, key=rn.Key.from_seed(args.seed),
    )  # fmt: skip


def settings_of(args: argparse.Namespace) -> tuple:
    """Return what a share of the data depends on."""
    return args.data, args.data_dir, args.people, args.split, args.seed


def loop(args: argparse.Namespace, folder: str | Path) -> list[float]:
    """Train without Flower and return the accuracy after every tenth round."""
    settings, server = settings_of(args), server_of(args, folder)
    (x, y), curve = people_of(settings), []
    while server.t < args.rounds:
        opened = server.open(range(args.people))
        if opened is None:
            break  # nobody may take part: in a world where people come and go, ask again later
        trained = train(opened.weights, x[opened.cohort], y[opened.cohort], args.client_rate)
        for i, person in enumerate(opened.cohort):
            server.receive_weights(opened.t, person, {n: w[i] for n, w in trained.items()})
        weights = server.close()
        if server.t % max(1, args.rounds // 10) == 0:
            curve.append(accuracy(weights, settings))
    server.leave()
    return curve


def parser() -> argparse.ArgumentParser:
    """Return the options; the defaults are those of docs/federated.md."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", default="fashion-mnist")
    options.add_argument("--data-dir", help="the folder of the four IDX files")
    options.add_argument("--split", choices=["dirichlet", "shards"], default="dirichlet")
    options.add_argument("--mechanism", default="bsr", help="bsr, blt, tree, identity, ...")
    options.add_argument("--people", type=int, default=1000)
    options.add_argument("--cohort", type=int, default=100)
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--everyone", action="store_true", help="account for all in every round")
    options.add_argument("--epsilon", type=float, default=8.0)
    options.add_argument("--delta", type=float, default=1e-4)
    options.add_argument("--clip", type=float, default=0.25)
    options.add_argument("--client-rate", type=float, default=0.1)
    options.add_argument("--server-rate", type=float, default=1.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", help="the run's folder; a temporary one when left out")
    return options


def main(run: Callable[[argparse.Namespace, str], list[float]]) -> None:
    """Train once and print the accuracy and what may be said about privacy."""
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as spare:
        curve = run(args, args.out or spare)
    print(f"accuracy by tenths of the run: {' '.join(f'{a:.3f}' for a in curve)}")
    who = f"{args.people} people in rounds of {args.cohort}"
    print(f"{who}, {mechanism_of(args).participation}: epsilon {args.epsilon:g}, each person.")


if __name__ == "__main__":
    main(loop)
