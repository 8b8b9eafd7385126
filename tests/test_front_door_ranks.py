"""The unchanged loop on several processes: one run, one file, one refusal."""

import numpy as np
import pytest
import torch

import front_door_runs
from front_door_runs import data, loop, private, weights
from parallel_runs import flat
from processes import launch
from rootnoise._check import RootnoiseError
from rootnoise.front_door import evaluate
from rootnoise.front_door.several import _contents


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
