"""WHO may take part WHEN: frozen values that sampler, sensitivity and accountant all read.

A "person" is one record of the data set. Each value bounds the steps at which one person's
gradient may enter, and refuses (`validate`) the step counts that it cannot cover. Where steps are
drawn at random, and kept secret, privacy is `amplified`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rootnoise._check import RootnoiseError, integer, real, set_fields
from rootnoise._files import Kinds


@dataclass(frozen=True)
class SingleParticipation:
    """Every person takes part in at most one step: one pass over the data."""

    type: ClassVar[str] = "single"
    amplified: ClassVar[bool] = False

    def validate(self, n_steps: int) -> None:
        """Accept any number of steps."""

    def __str__(self) -> str:
        return "at most one step each"


@dataclass(frozen=True)
class MinSeparation:
    """Every person's steps are at least `min_sep` (b) apart, and at most `max_participations` (k).

    Raises:
        RootnoiseError: b or k below 1.
    """

    min_sep: int
    max_participations: int
    type: ClassVar[str] = "min-sep"
    amplified: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _set_counts(self, "min_sep", "max_participations")

    def validate(self, n_steps: int) -> None:
        """Refuse more participations than `n_steps` can hold: (k - 1) b < n."""
        n, b, k = n_steps, self.min_sep, self.max_participations
        if (k - 1) * b >= n:
            raise RootnoiseError(
                f"max_participations must be in [1, ceil(n_steps/min_sep)={-(-n // b)}], got {k} "
                f"(n_steps={n}, min_sep={b})"
            )

    def __str__(self) -> str:
        return f"at most {self.max_participations} steps each, at least {self.min_sep} apart"


@dataclass(frozen=True)
class FixedCycle:
    """Every person takes part at steps i, i + period, i + 2 period, ...: once in each of `epochs`.

    Raises:
        RootnoiseError: period or epochs below 1.
    """

    period: int
    epochs: int
    type: ClassVar[str] = "fixed-cycle"
    amplified: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _set_counts(self, "period", "epochs")

    @property
    def min_sep(self) -> int:
        """The separation b of one person's steps: the period."""
        return self.period

    @property
    def max_participations(self) -> int:
        """The largest number k of one person's steps: the epochs."""
        return self.epochs

    def validate(self, n_steps: int) -> None:
        """Refuse step counts that do not end inside the last epoch."""
        low, high = (self.epochs - 1) * self.period + 1, self.epochs * self.period
        if not low <= n_steps <= high:
            raise RootnoiseError(
                f"n_steps must be in [{low}, period*epochs={high}] for {self.epochs} epochs of "
                f"{self.period} steps, got {n_steps}"
            )

    def __str__(self) -> str:
        if self.epochs == 1:
            return "one step of the one epoch"
        return f"one step in each of {self.epochs} epochs, exactly {self.period} apart"


@dataclass(frozen=True)
class BallsInBins(FixedCycle):
    """A fixed cycle in which each person's first step is drawn: uniform on the first `period` ones.

    Choquette-Choo et al. (2024): every person falls into one of `period` bins, independently of all
    others, and takes part whenever the bin has its turn. Sensitivity and error are those of the
    fixed cycle; the accountant knows that the bin is random, and that it is secret.

    Raises:
        RootnoiseError: period or epochs below 1.
    """

    type: ClassVar[str] = "balls-in-bins"
    amplified: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{super().__str__()}, from a first step drawn at random"


@dataclass(frozen=True)
class CyclicPoisson:
    """Step t draws each person of group t mod `groups` independently with `probability`.

    One group is the Poisson sampling of DP-SGD (Abadi et al. 2016); several are the cyclic
    sampling of Choquette-Choo et al. (2023), which needs a strategy with at most `groups` bands.

    Raises:
        RootnoiseError: groups below 1, or a probability outside (0, 1].
    """

    groups: int
    probability: float
    type: ClassVar[str] = "cyclic-poisson"
    amplified: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set_counts(self, "groups")
        set_fields(self, probability=real("probability", self.probability, above=0, at_most=1))

    def validate(self, n_steps: int) -> None:
        """Refuse more groups than steps: some people would never take part."""
        integer("groups", self.groups, 1, n_steps, high_name="n_steps")

    @property
    def min_sep(self) -> int:
        """The least separation of one person's steps: the groups."""
        return self.groups

    def rounds(self, n_steps: int) -> int:
        """Return how often, at most, one group has its turn: ceil(n / groups)."""
        return -(-n_steps // self.groups)

    def __str__(self) -> str:
        turn = "every step" if self.groups == 1 else f"one step in {self.groups}"
        return f"independently with probability {self.probability:.6g} at {turn}"


@dataclass(frozen=True)
class MinSepPoisson:
    """Whoever sat out the last `min_sep` - 1 steps joins the next one with `probability`.

    Draws are independent, and the run starts as if it had gone on forever: everybody joins every
    step with the same probability, `rate`. Dong & Ganesh (2026), for strategies with at most
    `min_sep` bands. `min_sep` 1 is Poisson sampling, `probability` 1 is balls in bins.

    Raises:
        RootnoiseError: min_sep below 1, or a probability outside (0, 1].

    >>> MinSepPoisson(min_sep=4, probability=0.25).rate
    0.14285714285714285
    """

    min_sep: int
    probability: float
    type: ClassVar[str] = "min-sep-poisson"
    amplified: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _set_counts(self, "min_sep")
        set_fields(self, probability=real("probability", self.probability, above=0, at_most=1))

    @property
    def rate(self) -> float:
        """The probability p / (1 + (b - 1) p) that a given person joins a given step."""
        return self.probability / (1 + (self.min_sep - 1) * self.probability)

    def validate(self, n_steps: int) -> None:
        """Refuse a separation longer than the run."""
        integer("min_sep", self.min_sep, 1, n_steps, high_name="n_steps")

    def __str__(self) -> str:
        return (
            f"with probability {self.probability:.6g} at every step, {self.rate:.6g} on average, "
            f"that is at least {self.min_sep} after the last one"
        )


# Independent draws: the sensitivity is that of one participation, and the accountant composes.
PoissonSampling = CyclicPoisson | MinSepPoisson
Participation = SingleParticipation | MinSeparation | FixedCycle | BallsInBins | PoissonSampling


KINDS: Kinds[Participation] = Kinds("participation must be of a known type")
for kind in Participation.__args__:
    KINDS.add(kind.type)(kind)

from_dict = KINDS.from_dict


def to_dict(participation: Participation) -> dict[str, Any]:
    """Return a JSON-ready description, read back by `from_dict`.

    >>> to_dict(FixedCycle(period=100, epochs=10))
    {'type': 'fixed-cycle', 'period': 100, 'epochs': 10}
    """
    return KINDS.to_dict(participation)


def first_steps(participation: Participation, t: int) -> Participation | None:
    """Return the participation in the first t steps, or None if it is not of the same kind.

    >>> first_steps(FixedCycle(period=100, epochs=10), 250)
    FixedCycle(period=100, epochs=3)
    """
    match participation:
        case FixedCycle(period, _):
            return FixedCycle(period, -(-t // period))
        case SingleParticipation():
            return participation
        case CyclicPoisson(groups, _) if groups <= t:
            return participation
    return None


def _set_counts(participation: Any, *names: str) -> None:
    counts = {name: integer(name, getattr(participation, name), 1) for name in names}
    set_fields(participation, **counts)
