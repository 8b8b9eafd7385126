"""The tables and the curves of docs/federated.md: mechanisms at one user-level epsilon.

    python examples/federated_compare.py --data-dir FOLDER --picture docs/federated-accuracy.png

Training is that of federated_loop.py. Server rates are tuned on a split of the data that no
reported run sees. "Flower's own" is what flwr's fixed clipping with an accountant assumes:
independent noise, and everybody in every round. The table of epsilons needs flwr and dp-accounting,
and is left out where they are not installed.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec

import federated_loop as task
import numpy as np

import rootnoise as rn

NAMES = {
    "bsr": "BSR",
    "blt": "BLT",
    "tree": "tree",
    "identity": "independent",
    "flower": "Flower's own",
}
RATES = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
SPLITS = ("dirichlet", "shards")
TUNED_ON = 100  # the seed of the tuning split


def trained(args: argparse.Namespace, name: str, rate: float, split: str, seed: int) -> list[float]:
    """Return one run's curve."""
    changed = {"mechanism": name, "server_rate": rate, "split": split, "seed": seed}
    if name == "flower":
        changed |= {"mechanism": "identity", "everyone": True}
    with tempfile.TemporaryDirectory() as folder:
        return task.loop(argparse.Namespace(**vars(args) | changed), folder)


def accuracies(args: argparse.Namespace) -> dict[tuple[str, str], np.ndarray]:
    """Tune, run and print; return the curves, shape (seeds, 10), by mechanism and split."""
    curves = {}
    print("| mechanism | server rate | Dirichlet | shards |\n| --- | --- | --- | --- |")
    for name, title in NAMES.items():
        ends = [trained(args, name, rate, "dirichlet", TUNED_ON)[-1] for rate in RATES]
        rate = RATES[int(np.argmax(ends))]
        for split in SPLITS:
            runs = [trained(args, name, rate, split, seed) for seed in range(args.seeds)]
            curves[name, split] = np.array(runs)
        cells = [curves[name, split][:, -1] for split in SPLITS]
        shown = " | ".join(f"{100 * c.mean():.1f} +- {100 * c.std(ddof=1):.1f}" for c in cells)
        print(f"| {title} | {rate:g} | {shown} |", flush=True)
    return curves


def epsilons(args: argparse.Namespace) -> None:
    """Print what a noise of z clip norms a round costs, by Flower's accountant and by ours."""
    from flwr.serverapp import (
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        RdpAccountant,
        SamplingMethod,
    )

    n, min_sep = args.rounds, args.people // args.cohort
    who = rn.MinSeparation(min_sep=min_sep, max_participations=-(-n // min_sep))
    sgd = rn.SGD(n, momentum=0.9)
    splits = {name: rn.factorize(sgd, who, name) for name in ("identity", "bsr")}

    def ours(name: str, sigma: float) -> rn.Mechanism:
        return rn.Mechanism.calibrate(splits[name], who, noise_multiplier=sigma, delta=args.delta)

    plain, bsr = ours("identity", 1.0), ours("bsr", 1.0)
    print(f"\n| z | Flower's own | the same noise, {who} | BSR of the same error |")
    print("| --- | --- | --- | --- |")
    for z in (2.0, 5.0, 10.0, 20.0):
        model = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
        accountant = RdpAccountant(PrivacyConfig(args.delta, args.people, *model))
        accountant.compose(GaussianPrivacyEvent(z, args.cohort, args.people), n)
        sigma = z / plain.sensitivity.value
        same = sigma * plain.rmse / bsr.rmse
        theirs = accountant.get_epsilon(args.delta)
        rested, better = ours("identity", sigma).epsilon, ours("bsr", same).epsilon
        print(f"| {z:g} | {theirs:.2f} | {rested:.2f} | {better:.2f} |")


def picture(curves: dict[tuple[str, str], np.ndarray], args: argparse.Namespace) -> None:
    """Draw the curves, one standard deviation over seeds around each."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    rounds = args.rounds // 10 * np.arange(1, 11)
    for axis, split in zip(axes, SPLITS, strict=True):
        for name, title in NAMES.items():
            runs = 100 * curves[name, split]
            mean, std = runs.mean(0), runs.std(0, ddof=1)
            (line,) = axis.plot(rounds, mean, label=title)
            axis.fill_between(rounds, mean - std, mean + std, color=line.get_color(), alpha=0.2)
        axis.set(title=f"{split}, epsilon = {args.epsilon:g}", xlabel="round")
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend()
    figure.savefig(args.picture, dpi=110)


def main() -> None:
    """Print the tables and draw the picture."""
    options = task.parser()
    options.set_defaults(epsilon=2.0, clip=0.1)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--picture")
    args = options.parse_args()
    if find_spec("flwr") and find_spec("dp_accounting"):
        epsilons(args)
    curves = accuracies(args)
    if args.picture:
        picture(curves, args)


if __name__ == "__main__":
    main()
