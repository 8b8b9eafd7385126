"""A small federated run, and the processes of its kills; a child can import it, a test cannot."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from processes import kill_at_line, kill_at_state, kill_inside_write
from rootnoise.factorization import factorize
from rootnoise.federated import PrivateAggregator
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import MinSeparation
from rootnoise.workload import SGD

ROUNDS, COHORT = 8, 3
WEIGHTS = {"a": torch.zeros(4, 3), "b": torch.zeros(5), "steps": torch.tensor(7)}
FILES = tuple(f"federated/{name}.py" for name in ("clients", "server", "store"))
FILES += ("_files.py", "participation/ledger_file.py", "noise/stream.py", "keys.py")


def mechanism(
    n: int = ROUNDS, b: int = 3, k: int = 2, beta: float = 0.9, alpha: float = 1.0
) -> Mechanism:
    who = MinSeparation(b, k)
    bsr = factorize(SGD(n, momentum=beta, decay=alpha), who, "bsr")
    return Mechanism.calibrate(bsr, who, epsilon=4.0, delta=1e-5, clip_norm=0.5)


def server(folder: Path, **settings: Any) -> PrivateAggregator:
    return PrivateAggregator(
        folder, mechanism(), WEIGHTS, cohort_size=COHORT, key=Key.from_seed(5), **settings
    )


def update(t: int, client: object, life: int = 0) -> dict[str, torch.Tensor]:
    """What a client answers: another answer in another life of the server, if asked for."""
    seed = int.from_bytes(hashlib.sha256(f"{t} {client} {life}".encode()).digest()[:4], "little")
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(WEIGHTS[name].shape, generator=rng) for name in ("a", "b")}


def there(t: int) -> list[str]:
    """Who is there for round t; new ones come every round."""
    rng = np.random.default_rng(t)
    return [f"phone {i}" for i in range(14 + t) if rng.random() < 0.9]


def vector(size: int = 2000, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def closed(aggregator: PrivateAggregator) -> dict[str, torch.Tensor]:
    """Close the open round, which is not skipped."""
    weights = aggregator.close()
    assert weights is not None
    return weights


def run(folder: Path, log: Path, life: int = 0) -> None:
    """Go on to the end; each release is shown to the world, which is a file, as a hash."""
    aggregator = server(folder)
    while aggregator.t < ROUNDS:
        opened = aggregator.open(there(aggregator.t))
        assert opened is not None
        show(log, opened.t, opened.weights)
        for client in opened.cohort:
            aggregator.receive(opened.t, client, update(opened.t, client, life))
        weights = aggregator.close()
        assert weights is not None
        show(log, aggregator.t, weights)
    show(log, aggregator.t, aggregator.weights)  # the life before may have died in the last round
    aggregator.leave()


def show(log: Path, t: int, weights: dict[str, torch.Tensor]) -> None:
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()
    with log.open("a") as file:
        file.write(f"{t} {digest}\n")


def killed_at_line(folder: Path, log: Path, fuse: int, life: int) -> None:
    kill_at_line(fuse, FILES)
    run(folder, log, life)


def killed_at_state(folder: Path, log: Path, fuse: int, life: int) -> None:
    kill_at_state(fuse, folder, FILES)
    run(folder, log, life)


def killed_inside_write(folder: Path, log: Path, fuse: int, life: int) -> None:
    kill_inside_write(fuse)
    run(folder, log, life)
