"""How the probe of independence goes about it: when it looks, what it sees, what it refuses."""

import gc
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import probe_runs
from probe_cases import (
    TOKENS,
    Add,
    Tokens,
    V,
    X,
    Y,
    ce,
    contrastive,
    make,
    mlp,
    token_mean,
    train,
)
from processes import launch
from rootnoise._check import RootnoiseError
from rootnoise.training.probe import Probe, _differ, _sources, _Trace
from rootnoise.training.tape import NOTE


def test_equal_examples_show_nothing_and_are_made_up_for():
    o = make(mlp())
    x, y = torch.ones_like(X), torch.zeros_like(Y)
    train(o, lambda m, b: F.cross_entropy(m(x[b]), y[b]), steps=3)
    assert o.claim().endswith("has not been probed yet.")
    train(o, ce, steps=1)
    assert o._probe.probed == [3]
    train(o, ce, steps=2)
    assert o._probe.probed == [3, 4]
    o = make(mlp())
    train(o, lambda m, b: F.cross_entropy(m(x[b]), y[b]), steps=3)
    with pytest.raises(RootnoiseError, match=r"^loss \(cross_entropy\) must not mix"):
        train(o, contrastive, steps=1)


def test_later_steps_are_probed():
    o = make(mlp(), probe_every=3)
    train(o, ce, steps=8)
    assert o._probe.probed == [0, 1, 2, 3, 4, 6]
    o = make(Tokens())
    full = lambda m, b: F.cross_entropy(m(TOKENS[b]).flatten(0, 1), TOKENS[b].flatten())  # noqa: E731
    train(o, full, steps=4)  # without padding all tokens count
    with pytest.raises(RootnoiseError, match=r"^loss \(cross_entropy\) must not mix"):
        train(o, token_mean, steps=1)


def test_a_probed_step_is_let_go(monkeypatch):
    """A hook in autograd's graph that holds the step would keep every probed batch for ever."""
    steps = WeakSet()
    enter = Probe.enter

    def noted(probe, args, kwargs):
        enter(probe, args, kwargs)
        steps.add(probe._step)

    monkeypatch.setattr(Probe, "enter", noted)
    o = make(mlp())
    train(o, ce, steps=1)
    assert o._probe.probed == [0]
    gc.collect()
    assert not steps


def test_options_are_checked():
    with pytest.raises(RootnoiseError, match=r"^independence must be probed or assumed, got 'no'"):
        make(mlp(), independence="no")
    with pytest.raises(RootnoiseError, match=r"^probe_every must be >= 0, got -1"):
        make(mlp(), probe_every=-1)


def test_a_step_that_cannot_be_replayed_is_refused():
    def refused(message, loss, model=mlp):
        o = make(model())
        with pytest.raises(RootnoiseError, match=message):
            train(o, loss, steps=1)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = nn.Linear(8, V), [0]

        def forward(self, x):
            self.calls.append(0)
            if len(self.calls) > 2:
                raise KeyError("once")
            return self.inner(x)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, V)

        def forward(self, batch):
            return self.inner(X[batch])

    def written(module, batch):
        out, y = module(X[batch]), Y[batch]
        scale = torch.ones(len(y))
        first = scale_of(scale)
        loss = F.cross_entropy(out, y, reduction="none") * first
        OUTSIDE[0].add_(1)
        return loss.mean()

    def scale_of(scale):
        return scale * OUTSIDE[1]

    refused("^step must run again for the probe of independence, got KeyError 'once'", ce, Counts)
    refused("^tensors of the loss must not be written to", written)
    rows = lambda m, b: F.cross_entropy(m(b), Y[b])  # noqa: E731
    refused(
        r"^one tensor that the model gets must have one row an example \(6\), got none", rows, Rows
    )


OUTSIDE = torch.ones(2, 1).split(1)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("what", ["layer", "loss"])
def test_all_ranks_refuse_together(tmp_path, sharded, what):
    launch(2, probe_runs.mix, tmp_path, sharded, what)
    zero, one = ((tmp_path / f"{rank}.txt").read_text().split("\n") for rank in range(2))
    assert zero[0] == "step 0 was refused by rank 1"
    assert one[0].startswith("layer 1 (Mean) must" if what == "layer" else "loss (add) must")
    for lines in (zero, one):
        assert lines[1] == "step 1"  # and they can go on
        assert lines[2].endswith("was probed at 1 of this process's steps, last at its step 0.")


