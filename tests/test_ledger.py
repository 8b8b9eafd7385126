import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootnoise._check import RootnoiseError
from rootnoise.ledger import Ledger
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation


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
