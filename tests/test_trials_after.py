"""`rootnoise tune`: what is refused, the finished folder, forgeries of it, and public data."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import trial_cases
from commands import refused
from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise.accounting import Trials
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.runs import inference, rebuilt, report, statement, trials
from rootnoise.runs.audit import audit
from rootnoise.runs.config import RunConfig, make_mechanism, make_sampler
from rootnoise.runs.data import load
from rootnoise.runs.run import run
from rootnoise.runs.trials import chosen_on_public, release_best
from rootnoise.runs.tuning import Tuning
from test_runs_audit import FORGERIES, change, failures, reseal
from test_runs_rebuilt import forge
from trial_cases import CONFIG, CYCLE, GRID, LINE, PUBLIC, SMALL

drawn = trial_cases.drawn
# Forged numbers of trials in config.json, which says 5; in text the second is the same.
CONFIGURED = {"trials of config": 2.0, "trials almost": 5.0000001}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "best"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "draw", lambda self: 3)
        # The forgeries set another clip norm than this point's.
        patch.setattr("secrets.choice", lambda points: points[-1])
        release_best(CONFIG, out)
    return out


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--lr", "0.1"], "grid must have at least 2 points, such as lr 0.1,0.2,0.5, got 1: train"),
        (["--lr", "0.1,0.1"], "grid's lr must be distinct, got [0.1, 0.1]"),
        (["--lr", "0.1,much"], "lr must be numbers with commas between, got '0.1,much'"),
        (["--lr", "0.1,-1"], "lr must be a finite number > 0, got -1.0"),
        (["--lr", "0.1,nan"], "grid's lr must be a finite number, got nan"),
        (["--mechanism", "none"], "epsilon must be left out for mechanism none, got 4.0"),
        (["--mechanism", "dpsgd"], "sampling must be fixed-cycle for trials (identity is dpsgd's"),
        (["--sampling", "balls-in-bins"], "sampling must be fixed-cycle for trials"),
        (["--mechanism", "auto", "--sampling", "poisson"], "sampling must be fixed-cycle for"),
        (["--insecure-noise-seed", "3"], "insecure_noise_seed must be left out for trials, each"),
        (["--trials", "1"], "trials: mean must be a finite number >= 1.01"),
        (["--trials", "1001"], "trials must be a finite number <= 1000, got 1001.0"),
        (["--trials-shape", "few"], "trials: shape must be a number, got 'few'"),
        (["--trials", "5", "--public", "mnist"], "give exactly one of trials and public, got"),
        (["--trials-shape", "2", "--public", "mnist"], "trials-shape must come with --trials"),
        (["--public-dir", "a"], "public_dir must come with public, got a alone"),
        (["--public", "digits"], "public must be another data set than the private one, got dig"),
        (
            ["--dataset", "mnist", "--public", "mnist-5k"],
            "public must be another data set than the",
        ),
        (["--device", "cuda:99"], "device must be one that torch finds here ("),
        (["--batch-size", "5000"], "batch_size must be in [1, n_examples=1442], got 5000"),
        (["--weight-decay", "0,100"], "weight_decay must be < 2 (1 + momentum) / lr"),
    ],
)
def test_what_cannot_be_tuned_is_one_line_before_anything_is_drawn(
    call, tmp_path, monkeypatch, options, line
):
    def draw(self):
        raise AssertionError

    monkeypatch.setattr(Trials, "draw", draw)
    base = LINE[:-4] if options[0] == "--lr" else LINE
    assert line in refused(call, *base, *options, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_one_process_tunes(call, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for more in ([], ["--public", PUBLIC]):
        line = refused(call, *LINE, *more, "--out", tmp_path / "out")
        assert "tuning must be in one process, got one that a launcher has started" in line
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_no_tuning_are_refused(tmp_path):
    plain = dataclasses.replace(CONFIG, tuning=None)
    with pytest.raises(RootnoiseError, match=r"^tuning must have private trials, got none"):
        release_best(plain, tmp_path / "out")
    with pytest.raises(RootnoiseError, match=r"^tuning must name public data, got none"):
        chosen_on_public(CONFIG)
    with pytest.raises(RootnoiseError, match=r"^run must be one run, and the best of several"):
        run(CONFIG, tmp_path / "out")
    with pytest.raises(RootnoiseError, match=r"^lr must be one that was tried, 0.05, 0.2, got 0.1"):
        dataclasses.replace(CONFIG, lr=0.1)
    none = {"mechanism": "none", "epsilon": None}
    with pytest.raises(RootnoiseError, match=r"^mechanism must be private for trials that are pai"):
        dataclasses.replace(CONFIG, **none)


def test_trials_of_unlike_noise_are_refused(monkeypatch, tmp_path):
    mechanism = trials._points(CONFIG, 1442)[0].mechanism
    assert mechanism is not None
    other = dataclasses.replace(mechanism, noise_multiplier=1.0)
    with pytest.raises(RootnoiseError, match=r"^trials must have one noise multiplier, got 2"):
        trials._refuse_unlike([mechanism, other])
    calibrate = make_mechanism

    def less(config, sampler):
        found = calibrate(config, sampler)
        assert found is not None
        factor = 0.9 if config.momentum else 1.0
        return dataclasses.replace(found, noise_multiplier=factor * found.noise_multiplier)

    monkeypatch.setattr(trials, "make_mechanism", less)
    tuning = Tuning({"momentum": [0.0, 0.9]}, trials=5.0)
    config = dataclasses.replace(CONFIG, momentum=0.0, tuning=tuning)
    with pytest.raises(RootnoiseError, match=r"^trials must have one noise multiplier"):
        release_best(config, tmp_path / "out")


def test_each_workload_of_the_grid_has_its_own_factorization():
    grid = {"momentum": [0.0, 0.9], "weight_decay": [0.0, 0.01], "lr": [0.1, 0.2]}
    tuning = Tuning(grid, trials=5.0)
    config = RunConfig(**SMALL, momentum=0.0, lr=0.1, tuning=tuning)
    points = trials._points(config, 1442)
    assert len(points) == 8
    for point in points:
        expected = make_mechanism(point.config, make_sampler(point.config, 1442))
        assert point.mechanism.fingerprint == expected.fingerprint


# ------------------------------------------------------------------------------------- afterwards


def test_a_tuned_run_is_audited_reported_and_used_but_not_resumed(call, tuned, tmp_path):
    assert call("audit", tuned)[0] == 0
    names = {check.name for check in audit(tuned)}
    assert {"number of trials", "epsilon at delta 1e-05", "ledger keeps the participation"} < names
    status, shown, _ = call("predict", tuned, "--json")
    assert status == 0
    saved = json.loads((tuned / "result.json").read_text())
    assert json.loads(shown)["accuracy"] == saved["accuracy"]
    assert "got a finished one" in refused(call, "train", "--resume", "--out", tuned)
    (tuned / "config.json").read_bytes()
    page = report.page(report.read(tuned))
    assert "rootnoise tune --dataset digits" in page
    assert "--lr 0.05,0.2" in page
    assert "<code>rootnoise tune --config run.toml" in page
    assert "that nobody saw how long the tuning took" in page
    assert "seconds of training" not in page
    assert call("compare", tuned, tuned, "--out", tmp_path / "both.html")[0] == 0
    assert "(4, 1e-05)-differential privacy" in (tmp_path / "both.html").read_text()


def test_attacks_are_on_one_trial(call, tuned):
    line = ("audit", tuned, "--empirical", "--canaries", "300", "--json")
    checks = {check["name"]: check for check in json.loads(call(*line)[1])["checks"]}
    stated = checks["attack on one trial: distinguishing"]["stated"]
    mechanism = Mechanism.load(tuned / "mechanism.json")
    alone = dataclasses.replace(mechanism, trials=None).epsilon
    assert stated.startswith(f"epsilon <= {alone:.6g}")
    assert alone < mechanism.epsilon


def test_a_file_of_a_tuning_makes_it_again_and_is_no_run(call, tuned, tmp_path, drawn):
    path = tuned / "run.toml"
    line = refused(call, "train", "--config", path, "--out", tmp_path / "out")
    assert (
        "run.toml must be of one run, got a tuning's lr: rootnoise tune --config takes it" in line
    )
    drawn(1)
    status, _, err = call("tune", "--config", path, "--out", tmp_path / "out", "--json")
    assert (status, err) == (0, "")
    assert (tmp_path / "out/run.toml").read_bytes() == path.read_bytes()
    words = report.command(inference.settings(tuned)).split()[1:-1]
    assert call(*words, tmp_path / "more", "--json")[0] == 0
    assert (tmp_path / "more/run.toml").read_bytes() == path.read_bytes()


def test_an_unfinished_release_is_not_resumed(call, tuned, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "privacy.json", "mechanism.json", "metrics.jsonl"):
        (out / name).write_bytes((tuned / name).read_bytes())
    assert "checkpoint.pt must be readable" in refused(call, "train", "--resume", "--out", out)
    [said] = [check.found for check in audit(out) if check.name == "finished"]
    assert said == "a tuning that was stopped while its best trial was written"


@pytest.mark.parametrize("case", [*FORGERIES, "fewer trials", "no trials", *CONFIGURED])
def test_a_forged_tuning_is_refuted(tuned, tmp_path, case):
    """Each edit is made consistent by hashes and seal; only recomputing finds it."""
    out = tmp_path / "out"
    out.mkdir()
    for file in tuned.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    (out / "ledger.bin").chmod(0o600)
    assert failures(out) == []
    name = "number of trials"
    if case in FORGERIES:
        edit, name = FORGERIES[case]
        change(out, *edit)
    elif case in CONFIGURED:
        change(out, "config.json", "tuning", "trials", CONFIGURED[case])
    else:
        other = None if case == "no trials" else Trials(2.0)
        made = dataclasses.replace(Mechanism.load(out / "mechanism.json"), trials=other)
        made.save(out / "mechanism.json", overwrite=True)
        stated = json.loads((out / "privacy.json").read_text())
        described = statement.described(made, with_bound=False)
        stated["mechanism"] = described | {"error": stated["mechanism"]["error"]}
        (out / "privacy.json").write_text(json.dumps(stated))
    reseal(out)
    found = failures(out)
    assert any(check.startswith(name) for check in found), found


def test_settings_of_a_tuning_are_held_to_what_ran(tuned, tmp_path):
    """But for what was tried beside the point that won."""
    grid = {"tuning": dataclasses.asdict(CONFIG.tuning) | {"grid": GRID | {"lr": [0.07, 0.2]}}}
    others = {"seed": 1, "bands": 2, "momentum": 0.5, "epochs": 3, "weight_decay": 0.1}
    for i, other in enumerate([grid, *({name: value} for name, value in others.items())]):
        out = shutil.copytree(tuned, tmp_path / f"{i}")
        forge(out, **other)
        found = failures(out)
        assert bool(found) == (other is not grid), other
        assert "readable" not in found
    assert "tuning" in rebuilt.stated_alone(inference.settings(tuned))


# ------------------------------------------------------------------------------------- public data


def test_tuning_on_public_data_costs_nothing_and_says_which(call, tmp_path):
    out = tmp_path / "out"
    status, shown, err = call(*LINE, "--public", PUBLIC, "--out", out, "--json")
    assert (status, err) == (0, "")
    result = json.loads(shown)
    assert [(row["lr"], row["clip_norm"]) for row in result["tried"]] == [
        (0.05, 0.5),
        (0.05, 1.0),
        (0.2, 0.5),
        (0.2, 1.0),
    ]
    best = max(result["tried"], key=lambda row: row["accuracy"])
    assert (result["lr"], result["clip_norm"]) == (best["lr"], best["clip_norm"])
    mechanism = Mechanism.load(out / "mechanism.json")
    assert mechanism.trials is None
    assert result["noise_multiplier"] == accounting.noise_multiplier(CYCLE, 8, 4.0, 1e-5)
    assert "the best of a random number" not in result["claim"]
    said = f"Chosen by trials on {PUBLIC}: lr among 0.05, 0.2; clip norm among 0.5, 1. That these"
    assert said in result["claim"]
    assert failures(out) == []
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_trials_on_public_data_do_not_look_at_the_private_ones(monkeypatch):
    loaded = []

    def spy(name, folder):
        loaded.append((name, folder))
        return load(name, None)

    monkeypatch.setattr(trials, "load", spy)
    tuning = Tuning(GRID, public=PUBLIC, public_dir="somewhere")
    config = dataclasses.replace(CONFIG, dataset="mnist", insecure_noise_seed=3, tuning=tuning)
    keys, fresh = [], Key.fresh

    def spied(cls):
        keys.append(fresh())
        return keys[-1]

    monkeypatch.setattr(Key, "fresh", classmethod(spied))
    chosen = chosen_on_public(config)
    assert loaded == [(PUBLIC, Path("somewhere"))]
    assert chosen.tuning == tuning
    assert len({key.id for key in keys}) == 4


def test_the_private_run_of_a_public_tuning_is_resumed(call, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rootnoise.runs.run._to_the_end", interrupt)
        status, shown, err = call(*LINE, "--public", PUBLIC, "--out", out)
    line = f"stopped: rootnoise train --resume --out {out} goes on\n"
    assert (status, shown, err) == (130, "", line)
    assert call("train", "--resume", "--out", out, "--json")[0] == 0
    assert failures(out) == []
    assert f"Chosen by trials on {PUBLIC}" in (out / "claim.txt").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(trials, "chosen_on_public", interrupt)
        status, _, err = call(*LINE, "--public", PUBLIC, "--out", tmp_path / "b")
    assert (status, err) == (130, "stopped: before the first step, nothing is kept\n")


def test_what_was_tried_on_public_data_is_shown_as_a_table(call, tmp_path):
    status, shown, _ = call(*LINE, "--public", PUBLIC, "--out", tmp_path / "out")
    assert status == 0
    assert f"tried on {PUBLIC}, which costs nothing" in shown
    assert shown.count("0.05") >= 2


def test_a_planned_mechanism_is_not_amplified(tmp_path, drawn):
    drawn(1)
    tuning = Tuning({"lr": [0.1, 0.2]}, trials=5.0)
    config = RunConfig(**SMALL, mechanism="auto", lr=0.1, tuning=tuning)
    assert config.sampling == "fixed-cycle"
    result = release_best(config, tmp_path / "out")
    assert (result.sampling, result.mechanism != "auto") == ("fixed-cycle", True)
    assert failures(tmp_path / "out") == []
