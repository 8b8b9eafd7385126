"""What a reorganisation must leave equal; `python tests/golden.py` writes golden.json anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import rootnoise as rn

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


def calibrated(name: str, n_steps: int, **options: Any) -> rn.Mechanism:
    participation = rn.FixedCycle(n_steps // 4, 4)
    split = rn.factorize(rn.SGD(n_steps, momentum=0.9), participation, name, **options)
    return rn.Mechanism.calibrate(split, participation, noise_multiplier=2.0, delta=1e-5)


def described(mechanism: rn.Mechanism) -> dict[str, Any]:
    """The file of a mechanism, its fingerprint, and what its strategy comes to."""
    return {
        "fields": mechanism.to_dict(),
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
        "fields": mechanism.to_dict(),
        "sizes": {str(size): drawn(mechanism, size) for size in SIZES},
    }


def stream_of(name: str) -> rn.Mechanism:
    return calibrated(name, N_STREAM, **STREAMS[name])


if __name__ == "__main__":
    golden = {
        "mechanisms": {name: described(calibrated(name, N_STEPS)) for name in rn.mechanisms()},
        "noise": {name: streamed(stream_of(name)) for name in STREAMS},
    }
    FILE.write_text(json.dumps(golden, indent=None) + "\n")
