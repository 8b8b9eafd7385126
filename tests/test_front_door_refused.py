"""What `make_private` and its loop refuse, in one line; and collate functions that they allow."""

import random  # noqa: TID251 - data sets use it

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from front_door_parts import BATCH, GOAL, bsr, data, parts, weights
from rootnoise import (
    RootnoiseError,
    make_private,
)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def twice():
    model, _, run = bsr()
    return model, run.optimizer, data()


def weighted():
    return DataLoader(data(), BATCH, sampler=WeightedRandomSampler([1.0] * 24, 24))


def mixed_up(examples):
    x, y = default_collate(examples)
    order = torch.randperm(len(x))
    return {"x": 0.75 * x + 0.25 * x[order], "y": [y, y[order]]}


def centred(examples):
    x, y = default_collate(examples)
    return (x - x.mean(0)).numpy(), y


def unfolded(examples):
    """A row has one dimension more where an example comes twice."""
    x, y = default_collate(examples)
    return (x if len(x.unique(dim=0)) == len(x) else x[:, None]), y


class Jittered:
    def __init__(self):
        self.rng = torch.Generator().manual_seed(0)

    def __call__(self, examples):
        x, y = default_collate(examples)
        return x + torch.randn(x.shape, generator=self.rng), y


def padded(examples):
    """Each example is longer than the last; counts are of the whole batch."""
    rows = [x[:1].repeat(1 + int(10 * abs(x[1]))) for x, _ in examples]
    rows = [row + torch.rand(1) + random.random() for row in rows]  # noqa: S311
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
    lengths = [len(row) for row in rows]
    return {"x": x, "lengths": lengths, "n": sum(lengths), "text": ["a"] * len(rows), "rows": rows}


def generators():
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), torch.get_rng_state().tolist(), numpy["key"].tolist(), numpy["pos"]


@pytest.mark.parametrize("n", [1, 2, 24])
def test_collate_functions_may_pad_augment_and_count(n):
    """They are tried, and move no generator."""
    model, sgd = parts()
    loader = DataLoader(data(n), 1, collate_fn=padded)
    before = generators()
    run = make_private(model, sgd, loader, mechanism="identity", **GOAL)
    assert generators() == before
    assert next(iter(run.loader))["text"] == ["a"]


def test_collate_functions_may_be_trusted():
    model, sgd = parts()
    loader = DataLoader(data(), BATCH, collate_fn=centred)
    make_private(model, sgd, loader, mechanism="bsr", independence="assumed", **GOAL)


