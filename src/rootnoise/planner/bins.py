"""Which strategies balls-in-bins sampling is tried with: the best ones by a forecast.

To calibrate one takes 1 to 20 s of CPU time; a forecast from few samples takes 0.01 s with 8 bins,
0.03 s with 100, 0.17 s with 500. So forecasts choose. Chance decides what is tried and nothing
else: what a row states is what `Mechanism.calibrate` finds.

The more bands, the more means overlap, and the less a bin hides: with 8 bins and 10 epochs, at
epsilon 1, the noise of a fixed cycle is multiplied by 0.43 for one band, 0.54 for two, 0.71 for
four and 0.96 for eight. So fewer bands are best than in fixed cycles.
"""

from __future__ import annotations

import math
from typing import Any

from rootnoise import accounting
from rootnoise.factorization import Factorization
from rootnoise.participation import BallsInBins, FixedCycle
from rootnoise.planner import objective as objectives
from rootnoise.planner.job import Job, priced

# With more bins, or numbers in all their means, a forecast takes a second and more: none is made.
MANY, LARGE = 1024, 2**22
# A plan that is not asked takes at most half a minute for up to so many.
UNASKED = 512
# Numbers of bands to look at.
BANDS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
# A forecast ends so close to epsilon, in at most so many steps.
CLOSE, STEPS = 0.01, 8

# So much more error no memory of up to 64 vectors is worth.
FAR = 0.03

Candidate = tuple[str, dict[str, Any]]


def pays(job: Job) -> bool:
    """Whether a plan looks at balls in bins by itself: in a single epoch, where they gain most.

    >>> pays(Job(n_examples=400, batch_size=100, epochs=4, epsilon=1, delta=1e-5))
    False
    >>> pays(Job(n_examples=400, batch_size=100, epochs=1, epsilon=1, delta=1e-5))
    True
    """
    return job.epochs == 1 and 2 <= job.period <= UNASKED


class Forecasts:
    """Forecast errors of strategies under balls in bins, and which one to calibrate."""

    def __init__(self, job: Job, objective: str = "all") -> None:
        self._job, self._objective = job, objective
        self._cycle = FixedCycle(job.period, job.epochs)
        self._alone = accounting.noise_multiplier(self._cycle, job.n_steps, job.epsilon, job.delta)
        # Error, memory, and the candidate; those far behind the best at their time are left out.
        self._near: list[tuple[float, int, Candidate]] = []
        self._far: set[str] = set()

    @property
    def best(self) -> float:
        """The least error so far."""
        return min((error for error, _, _ in self._near), default=math.inf)

    def look(self, candidate: Candidate, split: Factorization) -> float:
        """Return the forecast error, infinite where it is more than `FAR` above the best."""
        who = BallsInBins(self._job.period, self._job.epochs)
        unit = objectives.expected(split, who, self._objective) / self._job.batch_size
        error = unit * self._multiplier(who, split, (1 + FAR) * self.best / unit)
        if math.isfinite(error):
            self._near.append((error, split.memory_rows, candidate))
        else:
            self._far.add(candidate[0])
        return error

    @property
    def chosen(self) -> Candidate | None:
        """What `Plan.recommended` would take of them."""
        found = min(self._near, key=lambda found: priced(*found[:2]), default=None)
        return None if found is None else found[2]

    def passed(self) -> str:
        """Return which mechanisms are not among the chosen ones, and why; nothing if all are."""
        names = {name for _, _, (name, _) in self._near} | self._far
        names -= {self.chosen[0]} if self.chosen else set()
        why = "not calibrated, as forecasts from few samples have more error or memory"
        return f"{', '.join(sorted(names))} {why}" if names else ""

    def _multiplier(self, who: BallsInBins, split: Factorization, most: float) -> float:
        """Return a noise multiplier that spends about epsilon, infinity if it is above `most`."""
        job = self._job

        def excess(sigma: float) -> float:
            found = accounting.forecast(who, job.n_steps, sigma, job.delta, split.strategy)
            return math.log(min(max(found, 0.1 * job.epsilon), 10 * job.epsilon) / job.epsilon)

        sigma = min(self._alone, most)
        over = excess(sigma)
        if over > 0 and sigma < self._alone:
            return math.inf
        slope = 1.5  # epsilon falls about as fast as 1 / sigma to its square
        for _ in range(STEPS):
            last, sigma = sigma, min(self._alone, sigma * math.exp(over / slope))
            if abs(over) <= CLOSE or sigma == last:
                break
            before, over = over, excess(sigma)
            slope = min(4.0, max(0.5, (before - over) / math.log(sigma / last)))
        return sigma
