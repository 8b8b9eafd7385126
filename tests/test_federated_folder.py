"""A run's folder: gone on from where it stands, and no other or damaged one."""

import pickle
import runpy
from pathlib import Path

import pytest
import torch

import federated_runs as runs
from federated_runs import closed
from rootnoise._check import RootnoiseError
from rootnoise.federated import PrivateAggregator
from rootnoise.federated.store import KEY, MODEL, STATE, _digest
from rootnoise.keys import Key

EXAMPLE = Path(__file__).parents[1] / "examples" / "federated_loop.py"


def test_a_folder_says_what_the_run_says(tmp_path):
    """Its claim is compared; released weights that somebody changed are written anew."""
    server = runs.server(tmp_path)
    server.leave()
    released = (tmp_path / "model.pt").read_bytes()
    weights = {name: w + 1 for name, w in runs.WEIGHTS.items()}
    torch.save({"t": 0, "weights": weights}, tmp_path / "model.pt")
    runs.server(tmp_path).leave()
    assert (tmp_path / "model.pt").read_bytes() == released
    claim = tmp_path / "claim.txt"
    for wrong in (claim.read_bytes().replace(b"(4,", b"(1,"), None):
        claim.unlink() if wrong is None else claim.write_bytes(wrong)
        with pytest.raises(RootnoiseError, match=r"claim\.txt must be as a run wrote it"):
            runs.server(tmp_path)


def test_the_flower_app_holds_the_same_loop():
    """Flower copies no links, and nothing from outside the app's folder."""
    assert (EXAMPLE.parent / "flower_app" / EXAMPLE.name).read_bytes() == EXAMPLE.read_bytes()


def test_the_example_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Eight people, six rounds; and the same again, left after each of the first three."""
    example = runpy.run_path(str(EXAMPLE))
    options = ["--data", "digits", "--people", "8", "--cohort", "2", "--rounds", "6"]
    args = example["parser"]().parse_args(options)
    assert len(example["loop"](args, tmp_path / "whole")) == 6
    close = PrivateAggregator.close

    def close_and_leave(server):
        weights = close(server)
        server.leave()
        return weights

    with monkeypatch.context() as patch:
        patch.setattr(PrivateAggregator, "close", close_and_leave)
        for _ in range(3):
            with pytest.raises(RootnoiseError, match="run must go on from its folder"):
                example["loop"](args, tmp_path / "parts")
    assert len(example["loop"](args, tmp_path / "parts")) == 3
    whole, parts = ((tmp_path / name / "model.pt").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def one_round(server):
    t = server.t
    for client in server.open(runs.there(t)).cohort:
        server.receive(t, client, runs.update(t, client))
    return closed(server)


def test_nothing_leaves_a_round_that_is_not_on_disk(tmp_path, monkeypatch):
    """The disk fails at the commit: the weights are neither shown nor built on; the folder is."""
    server = runs.server(tmp_path)
    first = one_round(server)
    server.open(runs.there(1))

    def full(state):
        raise RootnoiseError("state.pt must be writable, got a full disk")

    monkeypatch.setattr(server._store, "commit", full)
    with pytest.raises(RootnoiseError, match="full disk"):
        server.close()  # empty, thus skipped: the same
    for act in (lambda: server.weights, lambda: server.open([]), server.close, server.finish):
        with pytest.raises(RootnoiseError, match="run must go on from its folder"):
            act()
    with pytest.raises(RootnoiseError, match="run must go on from its folder"):
        server.receive(1, "phone 1", None)
    server.leave()
    again = runs.server(tmp_path)
    assert again.t == 1
    assert all(torch.equal(w, first[name]) for name, w in again.weights.items())


def test_one_process_at_a_time(tmp_path):
    server = runs.server(tmp_path)
    with pytest.raises(RootnoiseError, match="must not be in use by another process"):
        runs.server(tmp_path)
    server.leave()
    runs.server(tmp_path).leave()


def test_an_older_state_is_refused(tmp_path):
    server = runs.server(tmp_path)
    one_round(server)
    older = (tmp_path / "state.pt").read_bytes()
    one_round(server)
    server.leave()
    (tmp_path / "state.pt").write_bytes(older)
    with pytest.raises(RootnoiseError, match=r"must be the newest, got one at round 1 though 2 we"):
        runs.server(tmp_path)


@pytest.mark.parametrize("name", ["state.pt", "model.pt"])
def test_damaged_files_are_refused(tmp_path, name):
    server = runs.server(tmp_path)
    one_round(server)
    server.leave()
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RootnoiseError, match=f"{name} must be as a run wrote it"):
        runs.server(tmp_path)


class Harm:
    """A pickle that does something when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [STATE, MODEL])
