"""The one interface of every factorization, and the registry behind `factorize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np

from rootnoise._check import RootnoiseError, integer, one_of
from rootnoise.causal import CausalMatrix, Product, chain
from rootnoise.factorization import error
from rootnoise.participation import Participation, SingleParticipation
from rootnoise.participation.sensitivity import Sensitivity, sensitivity
from rootnoise.workload import Workload


@dataclass(frozen=True, eq=False)
class Factorization:
    """A = B C: what is privatised is C X + Z, and B turns it into the iterates.

    Attributes:
        mechanism: the registered name.
        workload: A.
        strategy: C, the encoder.
        known_decoder: B where it has a closed form; otherwise it is A C^-1.
    """

    mechanism: str
    workload: Workload
    strategy: CausalMatrix
    known_decoder: CausalMatrix | None = None

    @property
    def n_steps(self) -> int:
        """Steps n."""
        return self.workload.n_steps

    @cached_property
    def noising(self) -> CausalMatrix:
        """C^-1: its row t applied to Z is the noise of step t."""
        return self.strategy.inverse()

    @cached_property
    def decoder(self) -> CausalMatrix:
        """B = A C^-1."""
        if self.known_decoder is not None:
            return self.known_decoder
        a, c = self.workload.matrix, self.strategy
        # Toeplitz maps commute, and a filter over the column of A costs less than a dense product.
        if a.is_toeplitz and c.is_toeplitz:
            return Product(self.noising, a)
        if any(kind == "other" for kind, _ in chain(c)):
            a = self.workload.recurrence  # what streams with little state has its norms from that
        return Product(a, self.noising)

    @property
    def memory_rows(self) -> int:
        """Noise vectors of the model's size that a step must remember."""
        return self.noising.state_size

    def sensitivity(self, participation: Participation) -> Sensitivity:
        """Return how far one person moves C X."""
        return sensitivity(self.strategy, participation)

    def rmse(self, participation: Participation) -> float:
        """Return the expected approximation error at noise multiplier 1, sens * |B|_F / sqrt(n)."""
        if participation not in self._errors:  # a search has asked before whoever ranks its result
            found = error.rmse(self.decoder, self.sensitivity(participation).value)
            self._errors[participation] = found
        return self._errors[participation]

    @cached_property
    def _errors(self) -> dict[Participation, float]:
        return {}

    def max_error(self, participation: Participation) -> float:
        """Return the error of the worst step at noise multiplier 1, sens * the largest row of B."""
        return error.max_error(self.decoder, self.sensitivity(participation).value)


# A builder takes the workload, the participation and the keyword options that its mechanism has.
Builder = Callable[..., Factorization]
_BUILDERS: dict[str, Builder] = {}
# What every builder may take; all else is an option of its own.
_SHARED = {"workload", "participation", "progress"}
# Those whose strategy is the same for all workloads.
AIMLESS = frozenset({"identity", "tree"})


def register(name: str) -> Callable[[Builder], Builder]:
    """Register a builder under the name that `factorize` and the command line use."""

    def add(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return add


def mechanisms() -> tuple[str, ...]:
    """Return the registered names, sorted.

    >>> "bsr" in mechanisms()
    True
    """
    return tuple(sorted(_BUILDERS))


def options(mechanism: str) -> frozenset[str]:
    """Return the names of the options that a mechanism takes.

    >>> sorted(options("bsr-gamma"))
    ['bands', 'contraction', 'gamma']
    """
    own = frozenset(signature(_BUILDERS[mechanism]).parameters) - _SHARED
    return own if mechanism in AIMLESS else own | {"contraction"}


def refuse_foreign(mechanism: str, given: Mapping[str, Any]) -> None:
    """Refuse an option that the mechanism does not take.

    Raises:
        RootnoiseError: there is one.
    """
    for name, value in given.items():
        if name not in options(mechanism):
            raise RootnoiseError(
                f"{name} must be left out for mechanism {mechanism!r}, got {value!r}"
            )


def factorize(
    workload: Workload,
    participation: Participation | None = None,
    mechanism: str = "bsr",
    **options: Any,
) -> Factorization:
    """Split a workload by a named mechanism.

    Args:
        workload: what is computed.
        participation: who may take part when (default: at most one step each).
        mechanism: one of `mechanisms()`.
        options: those of the mechanism's own function, such as `bands`; None leaves its default.
            Of all of them `contraction`: the strategy is the one for `workload.contracted(it)`.

    Raises:
        RootnoiseError: an unknown mechanism, an option that it does not have or cannot take, or a
            participation that does not fit n_steps.

    >>> from rootnoise.workload import prefix_sum
    >>> factorize(prefix_sum(100), mechanism="bsr", bands=3).strategy.coefficients
    array([1.   , 0.5  , 0.375])
    """
    participation = participation if participation is not None else SingleParticipation()
    participation.validate(workload.n_steps)
    one_of("mechanism", mechanism, mechanisms())
    builder = _BUILDERS[mechanism]
    given = {name: value for name, value in options.items() if value is not None}
    progress = given.pop("progress", None)
    refuse_foreign(mechanism, given)
    aim = workload.contracted(given.pop("contraction", 0.0))
    if progress is not None and "progress" in signature(builder).parameters:
        given["progress"] = progress  # a closed form has none to report
    made = builder(aim, participation, **given)
    return made if aim is workload else Factorization(made.mechanism, workload, made.strategy)


# What an optimiser reports: the options tried so far, and the least rmse.
Progress = Callable[[int, float], None]


class Search:
    """Tries options and keeps the factorization of least rmse, as it is reported.

    Attributes:
        best: the factorization of the best option so far.
    """

    best: Factorization

    def __init__(
        self,
        build: Callable[[Any], Factorization],
        participation: Participation,
        progress: Progress | None = None,
    ):
        self._build, self._participation, self._progress = build, participation, progress
        self._tried, self._least = 0, float("inf")

    def __call__(self, option: Any) -> float:
        """Return the rmse of one option."""
        factorization = self._build(option)
        rmse = factorization.rmse(self._participation)
        if rmse < self._least:
            self.best, self._least = factorization, rmse
        self.report(rmse)
        return rmse

    def report_objective(self, value: float) -> None:
        """Count one more option, whose 2 log rmse is `value`, in the progress."""
        self.report(float(np.exp(value / 2)))

    def report(self, rmse: float) -> None:
        """Count one more option, tried elsewhere, in the progress."""
        self._tried += 1
        if self._progress is not None:
            self._progress(self._tried, min(rmse, self._least))


def default_bands(n_steps: int, participation: Participation) -> int:
    """Return the separation of one person's steps (n if there is but one).

    Up to it, columns of one person never overlap. It is optimal, or close, for up to about ten
    participations; for more, see `bsr` with bands="auto".
    """
    if isinstance(participation, SingleParticipation):
        return n_steps
    return min(participation.min_sep, n_steps)


def checked_bands(bands: int | None, n_steps: int, participation: Participation) -> int:
    """Return bands in [1, n_steps], the default where None."""
    if bands is None:
        return default_bands(n_steps, participation)
    return integer("bands", bands, 1, n_steps, high_name="n_steps")
