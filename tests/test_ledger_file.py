"""The ledger's file on its own: whole records, torn ones, and what reaches the disk."""

from __future__ import annotations

import os

import numpy as np
import pytest

from rootnoise._check import RootnoiseError
from rootnoise.participation import MinSeparation
from rootnoise.participation.ledger import Ledger
from rootnoise.participation.ledger_file import Journal, first_line, pack, unpack

HEADER = {"b": 1, "a": "x"}
BATCHES = [[], [0], [2**32 - 1], [0, 1, 2], [5, 900, 2**20]]


def written(path, batches=BATCHES):
    journal = Journal.create(path, HEADER)
    for batch in batches:
        journal.append(pack(np.array(batch, dtype=np.int64)))
    return journal


def test_records_come_back_in_order(tmp_path):
    journal = written(tmp_path / "ledger.bin")
    assert [unpack(record).tolist() for record in journal.records()] == BATCHES
    again = Journal.reopen(journal.path, dict(reversed(HEADER.items())))
    assert list(again.records()) == list(journal.records())


def test_a_record_torn_anywhere_is_cut_and_no_whole_one(tmp_path):
    journal = written(tmp_path / "ledger.bin")
    whole = journal.path.read_bytes()
    before = len(whole) - len(pack(np.array(BATCHES[-1])))
    for length in range(before, len(whole) + 1):
        journal.path.write_bytes(whole[:length])
        journal.cut()
        assert journal.path.read_bytes() == (whole if length == len(whole) else whole[:before])
    journal.path.write_bytes(first_line(HEADER) + b"\x00")
    journal.cut()
    assert journal.path.read_bytes() == first_line(HEADER)


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    journal = written(tmp_path / "ledger.bin")
    whole = journal.path.read_bytes()
    with pytest.raises(
        RootnoiseError, match=r"^ledger file must be new and writable, got .*ledger.bin: File exis"
    ):
        Journal.create(journal.path, HEADER)
    assert journal.path.read_bytes() == whole
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_sync_waits_for_the_disk(tmp_path, monkeypatch):
    journal, synced = written(tmp_path / "ledger.bin"), []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    journal.sync()
    assert synced == [journal.path.stat().st_ino]


def test_a_ledger_killed_before_its_first_checkpoint_goes_on_with_its_file(tmp_path):
    path = tmp_path / "ledger.bin"
    ledger = Ledger(MinSeparation(2, 3), 6)
    state = ledger.state_dict()
    ledger.keep(path)
    ledger.admit(0, [1, 4])
    whole = path.read_bytes()
    again = Ledger(MinSeparation(2, 3), 6)
    again.load_state_dict(state)
    again.keep(path)
    with pytest.raises(RootnoiseError, match=r"^step 0 must repeat its batch of before the run"):
        again.admit(0, [1])
    again = Ledger(MinSeparation(2, 3), 6)
    again.load_state_dict(state)
    again.keep(path)
    again.admit(0, [4, 1])
    assert (path.read_bytes(), again.digest) == (whole, ledger.digest)


@pytest.mark.parametrize("name", ["count", "last_step"])
def test_one_bad_number_among_good_ones_is_not_resumed(name):
    ledger = Ledger(MinSeparation(1, 3), 6)
    for t in range(2):
        ledger.admit(t, [1, 4])
    state = ledger.state_dict()
    for bad in (-1, 3):
        numbers = state[name].clone()
        numbers[2] = bad
        with pytest.raises(RootnoiseError, match=f"^saved ledger's {name} must be 6 int32 values"):
            Ledger(MinSeparation(1, 3), 6).load_state_dict(state | {name: numbers})


def test_a_state_is_not_loaded_into_a_ledger_that_has_a_file(tmp_path):
    ledger = Ledger(MinSeparation(1, 3), 6)
    state = ledger.state_dict()
    other = Ledger(MinSeparation(1, 3), 6)
    other.keep(tmp_path / "ledger.bin")
    with pytest.raises(RootnoiseError, match=r"^ledger must be kept in a file after a state is"):
        other.load_state_dict(state)


def test_a_damaged_size_is_a_torn_record_and_takes_no_memory(tmp_path):
    """Of 2^32 - 1 gaps of 255 bits: 137 GB."""
    journal = written(tmp_path / "ledger.bin")
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b"\xff" * 5 + bytes(100))
    assert [unpack(record).tolist() for record in journal.records()] == BATCHES
    journal.cut()
    assert journal.path.read_bytes() == whole
