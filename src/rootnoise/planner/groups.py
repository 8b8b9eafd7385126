"""How many groups cyclic Poisson sampling should have, together with the bands that they allow.

The error of g groups is sigma(g) rmse(g). More groups draw each record with a higher probability,
and need more noise; they allow more bands, and these a smaller rmse. So the error falls and then
rises, but for the rounds, ceil(n / g) of them: where g does not divide n, everybody may take part
once more, and the error has a local minimum at almost every g = ceil(n / rounds). It is not
unimodal: at 480 steps, epsilon 1, there are 19 minima. Those near the best are within 1 % of each
other (4 jobs of 392 to 1,200 steps).

So powers of two find the region, with the closed form of BSR and a coarse calibration, and all
g = ceil(n / rounds) of the region are compared. What optimised bands gain over BSR changes slowly
with g, and is interpolated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from rootnoise import accounting
from rootnoise.factorization import factorize
from rootnoise.participation import CyclicPoisson
from rootnoise.planner import objective as objectives
from rootnoise.planner.job import Job
from rootnoise.workload import Workload

# Fraction of epsilon that a calibration may waste in a search: tens of ms at 100,000 steps.
TOLERANCE = 0.01
# Groups to compare in the region, at most: about 50 ms each.
MOST = 24
# Powers of two below the best one whose errors are looked at: few groups take long to calibrate.
BELOW = 3


def powers(job: Job) -> list[CyclicPoisson]:
    """Return cyclic Poisson sampling of 1, 2, 4, ... groups, as long as it amplifies and fits."""
    return [cyclic(job, 2**i) for i in range(most(job).bit_length())]


def most(job: Job) -> int:
    """Return the most groups that amplify and fit the memory, 0 if none do."""
    found = min(-(-job.n_examples // job.batch_size) - 1, job.n_steps)
    return found if job.memory_rows is None else min(found, job.memory_rows + 1)


def region(workload: Workload, job: Job, objective: str = "all") -> tuple[int, ...]:
    """Return the powers of two around the one of least error, from a quarter of it to its double.

    Larger ones are quicker, so they come first; the search ends when `BELOW` in a row are worse.
    """
    numbers = [who.groups for who in powers(job)]
    best, least, worse = 0, np.inf, 0
    error = errors(workload, job, objective)
    for i in range(len(numbers) - 1, -1, -1):
        found = error(numbers[i])
        if found < least:
            best, least, worse = i, found, 0
        else:
            worse += 1
        if worse == BELOW:
            break
    return tuple(numbers[max(0, best - 2) : best + 2])


def errors(workload: Workload, job: Job, objective: str = "all") -> Callable[[int], float]:
    """Return the error of BSR, by one of `OBJECTIVES`, as a function of the number of groups."""

    @cache
    def error(groups: int) -> float:
        who = cyclic(job, groups)
        n = job.n_steps
        sigma = accounting.noise_multiplier(who, n, job.epsilon, job.delta, TOLERANCE)
        split = factorize(workload, who, "bsr", bands=groups)
        return sigma * objectives.expected(split, who, objective)

    return error


def cyclic(job: Job, groups: int) -> CyclicPoisson:
    """Return cyclic Poisson sampling with batches of the job's size on average."""
    return CyclicPoisson(groups, groups * job.batch_size / job.n_examples)


def best(workload: Workload, job: Job, gains: dict[int, float], objective: str = "all") -> int:
    """Return the number of groups of least error in a region.

    Args:
        workload: what is computed.
        job: for which data, batches and privacy.
        gains: error of the best factorization over that of BSR, at the region's powers of two.
        objective: one of `OBJECTIVES`.
    """
    known = np.log(np.array(sorted(gains)))
    logs = np.log([gains[g] for g in sorted(gains)])
    error = errors(workload, job, objective)

    def predicted(groups: int) -> float:
        return error(groups) * float(np.exp(np.interp(np.log(groups), known, logs)))

    low, high = min(gains), max(gains)
    if 2 * high > most(job):  # the next power does not fit, but numbers on the way to it do
        high = most(job)
    return min(tight(job.n_steps, low, high), key=predicted)


def tight(n_steps: int, low: int, high: int) -> list[int]:
    """Return the least numbers of groups of each number of rounds, and the ends; `MOST` of them.

    >>> tight(28, 4, 10)
    [4, 5, 6, 7, 10]
    """
    rounds = range(-(-n_steps // high), -(-n_steps // low) + 1)
    found = sorted({low, high, *(g for r in rounds if low < (g := -(-n_steps // r)) < high)})
    if len(found) > MOST:
        places = np.unique(np.rint(np.linspace(0, len(found) - 1, MOST)).astype(int))
        found = [found[i] for i in places]
    return found
