"""Limits: what is refused before work begins, as no use or this machine's memory allows it."""

from __future__ import annotations

import os
from pathlib import Path

from rootnoise._check import RootnoiseError, integer, real

# Beyond, an answer takes minutes: 0.8 us and 200 bytes a step for a Toeplitz workload.
MOST_STEPS = 10_000_000
# A matrix without structure takes O(n^3): at so many steps a minute for its root, and three for the
# lower bound (64 times the 1 s and 3 s of 2048 steps).
MOST_DENSE = 8192
# A smaller epsilon is noise alone, a larger one no privacy.
LEAST_EPSILON, MOST_EPSILON = 1e-6, 1e5


def epsilon(value: float) -> float:
    """Return an epsilon that can be calibrated to, or refuse it."""
    positive = real("epsilon", value, above=0)
    return real("epsilon", positive, at_least=LEAST_EPSILON, at_most=MOST_EPSILON)


def steps(value: int) -> int:
    """Return a number of steps that is worked out in seconds, or refuse it.

    >>> steps(10**8)
    Traceback (most recent call last):
    rootnoise._check.RootnoiseError: n_steps must be in [1, 10000000], got 100000000
    """
    return integer("n_steps", value, 1, MOST_STEPS)


def dense(value: int) -> int:
    """Return a number of steps that a matrix without structure may have, or refuse it.

    >>> dense(10**5)
    Traceback (most recent call last):
    rootnoise._check.RootnoiseError: n_steps must be in [1, 8192] for a matrix that ..., got 100000
    """
    if value > MOST_DENSE:
        raise RootnoiseError(
            f"n_steps must be in [1, {MOST_DENSE}] for a matrix that is not Toeplitz (minutes; a "
            f"file of coefficients, or --schedule, may have more), got {value}"
        )
    memory(f"a matrix of {value} steps", 56.0 * value**2, "a shorter run")  # measured
    return value


def memory(what: str, needed: float, cure: str) -> None:
    """Refuse what needs more bytes than are free; nothing is refused where that is not known."""
    free = _free()
    if free is not None and needed > free:
        raise RootnoiseError(
            f"memory must hold {what}, {needed / 1e9:.3g} GB ({cure} needs less), "
            f"got {free / 1e9:.3g} GB free"
        )


def _free() -> float | None:
    """Return the bytes that can be taken without swapping, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(float(s.split()[1]) for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return None
