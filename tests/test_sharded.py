"""FSDP2 on real processes: every rank makes the noise of its own shards, and no other."""

import warnings

import pytest
import torch

import sharded_runs
from parallel_runs import (
    N_STEPS,
    alone,
    assert_close,
    backward,
    examples,
    flat,
    make,
    private,
    results,
    train,
)
from processes import launch
from rootnoise.noise import NoiseStream
from rootnoise.training import privatize
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


def test_models_of_all_kinds_cut_anyhow(tmp_path):
    """As a whole, layer by layer, without a root; tied weights, and layers outside the table."""
    launch(2, sharded_runs.cut_anyhow, tmp_path, 3)
    for name, (kind, _) in sharded_runs.CUTS.items():
        with warnings.catch_warnings(action="ignore"):
            optimizer = private(privatize(sharded_runs.seeded(kind), "sum"), 1)
        first = flat(optimizer.module.state_dict())
        train(optimizer, 0, 1, 3)
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert_close({"weights": found}, optimizer, first)
        del optimizer


def test_narrow_layers(tmp_path):
    launch(2, sharded_runs.narrow, tmp_path, 3)
    first, optimizer = alone(3)
    expected = flat(optimizer.module.state_dict())
    off = flat(results(tmp_path, 2)[0]["weights"]) - expected
    assert 0 < abs(off).max() < 0.02 * abs(expected - first).max()


@pytest.mark.parametrize("sync", [True, False], ids=["at once", "with the last"])
def test_micro_batches_are_the_batch(tmp_path, sync):
    launch(2, sharded_runs.divided, tmp_path, N_STEPS, sync)
    first, optimizer = alone(N_STEPS)
    for found in results(tmp_path, 2):
        assert_close(found, optimizer, first)


def test_no_record_moves_the_sum_by_more_than_the_clip_norm(tmp_path):
    launch(2, sharded_runs.one_record, tmp_path)


@pytest.mark.parametrize("what", [sharded_runs.break_off, sharded_runs.refuse_together])
def test_what_is_broken_off_or_refused_starts_anew(tmp_path, what):
    launch(2, what, tmp_path, 4)
    first, optimizer = alone(4)
    for found in results(tmp_path, 2):
        assert_close(found, optimizer, first)
    if what is sharded_runs.refuse_together:
        lines = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2)]
        assert lines[0][0] == "step 0 was refused by rank 1"
        assert lines[1][0].startswith("micro-batch must be of the batch of step 0, got example ")
        assert lines[0][1].startswith("loss (")
        assert lines[1][1] == "step 0 was refused by rank 0"
        for _, _, line in lines:
            assert line.startswith("parameter 2.weight must be used by its own layer's call alone")


def test_ranks_that_would_wait_for_each_other_refuse(tmp_path):
    launch(2, sharded_runs.disagree, tmp_path, 3)
    first, optimizer = alone(3)
    for rank, found in enumerate(results(tmp_path, 2)):
        assert_close(found, optimizer, first)
        assert (tmp_path / f"{rank}.txt").read_text().splitlines() == [
            "ranks must do the same in step 0, part for part, got accumulate, accumulate without "
            "set_requires_gradient_sync",
            "ranks must do the same in step 0, part for part, got accumulate, step",
        ]


def test_refusals(tmp_path):
    launch(1, sharded_runs.refuse, tmp_path)
    expected = [
        "gradients of 0.weight are missing: run forward and backward once, in",
        "indices must be one a gradient row (6), got 5",
        "forward must run once a step (evaluate under no_grad, drop one by zero_grad), got 2 in tr",
        "saved noise's state must have a DTensor of at least 3 rows for 0.weight, got",
        "saved noise's state must have a DTensor of at least 3 rows for 0.weight, got",
        "saved noise's state must have a DTensor of at least 3 rows for 0.weight, got",
        "layer model (Scaled) must be sharded as one, without its parts, got a Linear shard",
        "0.weight must be on the mesh's device (cpu, no CPU offload), got meta",
        "weight must be sharded by rows over one mesh dimension, got (Shard(dim=1),)",
        "0.weight must be sharded by rows over one mesh dimension, got Tensor",
        "shard must hold rows range(0, 5), got 3 rows",
    ]
    lines = (tmp_path / "lines.txt").read_text().splitlines()
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
