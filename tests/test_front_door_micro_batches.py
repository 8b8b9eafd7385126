"""Micro-batches in an unchanged loop: the run of the undivided batches, or one line."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from rootnoise import Key, RootnoiseError, make_private
from rootnoise.participation.loader import Split

EPOCHS, BATCH, N = 2, 8, 24
GOAL: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "epochs": EPOCHS, "mechanism": "bsr"}


def data():
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x[:, 0] > 0).long())


def private(micro=None, *, scheduler=None, workers=0, kind=torch.optim.SGD, key=303, **changes):
    with torch.random.fork_rng():
        torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
        model = nn.Linear(5, 2)
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    inner = kind(model.parameters(), lr=0.1, **more)
    made = None if scheduler is None else scheduler(inner)
    loader = DataLoader(data(), batch_size=BATCH, num_workers=workers)
    own = None if key is None else Key.from_seed(key)
    given = GOAL | {"key": own, "seed": 5, "scheduler": made} | changes
    return make_private(model, inner, loader, micro_batch_size=micro, **given), made


def train(run, scheduler=None, epochs=EPOCHS):
    """The loop of everyone, and the sizes of what the loader gave."""
    sizes: list[int] = []
    for _ in range(epochs):
        expected, before = len(run.loader), len(sizes)
        for x, y in run.loader:
            sizes.append(len(x))
            run.optimizer.zero_grad()
            cross_entropy(run.model(x), y, reduction="sum").backward()
            run.optimizer.step()
            if scheduler is not None:
                scheduler.step()
        assert len(sizes) - before == expected
    return sizes


def ended(run):
    """Weights, noise, and what the ledger counts."""
    private = run.optimizer.private
    ledger, noise = private.ledger.state_dict(), private.stream.state_dict()
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return weights, noise, {n: ledger[n] for n in ("t", "last_step", "count")}


def same_run(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(one[1:], other[1:], strict=True):  # noise bits and ledger
        assert a.keys() == b.keys()
        for name in a:
            equal = (
                torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
            )
            assert equal, name


@given(st.integers(0, 40), st.integers(1, 50), st.booleans())
def test_parts_are_the_batch_in_its_order(size, of, by_size):
    batch = np.arange(size)
    parts = (Split(most=of) if by_size else Split(of))(batch)
    assert np.array_equal(np.concatenate(parts), batch)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    if by_size:
        assert max(sizes) <= of
        assert len(parts) == max(1, -(-size // of))
    else:
        assert len(parts) == of


KINDS = {
    "fixed": {"loss_reduction": "sum"},
    "poisson": {"loss_reduction": "sum", "sampling": "poisson", "mechanism": "identity"},
    "schedule": {"loss_reduction": "sum", "scheduler": lambda o: ExponentialLR(o, 0.5)},
    "adam": {"loss_reduction": "sum", "kind": torch.optim.AdamW},
    "workers": {"loss_reduction": "sum", "workers": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_in_micro_batches_is_the_run_of_whole_ones(kind):
    run, scheduler = private(**KINDS[kind])
    whole_sizes = train(run, scheduler)
    whole = ended(run)
    planned = list(run.optimizer.rates)
    del run, scheduler
    for micro in (3,) if kind == "workers" else (1, 3, 100):
        gc.collect()
        run, scheduler = private(micro, **KINDS[kind])
        sizes = train(run, scheduler)
        same_run(ended(run), whole)
        assert max(sizes) <= micro
        assert sum(sizes) == sum(whole_sizes)
        assert run.optimizer.t == EPOCHS * run.loader.period
        assert list(run.optimizer.rates) == planned  # no warning took them away
        if scheduler is not None:
            assert scheduler.last_epoch == run.optimizer.t
            assert set(scheduler.state_dict()) == set(ExponentialLR(adhoc(), 1).state_dict())
            assert isinstance(scheduler, ExponentialLR)
        del run, scheduler


def adhoc():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def test_a_mean_is_over_each_part():
    run, _ = private(3)
    for x, y in run.loader:
        run.optimizer.zero_grad()
        cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
    means = ended(run)
    del run
    gc.collect()
    run, _ = private(3, loss_reduction="sum")
    train(run, epochs=1)
    same_run(ended(run), means)


def test_a_scheduler_unknown_to_make_private_must_skip_with_the_step():
    run, _ = private(3)
    scheduler = LambdaLR(run.optimizer, lambda t: 1.0)  # of the wrapped optimizer
    ExponentialLR(run.optimizer, 0.5)
    skipped = []
    for x, y in run.loader:
        run.optimizer.zero_grad()
        cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        skipped.append(run.optimizer.step_was_skipped)
        if not run.optimizer.step_was_skipped:
            scheduler.step()
    assert skipped == [True, True, False] * 3
    assert scheduler.last_epoch == run.optimizer.t == 3

    run, _ = private(3, mechanism="identity", key=4)
    halves = ExponentialLR(run.optimizer, 0.5)
    line = (
        r"^learning rate must stay the same within a batch, got 0.05 after 0.1: give make_private"
    )
    with pytest.raises(RootnoiseError, match=line):
        train(run, halves)
    assert run.optimizer.t == 0


def test_closures_run_for_each_part():
    run, _ = private(3)
    losses = []
    for x, y in run.loader:

        def closure(x=x, y=y):
            run.optimizer.zero_grad()
            loss = cross_entropy(run.model(x), y)
            loss.backward()
            return loss

        losses.append(run.optimizer.step(closure))
    assert len(losses) == len(run.loader) == 9
    assert run.optimizer.t == 3


def first_part(run, batches, step=True):
    x, y = next(batches)
    run.optimizer.zero_grad()
    cross_entropy(run.model(x), y).backward()
    if step:
        run.optimizer.step()


def test_a_batch_broken_off_releases_nothing_and_starts_over(tmp_path):
    run, _ = private(loss_reduction="sum")
    train(run)
    whole = ended(run)
    del run
    gc.collect()

    run, _ = private(3, loss_reduction="sum")
    run.optimizer.save(tmp_path / "run.pt")
    before = ended(run)[0]
    batches = iter(run.loader)
    for _ in range(2):
        x, y = next(batches)
        run.optimizer.zero_grad()
        cross_entropy(run.model(x), y, reduction="sum").backward()
        run.optimizer.step()
    assert torch.equal(ended(run)[0], before)
    assert all(p.grad is None for p in run.model.parameters())
    with pytest.raises(
        RootnoiseError, match=r"^state must be that between two steps, got step 0 i"
    ):
        run.optimizer.save(tmp_path / "run.pt")
    for _ in range(EPOCHS):  # in the same process: a new pass begins with the batch
        for x, y in run.loader:  # gradients dropped after the step, as some loops do
            cross_entropy(run.model(x), y, reduction="sum").backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    same_run(ended(run), whole)
    del run, batches
    gc.collect()

    settings = {"loss_reduction": "sum", "key": None, "resume": tmp_path / "run.pt"}
    run, _ = private(5, **settings)  # in another one, in parts of another size
    train(run)
    same_run(ended(run), whole)


def test_a_forward_of_a_pass_before_is_not_of_the_batch_drawn_anew():
    """Else examples 4 to 6 of the batch would count for 1 to 3, and then once more."""
    run, _ = private(3)
    x, y = next(iter(run.loader))
    old = cross_entropy(run.model(x), y)
    next(iter(run.loader))
    with pytest.raises(RootnoiseError, match=r"^backward must be of the last forward, got one"):
        old.backward()
    with pytest.raises(RootnoiseError, match="missing: run forward and backward once"):
        run.optimizer.step()


@pytest.mark.parametrize("broken_off", [False, True])
def test_what_zero_grad_drops_between_parts_counts_for_nothing(broken_off):
    run, _ = private(3)
    train(run)
    before = ended(run)
    del run
    gc.collect()

    def interrupt(*_):
        raise KeyboardInterrupt

    run, _ = private(3)
    for _ in range(EPOCHS):
        for x, y in run.loader:
            if broken_off:
                with run.model.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
                    run.model(3 * x)
            else:
                cross_entropy(run.model(3 * x), y).backward()
            run.optimizer.zero_grad()
            cross_entropy(run.model(x), y, reduction="sum").backward()
            run.optimizer.step()
    same_run(ended(run), before)


def test_parts_are_stepped_on_once_each_in_their_order():
    run, _ = private(3)
    batches = iter(run.loader)
    first_part(run, batches, step=False)
    with pytest.raises(
        RootnoiseError, match=r"^each batch must be stepped on once before the next"
    ):
        next(batches)

    batches = iter(run.loader)
    first_part(run, batches)
    with pytest.raises(
        RootnoiseError, match=r"^step must follow a new batch of the loader that mak"
    ):
        run.optimizer.step()
    first_part(run, batches)
    run.optimizer.private.zero_grad()  # drops the first two
    x, y = next(batches)
    cross_entropy(run.model(x), y).backward()
    with pytest.raises(
        RootnoiseError, match=r"^last micro-batch of step 0 must be taken by step, g"
    ):
        run.optimizer.accumulate()
    with pytest.raises(
        RootnoiseError, match=r"^batch of step 0 must be whole, its micro-batches jo"
    ):
        run.optimizer.step()
    assert run.optimizer.t == 0

    batches = iter(run.loader)
    first_part(run, batches, step=False)
    rest = run.optimizer.private.sampler.batch(0)[3:]
    run.optimizer.draw(rest, together=True)  # as by a host that draws all parts of a batch
    with pytest.raises(RootnoiseError, match=r"^each batch must be stepped on once before the"):
        run.optimizer.draw(rest, together=True)  # of the next batch


def test_a_part_twice_or_of_another_batch_is_refused():
    run, _ = private(3)
    sampler = run.optimizer.private.sampler
    for wrong, line in (
        (
            sampler.batch(0)[:3],
            r"^micro-batches of step 0 must have each example once, got \d+ twi",
        ),
        (sampler.batch(1)[:3], r"^micro-batch must be of the batch of step 0, got example \d+"),
    ):
        batches = iter(run.loader)
        first_part(run, batches)
        run.optimizer.draw(wrong, last=False)
        x, y = run.loader.dataset[wrong]
        run.optimizer.zero_grad()
        cross_entropy(run.model(x), y).backward()
        with pytest.raises(RootnoiseError, match=line):
            run.optimizer.step()
        assert run.optimizer.t == 0


@pytest.mark.parametrize("size", [0, 1.5])
def test_a_size_is_a_whole_number(size):
    with pytest.raises(
        RootnoiseError, match=r"^micro_batch_size must be an integer|^micro_batch_si"
    ):
        private(size)
