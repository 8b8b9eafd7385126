"""Every setting of a run is held to what ran, or named as one that no other file tells."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from rootnoise._check import RootnoiseError
from rootnoise.causal import Dense
from rootnoise.factorization import Factorization, mechanisms
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.runs import rebuilt, settings_file
from rootnoise.runs.audit import REPEATED, audit
from rootnoise.runs.config import RunConfig, claim, make_mechanism, make_sampler
from rootnoise.runs.folder import as_json
from rootnoise.runs.run import run
from rootnoise.runs.statement import batches
from rootnoise.runs.tuning import Tuning
from test_runs import SMALL, with_
from test_runs_audit import change, failures, first_failure, reseal

N = 1442  # examples of the digits
WARM = {"schedule": "linear", "warmup": 3, "final": 0.1}
BINS = {"sampling": "balls-in-bins", "epochs": 1, "mechanism": "identity"}
APART = {"sampling": "min-sep-poisson", "separation": 4, "epochs": 1}
BUFFERED = {"mechanism": "blt", "buffers": 1, "epochs": 1, "batch_size": 20, "momentum": 0.0}
SEEDED = {"mechanism": "dpsgd", "insecure_noise_seed": 3}
PAID = {"tuning": Tuning({"lr": [0.1, 0.2]}, trials=5.0)}
# For each setting: those of a run, another value, and the check that fails.
CASES = [
    ("bands", {}, 7, "strategy"),
    ("bands", {"bands": "auto"}, 3, "strategy"),
    ("buffers", BUFFERED, 2, "strategy"),
    ("gamma", {"mechanism": "bsr-gamma", "gamma": 0.5}, 0.501, "strategy"),
    ("gamma", {"mechanism": "bsr-gamma"}, 0.1, "strategy"),
    ("lam", {"mechanism": "lambda-cgd", "lam": 0.5}, 0.501, "strategy"),
    ("base", {"mechanism": "epoch-scaled"}, "bandmf", "strategy"),
    ("estimator", {"mechanism": "tree", "estimator": "full"}, "online", "strategy"),
    ("tolerance", {"mechanism": "dense"}, 0.1, "strategy"),
    ("contraction", {"contraction": 1.0}, None, "strategy"),
    ("mechanism", {}, "bisr", "strategy"),
    ("epsilon", {}, 4.001, "budget"),
    ("epsilon", {}, 3.999, "budget"),
    ("epsilon", {"mechanism": "dpsgd"}, 5.0, "budget"),
    ("epochs", {}, 4, "sampler"),
    ("epochs", BINS, 2, "participation"),
    ("batch_size", {}, 201, "sampler"),
    ("batch_size", {"mechanism": "dpsgd"}, 201, "participation"),
    ("momentum", {}, 0.91, "workload"),
    ("decay", {}, 0.99, "workload"),
    ("weight_decay", {}, 0.01, "workload"),
    ("lr", {"weight_decay": 0.01}, 0.21, "workload"),
    ("schedule", WARM, "cosine", "workload"),
    ("warmup", WARM, 4, "workload"),
    ("final", WARM, 0.11, "workload"),
    ("sampling", {"mechanism": "identity"}, "poisson", "sampler"),
    ("sampling", BINS, "fixed-cycle", "participation"),
    ("groups", {"sampling": "poisson", "groups": 4}, 5, "participation"),
    ("separation", APART, 3, "participation"),
    ("insecure_noise_seed", SEEDED, 4, "key"),
]
# Those whose traces are in a whole folder alone, and those that a run's settings never have.
FOLDER, REFUSED = {"clip_norm", "delta", "seed", "tuning"}, {"memory_rows"}


def checked(config, ran):
    """The checks that fail for these settings, of the mechanism and the sampler that ran."""
    sampler = make_sampler(ran, N)
    mechanism = make_mechanism(ran, sampler)
    key = Key.from_seed(ran.insecure_noise_seed or 0)
    stated = {"sampler": batches(sampler), "key_id": key.id}
    return [c.name for c in rebuilt.settings(config, stated, mechanism, None) if not c.held]


@pytest.mark.parametrize(("name", "of", "other", "check"), CASES)
def test_a_setting_of_another_run_is_refuted(name, of, other, check):
    ran = with_(**of)
    assert checked(ran, ran) == []
    found = checked(dataclasses.replace(ran, **{name: other}), ran)
    assert any(each.startswith(check) for each in found), found
    assert name not in rebuilt.stated_alone(ran)


@pytest.mark.parametrize("name", ["bandmf", "bsr"])
def test_a_search_may_end_elsewhere_if_it_is_as_good(name):
    """As on another processor; what has a formula may not."""
    ran = with_(mechanism=name)
    mechanism = make_mechanism(ran, make_sampler(ran, N))
    assert mechanism is not None
    c = mechanism.strategy.dense()
    off = np.random.default_rng(0).standard_normal(c.shape)

    def alike(other):
        made = Factorization(name, mechanism.workload, Dense(other))
        return rebuilt._alike(made, mechanism)

    assert alike(c * (1 + 1e-8 * off))
    turned = c * (1 + 3e-3 * off)
    turned *= np.linalg.norm(c, axis=0) / np.linalg.norm(turned, axis=0)
    assert alike(turned) == (name == "bandmf")
    assert not alike(c * (1 + 0.01 * off))  # near, and worse
    assert not alike(1.1 * c)  # as good, and elsewhere
    assert set(rebuilt.SEARCHED) < set(mechanisms())


def test_every_setting_is_judged():
    """A new one must be held to something, or be named as one that is stated alone."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    tried = {name for name, *_ in CASES} | FOLDER | REFUSED
    assert names == tried | set(rebuilt.ALONE)
    assert not tried & set(rebuilt.ALONE)
    assert {*rebuilt.DRAWN, *REPEATED} <= names