WRONG = {
    "a second call": (lambda: (*twice(), {}), "make_private must be called once a run"),
    "another sampler": (lambda: (*parts(), weighted(), {}), "loader must draw single examples at"),
    "no batch size": (lambda: (*parts(), data(), {"batch_size": None}), "batch_size must be given"),
    "a stream": (lambda: (*parts(), Stream(), {}), "data must be a map-style data set of known"),
    "no such sampling": (lambda: (*parts(), data(), {"sampling": "x"}), "sampling must be auto, "),
    "no such plan": (
        lambda: (*parts(), data(), {"sampling": "x", "mechanism": "auto"}),
        "sampling must be one that the plan has, got 'x'",
    ),
    "options of auto": (
        lambda: (*parts(), data(), {"options": {"bands": 2}, "mechanism": "auto"}),
        "options must be left out with mechanism auto",
    ),
    "an interval": (
        lambda: (*parts(), data(), {"scheduler_interval": "day"}),
        "scheduler_interval must be step or epoch, got 'day'",
    ),
    "a foreign scheduler": (
        lambda: (*parts(), data(), {"scheduler": StepLR(parts()[1], 1)}),
        "scheduler must be the optimizer's own",
    ),
    "no module": (lambda: (None, parts()[1], data(), {}), "model must be a torch module, got None"),
    "no optimizer": (lambda: (parts()[0], None, data(), {}), "optimizer must be a torch optimizer"),
    "no options": (lambda: (*parts(), data(), {"options": 5}), "options must be a mapping, got"),
    "no path": (lambda: (*parts(), data(), {"resume": 5}), "resume must be a path, got int"),
    "no scheduler": (
        lambda: (*parts(), data(), {"scheduler": 3}),
        "scheduler must be one of torch, or a function that makes one, got int",
    ),
    "no noise": (
        lambda: (*parts(), data(), {"epsilon": None, "noise_multiplier": -1.0}),
        "noise_multiplier must be a finite number > 0, got -1.0$",
    ),
    "an index twice": (
        lambda: (*parts(), Subset(Subset(data(), [*range(12), 0]), range(9)), {}),
        "data must hold each record once, for epsilon is one index's, got a Subset with index 0 2 ",
    ),
    "a set twice": (
        lambda: (*parts(), ConcatDataset([data(), ConcatDataset([d := data(), d])]), {}),
        "data must hold each record once, for epsilon is one index's, got a ConcatDataset of one",
    ),
    "a rare class twice": (
        lambda: (*parts(), ConcatDataset([d := data(), Subset(d, [3, 5])]), {}),
        "data must hold each record once, for epsilon is one index's, got a ConcatDataset with "
        "index 3 2 times",
    ),
    "folds that overlap": (
        lambda: (*parts(), ConcatDataset([Subset(d := data(), range(8)), Subset(d, [9, 7])]), {}),
        "data must hold each record once, for epsilon is one index's, got a ConcatDataset with "
        "index 7 2 times",
    ),
    "an index from the end": (
        lambda: (*parts(), Subset(data(), [1, 1 - len(data())]), {}),
        "data must hold each record once, for epsilon is one index's, got a Subset with index 1 2 ",
    ),
    "tensors twice": (
        lambda: (*parts(), ConcatDataset([d := data(), TensorDataset(*d.tensors)]), {}),
        "data must hold each record once, for epsilon is one index's, got a ConcatDataset with "
        "index 0 2 times",
    ),
    "mix-up": (
        lambda: (*parts(), DataLoader(data(), collate_fn=mixed_up), {}),
        "collate_fn must make each example's row of that example alone, got another row of one "
        "example beside others",
    ),
    "a mean": (
        lambda: (*parts(), DataLoader(data(), collate_fn=centred), {}),
        "collate_fn must make each example's row of that example alone, got another row of one "
        "example beside others",
    ),
    "a shape": (
        lambda: (*parts(), DataLoader(data(), collate_fn=unfolded), {}),
        "collate_fn must make each example's row of that example alone, got another row of one "
        "example beside others",
    ),
    "a generator of its own": (
        lambda: (*parts(), DataLoader(data(), collate_fn=Jittered()), {}),
        "collate_fn must make each example's row of that example alone, got another row of one "
        r"example \(or",
    ),
    "batch norm": (
        lambda: (m := nn.BatchNorm1d(5), torch.optim.SGD(m.parameters()), data(), {}),
        "layer model must not mix examples",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use_is_refused_in_one_line(wrong):
    make, line = WRONG[wrong]
    model, optimizer, dataset, changes = make()
    settings = {"batch_size": BATCH, "mechanism": "bsr"} | GOAL | changes
    with pytest.raises(RootnoiseError, match=f"^{line}") as refusal:
        make_private(model, optimizer, dataset, **settings)
    assert "\n" not in str(refusal.value)


def test_batches_are_stepped_on_once_each():
    _model, _sgd, run = bsr()
    with pytest.raises(RootnoiseError, match=r"^step must follow a new batch of the loader"):
        run.optimizer.step()
    batches = iter(run.loader)
    x, y = next(batches)
    with pytest.raises(RootnoiseError, match=r"^each batch must be stepped on once before the ne"):
        next(batches)
    x, y = next(iter(run.loader))
    nn.functional.cross_entropy(run.model(x), y).backward()
    run.optimizer.step()
    with pytest.raises(RootnoiseError, match=r"^step must follow a new batch of the loader"):
        run.optimizer.step()
    assert run.optimizer.t == 1


def test_no_scaler_and_no_new_parameters():
    model, _sgd, run = bsr()
    with pytest.raises(RootnoiseError, match=r"^parameters must all be the optimizer's before"):
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(iter(run.loader))
    before = weights(model)
    scaler.scale(nn.functional.cross_entropy(run.model(x), y)).backward()
    with pytest.raises(
        RootnoiseError, match=r"^step must get gradients as they are .* got a GradScaler"
    ):
        scaler.step(run.optimizer)
    assert torch.equal(before, weights(model))