def test_rounding_is_told_from_mixing():
    """A hundred times the type's epsilon of the row's largest number, and of 1e-3 at the least."""
    kept, eps = torch.tensor([True, True, False]), torch.finfo(torch.float32).eps
    old = torch.tensor([[1.0, 0.5], [1e-6, 0.0], [1.0, 1.0]])
    for row, off, seen in (
        (0, 50 * eps, False),
        (0, 200 * eps, True),
        (1, 5e-2 * eps, False),
        (1, 2e-1 * eps, True),
        (2, 1.0, False),  # replaced, so that it may change
    ):
        new = old.clone()
        new[row] += off
        assert _differ(old, new, 3, kept) == seen
    assert _differ(old, None, 3, kept)
    assert not _differ(torch.zeros(3, 2), None, 3, kept)


def test_faint_mixing_is_seen():
    o = make(mlp(Add(lambda h: h + 1e-3 * h.mean(0))))
    batch = o.sampler.batch(0)
    F.cross_entropy(o.module(X[batch]), Y[batch]).backward()
    with pytest.raises(RootnoiseError, match=r"must not mix the examples of a batch"):
        o.step(batch)


class WithLoss(nn.Module):
    """Makes its loss itself, over the sum of the batch's weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 9))

    def forward(self, x, y):
        weights = 1.0 + y
        return (weights * F.cross_entropy(self.net(x), y, reduction="none")).sum() / weights.sum()


def test_a_loss_made_inside_is_seen_in_the_gradients_of_layers():
    o = make(WithLoss())
    batch = o.sampler.batch(0)
    o.module(X[batch], Y[batch]).backward()
    message = r"^loss, or what follows layer net.2 \(Linear\), must not mix the examples"
    with pytest.raises(RootnoiseError, match=message):
        o.step(batch)


@pytest.mark.parametrize("rows", range(2, 9))
def test_every_example_stays_once_and_is_replaced_once(rows):
    kept = [source == torch.arange(rows) for source in _sources(rows, t=3)]
    assert (kept[0] ^ kept[1]).all()
    assert [int(k.sum()) for k in kept] == [rows // 2, rows - rows // 2]


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, V), nn.Linear(8, 4)

    def forward(self, x):
        logits, other = self.first(x), self.last(x)
        return {"logits": logits, "other": other, "scores": logits.softmax(1)}


def test_each_output_counts_and_none_need_be_used():
    def legal(module, batch):
        found = module(X[batch])
        return F.cross_entropy(found["logits"], Y[batch]) + found["other"].square().mean()

    def mixing(module, batch):
        found = module(X[batch])
        spread = (found["other"] - found["other"].mean(0)).square().mean()
        return F.cross_entropy(found["logits"], Y[batch]) + spread

    o = make(TwoHeads())
    train(o, legal)
    assert o.t == 2
    with pytest.raises(RootnoiseError, match=r"^loss \(\w+\) must not mix the examples"):
        train(make(TwoHeads()), mixing)


def test_a_sharded_model_returns_rows():
    one = torch.ones((), requires_grad=True)
    with pytest.raises(RootnoiseError, match=r"^loss of a sharded model must be made of rows that"):
        _Trace(nn.Linear(2, 2), 4, deep=False).backward(2 * one, None, [one])


def test_labels_are_labels_beside_tensors_as_wide_as_the_batch():
    def loss(module, batch):
        y = Y[batch]
        logits = module(X[batch]) * 2.0  # as many classes as examples
        return F.cross_entropy(logits, y, reduction="sum") / (1 + y).sum()

    with pytest.raises(RootnoiseError, match=r"^loss \(\w+\) must not mix the examples"):
        train(make(mlp()), loss)


def test_an_error_of_the_loss_says_that_it_is_the_loops_own():
    o = make(mlp())
    out = o.module(X[:4])
    with pytest.raises(RuntimeError, match="expected") as error:
        F.cross_entropy(out, Y[:4].int())
    assert error.value.__notes__ == [NOTE]
