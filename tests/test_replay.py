"""The auditor reads a ledger's file by other code, and finds what breaks the participation."""

import json

import numpy as np
import pytest

from rootnoise._check import RootnoiseError
from rootnoise.auditing import replay as module
from rootnoise.auditing.replay import replay
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.participation.ledger import Ledger
from rootnoise.participation.ledger_file import first_line, pack, unpack
from rootnoise.participation.samplers import CyclicPoissonSampler, FixedCycleSampler


def written(path, batches, n=6):
    """A file of these batches, whether they keep a participation or not."""
    records = [pack(np.array(batch, dtype=np.int64)) for batch in batches]
    path.write_bytes(first_line({"n_examples": n, "salt": "00" * 16}) + b"".join(records))
    return path


@pytest.mark.parametrize("pairs", [10, 10**7])
def test_what_a_sampler_draws_and_a_ledger_keeps_holds(tmp_path, monkeypatch, pairs):
    monkeypatch.setattr(module, "PAIRS", pairs)  # in many passes, and in one
    for i, sampler in enumerate(
        (
            FixedCycleSampler(103, 10, 3, seed=1),
            CyclicPoissonSampler(103, 10, 40, seed=1),
            CyclicPoissonSampler(103, 5, 40, groups=7, seed=1),
        )
    ):
        path = tmp_path / f"{i}.bin"
        ledger = Ledger(sampler.participation, 103)
        ledger.keep(path)
        for t, batch in enumerate(sampler):
            ledger.admit(t, batch)
        found = replay(path, sampler.participation)
        assert found.broken is None
        assert found.digest == ledger.digest
        assert found.steps == sampler.n_steps
        assert found.participations == sum(batch.size for batch in sampler)


BROKEN = {
    "twice": (SingleParticipation(), [[0, 1], [1]], "an example has 2 steps"),
    "too close": (MinSeparation(3, 2), [[5], [], [5]], "two only 2 apart"),
    "too often": (MinSeparation(1, 2), [[3], [3], [3]], "an example has 3 steps"),
    "off the cycle": (FixedCycle(2, 3), [[0], [1], [2], [0]], "two only 3 apart"),
    "past the epochs": (FixedCycle(1, 2), [[0], [0], [0]], "an example has 3 steps"),
    "in another group": (CyclicPoisson(2, 0.5), [[0], [1], [0], [0]], "two only 1 apart"),
    "nobody": (CyclicPoisson(1, 0.5), [[]] * 40, "0 participations where 120 +- "),
    "everybody": (CyclicPoisson(1, 0.5), [range(6)] * 80, "480 participations where 240 +- "),
    "a stranger": (MinSeparation(3, 2), [[6]], "step 0 names an example that is none of 6"),
    "no rule": ("all", [[0]], "no rule is known for all"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_history_that_breaks_the_rule_is_named(tmp_path, case):
    participation, batches, message = BROKEN[case]
    found = replay(written(tmp_path / "ledger.bin", batches), participation)
    assert found.broken is not None
    assert message in found.broken


def test_both_unpackings_agree(tmp_path):
    rng = np.random.default_rng(0)
    for n in (2, 300, 70_000, 2**32):
        for size in (0, 1, 2, 40):
            batch = np.unique(rng.integers(0, n, size))
            np.testing.assert_array_equal(module._batch(pack(batch)), batch)
            np.testing.assert_array_equal(unpack(pack(batch)), batch)


def test_an_edited_size_does_not_fill_the_memory(tmp_path):
    path = written(tmp_path / "ledger.bin", [[]])
    path.write_bytes(path.read_bytes()[:-5] + b"\xff\xff\xff\xff\x00")
    found = replay(path, MinSeparation(3, 2))
    assert found.broken == "step 0 names an example that is none of 6"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ledger file must begin with its header"),
        (b"[]\n", "ledger file must begin with its header"),
        (b"\xff\n", "ledger file must begin with its header"),
        (json.dumps({"n_examples": 6}).encode() + b"\n", "ledger file must begin with its header"),
        (first_line({"n_examples": 6, "salt": "00"}) + b"\1\0", "ledger file must hold whole"),
        (first_line({"n_examples": 6, "salt": "00"}) + b"\1\0\0\0\7", "ledger file must hold who"),
        (
            first_line({"n_examples": 6, "salt": "00"}) + b"\1\0\0\0\x21" + bytes(5),
            "ledger file must hold whole records",
        ),
    ],
)
def test_what_is_no_ledger_is_refused(tmp_path, content, message):
    (tmp_path / "ledger.bin").write_bytes(content)
    with pytest.raises(RootnoiseError, match=f"^{message}"):
        replay(tmp_path / "ledger.bin", SingleParticipation())
    with pytest.raises(RootnoiseError, match=r"^ledger file must be readable, got No such file"):
        replay(tmp_path / "none.bin", SingleParticipation())
