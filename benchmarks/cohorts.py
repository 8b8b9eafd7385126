"""How full rounds are when clients come and go, by policy, and what a million clients cost.

A client has a time zone, sleeps with its device plugged in, and is there only in those hours, more
or less; some are there often and some hardly ever. A round takes what it finds. `--full` runs a
million clients over ten thousand rounds; the default compares the policies on fewer, with as many
participations as the rounds hold, and with a quarter more than full rounds use. Load is b m / n,
the part of all clients that must rest at any time; at 1 all rounds are full only if everybody is
always there.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import numpy as np

from rootnoise.federated.clients import Clients
from rootnoise.federated.cohorts import Policy, pick
from rootnoise.participation import MinSeparation
from rootnoise.participation.ledger_file import Indices
from rootnoise.runs.palette import BLUE, ORANGE

POLICIES: tuple[Policy, ...] = ("fewest", "longest", "random")
ROUNDS_A_DAY = 48
DROPOUT = 0.1


def there(n: int, n_rounds: int, seed: int) -> Iterator[Indices]:
    """Yield who is there in each round: 3 % of all by day, 30 % by night, by zone and habit."""
    rng = np.random.default_rng(seed)
    zone = rng.choice(24, n, p=zones()).astype(np.int8)
    habit = rng.beta(0.8, 1.6, n).astype(np.float32)  # from hardly ever to almost always
    hours = np.arange(24)
    for t in range(n_rounds):
        hour = (t * 24 / ROUNDS_A_DAY + hours) % 24
        awake = np.where((hour < 6) | (hour >= 23), 0.9, 0.09).astype(np.float32)
        yield np.flatnonzero(rng.random(n, dtype=np.float32) < habit * awake[zone])


def zones() -> np.ndarray:
    """Return how many live in each of 24 time zones: most in eight neighbouring ones."""
    crowd = np.full(24, 0.2)
    crowd[:8] = 1.0
    return crowd / crowd.sum()


def simulate(
    n: int, m: int, b: int, k: int, n_rounds: int, policy: Policy, seed: int = 0
) -> tuple[np.ndarray, float, float, Clients]:
    """Return the part of each round that was filled, seconds of picking and admitting, clients."""
    clients = Clients(MinSeparation(b, k))
    start = time.perf_counter()
    everyone = clients.join(range(n))
    joined = time.perf_counter() - start
    rng, filled, spent = np.random.default_rng(seed + 1), np.zeros(n_rounds), 0.0
    for t, available in enumerate(there(n, n_rounds, seed)):
        start = time.perf_counter()
        cohort = pick(clients, everyone[available], m, rng, policy)
        spent += time.perf_counter() - start
        stayed = cohort[rng.random(cohort.size) >= DROPOUT]
        start = time.perf_counter()
        clients.admit(stayed)
        spent += time.perf_counter() - start
        filled[t] = cohort.size / m
    return filled, joined, spent, clients


def picture(path: str) -> None:
    """Draw who was there and who took part, and how full rounds were by policy."""
    import matplotlib.pyplot as plt

    n, m, b, k, n_rounds, shown = 20_000, 500, 12, 42, 1_500, 144
    clients, rng = Clients(MinSeparation(b, k)), np.random.default_rng(1)
    everyone, some = clients.join(range(n)), np.arange(0, n, n // 60)
    seen = np.zeros((some.size, shown))
    for t, available in enumerate(there(n, shown, 0)):
        cohort = pick(clients, everyone[available], m, rng)
        stayed = cohort[rng.random(cohort.size) >= DROPOUT]
        clients.admit(stayed)
        groups = (available, cohort, stayed)
        seen[:, t] = sum(np.isin(some, who).astype(int) for who in groups)
    order = np.argsort((seen > 0).sum(1))
    figure, (top, bottom) = plt.subplots(2, figsize=(8, 6.4), height_ratios=(2, 1))
    y, x = np.nonzero(seen[order])
    kind = seen[order][y, x]
    for value, colour, size, label in (
        (1, "0.85", 4, "there"),
        (2, ORANGE, 10, "invited, dropped out: keeps its turn"),
        (3, BLUE, 10, "took part"),
    ):
        top.scatter(x[kind == value], y[kind == value], size, colour, marker="s", label=label)
    top.set(ylabel="60 of 20,000 clients", yticks=[], xlim=(0, shown))
    top.legend(loc="lower right", fontsize=8)
    top.set_title(f"Rounds of {m}, at least {b} apart, at most {k} each", fontsize=10)
    for policy in POLICIES:
        filled, *_ = simulate(n, m, b, k, n_rounds, policy)
        smooth = np.convolve(filled, np.ones(ROUNDS_A_DAY) / ROUNDS_A_DAY, "valid")
        bottom.plot(np.arange(smooth.size) + ROUNDS_A_DAY, smooth, label=policy)
    bottom.set(xlabel="round", ylabel="filled, mean of a day", ylim=(0, 1.05), xlim=(0, n_rounds))
    bottom.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print one line a setting and policy, or draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="a million clients, 10,000 rounds")
    parser.add_argument("--picture", metavar="PATH", help="draw participation instead")
    arguments = parser.parse_args()
    if arguments.picture:
        picture(arguments.picture)
        return
    full = arguments.full
    n, n_rounds, m = (1_000_000, 10_000, 1_000) if full else (20_000, 1_500, 500)
    print("policy    load    b    k   mean   5 %   full   seconds  join s  MB")
    for load in (0.3,) if full else (0.3, 0.5, 0.7):
        b = int(load * n / m)
        most, tight = -(-n_rounds // b), int(1.25 * n_rounds * m * (1 - DROPOUT) / n)
        for k in (tight,) if full else sorted({most, min(tight, most)}):
            for policy in POLICIES[:1] if full else POLICIES:
                filled, joined, spent, _ = simulate(n, m, b, k, n_rounds, policy)
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(
                    f"{policy:8}  {load:4}  {b:3}  {k:3}  {filled.mean():5.3f}  "
                    f"{np.quantile(filled, 0.05):4.2f}  {(filled == 1).mean():5.3f}  "
                    f"{spent:7.1f}  {joined:6.1f}  {memory:4.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
