"""The checked settings of a run, and what follows from them: batches, mechanism, key, claim."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rootnoise import _limits
from rootnoise._check import RootnoiseError, integer, one_of, real, warn_of_delta
from rootnoise.factorization import Factorization, factorize, mechanisms
from rootnoise.factorization.base import refuse_foreign
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import CyclicPoisson
from rootnoise.participation.samplers import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedCycleSampler,
    MinSepPoissonSampler,
    Sampler,
)
from rootnoise.planner import MEMORY_ROWS, Job, Row, advised_rate, plan
from rootnoise.runs.settings import LR_WITHOUT_NOISE, Options, Settings
from rootnoise.runs.tuning import Tuning
from rootnoise.workload import SGD, ScheduledSGD, Workload, learning_rates

# Largest learning rate, clip norm, and 1 / clip norm: weights and noise then fit into float32.
LARGEST = 1e6

# Images of the one are among those of the other.
OVERLAP = {"mnist", "mnist-5k"}

# Samplings that need a strategy in which no two columns of one person overlap, and the setting
# that says how many bands that are.
POISSON = {"poisson": "groups", "min-sep-poisson": "separation"}
SAMPLINGS = ("fixed-cycle", "balls-in-bins", *POISSON)
# A plan's names for each sampling that it may choose; cyclic Poisson is poisson with groups.
PLANNED = {
    "fixed-cycle": ("fixed-cycle",),
    "poisson": ("poisson", "cyclic-poisson"),
    "balls-in-bins": ("balls-in-bins",),
}


@dataclass(frozen=True)
class RunConfig(Settings):
    """The settings of a run, checked; `run` documents them.

    Attributes:
        tuning: how some of them were chosen, where several were tried.

    Raises:
        RootnoiseError: a value outside its range, whatever the data set.

    >>> RunConfig(mechanism="dpsgd", epsilon=8.0).sampling
    'poisson'
    """

    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tuning, Mapping):  # from config.json
            object.__setattr__(self, "tuning", Tuning.from_dict(self.tuning))
        one_of("mechanism", self.mechanism, ("none", "dpsgd", *mechanisms(), "auto"))
        one_of("sampling", self.sampling, ("auto", *SAMPLINGS))
        paid = self.tuning is not None and self.tuning.public is None
        if self.sampling == "auto" and (paid or self.mechanism != "auto"):
            kind = "poisson" if self.mechanism == "dpsgd" else "fixed-cycle"
            object.__setattr__(self, "sampling", kind)
        if self.lr == "auto" and self.mechanism == "none":
            object.__setattr__(self, "lr", LR_WITHOUT_NOISE)
        self._check_numbers()
        if self.average is not None:
            share = real("average", self.average, at_least=0, at_most=1)
            object.__setattr__(self, "average", share or None)
        if self.mechanism == "dpsgd" and self.sampling != "poisson":
            rule = "poisson for mechanism dpsgd (identity takes both)"
            raise RootnoiseError(f"sampling must be {rule}, got {self.sampling}")
        self._check_bands_of_poisson()
        self._check_planned()
        self._check_tuned()

    @property
    def learning_rate(self) -> float:
        """The number `lr`, which `planned` finds for auto."""
        if isinstance(self.lr, str):
            raise RootnoiseError(f"lr must be planned for a data set first, got {self.lr}")
        return self.lr

    @property
    def split(self) -> dict[str, Any]:
        """The options of the mechanism, in the form that `factorize` takes."""
        return {name: v for name in OPTIONS if (v := getattr(self, name)) is not None}

    def _check_bands_of_poisson(self) -> None:
        """Amplification needs at most as many bands as groups, or as steps of separation."""
        own = POISSON.get(self.sampling)
        for sampling, name in POISSON.items():
            given = integer(name, getattr(self, name), 1)
            if given == 1 or (name == own and self.mechanism not in ("none", "dpsgd", "auto")):
                continue
            rule, cure = f"1 but for a banded mechanism under {sampling} sampling", ""
            if own not in (None, name):
                rule, cure = f"1 under {self.sampling} sampling", f": give --{own} {given}"
            raise RootnoiseError(f"{name} must be {rule}, got {given}{cure}")
        alone = ("dpsgd", "identity", "auto")
        if own and getattr(self, own) == 1 and self.mechanism not in alone:
            rule = f"fixed-cycle for mechanism {self.mechanism} without {own}"
            raise RootnoiseError(f"sampling must be {rule}, got {self.sampling}")

    def _check_planned(self) -> None:
        """Refuse what the plan will choose, or what only a plan needs."""
        if self.mechanism != "auto":
            if self.memory_rows is not None:
                rule = f"left out for mechanism {self.mechanism} (auto chooses within it)"
                raise RootnoiseError(f"memory_rows must be {rule}, got {self.memory_rows}")
            return
        for name in OPTIONS:
            if getattr(self, name) is not None:
                raise RootnoiseError(
                    f"{name} must be left out for mechanism auto, got {getattr(self, name)}"
                )
        one_of("sampling", self.sampling, ("auto", *PLANNED), " for mechanism auto")
        if self.memory_rows is not None:
            integer("memory_rows", self.memory_rows, 0)

    def _check_tuned(self) -> None:
        """Refuse what was not tried, and trials whose best is not accounted for."""
        tuning = self.tuning
        if tuning is None:
            return
        for name, values in tuning.grid.items():
            if getattr(self, name) not in values:
                rule = f"{name} must be one that was tried, {', '.join(map(str, values))}"
                raise RootnoiseError(f"{rule}, got {getattr(self, name)}")
        if tuning.public is not None:
            if tuning.public == self.dataset or {tuning.public, self.dataset} == OVERLAP:
                rule = "public must be another data set than the private one"
                raise RootnoiseError(f"{rule}, got {tuning.public}")
            return
        if self.mechanism == "none":
            raise RootnoiseError("mechanism must be private for trials that are paid for, got none")
        if self.sampling != "fixed-cycle":
            rule = "sampling must be fixed-cycle for trials (identity is dpsgd's noise there)"
            raise RootnoiseError(f"{rule}, got {self.sampling}")
        if self.insecure_noise_seed is not None:
            rule = "insecure_noise_seed must be left out for trials, each of which has its own key"
            raise RootnoiseError(f"{rule}, got {self.insecure_noise_seed}")

    def _check_numbers(self) -> None:
        if self.mechanism == "none":
            for name in ("epsilon", "insecure_noise_seed", *OPTIONS):
                value = getattr(self, name)
                if value is not None:
                    raise RootnoiseError(f"{name} must be left out for mechanism none, got {value}")
        elif self.epsilon is None:
            raise RootnoiseError(f"epsilon must be given for mechanism {self.mechanism}, got none")
        else:
            _limits.epsilon(self.epsilon)
            if self.mechanism != "auto":
                name = "identity" if self.mechanism == "dpsgd" else self.mechanism
                refuse_foreign(name, self.split)
        real("delta", self.delta, above=0, below=1)
        integer("epochs", self.epochs, 1)
        integer("batch_size", self.batch_size, 1)
        if self.micro_batch_size is not None:
            integer("micro_batch_size", self.micro_batch_size, 1)
        real("momentum", self.momentum, at_least=0, below=1)
        real("decay", self.decay, above=0, at_most=1)
        clip = real("clip_norm", self.clip_norm, above=0)
        real("clip_norm", clip, at_least=1 / LARGEST, at_most=LARGEST)
        if self.bands not in (None, "auto"):
            integer("bands", self.bands, 1)  # type: ignore[arg-type]
        self._check_rates()
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise RootnoiseError(f"device must be cpu, cuda or cuda:N, got {self.device!r}")
        integer("seed", self.seed, 0, 2**63 - 1)
        if self.insecure_noise_seed is not None:
            integer("insecure_noise_seed", self.insecure_noise_seed, 0)

    def _check_rates(self) -> None:
        if self.lr != "auto":
            rate = real("lr", self.lr, above=0)  # type: ignore[arg-type]
            real("lr", rate, at_most=LARGEST)
        w = real("weight_decay", self.weight_decay, at_least=0)
        # Then x <- x - lr m, m <- beta m + w x has both roots in the unit circle (Polyak, 1964).
        most = np.inf if self.lr == "auto" else 2 * (1 + self.momentum) / self.learning_rate
        if w >= most:
            rule = f"< 2 (1 + momentum) / lr = {most:g}, or the weights grow without bound"
            raise RootnoiseError(f"weight_decay must be {rule}, got {w}")
        if w and self.decay != 1:
            raise RootnoiseError(f"decay must be 1 with weight_decay, got {self.decay}")
        if self.schedule is None:
            for name, value in (("warmup", self.warmup), ("final", self.final)):
                if value:
                    raise RootnoiseError(f"{name} must be left out without schedule, got {value}")
        else:
            learning_rates(
                self.schedule, 1 + integer("warmup", self.warmup, 0), self.warmup, self.final
            )


# Options of mechanisms; each applies to some of them.
OPTIONS = tuple(option.name for option in fields(Options))


def rates(config: RunConfig, n_steps: int) -> NDArray[np.float64]:
    """Return the learning rate of every step relative to lr, shape (n_steps,)."""
    if config.schedule is None:
        return np.ones(n_steps)
    return learning_rates(config.schedule, n_steps, config.warmup, config.final)


def n_averaged(config: RunConfig, n_steps: int) -> int:
    """Return of how many last iterates the released model is the mean: 1 without `average`.

    >>> n_averaged(RunConfig(epsilon=8.0, average=0.25), n_steps=30)
    8
    """
    return max(1, round((config.average or 0) * n_steps))


def make_workload(config: RunConfig, n_steps: int) -> Workload:
    """Return what the run's optimizer computes, in units of lr.

    With x the parameters divided by lr, torch computes m <- beta m + g + w lr x, so the weight
    decay w is multiplied by lr; for lr auto, which is advised without it, w is 0.
    """
    if config.schedule is None and not config.weight_decay:
        return SGD(n_steps, config.momentum, config.decay)
    w = 0.0 if isinstance(config.lr, str) else config.lr * config.weight_decay
    made = ScheduledSGD(rates(config, n_steps), config.momentum, weight_decay=w, decay=config.decay)
    # With a constant rate `neighbour` is the same workload in Toeplitz form.
    return made if config.schedule is not None else made.neighbour


def planned(config: RunConfig, n_examples: int) -> RunConfig:
    """Return the settings, with those of the row to take of a plan for mechanism auto.

    Of lr auto it is the advised rate, to two digits: a function of these settings and the number of
    examples alone, so that it costs no privacy.

    Raises:
        RootnoiseError: settings for which there is no plan.

    >>> chosen = planned(RunConfig(mechanism="auto", epsilon=8.0, epochs=2), n_examples=2000)
    >>> chosen.mechanism, chosen.sampling, chosen.lr
    ('bandmf', 'fixed-cycle', 4.0)
    """
    if config.lr == "auto":
        plain = _with_mechanism(config, n_examples)
        mechanism = make_mechanism(plain, make_sampler(plain, n_examples))
        assert mechanism is not None  # noqa: S101 - RunConfig has a number for mechanism none
        config = replace(config, lr=advised_rate(mechanism, config.batch_size))
    return _with_mechanism(config, n_examples)


def _with_mechanism(config: RunConfig, n_examples: int) -> RunConfig:
    """Return the settings with a mechanism that is not auto."""
    if config.mechanism != "auto":
        return config
    integer("batch_size", config.batch_size, 1, n_examples, high_name="n_examples")
    rows = MEMORY_ROWS if config.memory_rows is None else config.memory_rows
    epsilon = cast("float", config.epsilon)  # without one, auto is refused
    job = Job(n_examples, config.batch_size, config.epochs, epsilon, config.delta, rows)
    bins = None if config.sampling == "auto" else config.sampling == "balls-in-bins"
    made = plan(make_workload(config, job.n_steps), job, bins=bins)
    chosen = made.recommended(*PLANNED.get(config.sampling, ("auto",)))
    return replace(config, memory_rows=None, **row_settings(chosen))


def row_settings(row: Row) -> dict[str, Any]:
    """Return the settings that train with a row of a plan."""
    found = {"mechanism": row.mechanism, **row.options, "sampling": row.sampling}
    match row.participation:
        case CyclicPoisson(1, _):
            found["mechanism"] = "dpsgd"
        case CyclicPoisson(groups, _):
            found |= {"sampling": "poisson", "groups": groups}
    return found


def _refuse_unplanned(config: RunConfig) -> None:
    if config.mechanism == "auto":
        raise RootnoiseError("mechanism must be planned for a data set first, got auto")


def make_sampler(config: RunConfig, n_examples: int) -> Sampler:
    """Return the run's batches: `epochs` times ceil(n_examples / batch_size) of them."""
    _refuse_unplanned(config)
    size, batch, epochs = n_examples, config.batch_size, config.epochs
    integer("batch_size", batch, 1, size, high_name="n_examples")
    _limits.steps(epochs * -(-size // batch))
    # min-sep-poisson draws every participation at the start: person, step, and their order.
    most = 32.0 * size * epochs if config.sampling == "min-sep-poisson" else 200.0 * epochs
    _limits.memory("all batches", most, "fewer epochs")
    if config.sampling == "fixed-cycle":
        return FixedCycleSampler(size, batch, epochs, config.seed)
    # Amplification needs secret batches, so their seed comes from OS entropy.
    secret = config.insecure_noise_seed
    if config.sampling == "balls-in-bins":
        return BallsInBinsSampler(size, batch, epochs, secret)
    steps = epochs * -(-size // batch)
    if config.sampling == "poisson":
        return CyclicPoissonSampler(size, batch, steps, config.groups, secret)
    return MinSepPoissonSampler(size, batch, steps, config.separation, secret)


def make_factorization(config: RunConfig, sampler: Sampler) -> Factorization:
    """Return how the run's workload is split."""
    name = "identity" if config.mechanism == "dpsgd" else config.mechanism
    workload = make_workload(config, sampler.n_steps)
    return factorize(workload, sampler.participation, name, **config.split)


def make_mechanism(config: RunConfig, sampler: Sampler) -> Mechanism | None:
    """Return the run's calibrated mechanism, or None without privacy."""
    _refuse_unplanned(config)
    if config.mechanism == "none":
        return None
    warn_of_delta(config.delta, sampler.n_examples)
    return Mechanism.calibrate(
        make_factorization(config, sampler),
        sampler.participation,
        epsilon=config.epsilon,
        delta=config.delta,
        clip_norm=config.clip_norm,
        trials=None if config.tuning is None else config.tuning.number,
    )


def make_key(config: RunConfig) -> Key:
    """Return a fresh noise key, or the one derived from the insecure seed."""
    seed = config.insecure_noise_seed
    return Key.fresh() if seed is None else Key.from_seed(seed)


def claim(config: RunConfig, mechanism: Mechanism | None) -> str:
    """Return what the run may say about privacy."""
    if mechanism is None:
        return "No privacy is claimed: the run neither clips gradients nor adds noise."
    said = mechanism.claim()
    if config.tuning is not None:
        said += f" {config.tuning.claim(config.dataset)}"
    if config.insecure_noise_seed is not None:
        return (
            "No privacy is claimed: the noise is reproducible, from the insecure noise seed "
            f"{config.insecure_noise_seed}. With a secret key it would be: {said}"
        )
    return said
