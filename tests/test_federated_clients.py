"""Clients by id: the picker and the ledger never break the participation, whoever is there."""

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootnoise._check import RootnoiseError
from rootnoise.federated import Clients, pick
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    SingleParticipation,
)
from rootnoise.participation.ledger_file import pack

WHO = MinSeparation(min_sep=2, max_participations=2)


@settings(max_examples=150)
@given(
    b=st.integers(1, 5),
    k=st.integers(1, 4),
    size=st.integers(1, 6),
    policy=st.sampled_from(["fewest", "longest", "random"]),
    days=st.lists(
        st.tuples(st.lists(st.integers(0, 11), max_size=15), st.integers(0, 2**12 - 1)),
        max_size=25,
    ),
)
def test_separation_and_participations_hold_for_any_availability(b, k, size, policy, days):
    """Brute force: everybody's rounds are listed, and the cohort is as full as it can be."""
    clients = Clients(MinSeparation(b, k))
    rounds: dict[int, list[int]] = {i: [] for i in range(12)}
    for t, (there, stays) in enumerate(days):
        cohort = pick(clients, clients.join(there), size, np.random.default_rng(t), policy)
        chosen = [list(clients._index)[i] for i in cohort]
        may = {i for i in there if len(rounds[i]) < k and (not rounds[i] or t - rounds[i][-1] >= b)}
        assert set(chosen) <= may
        assert len(set(chosen)) == len(chosen) == min(size, len(may))
        stayed = [i for i in chosen if stays >> i & 1]  # the others drop out, and keep their turn
        clients.admit(clients.join(stayed))
        for i in stayed:
            rounds[i].append(t)
    for steps in rounds.values():
        assert len(steps) <= k
        assert all(np.diff(steps) >= b)


def test_policies_take_whom_they_say():
    clients = Clients(MinSeparation(min_sep=1, max_participations=9))
    everyone = clients.join("abcd")
    for cohort in ([0, 1], [0], [0, 1], [2]):
        clients.admit(cohort)
    rng = np.random.default_rng(0)
    assert clients.rounds(everyone)[0].tolist() == [3, 2, 1, 0]
    assert clients.rounds(everyone)[1].tolist() == [2, 2, 3, -1]
    assert pick(clients, everyone, 2, rng, "fewest").tolist() == [2, 3]
    assert pick(clients, everyone[:3], 1, rng, "fewest").tolist() == [2]
    assert 2 not in pick(clients, everyone[:3], 2, rng, "longest")
    drawn = [tuple(pick(clients, everyone, 1, rng, "random")) for _ in range(40)]
    assert len(set(drawn)) == 4
    with pytest.raises(RootnoiseError, match=r"policy must be in \['fewest', .*\], got 'mine'"):
        pick(clients, everyone, 2, rng, "mine")
    with pytest.raises(RootnoiseError, match="size must be >= 1, got 0"):
        pick(clients, everyone, 0, rng)


def test_nobody_is_taken_before_one_who_has_waited_longer():
    """Of 1000, each of whom took part once."""
    clients = Clients(MinSeparation(min_sep=1, max_participations=9))
    everyone, rng = clients.join(range(1000)), np.random.default_rng(2)
    for client in rng.permutation(1000):
        clients.admit([client])
    _, last = clients.rounds(everyone)
    for size in range(1, 1000):
        chosen = pick(clients, everyone, size, rng, "longest")
        assert np.sort(last[chosen]).tolist() == list(range(size))


def test_ties_fall_by_chance():
    """2000 draws of 2 of 10 alike: each 400 times, 6 standard deviations allowed."""
    clients, rng = Clients(WHO), np.random.default_rng(1)
    everyone = clients.join(range(10))
    drawn = np.concatenate([pick(clients, everyone, 2, rng) for _ in range(2000)])
    count = np.bincount(drawn, minlength=10)
    assert np.all(np.abs(count - 400) < 6 * np.sqrt(2000 * 0.2 * 0.8))


def test_single_participation_is_once():
    clients = Clients(SingleParticipation())
    clients.admit(clients.join(["a"]))
    assert not clients.may_join(np.array([0])).any()


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        (CyclicPoisson(2, 0.1), "amplification needs clients who are always there"),
        (BallsInBins(4, 2), "amplification needs clients who are always there"),
        (FixedCycle(4, 2), "clients come and go, so use MinSeparation"),
    ],
)
def test_other_participations_are_refused(who, reason):
    with pytest.raises(RootnoiseError, match=f"min-sep or single .*{reason}.*, got {who.type}"):
        Clients(who)


