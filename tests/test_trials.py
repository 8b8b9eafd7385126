"""`rootnoise tune`: what the best trial leaves, that others leave nothing, and what it costs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

import training_runs
from commands import refused
from processes import outcome
from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise._files import lock
from rootnoise.accounting import Trials, tuned_noise_multiplier, tuned_privacy_cost
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import FixedCycle
from rootnoise.runs import inference, report, statement, trials
from rootnoise.runs.audit import audit
from rootnoise.runs.config import RunConfig, make_mechanism, make_sampler
from rootnoise.runs.data import load
from rootnoise.runs.run import run
from rootnoise.runs.trials import _Point, chosen_on_public, release_best
from rootnoise.runs.tuning import Tuning, marker
from test_runs import PRIVATE
from test_runs_audit import FORGERIES, change, failures, reseal

GRID = {"lr": [0.05, 0.2], "clip_norm": [0.5, 1.0]}
SMALL = {"dataset": "digits", "model": "logistic", "epsilon": 4.0, "epochs": 2, "batch_size": 400}
CONFIG = RunConfig(**SMALL, lr=0.05, clip_norm=0.5, tuning=Tuning(GRID, trials=5.0))
LINE = ["tune", "--dataset", "digits", "--model", "logistic", "--epsilon", "4", "--epochs", "2"]
LINE += ["--batch-size", "400", "--lr", "0.05,0.2", "--clip-norm", "0.5,1"]
CYCLE = FixedCycle(4, 2)  # ceil(1442 / 400)


def other_digits():
    """Public data of the same kind: half of the digits, which stand for somebody else's."""
    digits = load("digits")
    parts = (digits.train_inputs, digits.train_labels, digits.test_inputs, digits.test_labels)
    return tuple(part[::2] for part in parts)


PUBLIC = f"{__name__}:other_digits"


@pytest.fixture
def drawn(monkeypatch):
    """Let the number of trials be known, and keep a copy of each trial."""
    made = []
    train = _Point.train

    def kept(self, data):
        made.append((self, train(self, data), time.time()))
        return made[-1][1]

    def number(k):
        monkeypatch.setattr(Trials, "draw", lambda self: k)
        monkeypatch.setattr(_Point, "train", kept)
        return made

    return number


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "best"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "draw", lambda self: 3)
        release_best(CONFIG, out)
    return out


# ------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("shape", [1.0, 0.0, "poisson"])
def test_the_claim_is_that_of_private_selection_to_the_last_digit(tmp_path, drawn, shape):
    tuning = Tuning(GRID, trials=5.0, trials_shape=shape)
    number = tuning.number
    drawn(1)
    result = release_best(dataclasses.replace(CONFIG, tuning=tuning), tmp_path / "out")
    sigma = tuned_noise_multiplier(CYCLE, 8, 4.0, 1e-5, number)
    assert result.noise_multiplier == sigma
    assert result.epsilon == tuned_privacy_cost(CYCLE, 8, sigma, 1e-5, number).epsilon <= 4
    assert result.epsilon > 1.2 * accounting.privacy_cost(CYCLE, 8, sigma, 1e-5).epsilon
    stated = json.loads((tmp_path / "out/privacy.json").read_text())
    for cost in stated["mechanism"]["privacy"]:
        whole = tuned_privacy_cost(CYCLE, 8, sigma, cost["delta"], number)
        assert cost["epsilon"] == whole.epsilon
        assert not cost["exact"]
    assert stated["mechanism"]["trials"] == number.to_dict()
    for said in (result.claim, stated["claim"], (tmp_path / "out/privacy.md").read_text()):
        assert f"the best of a random number of trials ({number})" in said
        assert "Drawn at random in each trial: lr among 0.05, 0.2; clip norm among 0.5, 1." in said
        assert "Trials were scored on the test part of digits" in said
    assert failures(tmp_path / "out") == []


