"""How long a factorization with its sensitivity and error takes, in FFTs of the same length.

Each time is the median of 5 runs, divided by the median time, in the same process, of one real
FFT of length 2n: the unit in which the O(n log n) routes are naturally counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
from scipy import fft

from rootnoise import SGD, FixedCycle, factorize


def seconds(call: Callable[[], object], runs: int = 5) -> float:
    """Return the median wall time of a call."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def rmse(n: int, who: FixedCycle, mechanism: str, bands: int | None) -> float:
    """Build the workload, split it, and evaluate the split."""
    return factorize(SGD(n, 0.9), who, mechanism, bands=bands).rmse(who)


def main() -> None:
    """Print one line a length and mechanism."""
    print(f"{'steps':>9} {'mechanism':>12} {'bands':>9} {'ms':>9} {'FFTs':>7}")
    for n in (10**4, 10**5, 10**6):
        signal = np.random.default_rng(0).normal(size=2 * n)
        unit = seconds(partial(fft.rfft, signal))
        who = FixedCycle(n // 10, 10)
        cases = [("identity", None), ("bsr", 16), ("bsr", 1024), ("bsr", n // 10)]
        for mechanism, bands in [*cases, ("square-root", None)]:
            took = seconds(partial(rmse, n, who, mechanism, bands))
            p = bands or (n if mechanism == "square-root" else 1)
            print(f"{n:>9} {mechanism:>12} {p:>9} {1e3 * took:>9.2f} {took / unit:>7.1f}")


if __name__ == "__main__":
    main()