def test_what_breaks_the_participation_is_refused_and_not_recorded():
    clients = Clients(WHO)
    clients.join(["a", "b"])
    clients.admit([0])
    state = clients.state_dict()
    with pytest.raises(
        RootnoiseError, match=r"client 0 in round 1 breaks .*: rounds so far 1, the last one 0"
    ):
        clients.admit([1, 0])
    with pytest.raises(RootnoiseError, match=r"clients must be in \[0, 2\), got 1 to 2"):
        clients.admit([2, 1])
    with pytest.raises(RootnoiseError, match="distinct within a round, got 1 twice"):
        clients.admit([1, 1])
    with pytest.raises(RootnoiseError, match=r"1-D integers, got float64 of shape \(1,\)"):
        clients.admit([0.5])
    assert clients.state_dict() == state
    clients.admit([])
    clients.admit([0])
    clients.admit([])
    with pytest.raises(RootnoiseError, match=r"rounds so far 2, the last one 2"):
        clients.admit([0])


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (["a", 1], "client ids must all be str, as the first, got 1"),
        ([1, "1"], "client ids must all be int, as the first, got '1'"),
        ([""], "client id must not be empty, got ''"),
        ([True], "client id that is not a string must be an integer, got True"),
        ([1.0], "client id that is not a string must be an integer, got 1.0"),
        ([2**63], r"client id that is not a string must be in \[-9223372036854775808, "),
    ],
)
def test_ids_that_could_make_two_of_one_are_refused(ids, reason):
    clients = Clients(WHO)
    with pytest.raises(RootnoiseError, match=reason):
        clients.join(ids)
    assert len(clients) == 0
    clients.join(ids[:1] if reason.startswith("client ids") else ["a"])
    assert len(clients) == 1


def test_integers_of_any_kind_are_one_id():
    clients = Clients(WHO)
    ids: list[Any] = [np.int64(7), 7, np.uint8(7), 8]
    assert clients.join(ids).tolist() == [0, 0, 0, 1]


def filled(folder):
    clients = Clients(WHO)
    clients.keep(folder)
    for t in range(6):
        clients.join([f"client {i}" for i in range(3 + t)])
        clients.admit([t, t + 2])
    return clients


def test_a_reopened_ledger_goes_on_and_cuts_what_does_not_count(tmp_path):
    clients = filled(tmp_path)
    state, files = clients.state_dict(), {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    clients.join(["one more"])
    clients.admit([0])
    with (tmp_path / "cohorts.bin").open("ab") as file:
        file.write(b"\x05\x00")  # torn
    again = Clients.reopen(tmp_path, WHO, state)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == files
    assert again.state_dict() == state
    everyone = np.arange(8)
    for ours, theirs in zip(again.rounds(everyone), filled_rounds(), strict=True):
        assert np.array_equal(ours, theirs)
    again.admit([1])
    assert Clients.reopen(tmp_path, WHO, again.state_dict()).t == 7


def filled_rounds():
    count, last = np.zeros(8, dtype=int), np.full(8, -1)
    for t in range(6):
        for i in (t, t + 2):
            count[i] += 1
            last[i] = t
    return count, last


def edit(folder, name, old, new):
    content = (folder / name).read_bytes()
    assert old in content
    (folder / name).write_bytes(content.replace(old, new, 1))


def test_changed_files_are_refused(tmp_path):
    state = filled(tmp_path).state_dict()
    sound = {f: f.read_bytes() for f in tmp_path.iterdir()}
    harms = [
        ("clients.jsonl", b'"client 3"', b'"client x"'),
        ("clients.jsonl", b'"client 3"', b'"client 2"'),
        ("clients.jsonl", b'"client 3"', b'"client 3'),
        ("cohorts.bin", sound[tmp_path / "cohorts.bin"][-3:], b""),
        ("cohorts.bin", sound[tmp_path / "cohorts.bin"][-1:], b"\xff"),
        ("cohorts.bin", pack(np.array([5, 7])), pack(np.array([5, 6]))),  # whole, of another
    ]
    for name, old, new in harms:
        edit(tmp_path, name, old, new)
        with pytest.raises(RootnoiseError, match="must hold the 8 clients and 6 rounds of the sa"):
            Clients.reopen(tmp_path, WHO, state)
        for file, content in sound.items():
            file.write_bytes(content)
    with pytest.raises(RootnoiseError, match="ledger file must be of this run, got another"):
        Clients.reopen(tmp_path, WHO, state | {"salt": "00"})
    with pytest.raises(RootnoiseError, match="saved clients's participation must be"):
        Clients.reopen(tmp_path, SingleParticipation(), state)
    (tmp_path / "cohorts.bin").unlink()
    with pytest.raises(RootnoiseError, match=r"ledger file must be readable, got .*cohorts\.bin"):
        Clients.reopen(tmp_path, WHO, state)


def test_files_are_new_and_start_empty(tmp_path):
    filled(tmp_path)
    with pytest.raises(RootnoiseError, match=r"ledger file must be new .*clients\.jsonl"):
        Clients(WHO).keep(tmp_path)
    clients = Clients(WHO)
    clients.join(["a"])
    with pytest.raises(RootnoiseError, match="clients must be none to start a file, got 1"):
        clients.keep(tmp_path)
    for name in ("clients.jsonl", "cohorts.bin"):
        assert os.stat(tmp_path / name).st_mode & 0o777 == 0o600  # noqa: PTH116


def test_after_a_failed_write_nothing_is_appended(tmp_path):
    clients = filled(tmp_path)
    (tmp_path / "cohorts.bin").rename(tmp_path / "elsewhere")
    (tmp_path / "cohorts.bin").mkdir()
    with pytest.raises(RootnoiseError, match="ledger file must be writable"):
        clients.admit([0])
    assert clients.t == 6
    for act in (lambda: clients.admit([0]), lambda: clients.join(["new"])):
        with pytest.raises(RootnoiseError, match="files must be reopened after a failed write"):
            act()
