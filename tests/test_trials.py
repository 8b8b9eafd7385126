"""`rootnoise tune`: what the best trial leaves, that others leave nothing, and what it costs."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import os
import signal
import warnings
import weakref

import pytest
import torch

import training_runs
import trial_cases
from commands import refused
from processes import outcome
from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise._files import lock
from rootnoise.accounting import Trials, tuned_noise_multiplier, tuned_privacy_cost
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.runs import inference, statement, trials
from rootnoise.runs.run import run
from rootnoise.runs.trainer import Trainer
from rootnoise.runs.trials import _Point, release_best
from rootnoise.runs.tuning import Tuning, marker
from test_runs import PRIVATE
from test_runs_audit import failures
from trial_cases import CONFIG, CYCLE, GRID, LINE, contents

drawn = trial_cases.drawn


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
    assert (result.accuracy, result.seconds) == (max(scores), None)
    best = max(range(k), key=lambda i: (scores[i], -points[i].place, made[i][1].merit[-1]))
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
    assert losers  # six keys of one accuracy have a chance below 1e-6
    own = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["test_accuracy"]
    for trial in losers:
        for entry in trial.trained.history:
            score = f"{entry['test_accuracy']}"
            # Of few digits, such as 0.4, it may stand there for another reason.
            if entry["test_accuracy"] not in (best, own) and len(score) > 12:
                assert score.encode() not in everything
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


def test_ctrl_c_after_the_release_does_not_say_that_nothing_is_released(
    call, tmp_path, monkeypatch, drawn
):
    out, write = tmp_path / "out", trials._write
    drawn(1)

    def late(*parts):
        write(*parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "_write", late)
    said = f"stopped: {out} holds a whole run, which is released; starting over is another release"
    assert call(*LINE, "--out", out) == (130, "", f"{said}\n")
    assert (out / "model.pt").exists()


def test_a_mark_that_somebody_deleted_meanwhile_is_no_error(tmp_path, monkeypatch, drawn):
    out, write = tmp_path / "out", trials._write
    drawn(1)

    def deleted(*parts):
        marker(out).unlink()
        return write(*parts)

    monkeypatch.setattr(trials, "_write", deleted)
    assert release_best(CONFIG, out).private
    assert not marker(out).exists()


def test_a_comparison_that_fails_does_not_say_why(tmp_path, monkeypatch, drawn):
    """Scores are compared from the second trial on: any other line would count the trials."""
    drawn(2)

    def fail(self):
        raise MemoryError("of two trials")

    monkeypatch.setattr(trials._Trial, "merit", property(fail))
    with pytest.raises(RootnoiseError, match=r"^trials must all end") as caught:
        release_best(CONFIG, tmp_path / "out")
    assert caught.value.__context__ is None


@pytest.mark.parametrize("existed", [False, True, "link"])
@pytest.mark.parametrize("problem", ["stop", "disk"])
def test_a_release_is_whole_or_not_at_all(tmp_path, monkeypatch, drawn, existed, problem):
    out = tmp_path / "out"
    drawn(1)
    if existed == "link":
        (tmp_path / "real").mkdir()
        out.symlink_to("real")
    elif existed:
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
    assert out.exists() == bool(existed)
    assert out.is_symlink() == (existed == "link")


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


def test_a_trial_begins_when_nothing_is_left_of_the_last(tmp_path, monkeypatch, drawn):
    """Cycles keep a trial's model, wrapped, with its weights, until they are collected."""
    seen: list[weakref.ref[object]] = []

    class Watched(Trainer):
        def __init__(self, *parts):
            assert [old() for old in seen[1:]] == [None] * len(seen[1:])
            super().__init__(*parts)
            seen.append(weakref.ref(self.module))

    drawn(3)
    monkeypatch.setattr(trials, "Trainer", Watched)
    gc.disable()
    try:
        release_best(CONFIG, tmp_path / "out")
    finally:
        gc.enable()
    assert len(seen) == 4  # one shows before the first trial what is refused


def test_two_tunings_do_not_share_a_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    descriptor = os.open(marker(out), os.O_RDWR | os.O_CREAT)
    assert lock(descriptor)
    with pytest.raises(RootnoiseError, match=r"^out must not be in use by another tuning, got"):
        release_best(CONFIG, out)
    with pytest.raises(RootnoiseError, match="in use by another"), trials._begun(out):
        pass
    os.close(descriptor)
    for _ in range(2):  # whoever is refused holds no lock
        with pytest.raises(RootnoiseError, match=r"^out must be of no tuning that began and rel"):
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