def test_files_that_hold_a_programme_do_not_run_it(tmp_path, name):
    server = runs.server(tmp_path)
    server.leave()
    done = tmp_path.parent / f"done by {name}"
    torch.save({"t": 0, "harm": Harm(done)}, tmp_path / name)
    if name == STATE:  # its digest has no key
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + _digest(content))
    with pytest.raises((RootnoiseError, pickle.UnpicklingError)):
        runs.server(tmp_path)
    assert not done.exists()


def test_secrets_are_for_their_owner_alone(tmp_path):
    server = runs.server(tmp_path)
    for _ in range(2):
        modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in (STATE, KEY, MODEL)}
        assert modes == {STATE: 0o600, KEY: 0o600, MODEL: 0o644}
        one_round(server)


def test_a_refusal_does_not_keep_the_folder(tmp_path):
    server = runs.server(tmp_path)
    one_round(server)
    server.finish()
    refusals = []
    for _ in range(2):
        with pytest.raises(RootnoiseError, match="folder must be of a run that has not") as refusal:
            runs.server(tmp_path)
        refusals.append(refusal)  # it keeps what was being made


def test_a_finished_run_is_refused_and_has_no_secrets(tmp_path):
    server = runs.server(tmp_path)
    weights = one_round(server)
    server.finish()
    assert not (tmp_path / "noise.key").exists()
    assert not (tmp_path / "state.pt").exists()
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    assert held["t"] == 1
    assert all(torch.equal(w, weights[name]) for name, w in held["weights"].items())
    with pytest.raises(RootnoiseError, match="folder must be of a run that has not ended"):
        runs.server(tmp_path)
    with pytest.raises(RootnoiseError, match="run must go on from its folder"):
        server.open(["a"])


def test_other_runs_are_refused(tmp_path):
    server = runs.server(tmp_path)
    one_round(server)
    server.leave()
    key, settings = Key.from_seed(5), {"cohort_size": 3}
    with pytest.raises(RootnoiseError, match="key must be the run's"):
        PrivateAggregator(
            tmp_path, runs.mechanism(), runs.WEIGHTS, key=Key.from_seed(6), **settings
        )
    with pytest.raises(RootnoiseError, match=r"mechanism must be that of the folder's mechanism"):
        PrivateAggregator(tmp_path, runs.mechanism(k=1), runs.WEIGHTS, key=key, **settings)
    with pytest.raises(RootnoiseError, match="saved run's cohort_size must be 4, got 3"):
        PrivateAggregator(tmp_path, runs.mechanism(), runs.WEIGHTS, cohort_size=4)
    with pytest.raises(RootnoiseError, match=r"saved run's decay must be 0\.5, got 1\.0"):
        PrivateAggregator(tmp_path, runs.mechanism(), runs.WEIGHTS, decay=0.5, **settings)
    transposed = runs.WEIGHTS | {"a": torch.zeros(3, 4)}
    with pytest.raises(RootnoiseError, match="saved run's layout must be"):
        PrivateAggregator(tmp_path, runs.mechanism(), transposed, **settings)
    (tmp_path / "noise.key").unlink()
    with pytest.raises(RootnoiseError, match=r"noise\.key must be readable to go on"):
        PrivateAggregator(tmp_path, runs.mechanism(), runs.WEIGHTS, **settings)


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RootnoiseError, match=r"new or of a federated run, got thesis\.tex"):
        runs.server(tmp_path)
    with pytest.raises(RootnoiseError, match="folder must be writable, got"):
        runs.server(tmp_path / "thesis.tex")
