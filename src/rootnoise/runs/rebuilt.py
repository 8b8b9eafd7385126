"""The audit of a run's settings: all that `train` makes of them, made again and held to what ran.

Only the seal vouches for config.json, and whoever writes a folder can seal it anew. What ran is in
other files: the mechanism and its workload, the ledger, the weights. So workload, strategy, batches
and budget are made again from the settings, and must be those. A few settings leave no trace that
an audit could hold them to: `stated_alone` names them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import numpy as np

from rootnoise.factorization import Factorization
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import to_dict
from rootnoise.participation.ledger_file import Journal, pack
from rootnoise.participation.samplers import Sampler
from rootnoise.runs.checks import Check, fields, same
from rootnoise.runs.config import RunConfig, make_factorization, make_sampler
from rootnoise.runs.statement import Statement, batches

# No number of the privacy claim depends on them, and no other file holds them to what ran.
ALONE = ("average", "data_dir", "dataset", "device", "micro_batch_size", "model")
# Of a run without privacy nothing is claimed; these say what was drawn.
DRAWN = ("batch_size", "epochs", "mechanism", "sampling")
# Relative difference allowed between a strategy and the one made anew.
STRATEGY = 1e-6
# A search for many numbers ends elsewhere on another processor: by up to 0.9 %, and 2e-5 of the
# error, in eight runs of bandmf with other kernels of OpenBLAS. As good a one, not far off, passes.
SEARCHED = ("bandmf", "blt", "column-normalised", "dense", "epoch-scaled")
NEARBY, AS_GOOD = 0.05, 2e-4
# Part of epsilon that a calibration spends at least: by a formula, or on grids and by samples.
EXACT, AMPLIFIED = 1 - 1e-6, 0.9


def stated_alone(config: RunConfig) -> list[str]:
    """Return the settings that an audit can only repeat, sorted.

    >>> stated_alone(RunConfig(epsilon=8.0))[-3:]
    ['lr', 'micro_batch_size', 'model']
    """
    if config.mechanism == "none":
        return sorted({field.name for field in fields_of(config)} - {*DRAWN, "tuning"})
    unseen = list(ALONE)
    if not config.weight_decay:  # by which the workload multiplies it
        unseen.append("lr")
    if config.sampling != "fixed-cycle":  # else it fixes the batches
        unseen.append("seed")
    if config.tuning is not None:  # but for the value chosen and the number of private trials
        unseen.append("tuning")
    return sorted(unseen)


def settings(
    config: RunConfig, stated: Statement, mechanism: Mechanism | None, ledger: Path | None
) -> Iterator[Check]:
    """Yield the checks of a run's settings.

    Args:
        config: the settings.
        stated: the run's statement, for the number of examples and the key's identifier.
        mechanism: as its file has it; None without privacy.
        ledger: the file of a finished run.

    Raises:
        RootnoiseError: settings of which no run can be made.
    """
    sampler = make_sampler(config, stated["sampler"]["n_examples"])
    yield _made("sampler", stated["sampler"], batches(sampler))
    if mechanism is not None:
        yield _made(
            "participation", to_dict(mechanism.participation), to_dict(sampler.participation)
        )
        yield _budget(config, mechanism)
        if config.insecure_noise_seed is not None:
            yield same("key", stated["key_id"], Key.from_seed(config.insecure_noise_seed).id)
        if ledger is not None and _public(config):
            yield _seed(config, sampler, ledger)
        made = make_factorization(config, sampler)
        yield _made("workload", mechanism.workload.to_dict(), made.workload.to_dict())
        yield _strategy(made, mechanism)
    yield Check("stated alone", True, ", ".join(stated_alone(config)), "in no other file")


def _made(name: str, stated: Mapping[str, Any], found: Mapping[str, Any]) -> Check:
    return fields(f"{name} follows from config.json", stated, found)


def _public(config: RunConfig) -> bool:
    """Whether the settings fix the batches; where sampling amplifies, their seed is a secret."""
    return config.sampling == "fixed-cycle" or config.insecure_noise_seed is not None


def _budget(config: RunConfig, m: Mechanism) -> Check:
    """Hold epsilon to what was to be spent: not above it, and as near as a calibration comes."""
    assert config.epsilon is not None  # noqa: S101 - RunConfig refuses private runs without it
    least = (AMPLIFIED if m.participation.amplified else EXACT) * config.epsilon
    held = least <= m.epsilon <= config.epsilon
    return Check("budget", held, f"{least:.9g} to {config.epsilon:.9g}", f"{m.epsilon:.9g}")


def _seed(config: RunConfig, sampler: Sampler, ledger: Path) -> Check:
    """Draw every batch again."""
    records = enumerate(Journal(ledger).records())
    n = sampler.n_steps
    other = next((t for t, r in records if t >= n or r != pack(sampler.batch(t))), None)
    found = "the ledger's batches" if other is None else f"another batch at step {other}"
    cycle = config.sampling == "fixed-cycle"
    stated = config.seed if cycle else config.insecure_noise_seed
    return Check("seed", other is None, f"{stated}", found)


def _strategy(made: Factorization, m: Mechanism) -> Check:
    """Compare names, numbers of bands, and what both do."""
    ours, theirs, alike = made.strategy, m.strategy, _alike(made, m)
    held = made.mechanism == m.name and ours.bands == theirs.bands and alike
    found = f"{'' if alike else 'another, '}{made.mechanism} of {ours.bands} bands"
    said = f"{m.name} of {theirs.bands} bands"
    return Check("strategy follows from config.json", held, said, found)


def _alike(made: Factorization, m: Mechanism) -> bool:
    """Whether both strategies do the same to two random vectors, or nearly, and are as good."""
    ours, theirs = made.strategy, m.strategy
    if ours.n_steps != theirs.n_steps:
        return False
    u = np.random.default_rng(0).standard_normal((theirs.n_steps, 2))
    x, y = ours.apply(u), theirs.apply(u)
    off = float((np.linalg.norm(x - y, axis=0) / np.linalg.norm(y, axis=0)).max())
    if off <= STRATEGY or made.mechanism not in SEARCHED:
        return off <= STRATEGY
    return off <= NEARBY and math.isclose(made.rmse(m.participation), m.rmse, rel_tol=AS_GOOD)
