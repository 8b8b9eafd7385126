"""Real runs killed by SIGKILL, anywhere, and resumed: the bits of a run that nobody disturbed."""

import itertools
import json
import shutil
import signal

import numpy as np
import pytest
import torch

import training_runs
from processes import CONTEXT, outcome, start
from rootnoise._check import RootnoiseError
from rootnoise.runs.config import make_sampler
from rootnoise.runs.data import load
from rootnoise.runs.folder import RunFolder
from rootnoise.runs.run import run
from training_runs import CONFIG

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not disturbed, checkpointed once an epoch."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert outcome(training_runs.train, out, None) == 0
    return out


def assert_same_run(out, whole):
    """Same files, weights, accuracies and privacy, and no secret left."""
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}
    ours, theirs = (torch.load(path / "model.pt", weights_only=True) for path in (out, whole))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    results = [json.loads((path / "result.json").read_text()) for path in (out, whole)]
    metrics = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (out, whole)
    ]
    for entry in (*results, *metrics[0], *metrics[1]):
        entry.pop("seconds")
        entry.pop("out", None)
    assert results[0] == results[1]
    assert metrics[0] == metrics[1]


SAMPLER = make_sampler(CONFIG, load(CONFIG.dataset).n_train)


def assert_sound_checkpoint(out):
    """The ledger of the checkpoint counts the batches of the steps made, no more and no fewer."""
    optimizer = RunFolder(out).checkpoint()["optimizer"]
    t, ledger = optimizer["t"], optimizer["ledger"]
    assert t == ledger["t"] == optimizer["noise"]["t"]
    made = [SAMPLER.batch(i) for i in range(t)]
    members = np.concatenate(made) if made else np.empty(0, dtype=np.int64)
    count = np.bincount(members, minlength=SAMPLER.n_examples)
    assert np.array_equal(ledger["count"].numpy(), count)
    return t


def test_thirty_kills_leave_no_trace(tmp_path, whole):
    """At any line of the run, from the making of the folder to the deletion of the secrets."""
    out, generator = tmp_path / "out", np.random.default_rng(4)
    kills, made, reach = 0, 0, 900
    while True:
        fuse = int(generator.integers(reach))
        status = outcome(training_runs.train_killed_at_line, out, 1, fuse)
        if status == 0:
            break
        assert status == KILLED
        kills += 1
        if (out / "config.json").exists():
            before, made = made, assert_sound_checkpoint(out)
            assert made >= before
            reach = reach * 6 // 7 if made > before else reach * 5 // 4  # 3 lives of 5 make a step
        else:  # killed in the making of the folder: no data was touched
            shutil.rmtree(out, ignore_errors=True)
            reach = reach * 5 // 4
    assert kills >= 30, reach
    assert_same_run(out, whole)


def stop_at(step):
    def on_step(t, n_steps, accuracy):
        if t == step:
            raise KeyboardInterrupt

    return on_step


@pytest.fixture(scope="module")
def last_step(tmp_path_factory):
    """Files of a run whose next step is the last, by name."""
    out = tmp_path_factory.mktemp("last") / "out"
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, out, checkpoint_every=1, on_step=stop_at(SAMPLER.n_steps))
    return {file.name: file.read_bytes() for file in out.iterdir()}


def restore(files, out):
    out.mkdir()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return out


def assert_can_end(out, whole):
    """Resume a killed run; if all of its files were there, resuming says so and clears up."""
    if (out / "result.json").exists():
        with pytest.raises(RootnoiseError, match="out must hold an unfinished run"):
            run(CONFIG, out, resume=True)
    else:
        assert outcome(training_runs.train, out, 1) == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("kill", ["between", "inside"])
def test_a_kill_in_every_state_of_the_folder_from_the_last_step_on(
    tmp_path, whole, last_step, kill
):
    """Between two changes of the folder, and half through each write."""
    target = {
        "between": training_runs.train_killed_at_state,
        "inside": training_runs.train_killed_inside_write,
    }[kill]
    left: list[list[str]] = []
    while True:
        out = restore(last_step, tmp_path / str(len(left)))
        status = outcome(target, out, 1, len(left))
        if status == 0:
            break
        assert status == KILLED
        left.append([file.name for file in out.iterdir()])
        assert_can_end(out, whole)
    torn = [name for names in left for name in names if name.endswith(".partial")]
    # Metrics are written when the run is resumed and when it has been evaluated.
    files = ["metrics.jsonl", "checkpoint.pt", "metrics.jsonl", "model.pt", "model.safetensors"]
    files += ["privacy.json", "privacy.md", "result.json"]
    if kill == "inside":
        assert torn == [f".{name}.partial" for name in files]
    else:
        assert set(torn) == {f".{name}.partial" for name in files}
        assert [names for names in left if "result.json" in names and "noise.key" not in names]
        assert len(left) >= 3 * len(files)  # made, written, renamed


def test_a_kill_in_every_state_of_a_new_folder(tmp_path, whole):
    """Resumable or, before config.json is there, refused in one line: no data was touched yet."""
    refused = 0
    for fuse in itertools.count():
        out = tmp_path / str(fuse)
        assert outcome(training_runs.train_killed_at_state, out, 1, fuse) == KILLED
        if (out / "config.json").exists():
            break
        refused += 1
        with pytest.raises(RootnoiseError, match=r"out must hold a run's config\.json"):
            run(CONFIG, out, resume=True)
    assert refused >= 9
    assert outcome(training_runs.train, out, None) == 0
    assert_same_run(out, whole)


def test_only_one_process_runs_in_a_folder(tmp_path, whole):
    out, (ours, theirs) = tmp_path / "out", CONTEXT.Pipe()
    process = start(training_runs.train_and_wait, out, theirs)
    assert ours.recv() == 2
    for resume in (True, False):
        message = "in use by another run" if resume else "out must be new or empty"
        with pytest.raises(RootnoiseError, match=message):
            run(CONFIG, out, resume=resume)
    process.kill()
    process.join()
    assert outcome(training_runs.train, out, None) == 0  # the lock died with its holder
    assert_same_run(out, whole)


def test_a_folder_taken_between_check_and_creation_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    with RunFolder(tmp_path / "other") as other, RunFolder(tmp_path / "other") as folder:
        other._acquire()
        with pytest.raises(RootnoiseError, match="out must not be in use by another run, got"):
            folder.create({}, {"claim": ""}, None, None, {})


def test_an_older_checkpoint_is_refused(tmp_path):
    """Its steps were evaluated and shown: to make them again could use their noise twice."""
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, tmp_path, checkpoint_every=1, on_step=stop_at(3))
    older = checkpoint.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, tmp_path, resume=True, on_step=stop_at(12))
    checkpoint.write_bytes(older)
    with pytest.raises(RootnoiseError, match=r"and no older, got one with 0 evaluations"):
        run(CONFIG, tmp_path, resume=True)


@pytest.mark.parametrize("harm", ["torn", "flipped"])
def test_a_damaged_checkpoint_is_refused(tmp_path, last_step, harm):
    out = restore(last_step, tmp_path / "out")
    sound = last_step["checkpoint.pt"]
    path, generator = out / "checkpoint.pt", np.random.default_rng(1)
    for position in generator.integers(len(sound), size=100):
        harmed = bytearray(sound[:position] if harm == "torn" else sound)
        if harm == "flipped":
            harmed[position] ^= 1 << generator.integers(8)
        path.write_bytes(harmed)
        with pytest.raises(RootnoiseError, match=r"checkpoint\.pt must be as a run wrote it"):
            RunFolder(out).checkpoint()
