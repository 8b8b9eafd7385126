import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootnoise._check import RootnoiseError
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.participation.ledger import Ledger
from rootnoise.participation.ledger_file import pack, unpack


def through_disk(state):
    """What a checkpoint gives back: no code runs on loading."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def ledger_after(participation, *batches, n_examples=6):
    ledger = Ledger(participation, n_examples)
    for t, batch in enumerate(batches):
        ledger.admit(t, batch)
    return ledger


# Participation; batches, the last one refused; the example named, its count and its last step.
REFUSED = {
    "twice though single": (SingleParticipation(), [[0, 1], [2], [4, 1]], (1, 1, 0)),
    "too close": (MinSeparation(3, 2), [[], [5], [], [5]], (5, 1, 1)),
    "too often": (MinSeparation(1, 2), [[3], [3], [3]], (3, 2, 1)),
    "off the cycle": (FixedCycle(2, 3), [[0], [1], [2], [0]], (0, 1, 0)),
    "past the epochs": (FixedCycle(1, 2), [[0], [0], [0]], (0, 2, 1)),
    "in another group": (CyclicPoisson(2, 0.5), [[0], [1], [0], [1, 2], [1, 0]], (1, 2, 3)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_breaks_the_participation_is_refused_and_not_recorded(case):
    participation, batches, (example, count, last) = REFUSED[case]
    step = len(batches) - 1
    ledger = ledger_after(participation, *batches[:-1])
    before = ledger.state_dict()
    message = (
        f"example {example} at step {step} breaks the participation ({participation}): "
        f"steps so far {count}, the last one {last}"
    )
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
        ledger.admit(step, batches[-1])
    after = ledger.state_dict()
    assert after["t"] == before["t"]
    assert torch.equal(after["last_step"], before["last_step"])
    assert torch.equal(after["count"], before["count"])
    ledger.admit(step, [])  # the step itself is still to be had


ADMITTED = {
    "everybody once": (SingleParticipation(), [[0, 1], [2, 3], [4, 5]]),
    "exactly b apart": (MinSeparation(3, 2), [[0], [1], [2], [0, 3], [1]]),
    "a skipped epoch": (FixedCycle(2, 3), [[0], [1], [], [1], [0], [1]]),
    "first seen late": (FixedCycle(2, 3), [[0], [], [0, 2], [1]]),
    "any number of times": (CyclicPoisson(1, 0.5), [[0, 1]] * 50),
}


@pytest.mark.parametrize("case", ADMITTED)
def test_what_the_participation_allows_is_admitted(case):
    participation, batches = ADMITTED[case]
    assert ledger_after(participation, *batches).t == len(batches)


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_the_ledger_agrees_with_the_definition_of_min_separation(min_sep, most, data):
    ledger = Ledger(MinSeparation(min_sep, most), 3)
    steps: dict[int, list[int]] = {i: [] for i in range(3)}
    for t in range(12):
        batch = data.draw(st.sets(st.integers(0, 2)))
        legal = all(len(steps[i]) < most and all(t - u >= min_sep for u in steps[i]) for i in batch)
        try:
            ledger.admit(t, np.array(sorted(batch), dtype=np.int32))
        except RootnoiseError:
            assert not legal
            ledger.admit(t, [])
        else:
            assert legal
            for i in batch:
                steps[i].append(t)


@pytest.mark.parametrize("t", [0, 1, 3])
def test_steps_run_once_and_in_order(t):
    ledger = ledger_after(CyclicPoisson(1, 0.5), [0], [1])
    message = re.escape(f"step must be the next one, 2 (once, in order), got {t}")
    with pytest.raises(RootnoiseError, match=f"^{message}$"):
        ledger.admit(t, [2])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([-1, 2], "indices must be in [0, n_examples=6), got -1"),
        ([0, 6], "indices must be in [0, n_examples=6), got 6"),
        (np.array([2**63], dtype=np.uint64), f"indices must be in [0, n_examples=6), got {2**63}"),
        ([4, 1, 4], "indices must be distinct within a batch, got 4 twice"),
        ([0.5], "indices must be 1-D integers, got float64 of shape (1,)"),
        ([True], "indices must be 1-D integers, got bool of shape (1,)"),
        ([[1], [2]], "indices must be 1-D integers, got int64 of shape (2, 1)"),
    ],
)
def test_bad_indices_are_refused(indices, message):
    ledger = Ledger(CyclicPoisson(1, 0.5), 6)
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
        ledger.admit(0, indices)
    assert ledger.t == 0


def test_tensors_lists_and_arrays_are_indices():
    ledger = Ledger(CyclicPoisson(1, 0.5), 6)
    for t, batch in enumerate((torch.tensor([3, 1]), [1, 3], np.array([1, 3], dtype=np.uint8), [])):
        ledger.admit(t, batch)


def test_an_unknown_participation_has_no_ledger():
    with pytest.raises(RootnoiseError, match=r"^participation must be a known kind, got 'all'$"):
        Ledger("all", 6)


def test_a_resumed_ledger_still_knows_who_was_where():
    ledger = ledger_after(MinSeparation(3, 2), [0], [1])
    resumed = Ledger(MinSeparation(3, 2), 6)
    resumed.load_state_dict(through_disk(ledger.state_dict()))
    assert resumed.t == 2
    with pytest.raises(RootnoiseError, match=r"^example 1 at step 2 breaks"):
        resumed.admit(2, [1])
    resumed.admit(2, [2])
    resumed.admit(3, [0])
    assert ledger.t == 2  # the saved state is a copy


def test_a_ledger_is_never_rolled_back():
    ledger = ledger_after(MinSeparation(3, 2), [0], [1])
    with pytest.raises(
        RootnoiseError, match=r"^ledger must be at step 0 to load a state, got step"
    ):
        ledger.load_state_dict(ledger.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "saved ledger's version must be 1, got 2"),
        ({"n_examples": 7}, "saved ledger's n_examples must be 6, got 7"),
        ({"participation": None}, "saved ledger's participation must be {'type': 'min-sep', "),
        ({"t": None}, "saved ledger's t must be an integer, got None"),
        ({"t": 1}, "saved ledger's last_step must be 6 int32 values in [0, 0], got int32 of "),
        ({"salt": "12"}, "saved ledger's salt must be 32 hex digits, got '12'"),
        ({"digest": None}, "saved ledger's digest must be 64 hex digits, got None"),
        ({"count": None}, "saved ledger's count must be 6 int32 values in [0, 2], got float64 of "),
        ({"count": torch.zeros(6)}, "saved ledger's count must be 6 int32 values in [0, 2], got f"),
        (
            {"count": torch.full((6,), -1, dtype=torch.int32)},
            "saved ledger's count must be 6 int32 values in [0, 2], got int32 of shape (6,), or ",
        ),
    ],
)
def test_another_ledger_is_not_resumed(change, message):
    state = ledger_after(MinSeparation(3, 2), [0], [1]).state_dict()
    fresh = Ledger(MinSeparation(3, 2), 6)
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}"):
        fresh.load_state_dict(state | change)
    assert fresh.t == 0


# ------------------------------------------------------------------------------------- its file


def replayed(path):
    """Read the file with nothing of ours but its documented layout."""
    data = path.read_bytes()
    at, batches = data.index(b"\n") + 1, []
    while at < len(data):
        size, width = int.from_bytes(data[at : at + 4], "little"), data[at + 4]
        length = (size * width + 7) // 8
        word = int.from_bytes(data[at + 5 : at + 5 + length], "little")
        index, batch = -1, []
        for i in range(size):
            index += 1 + ((word >> (i * width)) & ((1 << width) - 1))
            batch.append(index)
        batches.append(batch)
        at += 5 + length
    return batches


@given(st.lists(st.sets(st.integers(0, 2**32 - 1), max_size=40), max_size=5))
def test_a_batch_survives_its_packing(batches):
    for batch in map(sorted, batches):
        np.testing.assert_array_equal(unpack(pack(np.array(batch, dtype=np.int64))), batch)


def test_the_file_holds_who_took_part_when_and_only_its_owner_reads_it(tmp_path):
    path, batches = tmp_path / "ledger.bin", [[0, 5], [], [1, 2, 3], [4]]
    ledger = Ledger(MinSeparation(3, 2), 6)
    ledger.keep(path)
    for t, batch in enumerate(batches):
        ledger.admit(t, batch[::-1])
    assert replayed(path) == batches
    assert path.stat().st_mode & 0o777 == 0o600
    header = json.loads(path.read_bytes().splitlines()[0])
    assert header["participation"] == {"type": "min-sep", "min_sep": 3, "max_participations": 2}
    assert header["n_examples"] == 6
    # The commitment can be recomputed from the file alone, by its documented chain.
    assert digest_of(path, bytes.fromhex(header["salt"])) == ledger.digest


def digest_of(path, salt):
    data = path.read_bytes()
    at = data.index(b"\n") + 1
    digest = hashlib.blake2b(data[:at], key=salt, digest_size=32).digest()
    while at < len(data):
        size, width = int.from_bytes(data[at : at + 4], "little"), data[at + 4]
        end = at + 5 + (size * width + 7) // 8
        digest = hashlib.blake2b(digest + data[at:end], key=salt, digest_size=32).digest()
        at = end
    return digest.hex()


def test_the_digest_tells_nothing_without_the_salt():
    one, two = (ledger_after(CyclicPoisson(1, 0.5), [0], [1]) for _ in range(2))
    assert one.digest != two.digest


def test_the_file_takes_the_stated_room(tmp_path):
    # 13 bits a participation at q = 1e-3: the largest of 1000 gaps is 1000 ln 1000 = 6900 on
    # average, and above 2**14 once in 13,000 batches. The mean over 20 batches is below 14.
    rng, path = np.random.default_rng(0), tmp_path / "ledger.bin"
    ledger = Ledger(CyclicPoisson(1, 1e-3), 1_000_000)
    ledger.keep(path)
    total = 0
    for t in range(20):
        batch = np.flatnonzero(rng.random(1_000_000) < 1e-3)
        ledger.admit(t, batch)
        total += batch.size
    assert 12.5 < 8 * path.stat().st_size / total < 14
    assert ledger._last.nbytes + ledger._count.nbytes == 8_000_000


def kept(path, *batches):
    """A ledger with its file, after these batches."""
    ledger = Ledger(MinSeparation(2, 5), 6)
    ledger.keep(path)
    for t, batch in enumerate(batches):
        ledger.admit(t, batch)
    return ledger


def resumed(state):
    ledger = Ledger(MinSeparation(2, 5), 6)
    ledger.load_state_dict(through_disk(state))
    return ledger


def test_a_killed_run_goes_on_with_its_file_and_repeats_its_batches(tmp_path):
    path = tmp_path / "ledger.bin"
    ledger = kept(path, [0], [1])
    state = ledger.state_dict()
    ledger.admit(2, [2, 3])  # made, then killed while the next record was written
    ledger.admit(3, [0])
    whole = path.read_bytes()
    path.write_bytes(whole + pack(np.array([1, 4]))[:-1])
    again = resumed(state)
    again.keep(path)
    assert path.read_bytes() == whole
    with pytest.raises(
        RootnoiseError,
        match=r"^step 2 must repeat its batch of before the run was stopped: its noise must not",
    ):
        again.admit(2, [2])


def test_a_repeated_run_ends_with_the_same_file(tmp_path):
    path = tmp_path / "ledger.bin"
    ledger = kept(path, [0], [1])
    state = ledger.state_dict()
    for t, batch in ((2, [2, 3]), (3, [0])):
        ledger.admit(t, batch)
    whole = path.read_bytes()
    again = resumed(state)
    again.keep(path)
    for t, batch in ((2, [3, 2]), (3, [0])):
        again.admit(t, batch)
        assert path.read_bytes() == whole
    again.admit(4, [5])
    assert again.t == 5
    assert replayed(path) == [[0], [1], [2, 3], [0], [5]]
    ledger.admit(4, [5])
    assert ledger.digest == again.digest


def test_the_file_of_another_run_is_refused(tmp_path):
    path = tmp_path / "ledger.bin"
    ledger = kept(path, [0], [1])
    with pytest.raises(RootnoiseError, match=r"^ledger file must be of this run, got another"):
        Ledger(MinSeparation(2, 5), 6).keep(path)
    with pytest.raises(RootnoiseError, match=r"^ledger file must be readable, got .*: No such"):
        resumed(ledger.state_dict()).keep(tmp_path / "none.bin")


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_changed_file_is_not_continued(tmp_path, damage):
    path = tmp_path / "ledger.bin"
    ledger = kept(path, [0, 2], [1])
    state, whole = ledger.state_dict(), path.read_bytes()
    changed = whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:]
    header = whole[: whole.index(b"\n") + 1]
    path.write_bytes({"cut": whole[:-1], "changed": changed, "emptied": header}[damage])
    with pytest.raises(
        RootnoiseError, match=r"^ledger file must hold the 2 steps of the saved state, got others"
    ):
        resumed(state).keep(path)


def test_a_file_that_cannot_be_written_stops_the_run(tmp_path, monkeypatch):
    with pytest.raises(RootnoiseError, match=r"^ledger file must be new and writable, got .*: No"):
        kept(tmp_path / "no folder" / "ledger.bin")
    ledger = kept(tmp_path / "ledger.bin", [0])
    (tmp_path / "ledger.bin").unlink()
    (tmp_path / "ledger.bin").mkdir()
    with pytest.raises(RootnoiseError, match=r"^ledger file must be writable, got .*: Is a direc"):
        ledger.admit(1, [1])
    assert ledger.t == 1


def test_a_full_disk_stops_the_run(tmp_path, monkeypatch):
    ledger = kept(tmp_path / "ledger.bin", [0])

    class Full(io.BytesIO):
        def write(self, data):
            return 3

    monkeypatch.setattr(Path, "open", lambda *a, **k: Full())
    with pytest.raises(RootnoiseError, match=r"^ledger file must be writable, got a full disk at "):
        ledger.admit(1, [1])
    assert ledger.t == 1


def test_the_file_can_be_written_afterwards_from_the_same_batches(tmp_path):
    batches = [[0, 5], [], [1, 2, 3], [4]]
    ledger = Ledger(MinSeparation(3, 2), 6)
    for t, batch in enumerate(batches):
        ledger.admit(t, batch)
    arrays = [np.array(batch, dtype=np.int64) for batch in batches]
    path = tmp_path / "ledger.bin"
    ledger.write_again(path, arrays)
    assert replayed(path) == batches
    assert path.stat().st_mode & 0o777 == 0o600
    header = json.loads(path.read_bytes().splitlines()[0])
    assert digest_of(path, bytes.fromhex(header["salt"])) == ledger.digest
    for others in (arrays[:-1], [*arrays, arrays[0]], [*arrays[:-1], np.array([3])]):
        (tmp_path / "other").unlink(missing_ok=True)
        with pytest.raises(RootnoiseError, match=r"^batches must be those of the 4 steps that wer"):
            ledger.write_again(tmp_path / "other", others)
    with pytest.raises(RootnoiseError, match=r"^ledger file must be new and writable"):
        ledger.write_again(path, arrays)
