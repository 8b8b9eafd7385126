"""The hand-over from mathematics to training: one frozen, calibrated, serialisable value.

A mechanism is its defining fields alone; sensitivity and epsilon are computed from them every time
one is made or loaded, so a file can never carry a privacy claim that its own numbers do not
support.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rootnoise import accounting, causal, participation, workload
from rootnoise._check import RootnoiseError, clip_range, integer, real, refuse_edits, set_fields
from rootnoise._files import write_whole
from rootnoise.accounting import PrivacyCost, Trials
from rootnoise.bounds.certificate import Certificate, Effort, lower_bound
from rootnoise.bounds.optimality import Optimality
from rootnoise.causal import CausalMatrix, Toeplitz
from rootnoise.factorization import Factorization, error
from rootnoise.participation import Participation, PoissonSampling, first_steps
from rootnoise.participation.sensitivity import Sensitivity, sensitivity
from rootnoise.workload import Workload

SCHEMA = 1


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
        trials: how many runs of it, of different hyperparameters, the one that is released is the
            best of; None if it is the only one.

    Attributes:
        sensitivity: of C for gradients of norm at most 1.
        privacy: what it costs at `delta`, all trials included.

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
    trials: Trials | None = None
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
        cost = self._cost(self.delta)
        if cost.exact and not sens.exact:  # nobody may move C G as far as the noise is scaled for
            cost = replace(cost, lower_bound=None)
        set_fields(self, sensitivity=sens, privacy=cost)

    def _cost(self, delta: float) -> PrivacyCost:
        who, n, sigma = self.participation, self.n_steps, self.noise_multiplier
        if self.trials is not None:
            return accounting.tuned_privacy_cost(who, n, sigma, delta, self.trials)
        return accounting.privacy_cost(who, n, sigma, delta, strategy=self.strategy)

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
        trials: Trials | None = None,
    ) -> Mechanism:
        """Return the mechanism that spends `epsilon` at `delta`, or that uses `noise_multiplier`.

        Or the one that is `rho`-zero-concentrated or `mu`-Gaussian differentially private, where
        steps are not random; `privacy` tells all of them. With `trials`, the one with which the
        best of so many runs spends `epsilon`.

        Raises:
            RootnoiseError: none or several of the four, a value out of range, or trials with random
                steps, rho or mu.

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
        n, strategy = factorization.n_steps, factorization.strategy
        if trials is not None and (rho, mu) != (None, None):
            raise RootnoiseError(f"rho and mu must be left out with trials, got {given}")
        if epsilon is not None and trials is not None:
            noise_multiplier = accounting.tuned_noise_multiplier(
                participation, n, epsilon, delta, trials
            )
        elif epsilon is not None:
            noise_multiplier = accounting.noise_multiplier(
                participation, n, epsilon, delta, strategy=strategy
            )
        elif noise_multiplier is None:
            noise_multiplier = accounting.noise_multiplier_for(participation, mu=mu, rho=rho)
        mechanism = cls(
            factorization.mechanism,
            factorization.workload,
            participation,
            strategy,
            noise_multiplier,
            delta,
            clip_norm,
            trials,
        )
        vars(mechanism)["_factorization"] = factorization  # it may know its decoder
        return mechanism

    @property
    def n_steps(self) -> int:
        """Steps that the mechanism covers; one more is refused."""
        return self.workload.n_steps

    @property
    def epsilon(self) -> float:
        """Privacy loss of what is released at `delta`, one person added or removed."""
        return self.privacy.epsilon

    def epsilon_spent(self, t: int, delta: float | None = None) -> float:
        """Return an upper bound on the privacy loss of the first t steps.

        If the strategy is Toeplitz and the sampling is by fixed cycles or (cyclic) Poisson, the
        bound is for these steps alone: C restricted to them is again such a strategy. Otherwise it
        is that of the whole run, and of all trials. It holds for a number of steps that was fixed
        in advance: a run that stops early because of its results costs as much as the whole run.

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
        if self.trials is not None:
            return self._cost(delta).epsilon
        strategy, who, sigma = self.strategy, self.participation, self.noise_multiplier
        c, so_far = strategy.coefficients, first_steps(who, t)
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

        >>> from rootnoise import SingleParticipation
        >>> from rootnoise.factorization import factorize
        >>> from rootnoise.workload import SGD
        >>> who = SingleParticipation()
        >>> made = Mechanism.calibrate(factorize(SGD(8), who, "bsr"), who, epsilon=1, delta=1e-5)
        >>> made.settings()["mechanism"], made.settings()["epsilon"]
        ('bsr', '1')
        """
        split = {"mechanism": self.name, "bands": self.strategy.bands}
        goal: dict[str, Any] = {"delta": self.delta, "clip_norm": self.clip_norm}
        work = self.workload.to_dict()
        who = participation.to_dict(self.participation)
        parts = {"workload": work.pop("type")} | work | {"participation": who.pop("type")} | who
        spent = {"epsilon": accounting.round_up(self.epsilon, 4)}
        if self.trials is not None:
            goal["trials"] = str(self.trials)
        return split | spent | goal | parts | {"noise_multiplier": self.noise_multiplier}

    def unlike(self, saved: Mapping[str, Any] | None) -> str:
        """Say how this mechanism differs from one with those `settings`, in one line.

        >>> from rootnoise import SingleParticipation
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
        every, uncovered = "Every", ""
        if self.trials is not None:
            every = (
                f"What is released is the best of a random number of trials ({self.trials}), each "
                "with a key of its own; of the others, and of their number, nothing is. In each "
                "trial every"
            )
            uncovered = ", the data that trials were scored on"
        return (
            f"({accounting.round_up(cost.epsilon)}, {number(cost.delta)})-differential privacy for "
            f"one record {relation}. {every} record takes part {self.participation}, in "
            f"{self.n_steps} steps. "
            f"Per-record gradients are clipped to l2 norm {number(self.clip_norm)} and summed; the "
            f"strategy is {self.name} with {self.strategy.bands} band(s) and {sens_name} "
            f"{norm} ({kind}: {sens.method}); Gaussian noise Z has standard deviation "
            f"{accounting.round_down(self.noise_std)}: noise multiplier "
            f"{number(self.noise_multiplier)} x clip norm x {sens_name}. Epsilon is {bound} "
            f"({cost.method}). Not covered: floating-point effects{uncovered}, and choices made by "
            f"looking at the data outside this run."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all that the file holds: definition, derived numbers, claim and fingerprint.

        And the `optimality` of a mechanism that knows it, from its file or by `certify`.
        """
        known = vars(self).get("optimality")
        optimality = {"optimality": known.to_dict()} if known else {}
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
            if "trials" in definition:
                definition["trials"] = Trials.from_dict(definition["trials"])
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
            vars(mechanism)["optimality"] = Optimality.from_dict(fields["optimality"])
        refuse_edits(mechanism.to_dict(), fields)
        return mechanism

    def verify(self) -> None:
        """Recompute the `optimality` that the file held, and refuse another; it takes seconds.

        Where there is none there is nothing to verify: loading has recomputed all the rest.

        Raises:
            RootnoiseError: what the mechanism holds is not what its definition gives.
        """
        if "optimality" not in vars(self):
            return
        self.optimality.refuse_other(Optimality(self.rmse, self.certificate().value))

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
        # Without trials nothing is added: fingerprints of older files stay what they are.
        trials = {} if self.trials is None else {"trials": self.trials.to_dict()}
        return {
            "name": self.name,
            "workload": self.workload.to_dict(),
            "participation": participation.to_dict(self.participation),
            "strategy": self.strategy.to_dict(),
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "clip_norm": self.clip_norm,
            **trials,
        }


def _short(value: Any) -> str:
    """Return a setting as text, a long one by its length alone."""
    if value is None:
        return "none"
    return f"{len(value)} numbers" if isinstance(value, list | tuple) else f"{value}"
