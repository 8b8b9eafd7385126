"""The unchanged loop on several processes: one run, one file, one refusal."""

import random  # noqa: TID251 - its state is looked at

import numpy as np
import pytest
import torch

import front_door_runs
from front_door_runs import data, loop, private, weights
from parallel_runs import flat
from processes import launch
from rootnoise._check import RootnoiseError
from rootnoise.front_door import evaluate, saved
from rootnoise.front_door.several import _contents
from rootnoise.keys import Key


@pytest.fixture(scope="module")
def alone():
    """Return first weights, last weights and accuracy of one process."""
    made = private("", 1)
    first = flat(made.model.state_dict())
    loop(made, 12)
    return first, flat(made.model.state_dict()), evaluate(made.model, data())


def assert_close(found, alone):
    """To rounding of what the run has moved."""
    first, last, accuracy = alone
    moved = np.abs(last - first).max()
    np.testing.assert_allclose(flat(found["weights"]), last, atol=1e-5 * moved, rtol=0)
    assert found["accuracy"] == accuracy


@pytest.mark.parametrize(
    ("size", "kind", "more"),
    [(2, "", {}), (4, "ddp", {"micro_batch_size": 1}), (2, "fsdp", {"micro_batch_size": 2})],
    ids=["plain", "ddp", "fsdp"],
)
def test_the_loop_of_one_process_on_several(tmp_path, alone, size, kind, more):
    launch(size, front_door_runs.run, tmp_path, kind, more)
    for rank in range(size):
        assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone)


@pytest.mark.parametrize(("size", "kind", "then"), [(2, "fsdp", ""), (2, "ddp", "fsdp")])
def test_a_saved_run_goes_on_with_other_ranks(tmp_path, alone, size, kind, then):
    """2 ranks with shards to one process, and 2 with copies to 3 with shards."""
    launch(size, front_door_runs.begin, tmp_path, kind)
    assert not (tmp_path / "of another rank.pt").exists()
    resume = tmp_path / "saved.pt"
    if then == "":
        made = private(then, 1, resume=resume)
        assert made.optimizer.t == 5
        loop(made, 12)
        front_door_runs.report(made, 0, tmp_path)
    else:
        launch(3, front_door_runs.run, tmp_path, then, {"resume": resume})
    assert_close(torch.load(tmp_path / "0.pt", weights_only=True), alone)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):  # 5 steps are not 12
        np.testing.assert_allclose(weights(resume), alone[1], rtol=1e-3)


class Record:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    "kind",
    [
        Record,
        lambda x: {"x": [Record(torch.tensor(float(x), dtype=torch.bfloat16))]},
        lambda x: np.array([None, x], dtype=object),
        complex,
    ],
    ids=["object", "bfloat16 in an object", "objects", "complex"],
)
def test_records_of_every_kind_are_compared(kind):
    digests = [_contents([kind(i), kind(x)]) for i, x in ((1, 2), (1, 2), (1, 3))]
    assert digests[0] == digests[1] != digests[2]


class Draws:
    """Records that draw from all global generators, as augmentation does."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return random.gauss(), np.random.random(), torch.rand(2)


def test_comparing_records_that_draw_moves_no_generator():
    def next_numbers():
        return random.gauss(), np.random.random(), torch.rand(1).item()

    found, states = [], (random.getstate(), np.random.get_state(), torch.get_rng_state())
    for compared in (False, True):
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if compared:
            assert saved.identity(Draws(), Key(bytes(32)))[1] is None  # not in memory
            digests = {_contents(Draws()) for _ in range(2)}
            assert len(digests) == 1
        found.append(next_numbers())
    assert found[0] == found[1]


def test_records_that_cannot_be_compared_are_refused():
    with pytest.raises(RootnoiseError, match=r"^data must give records of arrays, numbers and t"):
        _contents([object()])


def test_all_ranks_refuse_together(tmp_path):
    launch(2, front_door_runs.refuse, tmp_path)
    expected = [
        "data must be rank 0's on all ranks, got others on [1]",
        "data must be rank 0's on all ranks, got others on [1]",
        "clip_norm must be rank 0's on all ranks, got others on [1]",
        f"resume must be readable, got {tmp_path / 'none.pt'}: No such file or directory",
        "save must be called on every rank, got it on [0]",
        f"path must be writable, got {tmp_path / 'none' / 'x.pt'}: No such file or directory",
    ]
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text().splitlines() == expected
