"""How fast this machine makes noise: two numbers for a model of the time of a step."""

from __future__ import annotations

import time

from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise.stream import NoiseStream
from rootnoise.participation import SingleParticipation
from rootnoise.workload import prefix_sum

# Values a step, steps of a block, and how often one is made.
SIZE, STEPS, REPEATS = 2**18, 64, 3
# So wide that multiplying takes several times as long as drawing.
BANDS = 129


def measured(size: int = SIZE) -> tuple[float, float]:
    """Return seconds to draw a value, and for each row it is then a sum of; one thread of the CPU.

    Independent noise gives the first, a banded strategy the second, both in blocks of as many
    steps. It takes about a second; a loaded machine is slower.

    Args:
        size: values a step.
    """
    draw = _seconds(1, size)
    rows = BANDS - 1 + STEPS  # [state; z]
    return draw, max(0.0, _seconds(BANDS, size) - draw) / rows


def _seconds(bands: int, size: int) -> float:
    """Return seconds a value, the least of a few blocks."""
    who, work = SingleParticipation(), prefix_sum(STEPS * REPEATS)
    split = factorize(work, who, "bsr", bands=bands)
    made = Mechanism.calibrate(split, who, noise_multiplier=1.0, delta=1e-5)
    stream = NoiseStream(made, size, Key.fresh(), threads=1, block_steps=STEPS)
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(STEPS):
            stream.next()
        found.append((time.perf_counter() - start) / (STEPS * size))
    return min(found)