# ------------------------------------------------------------------------------- what is released


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_best_trial_is_released_whole(tmp_path, drawn, k):
    out, made = tmp_path / "out", drawn(k)
    result = release_best(CONFIG, out)
    assert len(made) == k
    assert {file.name for file in out.iterdir()} == PRIVATE
    points = [point for point, _, _ in made]
    scores = [trial.trained.history[-1]["test_accuracy"] for _, trial, _ in made]
    assert result.accuracy == max(scores)
    best = max(range(k), key=lambda i: (scores[i], -points[i].place))
    config, trial = points[best].config, made[best][1]
    found = torch.load(out / "model.pt", weights_only=True)
    for name, weight in trial.trained.weights.items():
        assert torch.equal(found[name], weight)
    mechanism = Mechanism.load(out / "mechanism.json")
    assert (result.lr, result.clip_norm) == (config.lr, config.clip_norm)
    assert (mechanism.clip_norm, mechanism.trials) == (config.clip_norm, Trials(5.0))
    assert statement.read(out / "privacy.json")["key_id"] == trial.key.id
    assert len({trial.key.id for _, trial, _ in made}) == k
    assert {point.mechanism.noise_multiplier for point in points} == {mechanism.noise_multiplier}
    assert failures(out) == []
    assert not marker(out).exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_losers_leave_nothing(call, tmp_path, drawn):
    """Neither key nor weights nor score nor name nor time of a trial that is not released."""
    out, made = tmp_path / "out", drawn(6)
    status, shown, err = call(*LINE, "--trials", "5", "--out", out, "--json")
    assert (status, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    files = contents(tmp_path)
    scores = [trial.trained.history[-1]["test_accuracy"] for _, trial, _ in made]
    best = json.loads(shown)["accuracy"]
    everything = b"\n".join([*files.values(), shown.encode(), *(str(f).encode() for f in files)])
    losers = [trial for _, trial, _ in made if trial.trained.history[-1]["test_accuracy"] < best]
    assert len(losers) > 2
    own = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["test_accuracy"]
    for trial in losers:
        for entry in trial.trained.history:
            if entry["test_accuracy"] not in (best, own):
                assert f"{entry['test_accuracy']}".encode() not in everything
        for weight in trial.trained.weights.values():
            assert weight.numpy().tobytes() not in everything
        for secret in (trial.key.id.encode(), trial.trained.ledger.digest.encode()):
            assert secret not in everything
    for _, trial, _ in made:  # the winner's too: whoever has it can subtract the noise
        assert trial.key.secret.hex().encode() not in everything
        assert trial.key.secret not in everything
    assert scores.index(best) < len(scores)
    last = max(when for _, _, when in made)
    assert all(path.stat().st_mtime >= last - 0.01 for path in (out, *files))
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {entry["seconds"] for entry in history} == {None}
    assert json.loads(shown)["seconds"] is None


def test_nothing_that_is_left_depends_on_the_number_of_trials(call, tmp_path, drawn):
    seen = []
    for k in (1, 4):
        drawn(k)
        out = tmp_path / f"out{k}"
        status, shown, err = call(*LINE, "--out", out, "--json")
        sizes = {name: len((out / name).read_bytes()) for name in ("run.toml", "ledger.bin")}
        seen.append((status, err, [*json.loads(shown)], sizes, [*json.loads(shown)["claim"][:60]]))
        assert (out / "run.toml").read_text().count("trials = 10.0") == 1
    assert seen[0] == seen[1]


def test_points_are_drawn_by_secret_randomness_from_the_whole_grid(tmp_path, monkeypatch, drawn):
    asked, made = [], drawn(3)

    def choice(points):
        asked.append(points)
        return points[2]

    monkeypatch.setattr("secrets.choice", choice)
    assert release_best(CONFIG, tmp_path / "out").lr == 0.2
    grid = [(lr, clip) for lr in GRID["lr"] for clip in GRID["clip_norm"]]
    for points in asked:
        assert [(p.config.lr, p.config.clip_norm) for p in points] == grid
        assert [p.mechanism.clip_norm for p in points] == [clip for _, clip in grid]
    assert [point.place for point, _, _ in made] == [2, 2, 2]


def test_equal_scores_are_ordered_by_the_release_alone(tmp_path, monkeypatch, drawn):
    made = drawn(6)
    monkeypatch.setattr("rootnoise.runs.trainer.Trainer.accuracy", lambda self: 0.5)
    release_best(CONFIG, tmp_path / "out")
    first = min(point.place for point, _, _ in made)
    merits = [trial.merit for point, trial, _ in made if point.place == first]
    assert len({merit[2] for merit in merits}) == len(merits)
    weights = torch.load(tmp_path / "out/model.pt", weights_only=True)
    [best] = [trial for _, trial, _ in made if trial.merit == max(merits)]
    assert all(torch.equal(weights[name], w) for name, w in best.trained.weights.items())


def test_a_trial_is_the_run_of_its_settings(tmp_path, drawn, monkeypatch):
    """Same key, same batches, same noise: the weights are those of the plain loop."""
    drawn(1)
    key = Key.from_seed(7)
    # It goes into the noise, and tells a mechanism with trials from one without.
    monkeypatch.setattr(Mechanism, "fingerprint", "ab" * 32)
    monkeypatch.setattr(Key, "fresh", classmethod(lambda cls: key))
    release_best(CONFIG, tmp_path / "best")
    config = inference.settings(tmp_path / "best")
    sigma = Mechanism.load(tmp_path / "best/mechanism.json").noise_multiplier
    alone = accounting.privacy_cost(CYCLE, 8, sigma, 1e-5).epsilon
    plain = dataclasses.replace(config, tuning=None, epsilon=alone, insecure_noise_seed=7)
    monkeypatch.setattr(accounting, "noise_multiplier", lambda *_, **__: sigma)
    run(plain, tmp_path / "plain")
    a, b = (torch.load(tmp_path / n / "model.pt", weights_only=True) for n in ("best", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------- no trial, and stops


def test_a_poisson_number_may_be_none_and_that_is_the_result(call, tmp_path, drawn):
    out = tmp_path / "out"
    drawn(0)
    status, shown, err = call(*LINE, "--trials-shape", "poisson", "--out", out, "--json")
    result = json.loads(shown)
    assert (status, err, result["released"]) == (0, "", False)
    assert (result["epsilon"], result["delta"]) == (4.0, 1e-5)
    assert "it costs the same" in result["said"]
    assert [path.name for path in tmp_path.iterdir()] == [".out.tuning"]
    line = refused(call, *LINE, "--out", out)
    assert "out must be of no tuning that began and released nothing" in line
    assert f"delete {marker(out)} and start over; else epsilon and delta of both add up" in line


def test_a_trial_that_fails_does_not_say_why(call, tmp_path, monkeypatch, drawn):
    out = tmp_path / "out"
    drawn(2)

    def fail(self, data):
        raise RuntimeError("row 17 is not finite")

    monkeypatch.setattr(_Point, "train", fail)
    line = refused(call, *LINE, "--out", out)
    assert line.startswith("error: trials must all end, got one that failed; its reason may")
    assert "17" not in line
    assert [path.name for path in tmp_path.iterdir()] == [".out.tuning"]
    marker(out).unlink()
    with pytest.raises(RootnoiseError, match=r"^trials must all end") as caught:
        release_best(CONFIG, out)
    assert caught.value.__context__ is None


def test_warnings_of_trials_are_not_shown(tmp_path, monkeypatch, drawn):
    drawn(2)
    train = _Point.train

    def warns(self, data):
        warnings.warn("row 17 is large", stacklevel=1)  # an error, if it were not for `tune`
        return train(self, data)

    monkeypatch.setattr(_Point, "train", warns)
    assert release_best(CONFIG, tmp_path / "out").private


def test_ctrl_c_releases_nothing_and_says_what_it_means(call, tmp_path, monkeypatch, drawn):
    out, made = tmp_path / "out", drawn(5)
    train = _Point.train

    def stop(self, data):
        if len(made) == 2:
            raise KeyboardInterrupt
        return train(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(_Point, "train", stop)
        status, shown, err = call(*LINE, "--out", out)
    assert (status, shown) == (130, "")
    assert err.startswith(
        "stopped: nothing is released; if nobody saw anything of it, its duration"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".out.tuning"]
    assert contents(tmp_path) == {marker(out): b""}
    marker(out).unlink()

    def early(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trials, "load", early)
        assert call(*LINE, "--out", out) == (130, "", "stopped: nothing is kept\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("problem", ["stop", "disk"])
def test_a_release_is_whole_or_not_at_all(tmp_path, monkeypatch, drawn, existed, problem):
    out = tmp_path / "out"
    drawn(1)
    if existed:
        out.mkdir()

    def fail(self, *_):
        assert (out / "ledger.bin").exists()
        if problem == "stop":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rootnoise.runs.folder.RunFolder.finish", fail)
    with pytest.raises((KeyboardInterrupt, RootnoiseError)) as caught:
        release_best(CONFIG, out)
    if problem == "disk":
        assert f"{caught.value}" == (
            f"out must be writable, got {out}: No space left on device, and nothing is released"
        )
    assert contents(tmp_path) == {marker(out): b""}
    assert out.exists() == existed


def test_a_tuning_that_is_killed_leaves_a_mark_and_no_trial(tmp_path):
    """In its first state, which lasts through all trials, there is an empty file and no more."""
    out = tmp_path / "out"
    assert outcome(training_runs.tune_killed_at_state, out, 0) == -signal.SIGKILL
    assert contents(tmp_path) == {marker(out): b""}
    with pytest.raises(RootnoiseError, match=r"^out must be of no tuning that began and released"):
        release_best(CONFIG, out)
    marker(out).unlink()
    assert outcome(training_runs.tune_killed_at_state, out, 1) == -signal.SIGKILL
    assert marker(out).exists()  # and the best trial is being written
    assert {path.name for path in out.rglob("*")} <= PRIVATE | {".lock"}


def test_a_folder_that_another_run_took_meanwhile_is_left_alone(tmp_path, monkeypatch, drawn):
    out, best = tmp_path / "out", trials._best

    def slow(*arguments):
        out.mkdir()
        (out / "theirs").write_text("x")
        return best(*arguments)

    drawn(1)
    monkeypatch.setattr(trials, "_best", slow)
    with pytest.raises(RootnoiseError, match=r"^out must be new or empty"):
        release_best(CONFIG, out)
    assert (out / "theirs").read_text() == "x"


def test_two_tunings_do_not_share_a_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    descriptor = os.open(marker(out), os.O_RDWR | os.O_CREAT)
    assert lock(descriptor)
    with pytest.raises(RootnoiseError, match=r"^out must not be in use by another tuning, got"):
        release_best(CONFIG, out)
    with pytest.raises(RootnoiseError, match="in use by another"), trials._begun(out):
        pass
    os.close(descriptor)
    with pytest.raises(RootnoiseError, match=r"^out must be of no tuning that began and released"):
        release_best(CONFIG, out)
    monkeypatch.setattr(trials, "_refuse_unended", lambda out: None)  # it ends just now
    with pytest.raises(RootnoiseError, match="in use by another"), trials._begun(out):
        pass


def test_a_place_that_cannot_be_written_is_refused_before_the_first_trial(
    tmp_path, monkeypatch, drawn
):
    made = drawn(1)
    (tmp_path / "file").touch()
    with pytest.raises(RootnoiseError, match=r"^out must be writable, got"):
        release_best(CONFIG, tmp_path / "file/out")
    monkeypatch.setattr(trials, "_refuse_unended", lambda out: None)
    with pytest.raises(RootnoiseError, match=r"^out must be writable, got"):
        release_best(CONFIG, tmp_path / "file/out")
    assert made == []


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
    stated = checks["attack: distinguishing"]["stated"]
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


@pytest.mark.parametrize("case", [*FORGERIES, "fewer trials", "no trials", "trials of config"])
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
    elif case == "trials of config":
        change(out, "config.json", "tuning", "trials", 2.0)
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
