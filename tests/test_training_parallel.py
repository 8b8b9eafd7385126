"""Data-parallel training on real processes: one noise, one ledger, one refusal."""

import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

import parallel_runs
from parallel_runs import N_STEPS, alone, assert_close, flat, results
from processes import launch


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_on_ranks_is_the_run_of_one_process(tmp_path, size):
    launch(size, parallel_runs.run, tmp_path, None, N_STEPS)
    found = results(tmp_path, size)
    first, optimizer = alone(N_STEPS)
    assert_close(found[0], optimizer, first)
    for other in found[1:]:  # bit by bit
        assert np.array_equal(flat(other["weights"]), flat(found[0]["weights"]))
        assert torch.equal(other["optimizer"]["ledger"]["count"], torch.full((24,), 3).int())
        assert other["optimizer"]["ledger"]["digest"] == found[0]["optimizer"]["ledger"]["digest"]


def test_no_raw_sum_is_made_in_the_memory_of_gradients(tmp_path):
    """Nobody who holds the last step's gradients sees the next one's sum before its noise."""
    launch(2, parallel_runs.hold_gradients, tmp_path)


def test_noise_that_is_added_once_a_rank_is_seen(tmp_path):
    launch(2, parallel_runs.run_wrong, tmp_path, N_STEPS)
    first, optimizer = alone(N_STEPS)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(results(tmp_path, 2)[0], optimizer, first)


def test_poisson_parts_may_be_empty(tmp_path):
    launch(4, parallel_runs.run, tmp_path, None, N_STEPS, True)
    first, optimizer = alone(N_STEPS, poisson=True)
    sizes = [optimizer.sampler.batch(t).size for t in range(N_STEPS)]
    assert min(sizes) < 4
    assert_close(results(tmp_path, 4)[0], optimizer, first)


def test_a_state_moves_between_numbers_of_ranks(tmp_path):
    """1 process to step 3, 4 ranks to 7, 2 ranks to the end; seeds of other ranks are overruled."""
    optimizer = parallel_runs.make(None, seed=1)
    first = flat(optimizer.module.state_dict())
    parallel_runs.train(optimizer, 0, 1, 3)
    torch.save(parallel_runs.saved(optimizer), tmp_path / "one.pt")
    (tmp_path / "4").mkdir()
    launch(4, parallel_runs.run, tmp_path / "4", tmp_path / "one.pt", 7)
    for name, rows in alone(7)[1].state_dict()["noise"].items():  # noise has no sum to round
        if isinstance(rows, torch.Tensor):
            for found in results(tmp_path / "4", 4):
                assert torch.equal(found["optimizer"]["noise"][name], rows)
    (tmp_path / "2").mkdir()
    launch(2, parallel_runs.run, tmp_path / "2", tmp_path / "4" / "3.pt", N_STEPS)
    parallel_runs.train(optimizer, 0, 1, N_STEPS)
    assert_close(results(tmp_path / "2", 2)[0], optimizer, first)


def test_all_ranks_refuse_together_and_can_go_on(tmp_path):
    launch(2, parallel_runs.refuse, tmp_path)
    zero, one = results(tmp_path, 2)
    assert len(zero["lines"]) == len(one["lines"]) == 5
    assert "indices must be one a gradient row (3), got 2" in zero["lines"][0]
    assert one["lines"][0] == "step 0 was refused by rank 0"
    assert zero["lines"][1] == "step 0 was refused by rank 1"
    assert "indices must be 1-D integers" in one["lines"][1]
    for lines in (zero["lines"], one["lines"]):
        assert "indices must be distinct within a batch" in lines[2]
        assert lines[3] == "ranks must be at one step, got [0, 1]"
        assert "breaks the participation" in lines[4]
    first, optimizer = alone(3)
    assert_close(zero, optimizer, first)


def test_a_ledger_that_cannot_be_written_stops_all_ranks(tmp_path):
    launch(2, parallel_runs.lose_file, tmp_path)
    assert "ledger file must be writable" in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == "step 0 was refused by rank 0"


def test_ranks_must_have_one_mechanism(tmp_path):
    launch(3, parallel_runs.disagree, tmp_path)
    for rank in range(3):
        line = (tmp_path / f"{rank}.txt").read_text()
        assert line == "mechanism must be rank 0's on all ranks, got others on [2]"


def test_spans_columns_and_sums(tmp_path):
    launch(3, parallel_runs.primitives, tmp_path)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_examples_run(tmp_path, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    launch(2, parallel_runs.example, str(script), port, tmp_path)
    line = (tmp_path / "0.txt").read_text()
    assert re.match(r"accuracy [01]\.\d\d on 2 processes. \(8, 1e-05\)-differential", line)
    assert (tmp_path / "1.txt").read_text() == ""


def test_two_runs_side_by_side_do_not_mix(tmp_path):
    launch(4, parallel_runs.two_runs, tmp_path)