def test_memory_rows_of_a_plan_are_refused():
    with pytest.raises(RootnoiseError, match=r"^memory_rows must be left out for mechanism bsr"):
        with_(memory_rows=8)


def test_what_is_stated_alone_depends_on_the_run():
    alone = {*rebuilt.ALONE, "lr"}
    assert set(rebuilt.stated_alone(SMALL)) == alone
    assert set(rebuilt.stated_alone(with_(weight_decay=0.01))) == alone - {"lr"}
    assert set(rebuilt.stated_alone(with_(mechanism="dpsgd"))) == alone | {"seed"}
    assert set(rebuilt.stated_alone(with_(**SEEDED))) == alone | {"seed"}
    assert set(rebuilt.stated_alone(with_(**PAID))) == alone | {"tuning"}
    none = set(rebuilt.stated_alone(with_(mechanism="none", epsilon=None)))
    assert {"lr", "momentum", "seed", "clip_norm"} < none
    assert not none & {"mechanism", "epochs", "batch_size", "sampling"}


# ----------------------------------------------------------------------------------- whole folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("rebuilt") / "run"
    run(SMALL, out)
    return out


def forge(out, **settings):
    """State other settings in every file that repeats them, and seal it all anew."""
    fields = json.loads((out / "config.json").read_text()) | settings
    (out / "config.json").write_bytes(as_json(fields))
    config = RunConfig(**fields)
    (out / "run.toml").write_bytes(settings_file.text(vars(config)))
    for name in REPEATED:
        change(out, "result.json", name, getattr(config, name))
    private = (out / "mechanism.json").exists()
    said = claim(config, Mechanism.load(out / "mechanism.json") if private else None)
    (out / "claim.txt").write_text(f"{said}\n")
    for name in ("privacy.json", "result.json"):
        change(out, name, "claim", said)
    reseal(out)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


PLAIN = [(name, other) for name, of, other, _ in CASES if not of]


@pytest.mark.parametrize(
    ("name", "other"),
    [*PLAIN, ("seed", 1), ("clip_norm", 1.001), ("delta", 1.1e-5), ("insecure_noise_seed", 3)],
)
def test_a_forger_who_seals_anew_is_refuted(copy, name, other):
    forge(copy, **{name: other})
    assert first_failure(copy) not in (None, "seal", "readable")


def test_what_is_stated_alone_may_be_anything_and_the_audit_says_so(copy):
    other = {"average": 0.5, "dataset": "mnist", "lr": 0.3, "micro_batch_size": 7, "model": "cnn"}
    other |= {"data_dir": "/elsewhere", "device": "cuda"}
    assert set(other) == set(rebuilt.stated_alone(SMALL))
    forge(copy, **other)
    assert failures(copy) == []
    [alone] = [check for check in audit(copy) if check.name == "stated alone"]
    assert alone.stated == ", ".join(sorted(other))
    change(copy, "result.json", "lr", 0.1)  # and every file says the same
    reseal(copy)
    assert failures(copy) == ["result.json agrees"]


def test_a_run_without_privacy_says_how_many_steps_it_took(tmp_path):
    out = tmp_path / "run"
    run(with_(mechanism="none", epsilon=None, epochs=1), out)
    assert failures(out) == []
    forge(out, epochs=2)
    assert failures(out) == ["sampler follows from config.json"]
    forge(out, epochs=1)
    change(out, "result.json", "lr", 0.1)
    reseal(out)
    assert failures(out) == ["result.json agrees"]


def test_batches_of_another_seed_are_found_at_their_step(copy):
    forge(copy, seed=5)
    [check] = [check for check in audit(copy) if not check.held]
    assert (check.name, check.stated, check.found) == ("seed", "5", "another batch at step 0")


def test_batches_are_drawn_again_where_their_seed_is_no_secret(tmp_path):
    for seed in (None, 3):
        out = tmp_path / f"{seed}"
        run(with_(mechanism="dpsgd", epochs=1, insecure_noise_seed=seed), out)
        assert failures(out) == []
        assert ("seed" in {check.name for check in audit(out)}) == (seed is not None)
