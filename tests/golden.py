"""What a reorganisation must leave equal; `python tests/golden.py` writes golden.json anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rootnoise as rn
from rootnoise import causal, participation, workload
from rootnoise.causal.banded import Banded
from rootnoise.causal.buffered import BufferedToeplitz
from rootnoise.causal.momentum import Descent
from rootnoise.causal.tree import Tree

FILE = Path(__file__).with_suffix(".json")
N_STEPS = 16
STREAMS = {
    "bsr": {"bands": 8},
    "blt": {},
    "tree": {},
    "banded-inverse": {"bands": 4},
    "identity": {},
}
N_STREAM = 200
SIZES = (1, 7, 4099)
SHOWN = slice(None, None, 137)
VALUES: dict[str, list[Any]] = {
    "workload": [
        rn.SGD(4, momentum=0.9, decay=0.99),
        rn.ToeplitzWorkload([1.0, 0.3, 0.0]),
        rn.MatrixWorkload([[1.0, 0.0], [0.1, 0.7]]),
        rn.ScheduledSGD([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], 0.1, 1e-3, decay=0.9),
        rn.ScheduledSGD([0.1, 0.2, 0.0], 0.9, nesterov=True),
    ],
    "participation": [
        rn.SingleParticipation(),
        rn.MinSeparation(3, 2),
        rn.FixedCycle(3, 2),
        rn.BallsInBins(3, 2),
        rn.CyclicPoisson(3, 0.1),
        rn.MinSepPoisson(3, 0.1),
    ],
    "strategy": [
        causal.Toeplitz(np.array([1.0, 0.3, 0.0]), 4),
        causal.Diagonal(np.array([1.0, -0.3])),
        causal.Dense(np.array([[1.0, 0.0], [0.3, 0.7]])),
        causal.Inverse(causal.Toeplitz(np.array([1.0, 0.3]), 4)),
        causal.Product(Tree(2), causal.Inverse(causal.Diagonal(np.array([1.0, 3.0])))),
        Banded(np.array([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3]])),
        BufferedToeplitz(np.array([0.3, 0.9]), np.array([0.1, 0.2]), 4),
        Descent([0.1, 0.2, 0.0], 0.9, 1e-3, 0.99, nesterov=True),
        Descent([0.1, 0.2], [0.5, 0.6], decay=[0.9, 0.8]),
        Tree(5),
        Tree(5, "online"),
        Tree(5, "naive"),
    ],
}
WRITE: dict[str, Any] = {
    "workload": lambda value: value.to_dict(),
    "participation": participation.to_dict,
    "strategy": lambda value: value.to_dict(),
}
READ: dict[str, Any] = {
    "workload": workload.from_dict,
    "participation": participation.from_dict,
    "strategy": causal.from_dict,
}


def written(room: str, value: Any) -> str:
    """The text that enters files and fingerprints, the order of its fields included."""
    return json.dumps(WRITE[room](value))


def processor() -> str:
    """What decides on the last bit of logarithms and sums: the same bits are for the same one.

    Of two AMD processors with AVX512, BLAS multiplied vectors of one number otherwise.
    """
    found = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    kinds = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    names = ("vendor_id", "cpu family", "model")
    kinds = {name.strip(): kind.strip() for name, kind in kinds.items()}
    return ", ".join([found, *(f"{name} {kinds[name]}" for name in names if name in kinds)])


def bits(mechanism: rn.Mechanism, size: int) -> str:
    """A hash of every bit of the noise of all steps."""
    stream = rn.NoiseStream(mechanism, size, rn.Key.from_seed(0))
    digest = hashlib.sha256()
    for _ in range(mechanism.n_steps):
        digest.update(stream.next().cpu().numpy().tobytes())
    return digest.hexdigest()


def calibrated(name: str, n_steps: int, **options: Any) -> rn.Mechanism:
    participation = rn.FixedCycle(n_steps // 4, 4)
    split = rn.factorize(rn.SGD(n_steps, momentum=0.9), participation, name, **options)
    return rn.Mechanism.calibrate(split, participation, noise_multiplier=2.0, delta=1e-5)


def described(mechanism: rn.Mechanism) -> dict[str, Any]:
    """The file of a mechanism, its fingerprint, and what its strategy comes to."""
    return {
        "fields": mechanism.certify().to_dict(),
        "fingerprint": mechanism.fingerprint,
        "strategy": mechanism.strategy.dense().tolist(),
        "noise_std": mechanism.noise_std,
        "rmse": mechanism.rmse,
    }


def drawn(mechanism: rn.Mechanism, size: int) -> dict[str, Any]:
    """A few values of every twentieth step, and the sum of squares of each."""
    stream = rn.NoiseStream(mechanism, size, rn.Key.from_seed(0))
    steps = np.array([stream.next().double().cpu().numpy() for _ in range(mechanism.n_steps)])
    return {
        "values": steps[::20, SHOWN].tolist(),
        "squares": (steps**2).sum(axis=1).tolist(),
    }


def streamed(mechanism: rn.Mechanism) -> dict[str, Any]:
    return {
        "fields": mechanism.certify().to_dict(),
        "sizes": {str(size): drawn(mechanism, size) for size in SIZES},
    }


def stream_of(name: str) -> rn.Mechanism:
    return calibrated(name, N_STREAM, **STREAMS[name])


def noise_bits() -> dict[str, Any]:
    streams = {name: stream_of(name) for name in STREAMS}
    hashes = {
        name: {str(size): bits(mechanism, size) for size in SIZES}
        for name, mechanism in streams.items()
    }
    return {"processor": processor(), "sha256": hashes}


if __name__ == "__main__":
    golden = {
        "mechanisms": {name: described(calibrated(name, N_STEPS)) for name in rn.mechanisms()},
        "noise": {name: streamed(stream_of(name)) for name in STREAMS},
        "texts": {room: [written(room, v) for v in values] for room, values in VALUES.items()},
        "bits": noise_bits(),
    }
    FILE.write_text(json.dumps(golden, indent=None) + "\n")
