"""`rootnoise account`: convert (epsilon, delta) to a noise multiplier, and back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from rootnoise._check import RootnoiseError, integer
from rootnoise.cli import _options, _progress
from rootnoise.cli._report import show

if TYPE_CHECKING:
    from rootnoise.accounting import Trials
    from rootnoise.causal import CausalMatrix
    from rootnoise.participation import Participation


@dataclass(frozen=True)
class Goal:
    """The given quantity: exactly one of these."""

    panel: ClassVar[str] = "Exactly one of"

    epsilon: Annotated[
        float | None, typer.Option(help="Privacy loss to spend; prints the noise multiplier.")
    ] = None
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise multiplier sigma; prints the epsilon.")
    ] = None
    rho: Annotated[
        float | None, typer.Option(help="Zero-concentrated privacy loss; not with random steps.")
    ] = None
    mu: Annotated[
        float | None, typer.Option(help="Gaussian privacy loss; not with random steps.")
    ] = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            said = ", ".join(f"{n.replace('_', '-')}={v}" for n, v in given.items()) or "none"
            raise RootnoiseError(
                f"give exactly one of --epsilon, --noise-multiplier, --rho and --mu, got {said}"
            )


@dataclass(frozen=True)
class Sampling:
    """How a person's steps are drawn at random, and the strategy if it matters."""

    panel: ClassVar[str] = "Random steps"

    sampling_probability: Annotated[
        float | None,
        typer.Option(help="Poisson sampling with this probability q (DP-SGD); needs --steps."),
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Steps n; without random ones they do not matter.")
    ] = None
    groups: Annotated[int, typer.Option(help="Groups of cyclic Poisson sampling; 1 is DP-SGD.")] = 1
    min_sep: Annotated[
        int | None,
        typer.Option(
            help="b-min-sep Poisson: after b - 1 steps off, join with --sampling-probability."
        ),
    ] = None
    bins: Annotated[
        int | None,
        typer.Option(help="Balls in bins: each record in one of this many bins, every cycle."),
    ] = None
    mechanism_file: Annotated[
        Path | None,
        typer.Option(
            help="mechanism.json whose strategy and trials are used, and its participation if none "
            "is given [default: independent noise]."
        ),
    ] = None
    samples: Annotated[int | None, typer.Option(help="Monte Carlo samples [default: 250000].")] = (
        None
    )
    mc_seed: Annotated[int, typer.Option(help="Seed of the Monte Carlo samples.")] = 0

    def value(self) -> tuple[Participation, int, CausalMatrix | None, Trials | None]:
        """Return participation and steps, and the strategy and trials of the file if there are."""
        import numpy as np

        from rootnoise.causal import Toeplitz

        strategy, own, trials = self._file()
        n = self.steps if strategy is None else strategy.n_steps
        if self.steps is not None and n != self.steps:
            raise RootnoiseError(f"steps must be the file's {n} or left out, got {self.steps}")
        who = self._participation(n)
        if who is None:
            return own, 1 if n is None else n, strategy, trials
        assert n is not None  # noqa: S101 - a random participation has steps
        return who, n, strategy or Toeplitz(np.ones(1), n), trials

    def _file(self) -> tuple[CausalMatrix | None, Participation, Trials | None]:
        from rootnoise.participation import SingleParticipation

        if self.mechanism_file is None:
            return None, SingleParticipation(), None
        mechanism = _options.saved(self.mechanism_file)
        return mechanism.strategy, mechanism.participation, mechanism.trials

    def _participation(self, n: int | None) -> Participation | None:
        from rootnoise.participation import BallsInBins, CyclicPoisson, MinSepPoisson

        q, b = self.sampling_probability, self.min_sep
        if q is None and self.bins is None:
            for name, value in (("groups", self.groups), ("min-sep", b or 1)):
                if value != 1:
                    rule = "1 without --sampling-probability"
                    raise RootnoiseError(f"{name} must be {rule}, got {value}")
            return None
        name = "bins" if q is None else "sampling-probability"
        if n is None:
            raise RootnoiseError(f"steps must be given with --{name}, got none")
        integer("steps", n, 1)
        if (self.bins is not None) + (q is not None) + (b is not None and q is None) > 1:
            raise RootnoiseError(f"bins must be left out with other sampling, got {self.bins}")
        if q is None:
            period = integer("bins", self.bins or 0, 1, n, high_name="steps")
            return BallsInBins(period, -(-n // period))
        if b is None:
            return CyclicPoisson(self.groups, q)
        if self.groups != 1:
            raise RootnoiseError(f"groups must be 1 with --min-sep, got {self.groups}")
        return MinSepPoisson(b, q)


@_options.grouped
def account(
    *,
    delta: Annotated[float, typer.Option(help="Failure probability, in (0, 1).")],
    goal: Goal,
    sampling: Sampling,
    best: _options.Tried,
    json: _options.Json = False,
) -> None:
    """Convert between epsilon and the noise multiplier, or rho, or mu.

    Without random steps the whole run is one Gaussian mechanism, for every factorization and
    participation: they differ only in the sensitivity, which scales the noise. With Poisson
    sampling the steps are composed, and epsilon is an upper bound. With balls in bins and b-min-sep
    Poisson it is for the strategy in --mechanism-file: a certain upper bound, or an upper
    confidence bound by Monte Carlo, as the method says. With --trials, or for the mechanism of a
    tuning, it is for the release of the best trial.
    """
    from rootnoise import accounting

    up = accounting.round_up
    who, n, strategy, trials = sampling.value()
    given = best.value()
    if trials not in (None, given) and given is not None:
        raise RootnoiseError(f"trials must be the file's, {trials}, or left out, got {given}")
    trials = trials or given
    samples = accounting.MonteCarlo.samples if sampling.samples is None else sampling.samples
    settings = accounting.MonteCarlo(samples, sampling.mc_seed)
    sigma = goal.noise_multiplier
    if trials is not None and (goal.rho, goal.mu) != (None, None):
        raise RootnoiseError("rho and mu must be left out with trials, which have neither")
    if goal.epsilon is not None and trials is not None:
        sigma = accounting.tuned_noise_multiplier(who, n, goal.epsilon, delta, trials)
    elif goal.epsilon is not None:
        with _progress.search("noise multiplier", quiet=json) as update:
            tried = count(1)
            sigma = accounting.noise_multiplier(
                who,
                n,
                goal.epsilon,
                delta,
                strategy=strategy,
                monte_carlo=settings,
                progress=lambda s, e: update(next(tried), f"{up(s)} costs epsilon {up(e)}"),
            )
    elif sigma is None:
        sigma = accounting.noise_multiplier_for(who, mu=goal.mu, rho=goal.rho)
    with _progress.busy("epsilon", quiet=json):
        if trials is not None:
            cost = accounting.tuned_privacy_cost(who, n, sigma, delta, trials)
        else:
            cost = accounting.privacy_cost(
                who, n, sigma, delta, strategy=strategy, monte_carlo=settings
            )
    bound = "exact" if cost.exact else "an upper bound"
    relation = (
        "added or removed (its slot of the public number of records stays, empty or filled)"
        if who.amplified
        else "zeroed out (everybody else's steps unchanged)"
    )
    # If the cost is 0 (total variation below delta) the epsilon that was asked for is shown.
    epsilon = up(cost.epsilon or goal.epsilon or 0.0)
    # A given noise multiplier is shown exactly; a computed one is rounded up.
    noise = accounting.exactly(sigma) if goal.noise_multiplier is not None else up(sigma, 9)
    tuned = "" if trials is None else ", of the best of several trials and nothing else"
    claim = (
        f"({epsilon}, {accounting.exactly(delta)})-differential privacy for one record "
        f"{relation}{tuned}; noise multiplier {noise} times clip norm times "
        f"sensitivity; epsilon is {bound} ({cost.method})."
    )
    values = {
        "epsilon": cost.epsilon,
        "delta": delta,
        "noise_multiplier": sigma,
        "rho": cost.rho,
        "mu": cost.mu,
        "epsilon_exact": cost.exact,
        "epsilon_lower_bound": cost.lower_bound,
        "method": cost.method,
        "claim": claim,
    }
    if not json:
        values |= {"epsilon": epsilon, "noise_multiplier": noise}
        if cost.lower_bound is not None:  # of any accounting: shown on its own safe side
            values["epsilon_lower_bound"] = accounting.round_down(cost.lower_bound, 6)
        values |= {
            name: value and up(value) for name, value in (("rho", cost.rho), ("mu", cost.mu))
        }
    show("privacy account", values, json)
