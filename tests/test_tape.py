"""A forward without a backward leaves a recording that ends by itself and holds little."""

import gc
import weakref

import pytest
import torch

from probe_cases import ce, make, mlp, train
from rootnoise._check import RootnoiseError
from rootnoise.training import tape
from rootnoise.training.tape import Tape, _modes


@pytest.fixture
def started():
    """Yield a tape that runs, and leave the modes as they were."""
    made, before = Tape(), len(_modes())
    made.start([torch.ones(4)])
    yield made
    made.stop()
    assert len(_modes()) == before


@pytest.mark.parametrize(
    ("most_calls", "most_bytes", "what"),
    [(9, 2**28, "more than 9 calls of torch"), (99, 2**12, "more than 64 times the outputs")],
)
def test_a_long_recording_is_given_up(monkeypatch, most_calls, most_bytes, what):
    monkeypatch.setattr(tape, "MOST_CALLS", most_calls)
    monkeypatch.setattr(tape, "MOST_BYTES", most_bytes)

    def long(module, batch):
        loss = ce(module, batch)
        for _ in range(20):
            loss = loss + torch.zeros(300).sum()
        return loss

    with pytest.raises(RootnoiseError, match=rf"^loss must be made in a few steps, {what} come"):
        train(make(mlp()), long, steps=1)
    train(make(mlp()), ce, steps=1)


def test_what_is_given_up_is_not_kept(started, monkeypatch):
    monkeypatch.setattr(tape, "MOST_CALLS", 3)
    kept = [weakref.ref(torch.zeros(8).add(i)) for i in range(9)]
    assert all(result() is None for result in kept)


def test_outputs_may_be_large(started):
    """64 times what the model has returned is left for the loss, beside 256 MiB."""
    assert started._left == tape.MOST_BYTES + 64 * 16


def test_a_tape_that_nobody_holds_records_no_more():
    before = len(_modes())
    made = Tape()
    made.start([torch.ones(4)])
    gone = weakref.ref(made)
    result = weakref.ref(torch.zeros(8).add(1))
    assert result() is not None  # recorded
    mode = made._mode
    del made
    gc.collect()
    assert gone() is None
    assert result() is None
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))
    holder = Tape()  # takes the idle mode out
    holder._mode = mode
    holder.stop()
    assert len(_modes()) == before
