"""FSDP2 on real processes: every rank makes the noise of its own shards, and no other."""

import pytest
import torch

import sharded_runs
from parallel_runs import N_STEPS, alone, assert_close, backward, examples, flat, make, results
from processes import launch
from rootnoise.noise import NoiseStream
from rootnoise.training.clipping import NonFiniteGradientWarning


@pytest.mark.parametrize("size", [1, 2, 4])
def test_noise_is_that_of_one_process_bit_by_bit(tmp_path, size):
    """The layers have 5 and 3 rows: of 4 ranks some hold less than others, or nothing."""
    launch(size, sharded_runs.noise, tmp_path)
    one = make(None, seed=1)
    stream = NoiseStream(one.mechanism, 58, one.stream.key)
    for found in torch.load(tmp_path / f"{size - 1}.pt", weights_only=True):
        expected = stream.next() / one.sampler.batch_size
        assert torch.equal(torch.cat([g.flatten() for g in found.values()]), expected)


@pytest.mark.parametrize(("size", "poisson"), [(2, False), (4, True)])
def test_a_sharded_run_is_the_run_of_one_process(tmp_path, size, poisson):
    launch(size, sharded_runs.run, tmp_path, N_STEPS, poisson)
    found = results(tmp_path, size)
    first, optimizer = alone(N_STEPS, poisson)
    assert_close(found[0], optimizer, first)
    assert sum(rank["held"] for rank in found) == 58
    rows = optimizer.mechanism.noising.state_size
    assert all(rank["state"] == [rows, rank["held"]] for rank in found)


def test_a_checkpoint_of_four_ranks_goes_on_with_two(tmp_path):
    launch(4, sharded_runs.begin, tmp_path, 5)
    (tmp_path / "2").mkdir()
    launch(2, sharded_runs.go_on, tmp_path / "2", tmp_path, N_STEPS)
    first, optimizer = alone(N_STEPS)
    assert_close(results(tmp_path / "2", 2)[0], optimizer, first)


def test_a_gradient_that_is_not_finite_counts_as_zero(tmp_path):
    launch(2, sharded_runs.count_bad, tmp_path)
    optimizer = make(None, seed=1)
    (x, y), batch = examples(), optimizer.sampler.batch(0)
    first = flat(optimizer.module.state_dict())
    x[batch[0], 0] = torch.inf
    backward(optimizer, x[batch], y[batch])
    with pytest.warns(NonFiniteGradientWarning):
        optimizer.step(batch)
    assert_close(results(tmp_path, 2)[0], optimizer, first)


def test_refusals(tmp_path):
    launch(1, sharded_runs.refuse, tmp_path)
    expected = [
        "gradients of 0.weight are missing: run forward and backward once, in",
        "indices must be one a gradient row (6), got 5",
        "backward must run once a step, got 2 for 0.weight",
        "saved noise's state must have a DTensor of at least 3 rows for 0.weight, got",
        "saved noise's state must have a DTensor of at least 3 rows for 0.weight, got",
        "saved noise's state must have a DTensor of at least 3 rows for 0.weight, got",
        "parameters of a sharded model must be in one layer each, got a second Linear with them",
        "layers of a sharded model must have a per-sample gradient in Opacus, got PReLU",
        "weight must be sharded by rows over one mesh dimension, got (Shard(dim=1),)",
        "0.weight must be sharded by rows over one mesh dimension, got Tensor",
        "shard must hold rows range(0, 5), got 3 rows",
    ]
    lines = (tmp_path / "lines.txt").read_text().splitlines()
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
