"""Servers killed by SIGKILL at lines, between and inside writes: same bits, nothing out twice."""

import signal

import numpy as np
import pytest
import torch

import federated_runs as runs
from processes import outcome

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert outcome(runs.run, folder / "out", folder / "log") == 0
    return folder


def model(folder):
    return (folder / "out" / "model.pt").read_bytes()


def releases(folder):
    """Return the hashes shown for each round: there must be one."""
    shown: dict[str, set[str]] = {}
    for line in (folder / "log").read_text().splitlines():
        t, digest = line.split()
        shown.setdefault(t, set()).add(digest)
    assert all(len(digests) == 1 for digests in shown.values())
    assert len(shown) == runs.ROUNDS + 1
    return shown


def assert_same(folder, whole):
    assert releases(folder) == releases(whole)
    assert model(folder) == model(whole)
    for name in ("clients.jsonl", "cohorts.bin"):  # but for the salt in the first line
        ours, theirs = ((path / "out" / name).read_bytes() for path in (folder, whole))
        assert ours.split(b"\n", 1)[1] == theirs.split(b"\n", 1)[1]


def lives(folder, seed, *, same):
    """Kill at random lines until a life reaches the end; return the number of kills."""
    rng, kills, reach, made = np.random.default_rng(seed), 0, 700, -1
    while True:
        life = 0 if same else kills
        fuse = int(rng.integers(reach))
        status = outcome(runs.killed_at_line, folder / "out", folder / "log", fuse, life)
        if status == 0:
            return kills
        assert status == KILLED
        kills += 1
        before, made = made, state_t(folder / "out" / "model.pt")
        assert made >= before
        reach = reach * 6 // 7 if made > before else reach * 11 // 10


def state_t(path):
    return torch.load(path, weights_only=True)["t"] if path.exists() else -1


def test_kills_at_any_line_leave_no_trace(tmp_path, whole):
    """From the making of the folder to the last release."""
    assert lives(tmp_path, 3, same=True) >= 15
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("how", ["between", "inside"])
def test_kills_at_every_change_of_the_folder(tmp_path, whole, how):
    """Each life dies at its first change of the folder but `fuse`, so all kinds are met."""
    target = {"between": runs.killed_at_state, "inside": runs.killed_inside_write}[how]
    kills = 0
    for fuse in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 5, 6, 7, 8]:
        status = outcome(target, tmp_path / "out", tmp_path / "log", fuse, 0)
        assert status in (0, KILLED)
        kills += status == KILLED
    assert kills >= 8
    assert outcome(runs.run, tmp_path / "out", tmp_path / "log") == 0
    assert_same(tmp_path, whole)


def test_a_round_made_again_with_other_answers_was_never_released(tmp_path):
    """Clients answer otherwise after each crash; what the world saw of a round is one thing."""
    assert lives(tmp_path, 8, same=False) >= 15
    releases(tmp_path)
    assert state_t(tmp_path / "out" / "model.pt") == runs.ROUNDS
