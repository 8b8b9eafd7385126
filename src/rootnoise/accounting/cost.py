"""What an accountant answers, and how a Monte Carlo one may be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rootnoise._check import integer, real, set_fields

# Called with what is being tried: a noise multiplier, and the epsilon found for it.
Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class MonteCarlo:
    """How the accountant samples, where no closed form or privacy loss distribution is known.

    Attributes:
        samples: how many of the likelihood ratio of adding a person; of removing one, at most.
        seed: fixes them. Choose it without looking at the epsilon that it gives.
        failure: probability, over the seed, that the epsilon reported is below the true one.

    Raises:
        RootnoiseError: fewer than 1000 samples, a negative seed, or failure outside (0, 0.5].
    """

    samples: int = 250_000
    seed: int = 0
    failure: float = 1e-6

    def __post_init__(self) -> None:
        set_fields(
            self,
            samples=integer("samples", self.samples, 1000),
            seed=integer("seed", self.seed, 0),
            failure=real("failure", self.failure, above=0, at_most=0.5),
        )


@dataclass(frozen=True)
class PrivacyCost:
    """The privacy of a whole run at one delta.

    Attributes:
        epsilon: the privacy loss.
        delta: its failure probability.
        exact: False where epsilon is an upper bound.
        method: how it was computed.
        mu: the run is exactly mu-Gaussian-differentially private; None where it is amplified.
        rho: the run is rho-zero-concentrated-differentially private; None where it is amplified.
        monte_carlo: what an upper confidence bound rests on; None where epsilon is certain.
        lower_bound: no accounting of this run can state less: somebody's data reach it. Epsilon
            itself where that is exact, None where none is known. It is not what is claimed.
    """

    epsilon: float
    delta: float
    exact: bool
    method: str
    mu: float | None = None
    rho: float | None = None
    monte_carlo: MonteCarlo | None = None
    lower_bound: float | None = None
