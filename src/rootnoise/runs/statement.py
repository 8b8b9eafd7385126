"""A run's statement about its privacy: `privacy.json` for machines, `privacy.md` for people.

Both are written before the first step, and again at the end with the number of steps, the digest of
the ledger and the hash of every other file. Their last line, the seal, is a hash of all the rest.
If it is kept elsewhere, any later edit of the folder, however consistent, is detected.

The statement has no statistic of the run's own noise. Even the norm of Z alone would let an
adversary tell whether a person took part: subtract a guess of the sums from the release, and
compare the norm of what remains.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rootnoise
from rootnoise._check import RootnoiseError
from rootnoise.accounting import PrivacyCost
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import to_dict
from rootnoise.participation.ledger import Ledger
from rootnoise.participation.samplers import Sampler
from rootnoise.runs.config import RunConfig, claim

SCHEMA = 2
PACKAGES = ("numpy", "scipy", "torch", "opacus")
# Epsilon is stated at the run's delta, and at delta times each of these.
FACTORS = (100.0, 0.01)
# Up to this many steps a lower bound takes a few seconds; for more use `rootnoise factorize`.
MOST_STEPS = 1024
# The condition that the ledger cannot check; `PrivateOptimizer` probes it.
INDEPENDENCE = (
    "That each example's gradient depends on no other example of its batch is probed at steps 0, "
    "1, 2, 4, 8, ... of each start, before their release; a step that mixes examples ends the run."
)

Statement = dict[str, Any]


def statement(
    config: RunConfig, sampler: Sampler, mechanism: Mechanism | None, key: Key
) -> Statement:
    """Return the statement of a run before its first step."""
    stated: Statement = {
        "schema": SCHEMA,
        **_facts(config, sampler, mechanism, key),
        "steps_made": 0,
        "versions": versions(),
    }
    if mechanism is not None:
        stated["mechanism"] = described(mechanism)
    return sealed(stated)


def _facts(
    config: RunConfig, sampler: Sampler, mechanism: Mechanism | None, key: Key
) -> dict[str, Any]:
    """Return the facts about sampler, key and mechanism that are known before training."""
    facts = {
        "claim": claim(config, mechanism),
        "private": mechanism is not None and config.insecure_noise_seed is None,
        "sampler": batches(sampler),
    }
    if mechanism is None:
        return facts
    return facts | {"independence": INDEPENDENCE, "key_id": key.id}


def batches(sampler: Sampler) -> dict[str, Any]:
    """Return what a statement says about the batches.

    >>> from rootnoise.participation.samplers import FixedCycleSampler
    >>> batches(FixedCycleSampler(n_examples=10, batch_size=4, epochs=2, seed=0))
    {'type': 'FixedCycleSampler', 'n_examples': 10, 'batch_size': 4, 'n_steps': 6}
    """
    return {
        "type": type(sampler).__name__,
        "n_examples": sampler.n_examples,
        "batch_size": sampler.batch_size,
        "n_steps": sampler.n_steps,
    }


def strange(stated: Statement, *, private: bool) -> list[str]:
    """Return the names of entries that no statement has, or whose words are not its own.

    Of what the key's identifier and the versions say nothing else tells; `as_markdown` shows both,
    so they must not be sentences.

    >>> stated = {"schema": SCHEMA, "versions": {"torch": "any"}, "key_id": "0" * 16, "epsilon": 1}
    >>> strange(stated, private=True)
    ['epsilon']
    """
    names = {"schema", "claim", "private", "sampler", "steps_made", "versions", "files", "seal"}
    if private:
        names |= {"independence", "key_id", "mechanism", "ledger"}
    packages = {"rootnoise", "python", *PACKAGES}
    own = {
        "schema": stated["schema"] == SCHEMA,
        "key_id": re.fullmatch(r"[0-9a-f]{16}", str(stated.get("key_id", "0" * 16))),
        "versions": all(
            name in packages and re.fullmatch(r"[\w.+!-]{1,40}", str(version))
            for name, version in stated["versions"].items()
        ),
    }
    return sorted({*stated} - names | {name for name, said in own.items() if not said})


def refuse_other(
    stated: Statement, config: RunConfig, sampler: Sampler, mechanism: Mechanism | None, key: Key
) -> None:
    """Refuse a statement about other parts than those that a resumed run trains with.

    Raises:
        RootnoiseError: another claim, sampler, key or mechanism, or a mechanism beyond the budget.
    """
    facts = _facts(config, sampler, mechanism, key)
    for name, value in facts.items():
        if stated.get(name) != value:
            rule = f"privacy.json must state the {name} of the run, {value!r}"
            raise RootnoiseError(f"{rule}, got {stated.get(name)!r}")
    if mechanism is None:
        return
    described_as = stated.get("mechanism", {}).get("fingerprint")
    if described_as != mechanism.fingerprint:
        rule = f"privacy.json must describe mechanism.json, {mechanism.fingerprint:.16}"
        raise RootnoiseError(f"{rule}, got {described_as!s:.16}")
    assert config.epsilon is not None  # noqa: S101 - RunConfig refuses private runs without it
    ours = (config.delta, config.clip_norm)
    if mechanism.epsilon > config.epsilon or (mechanism.delta, mechanism.clip_norm) != ours:
        rule = (
            f"mechanism.json must keep epsilon <= {config.epsilon:g}, delta {config.delta:g} and "
            f"clip norm {config.clip_norm:g} of config.json"
        )
        got = f"{mechanism.epsilon:g}, {mechanism.delta:g} and {mechanism.clip_norm:g}"
        raise RootnoiseError(f"{rule}, got {got}")


def begun(stated: Statement) -> Statement:
    """Return the statement as it was before the first step, without what `completed` adds."""
    added = ("files", "ledger")
    rest = {name: value for name, value in stated.items() if name not in added}
    return sealed(rest | {"steps_made": 0})


def completed(stated: Statement, ledger: Ledger | None, files: Mapping[str, bytes]) -> Statement:
    """Return the statement of a run that has taken all its steps and left these files."""
    done = stated | {
        "steps_made": stated["sampler"]["n_steps"],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    if ledger is not None:
        done |= {"steps_made": ledger.t, "ledger": ledger.digest}
    return sealed(done)


def described(mechanism: Mechanism, *, with_bound: bool = True) -> dict[str, Any]:
    """Return unit, relation, participation, noise, and epsilon at several deltas."""
    sens, delta = mechanism.sensitivity, mechanism.delta
    others = [replace(mechanism, delta=f * delta).privacy for f in FACTORS if f * delta < 1]
    costs = sorted([mechanism.privacy, *others], key=lambda cost: -cost.delta)
    return {
        "name": mechanism.name,
        "fingerprint": mechanism.fingerprint,
        "unit": "one record",
        "relation": "add-or-remove" if mechanism.participation.amplified else "zero-out",
        "participation": to_dict(mechanism.participation),
        "n_steps": mechanism.n_steps,
        "bands": mechanism.strategy.bands,
        "clip_norm": mechanism.clip_norm,
        "sensitivity": asdict(sens),
        "noise_multiplier": mechanism.noise_multiplier,
        "noise_std": mechanism.noise_std,
        **({} if mechanism.trials is None else {"trials": mechanism.trials.to_dict()}),
        "privacy": [_upper(cost) for cost in costs],
        "error": error_of(mechanism) if with_bound else None,
    }


def _upper(cost: PrivacyCost) -> dict[str, Any]:
    """Return the fields of what is claimed; a lower bound is not, and older runs have none."""
    return {name: value for name, value in asdict(cost).items() if name != "lower_bound"}


def error_of(mechanism: Mechanism) -> dict[str, float | None]:
    """Return rmse, lower bound and gap; the last two are None where they would take long."""
    if mechanism.n_steps > MOST_STEPS:
        return {"rmse": mechanism.rmse, "lower_bound": None, "gap": None}
    bound = mechanism.certificate()
    return {
        "rmse": mechanism.rmse,
        "lower_bound": bound.value,
        "gap": bound.gap(mechanism.rmse),
    }


def versions() -> dict[str, str]:
    """Return the versions of the software that computed this."""
    own = {"rootnoise": rootnoise.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


def sealed(stated: Statement) -> Statement:
    """Return the statement with its seal: SHA-256 of all the rest as canonical JSON."""
    rest = {name: value for name, value in stated.items() if name != "seal"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return rest | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def read(path: Path) -> Statement:
    """Return the statement in a `privacy.json`, after checking its seal.

    Raises:
        RootnoiseError: the file cannot be read, or its seal is broken.
    """
    try:
        stated = json.loads(path.read_bytes())
    except OSError as reason:
        raise RootnoiseError(f"privacy.json must be readable, got {reason.strerror}") from None
    except ValueError as reason:
        raise RootnoiseError(f"privacy.json must hold JSON, got {reason}") from None
    if not isinstance(stated, dict) or stated.get("seal") != sealed(stated)["seal"]:
        raise RootnoiseError(f"privacy.json must be as it was sealed, got an edited one in {path}")
    return stated


def as_json(stated: Statement) -> bytes:
    """Return the content of `privacy.json`."""
    return json.dumps(stated, indent=1, allow_nan=False).encode() + b"\n"


def as_markdown(stated: Statement) -> bytes:
    """Return the content of `privacy.md`."""
    lines = ["# Privacy of this run", "", stated["claim"], ""]
    sampler, made = stated["sampler"], stated["steps_made"]
    rows = {
        "steps made": f"{made} of {sampler['n_steps']}",
        "batches": "{type}, {n_examples} records, {batch_size} a step".format(**sampler),
    }
    if "mechanism" in stated:
        lines += [stated["independence"], ""]
        lines += [*_table("delta | epsilon | exact | method", *_epsilons(stated)), ""]
        rows |= _rows(stated["mechanism"]) | {"key id": stated["key_id"]}
    if "ledger" in stated:
        rows["ledger digest"] = stated["ledger"]
    rows["computed by"] = ", ".join(f"{name} {v}" for name, v in stated["versions"].items())
    lines += _table("what | value", *(f"{name} | {value}" for name, value in rows.items()))
    if "ledger" in stated:
        lines += ["", LEDGER]
    return "\n".join([*lines, "", f"Seal: {stated['seal']}", ""]).encode()


LEDGER = (
    "`ledger.bin` is for the auditor. It says who took part in which step; under random sampling "
    "the epsilon above does not hold against whoever reads it. Leave it out of what you publish: "
    "its digest, salted, tells nothing."
)


def _epsilons(stated: Statement) -> list[str]:
    return [
        f"{cost['delta']:.6g} | {cost['epsilon']:.9g} | "
        f"{'yes' if cost['exact'] else 'upper bound'} | {cost['method']}"
        for cost in stated["mechanism"]["privacy"]
    ]


def _rows(mechanism: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of `described` in words, without the epsilons."""
    rows = {}
    for name, value in mechanism.items():
        if name == "privacy":
            continue
        inner = value.items() if isinstance(value, dict) else ((None, value),)
        rows[name.replace("_", " ")] = ", ".join(
            (f"{k}: " if k else "") + (f"{v:.9g}" if isinstance(v, float) else str(v))
            for k, v in inner
        )
    return rows


def _table(head: str, *rows: str) -> list[str]:
    rule = " | ".join("---" for _ in head.split(" | "))
    return [f"| {row} |" for row in (head, rule, *rows)]
