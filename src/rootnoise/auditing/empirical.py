"""Empirical audits: lower bounds on epsilon from attacks on the real optimizer.

A bound above the claim refutes it, with the stated probability of being wrong. One below it proves
nothing: it only shows how much of the claim the attack could see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rootnoise.auditing import bounds, recompute
from rootnoise.auditing.attack import Attack, Trials
from rootnoise.mechanism import Mechanism
from rootnoise.participation import BallsInBins, CyclicPoisson

# Where a trade-off is held against the curve of a mechanism.
EPSILONS = np.concatenate([np.linspace(0.0, 2.0, 41), np.linspace(2.25, 20.0, 72)])


@dataclass(frozen=True)
class Verdict:
    """What an attack proves.

    Attributes:
        audit: which one.
        lower_bound: epsilon is larger, with probability at least 1 - failure.
        claimed: the epsilon that was claimed, at `delta`.
        delta: of both.
        failure: probability that a true claim gives a larger bound.
        canaries: people the bound rests on.
        detail: what was counted.
    """

    audit: str
    lower_bound: float
    claimed: float
    delta: float
    failure: float
    canaries: int
    detail: str

    @property
    def refuted(self) -> bool:
        """Whether the claim cannot be true."""
        return self.lower_bound > self.claimed


def distinguish(attack: Attack, failure: float = 0.01) -> Verdict:
    """Tell canaries that are in from those that are out, by a threshold on the likelihood ratio.

    One run chooses the threshold, a second one counts the errors. Their upper confidence bounds
    (Clopper & Pearson) are held against the trade-off of the claim's own family, at the largest
    noise multiplier that allows them (for Gaussian mechanisms that of Nasr et al. 2023, "Tight
    auditing of differentially private machine learning"), or, for balls in bins, against
    (epsilon, delta) alone.

    Args:
        attack: on the claim, with two runs to be made.
        failure: probability that a true claim is refuted.
    """
    classic = isinstance(attack.claimed.participation, BallsInBins)
    threshold = _threshold(attack.trials(0), failure, attack.claimed.delta if classic else None)
    trials = attack.trials(1)
    errors = _Errors.of(trials, threshold)
    bound = _family_epsilon(attack.claimed, *errors.at_most(failure))
    wrong = f"{errors.wrong_in} of {errors.out} out, {errors.wrong_out} of {errors.within} in"
    return _verdict("distinguishing", attack, bound, failure, f"wrong about {wrong}")


def one_run(attack: Attack, failure: float = 0.01) -> Verdict:
    """Guess the canaries of one run (Steinke, Nasr & Jagielski 2023), and bound epsilon by theirs.

    The r most telling scores are guessed, half of them in and half out; r is chosen before, by
    simulating the claim. No family is assumed, and so the bound is far below a true epsilon.

    Args:
        attack: on the claim, with one run to be made.
        failure: probability that a true claim is refuted.
    """
    guesses = planned_guesses(attack.claimed, attack.canaries, failure)
    right = _right(attack.trials(2), guesses)
    delta = attack.claimed.delta
    bound = bounds.one_run_epsilon(attack.canaries, guesses, right, delta, failure)
    return _verdict("one run", attack, bound, failure, f"{right} of {guesses} guesses right")


def _verdict(audit: str, attack: Attack, bound: float, failure: float, detail: str) -> Verdict:
    cost = attack.claimed.privacy
    return Verdict(audit, bound, cost.epsilon, cost.delta, failure, attack.canaries, detail)


@dataclass(frozen=True)
class _Errors:
    """How often a threshold was wrong about canaries that were out, and in."""

    wrong_in: int
    out: int
    wrong_out: int
    within: int

    @classmethod
    def of(cls, trials: Trials, threshold: float) -> _Errors:
        guess, out = trials.scores > threshold, ~trials.member
        wrong = int((guess & out).sum()), int((~guess & ~out).sum())
        return cls(wrong[0], int(out.sum()), wrong[1], int((~out).sum()))

    def at_most(self, failure: float) -> tuple[float, float]:
        """Return upper bounds on both error probabilities, wrong together with `failure`."""
        return (
            bounds.clopper_pearson(self.wrong_in, self.out, failure / 2),
            bounds.clopper_pearson(self.wrong_out, self.within, failure / 2),
        )


def planned_guesses(claimed: Mechanism, canaries: int, failure: float) -> int:
    """Return how many guesses promise the largest bound, for scores of the claimed noise."""
    rng = np.random.default_rng(0)
    member = rng.random(canaries) < 0.5
    mu = 1 / claimed.noise_multiplier
    p = claimed.participation
    seen = member
    if isinstance(p, CyclicPoisson):  # roughly: who was never drawn cannot be seen
        seen = member & (rng.random(canaries) > (1 - p.probability) ** p.rounds(claimed.n_steps))
    scores = rng.standard_normal(canaries) + mu * seen
    options = sorted({max(2, canaries // 2**i) for i in range(8)})
    found = [
        bounds.one_run_epsilon(
            canaries, r, _right(Trials(scores, member), r), claimed.delta, failure
        )
        for r in options
    ]
    return int(options[int(np.argmax(found))])


def _right(trials: Trials, guesses: int) -> int:
    """Return how many of the highest and lowest scores tell rightly who was in and out."""
    order = np.argsort(trials.scores)
    low = guesses // 2
    out, within = order[:low], order[order.size - (guesses - low) :]
    return int((~trials.member[out]).sum()) + int(trials.member[within].sum())


def _threshold(trials: Trials, failure: float, delta: float | None) -> float:
    """Return the threshold that would prove most, by its own run: mu, or epsilon at `delta`."""
    levels = np.quantile(trials.scores, np.linspace(0.02, 0.98, 97))
    errors = [_Errors.of(trials, level).at_most(failure) for level in levels]
    proved = [
        bounds.gaussian_mu(*both) if delta is None else bounds.classic_epsilon(*both, delta)
        for both in errors
    ]
    return float(levels[int(np.argmax(proved))])


def _family_epsilon(claimed: Mechanism, false_in: float, false_out: float) -> float:
    """Return the claim's epsilon at the largest noise multiplier that allows these errors."""
    p = claimed.participation
    if isinstance(p, BallsInBins):
        return bounds.classic_epsilon(false_in, false_out, claimed.delta)
    if not isinstance(p, CyclicPoisson):
        mu = bounds.gaussian_mu(false_in, false_out)
        return _epsilon(claimed, 1 / mu) if mu > 0 else 0.0

    def refuted(sigma: float) -> bool:
        allowed = recompute.poisson_deltas(p, claimed.n_steps, sigma, EPSILONS)
        errors = ((false_in, false_out), (false_out, false_in))
        return any(bool(np.any(1 - b > np.exp(EPSILONS) * a + allowed)) for a, b in errors)

    low, high = claimed.noise_multiplier / 8, claimed.noise_multiplier * 8
    if not refuted(high):
        return 0.0
    while high > 1.005 * low:  # more noise is refuted, less is not
        middle = (low * high) ** 0.5
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return _epsilon(claimed, high)


def _epsilon(claimed: Mechanism, sigma: float) -> float:
    return replace(claimed, noise_multiplier=sigma).epsilon
