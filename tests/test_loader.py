"""DataLoader gives the sampler's batches, with workers, resumed, and where nobody was drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from rootnoise._check import RootnoiseError
from rootnoise.participation.loader import data_loader
from rootnoise.participation.samplers import (
    CyclicPoissonSampler,
    FixedCycleSampler,
    MinSepPoissonSampler,
)

N = 30
DATA = TensorDataset(torch.arange(N) * 10, torch.arange(N) % 3)


class OneByOne:
    """A data set as small as one can be."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"value": 10 * i}


def sampler():
    # Some of the batches are empty: 30 * (1 - 1 / 30)^30 = 11 of 30 are expected.
    return CyclicPoissonSampler(N, 1, n_steps=30, seed=5)


def check(loader, start):
    expected = [sampler().batch(t) for t in range(start, 30)]
    found = list(loader)
    assert len(found) == len(loader) == len(expected)
    for (indices, batch), wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(indices, wanted)
        if wanted.size:
            values, labels = batch
            np.testing.assert_array_equal(values, 10 * wanted)
            np.testing.assert_array_equal(labels, wanted % 3)
        else:
            assert batch is None
            assert indices.dtype == torch.int64
    assert 0 in {wanted.size for wanted in expected}


@pytest.mark.parametrize("start", [0, 17])
def test_it_gives_the_batches_of_the_sampler(start):
    check(data_loader(DATA, sampler(), start=start), start)


def test_persistent_workers_give_the_same_batches_every_time():
    loader = data_loader(DATA, sampler(), start=9, num_workers=2, persistent_workers=True)
    check(loader, 9)
    check(loader, 9)


def test_a_resumed_loader_goes_on_in_the_middle_of_an_epoch():
    before = FixedCycleSampler(N, 7, 2, seed=3)
    whole = [indices.tolist() for indices, _ in data_loader(DATA, before)]
    resumed = FixedCycleSampler(N, 7, 2)
    resumed.load_state_dict(before.state_dict())
    rest = [indices.tolist() for indices, _ in data_loader(DATA, resumed, start=3, num_workers=2)]
    assert rest == whole[3:]


def test_any_data_set_and_any_collation():
    drawn = MinSepPoissonSampler(N, 5, n_steps=6, min_sep=3, seed=0)
    pairs = list(data_loader(OneByOne(), drawn))
    for t, (indices, batch) in enumerate(pairs):
        np.testing.assert_array_equal(indices, drawn.batch(t))
        np.testing.assert_array_equal(batch["value"], 10 * drawn.batch(t))
    counted = [n for _, n in data_loader(OneByOne(), drawn, collate_fn=len)]
    assert counted == [drawn.batch(t).size for t in range(6)]


def test_no_batch_is_left_when_the_run_is_over():
    assert list(data_loader(DATA, sampler(), start=30)) == []


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: data_loader(TensorDataset(torch.ones(5)), sampler()),
            "dataset must have the sampler's n_examples=30, got 5",
        ),
        (
            lambda: data_loader(DATA, sampler(), start=31),
            "start must be in [0, n_steps=30], got 31",
        ),
        (
            lambda: data_loader(DATA, sampler(), shuffle=True),
            "shuffle must be left out: the sampler chooses, got True",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=f"^{re.escape(line)}$"):
        call()
