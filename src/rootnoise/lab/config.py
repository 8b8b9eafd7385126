"""The settings of a run, and what follows from them: batches, mechanism, key, claim."""

from __future__ import annotations

from dataclasses import dataclass

from rootnoise._check import RootnoiseError, integer, real
from rootnoise.factorization import factorize, mechanisms
from rootnoise.mechanism import Mechanism
from rootnoise.randomness import Key
from rootnoise.sampling import CyclicPoissonSampler, FixedCycleSampler, Sampler
from rootnoise.workload import SGD

# Fashion-MNIST, cnn, 4 epochs in batches of 500 at epsilon 8, one run each: bsr 0.856 (0.862 at
# lr 1), dpsgd 0.846 (0.828 at lr 1), identity 0.789 (0.815 at lr 0.25). More noise wants less: 0.1
# was best for bsr on the digits at epsilon 1.
DEFAULT_LR = 0.5


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run; `run` documents them.

    Raises:
        RootnoiseError: a value outside its range, whatever the data set.

    >>> RunConfig(mechanism="dpsgd", epsilon=8.0).sampling
    'poisson'
    """

    dataset: str = "fashion-mnist"
    model: str = "cnn"
    mechanism: str = "bsr"
    epsilon: float | None = None
    delta: float = 1e-5
    epochs: int = 4
    batch_size: int = 500
    lr: float = DEFAULT_LR
    momentum: float = 0.9
    decay: float = 1.0
    clip_norm: float = 1.0
    bands: int | None = None
    sampling: str = "auto"
    seed: int = 0
    insecure_noise_seed: int | None = None

    def __post_init__(self) -> None:
        known = ("none", "dpsgd", *mechanisms())
        if self.mechanism not in known:
            rule = f"one of {', '.join(known)}"
            raise RootnoiseError(f"mechanism must be {rule}, got {self.mechanism!r}")
        if self.sampling not in ("auto", "fixed-cycle", "poisson"):
            rule = "auto, fixed-cycle or poisson"
            raise RootnoiseError(f"sampling must be {rule}, got {self.sampling!r}")
        if self.sampling == "auto":
            kind = "poisson" if self.mechanism == "dpsgd" else "fixed-cycle"
            object.__setattr__(self, "sampling", kind)
        self._check_numbers()
        if self.mechanism == "dpsgd" and self.sampling != "poisson":
            rule = "poisson for mechanism dpsgd (identity takes both)"
            raise RootnoiseError(f"sampling must be {rule}, got {self.sampling}")
        if self.sampling == "poisson" and self.mechanism not in ("dpsgd", "identity"):
            # Cyclic Poisson sampling would amplify banded strategies, in a regime of its own.
            rule = f"fixed-cycle for mechanism {self.mechanism}"
            raise RootnoiseError(f"sampling must be {rule}, got poisson")

    def _check_numbers(self) -> None:
        if self.mechanism == "none":
            for name in ("epsilon", "bands", "insecure_noise_seed"):
                value = getattr(self, name)
                if value is not None:
                    raise RootnoiseError(f"{name} must be left out for mechanism none, got {value}")
        elif self.epsilon is None:
            raise RootnoiseError(f"epsilon must be given for mechanism {self.mechanism}, got none")
        else:
            real("epsilon", self.epsilon, above=0)
        real("delta", self.delta, above=0, below=1)
        integer("epochs", self.epochs, 1)
        integer("batch_size", self.batch_size, 1)
        real("lr", self.lr, above=0)
        real("momentum", self.momentum, at_least=0, below=1)
        real("decay", self.decay, above=0, at_most=1)
        real("clip_norm", self.clip_norm, above=0)
        if self.bands is not None:
            integer("bands", self.bands, 1)
        integer("seed", self.seed, 0, 2**63 - 1)
        if self.insecure_noise_seed is not None:
            integer("insecure_noise_seed", self.insecure_noise_seed, 0)


def make_sampler(config: RunConfig, n_examples: int) -> Sampler:
    """Return the run's batches: `epochs` times ceil(n_examples / batch_size) of them."""
    if config.sampling == "fixed-cycle":
        return FixedCycleSampler(n_examples, config.batch_size, config.epochs, config.seed)
    steps = config.epochs * -(-n_examples // config.batch_size)
    # Who was drawn is a secret, so the seed comes from OS entropy.
    return CyclicPoissonSampler(
        n_examples, config.batch_size, steps, seed=config.insecure_noise_seed
    )


def make_mechanism(config: RunConfig, sampler: Sampler) -> Mechanism | None:
    """Return the run's calibrated mechanism, None without privacy."""
    if config.mechanism == "none":
        return None
    name = "identity" if config.mechanism == "dpsgd" else config.mechanism
    workload = SGD(sampler.n_steps, config.momentum, config.decay)
    factorization = factorize(workload, sampler.participation, name, bands=config.bands)
    return Mechanism.calibrate(
        factorization,
        sampler.participation,
        epsilon=config.epsilon,
        delta=config.delta,
        clip_norm=config.clip_norm,
    )


def make_key(config: RunConfig) -> Key:
    """Return a fresh noise key, or the one of the insecure seed."""
    seed = config.insecure_noise_seed
    return Key.fresh() if seed is None else Key.from_seed(seed)


def claim(config: RunConfig, mechanism: Mechanism | None) -> str:
    """Return what the run may say about privacy."""
    if mechanism is None:
        return "No privacy is claimed: the run neither clips gradients nor adds noise."
    if config.insecure_noise_seed is not None:
        return (
            "No privacy is claimed: the noise is reproducible, from the insecure noise seed "
            f"{config.insecure_noise_seed}. With a secret key it would be: {mechanism.claim()}"
        )
    return mechanism.claim()
