"""The hand-over from mathematics to training: one frozen, calibrated, serialisable value.

A mechanism is its defining fields alone; sensitivity and epsilon are computed from them every time
one is made or loaded, so a file can never carry a privacy claim that its own numbers do not
support.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rootnoise import accounting, causal, participation, workload
from rootnoise._check import RootnoiseError, clip_range, integer, real, set_fields
from rootnoise._files import write_whole
from rootnoise.accounting import PrivacyCost
from rootnoise.bounds.certificate import Certificate, Effort, lower_bound
from rootnoise.causal import CausalMatrix, Toeplitz
from rootnoise.factorization import Factorization, error
from rootnoise.participation import (
    CyclicPoisson,
    FixedCycle,
    Participation,
    PoissonSampling,
    SingleParticipation,
)
from rootnoise.participation.sensitivity import Sensitivity, sensitivity
from rootnoise.workload import Workload

SCHEMA = 1
# By so much the ascent behind a lower bound may end elsewhere on another machine.
REPEATS = 1e-3


@dataclass(frozen=True)
class Optimality:
    """How good a mechanism is; not a privacy number.

    Attributes:
        rmse: expected approximation error at noise multiplier 1 and clip norm 1.
        lower_bound: no factorization has a smaller rmse, by `Mechanism.certificate`.
    """

    rmse: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """Return rmse / lower_bound - 1: no factorization can be better by more than this."""
        return self.rmse / self.lower_bound - 1


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A factorization with its participation, clip norm and noise, ready to run.

    Args:
        name: the factorization's registered name.
        workload: A, of n_steps steps.
        participation: who may take part when.
        strategy: C, lower-triangular.
        noise_multiplier: sigma > 0, the standard deviation of Z over clip_norm * sensitivity.
        delta: in (0, 1).
        clip_norm: largest l2 norm of one person's gradient.

    Attributes:
        sensitivity: of C for gradients of norm at most 1.
        privacy: what it costs at `delta`.

    Raises:
        RootnoiseError: a value out of range, or parts that do not fit each other.
    """

    name: str
    workload: Workload
    participation: Participation
    strategy: CausalMatrix
    noise_multiplier: float
    delta: float
    clip_norm: float = 1.0
    sensitivity: Sensitivity = field(init=False)
    privacy: PrivacyCost = field(init=False)

    def __post_init__(self) -> None:
        set_fields(
            self,
            noise_multiplier=real("noise_multiplier", self.noise_multiplier, above=0),
            clip_norm=clip_range(real("clip_norm", self.clip_norm, above=0)),
            delta=real("delta", self.delta, above=0, below=1),
        )
        if self.strategy.n_steps != self.workload.n_steps:
            raise RootnoiseError(
                f"strategy must cover the workload's n_steps={self.workload.n_steps}, "
                f"got {self.strategy.n_steps}"
            )
        sens = sensitivity(self.strategy, self.participation)
        cost = accounting.privacy_cost(
            self.participation,
            self.n_steps,
            self.noise_multiplier,
            self.delta,
            strategy=self.strategy,
        )
        if cost.exact and not sens.exact:  # nobody may move C G as far as the noise is scaled for
            cost = replace(cost, lower_bound=None)
        set_fields(self, sensitivity=sens, privacy=cost)

    @classmethod
    def calibrate(
        cls,
        factorization: Factorization,
        participation: Participation,
        *,
        delta: float,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        rho: float | None = None,
        mu: float | None = None,
        clip_norm: float = 1.0,
    ) -> Mechanism:
        """Return the mechanism that spends `epsilon` at `delta`, or that uses `noise_multiplier`.

        Or the one that is `rho`-zero-concentrated or `mu`-Gaussian differentially private, where
        steps are not random; `privacy` tells all of them.

        Raises:
            RootnoiseError: none or several of the four, or a value out of range.

        >>> from rootnoise.factorization import factorize
        >>> from rootnoise.participation import FixedCycle
        >>> from rootnoise.workload import prefix_sum
        >>> cycle = FixedCycle(period=10, epochs=4)
        >>> bsr = factorize(prefix_sum(40), cycle, "bsr")
        >>> round(Mechanism.calibrate(bsr, cycle, epsilon=1, delta=1e-5).noise_multiplier, 4)
        3.7306
        """
        goals = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "rho": rho, "mu": mu}
        given = {name: value for name, value in goals.items() if value is not None}
        if len(given) != 1:
            raise RootnoiseError(f"give exactly one of {', '.join(goals)}, got {given or 'none'}")
        if epsilon is not None:
            noise_multiplier = accounting.noise_multiplier(
                participation,
                factorization.n_steps,
                epsilon,
                delta,
                strategy=factorization.strategy,
            )
        elif noise_multiplier is None:
            noise_multiplier = accounting.noise_multiplier_for(participation, mu=mu, rho=rho)
        mechanism = cls(
            factorization.mechanism,
            factorization.workload,
            participation,
            factorization.strategy,
            noise_multiplier,
            delta,
            clip_norm,
        )
        vars(mechanism)["_factorization"] = factorization  # it may know its decoder
        return mechanism

    @property
    def n_steps(self) -> int:
        """Steps that the mechanism covers; one more is refused."""
        return self.workload.n_steps

    @property
    def epsilon(self) -> float:
        """Privacy loss of the whole run at `delta`, one person added or removed."""
        return self.privacy.epsilon

    def epsilon_spent(self, t: int, delta: float | None = None) -> float:
        """Return an upper bound on the privacy loss of the first t steps.

        If the strategy is Toeplitz and the sampling is by fixed cycles or (cyclic) Poisson, the
        bound is for these steps alone: C restricted to them is again such a strategy. Otherwise it
        is that of the whole run. It holds for a number of steps that was fixed in advance: a run
        that stops early because of its results costs as much as the whole run.

        Args:
            t: steps released, in [0, n_steps].
            delta: failure probability; the mechanism's when None.

        Raises:
            RootnoiseError: a value out of range.
        """
        integer("t", t, 0, self.n_steps)
        if delta is None:
            delta = self.delta
        if t == 0:
            return 0.0
        strategy, who, sigma = self.strategy, self.participation, self.noise_multiplier
        c, so_far = strategy.coefficients, _so_far(who, t)
        if t < self.n_steps and c is not None and so_far is not None:
            strategy, who = Toeplitz(c[:t], t), so_far
            sigma = self.noise_std / (self.clip_norm * sensitivity(strategy, who).value)
        elif delta == self.delta:
            return self.epsilon
        steps = strategy.n_steps
        spent = accounting.privacy_cost(who, steps, sigma, delta, strategy=strategy).epsilon
        return min(self.epsilon, spent) if delta == self.delta else spent

    @property
    def noise_std(self) -> float:
        """Standard deviation of Z, on the *sum* of clipped gradients."""
        return self.noise_multiplier * self.clip_norm * self.sensitivity.value

    @cached_property
    def noising(self) -> CausalMatrix:
        """C^-1, which turns Z into the noise of the steps."""
        return self.strategy.inverse()

    @cached_property
    def _factorization(self) -> Factorization:
        return Factorization(self.name, self.workload, self.strategy)

    @cached_property
    def rmse(self) -> float:
        """Expected approximation error at noise multiplier 1 and clip norm 1."""
        return error.rmse(self._factorization.decoder, self.sensitivity.value)

    @cached_property
    def optimality(self) -> Optimality:
        """How good it is: computed on demand, or as the file held it: see `verify`."""
        return Optimality(self.rmse, self.certificate().value)

    def certify(self) -> Mechanism:
        """Return this mechanism, whose file now holds its `optimality`; it takes seconds.

        >>> from rootnoise.factorization import factorize
        >>> from rootnoise.participation import SingleParticipation
        >>> from rootnoise.workload import prefix_sum
        >>> who = SingleParticipation()
        >>> made = Mechanism.calibrate(factorize(prefix_sum(8), who), who, epsilon=1, delta=1e-5)
        >>> "optimality" in made.to_dict(), "optimality" in made.certify().to_dict()
        (False, True)
        """
        _ = self.optimality
        return self

    @cached_property
    def _certificates(self) -> dict[str, Certificate]:
        return {}

    def certificate(self, effort: Effort | str = Effort.FAST) -> Certificate:
        """Return the lower bound on the rmse of every factorization, solved once on demand.

        Raises:
            RootnoiseError: another effort than those of `lower_bound`.
        """
        if effort not in self._certificates:
            found = lower_bound(self.workload, self.participation, effort)
            self._certificates[effort] = found
        return self._certificates[effort]

    def gap(self, effort: Effort | str = Effort.FAST) -> float:
        """Return rmse / lower bound - 1: no factorization can be better by more than this.

        Raises:
            RootnoiseError: another effort than those of `lower_bound`.
        """
        return self.certificate(effort).gap(self.rmse)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the defining fields: two runs may share noise only if it is the same."""
        text = json.dumps(self._definition(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """Return plain values by name that tell mechanisms apart, as people set them.

        >>> from rootnoise.factorization import factorize
        >>> from rootnoise.workload import SGD
        >>> who = SingleParticipation()
        >>> made = Mechanism.calibrate(factorize(SGD(8), who, "bsr"), who, epsilon=1, delta=1e-5)
        >>> made.settings()["mechanism"], made.settings()["epsilon"]
        ('bsr', '1')
        """
        split = {"mechanism": self.name, "bands": self.strategy.bands}
        goal = {"delta": self.delta, "clip_norm": self.clip_norm}
        work = self.workload.to_dict()
        who = participation.to_dict(self.participation)
        parts = {"workload": work.pop("type")} | work | {"participation": who.pop("type")} | who
        spent = {"epsilon": accounting.round_up(self.epsilon, 4)}
        return split | spent | goal | parts | {"noise_multiplier": self.noise_multiplier}

    def unlike(self, saved: Mapping[str, Any] | None) -> str:
        """Say how this mechanism differs from one with those `settings`, in one line.

        >>> from rootnoise.factorization import factorize
        >>> from rootnoise.workload import SGD
        >>> who = SingleParticipation()
        >>> made = Mechanism.calibrate(factorize(SGD(8), who, "bsr"), who, epsilon=1, delta=1e-5)
        >>> made.unlike(made.settings() | {"delta": 1e-6})
        'delta: saved 1e-06, given 1e-05'
        """
        ours, other = self.settings(), [] if saved is None else list(saved)
        names = [n for n in dict.fromkeys([*ours, *other]) if (saved or {}).get(n) != ours.get(n)]
        if len(names) > 1 and "noise_multiplier" in names:  # it follows from the others
            names.remove("noise_multiplier")
        if saved is None or not names:
            return f"another one than {self.fingerprint[:16]}"
        return "; ".join(
            f"{n}: saved {_short(saved.get(n))}, given {_short(ours.get(n))}" for n in names
        )

    def claim(self) -> str:
        """Return the privacy guarantee as sentences that an auditor can check."""
        sens, cost, number = self.sensitivity, self.privacy, accounting.exactly
        amplified = self.participation.amplified
        relation = (
            "added to or removed from the data set (its slot of the public number of "
            "records stays, empty or filled)"
            if amplified
            else "zeroed out (its gradients replaced by zero, everybody else's steps unchanged)"
        )
        sens_name = (
            "column norm" if isinstance(self.participation, PoissonSampling) else "sensitivity"
        )
        kind = "exact" if sens.exact else "an upper bound"
        bound = "exact" if cost.exact and sens.exact else "an upper bound"
        # Private side: what costs rounds up, noise down; machines differ by less than 1e-12.
        norm = accounting.round_up(sens.value * (1 - 1e-12), 9)
        return (
            f"({accounting.round_up(cost.epsilon)}, {number(cost.delta)})-differential privacy for "
            f"one record {relation}. Every record takes part {self.participation}, in "
            f"{self.n_steps} steps. "
            f"Per-record gradients are clipped to l2 norm {number(self.clip_norm)} and summed; the "
            f"strategy is {self.name} with {self.strategy.bands} band(s) and {sens_name} "
            f"{norm} ({kind}: {sens.method}); Gaussian noise Z has standard deviation "
            f"{accounting.round_down(self.noise_std)}: noise multiplier "
            f"{number(self.noise_multiplier)} x clip norm x {sens_name}. Epsilon is {bound} "
            f"({cost.method}). Not covered: floating-point effects, and choices made by looking at "
            f"the data outside this run."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all that the file holds: definition, derived numbers, claim and fingerprint.

        And the `optimality` of a mechanism that knows it, from its file or by `certify`.
        """
        known = vars(self).get("optimality")
        optimality = {"optimality": asdict(known) | {"gap": known.gap}} if known else {}
        return {
            "schema": SCHEMA,
            "definition": self._definition(),
            "derived": {
                "n_steps": self.n_steps,
                "sensitivity": self.sensitivity.value,
                "sensitivity_exact": self.sensitivity.exact,
                "sensitivity_method": self.sensitivity.method,
                "noise_std": self.noise_std,
                "epsilon": self.privacy.epsilon,
                "epsilon_exact": self.privacy.exact,
                "epsilon_method": self.privacy.method,
            },
            **optimality,
            "claim": self.claim(),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Mechanism:
        """Rebuild a mechanism, recompute what follows from its definition, and refuse a mismatch.

        Of `optimality`, if the file holds it, only the gap is recomputed, from the other two: the
        bound takes seconds, says nothing about privacy, and does not enter the fingerprint.
        `verify` recomputes it.

        Raises:
            RootnoiseError: another schema, a missing or extra field, or any number that was edited.
        """
        if fields.get("schema") != SCHEMA:
            raise RootnoiseError(f"schema must be {SCHEMA}, got {fields.get('schema')!r}")
        try:
            definition = dict(fields["definition"])
            mechanism = cls(
                name=str(definition.pop("name")),
                workload=workload.from_dict(definition.pop("workload")),
                participation=participation.from_dict(definition.pop("participation")),
                strategy=causal.from_dict(definition.pop("strategy")),
                **definition,
            )
        except (KeyError, TypeError, AttributeError) as reason:
            raise RootnoiseError(
                f"definition must hold exactly a mechanism's fields, got {reason}"
            ) from None
        if "optimality" in fields:
            vars(mechanism)["optimality"] = _held(fields["optimality"])
        _refuse_edits(mechanism.to_dict(), fields, "")
        return mechanism

    def verify(self) -> None:
        """Recompute the `optimality` that the file held, and refuse another; it takes seconds.

        Where there is none there is nothing to verify: loading has recomputed all the rest.

        Raises:
            RootnoiseError: what the mechanism holds is not what its definition gives.
        """
        if "optimality" not in vars(self):
            return
        again = Optimality(self.rmse, self.certificate().value)
        for name, tolerance in (("rmse", 1e-6), ("lower_bound", REPEATS)):
            expected, held = getattr(again, name), getattr(self.optimality, name)
            if not math.isclose(expected, held, rel_tol=tolerance):
                raise RootnoiseError(
                    f"optimality.{name} must match what its definition gives, "
                    f"{expected!r}, got {held!r}"
                )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the mechanism as JSON, atomically; with its optimality after `certify`.

        Raises:
            RootnoiseError: the file exists and `overwrite` is False, or it cannot be written.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise RootnoiseError(f"path must not exist yet, got {target}")
        try:
            write_whole(target, json.dumps(self.to_dict(), indent=1).encode() + b"\n")
        except OSError as reason:
            raise RootnoiseError(
                f"path must be writable, got {target}: {reason.strerror}"
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mechanism:
        """Read a mechanism from JSON; see `from_dict`.

        Raises:
            RootnoiseError: an unreadable file, or one that `from_dict` refuses.
        """
        try:
            fields = json.loads(Path(path).read_text())
        except OSError as reason:
            raise RootnoiseError(f"path must be readable, got {path}: {reason.strerror}") from None
        except ValueError as reason:
            raise RootnoiseError(f"path must hold JSON, got {path}: {reason}") from None
        if not isinstance(fields, dict):
            raise RootnoiseError(f"path must hold a JSON object, got {path}")
        return cls.from_dict(fields)

    def _definition(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "workload": self.workload.to_dict(),
            "participation": participation.to_dict(self.participation),
            "strategy": self.strategy.to_dict(),
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "clip_norm": self.clip_norm,
        }


def _short(value: Any) -> str:
    """Return a setting as text, a long one by its length alone."""
    if value is None:
        return "none"
    return f"{len(value)} numbers" if isinstance(value, list | tuple) else f"{value}"


def _so_far(who: Participation, t: int) -> Participation | None:
    """Return the participation in the first t steps, or None if it is not of the same kind."""
    match who:
        case FixedCycle(period, _):
            return FixedCycle(period, -(-t // period))
        case SingleParticipation():
            return who
        case CyclicPoisson(groups, _) if groups <= t:
            return who
    return None


def _held(fields: Any) -> Optimality:
    """Return what a file holds about the error; `_refuse_edits` compares its gap."""
    if not isinstance(fields, dict):
        raise RootnoiseError(f"optimality must be an object, got {fields!r:.80}")
    rmse, bound = fields.get("rmse"), fields.get("lower_bound")
    if not isinstance(rmse, float) or not isinstance(bound, float) or not min(rmse, bound) > 0:
        raise RootnoiseError(
            f"optimality must hold rmse and lower_bound > 0, got {rmse!r} and {bound!r}"
        )
    return Optimality(rmse, bound)


def _refuse_edits(expected: Any, found: Any, where: str) -> None:
    """Compare a recomputed tree with the stored one; machines may round floats differently."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        for key, value in expected.items():
            _refuse_edits(value, found[key], f"{where}.{key}" if where else key)
        return
    # The definition was read from this very file, so that it is compared with itself.
    same = found == expected and type(found) is type(expected)
    # Of the optimality only the gap is computed anew, by IEEE arithmetic that is the same anywhere.
    exact = where.startswith("optimality")
    if not same and not exact and isinstance(expected, float) and isinstance(found, int | float):
        same = math.isclose(expected, found, rel_tol=1e-9)
    if not same:
        raise RootnoiseError(
            f"{where or 'mechanism'} must match what its definition gives, "
            f"{expected!r:.80}, got {found!r:.80}"
        )
