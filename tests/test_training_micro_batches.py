"""Micro-batches: the undivided batch to float rounding, one noise, one ledger entry, or nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import parallel_runs
from parallel_runs import N_STEPS, alone, assert_close, results
from processes import launch
from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.samplers import (
    CyclicPoissonSampler,
    FixedCycleSampler,
    OwnBatches,
    Sampler,
)
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.training.clipping import NonFiniteGradientWarning
from rootnoise.training.sharded import Shards
from rootnoise.workload import SGD

N, BATCH = 24, 8
X = torch.sin(torch.arange(N * 27.0) ** 2).view(N, 3, 9)
Y = torch.arange(N) % 5


class Tokens(nn.Module):
    """A layer whose norms are made by Gram matrices, and one whose gradients are made."""

    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(9, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.wide(x).tanh()).mean(1)


def make(own=False, poisson=False, **options):
    sampler: Sampler = FixedCycleSampler(N, BATCH, 3, seed=0)
    if poisson:
        sampler = CyclicPoissonSampler(N, BATCH, 9, seed=3)
    if own:
        sampler = OwnBatches(sampler.participation, N, BATCH, sampler.n_steps)
    who = sampler.participation
    split = factorize(SGD(sampler.n_steps), who, "identity" if poisson else "bsr")
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=0.3, delta=1e-5, clip_norm=0.4)
    model = Tokens()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    module = privatize(model, options.pop("reduction", "mean"))
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    return PrivateOptimizer(sgd, module, mechanism, sampler, Key.from_seed(1), **options)


def backward(o, part, x=X):
    reduction = o.module.loss_reduction
    if len(part):
        cross_entropy(o.module(x[part]), Y[part], reduction=reduction).backward()


def divided(o, parts, x=X):
    """Make a step in the given parts."""
    for i, part in enumerate(parts):
        backward(o, part, x)
        if i < len(parts) - 1:
            o.accumulate(part)
    o.step(parts[-1])


def weights(o):
    return torch.cat([p.detach().flatten() for p in o.module.parameters()])


def step_batch(o):
    return o.sampler.batch(o.t)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.integers(0, BATCH), max_size=6),
    reduction=st.sampled_from(["mean", "sum"]),
    poisson=st.booleans(),
)
def test_any_division_is_the_undivided_step(seed, cuts, reduction, poisson):
    cuts = sorted(cuts)

    def run(divide):
        """One after the other: two live optimizers of one key must release the same bits."""
        o, found = make(reduction=reduction, poisson=poisson), []
        rng = np.random.default_rng(seed)
        for _ in range(2):
            found.append(weights(o))
            batch = rng.permutation(step_batch(o))
            divided(o, np.split(batch, np.minimum(cuts, len(batch)) if divide else []))
        counts = [o.ledger.state_dict()[name] for name in ("last_step", "count")]
        return [*found, weights(o)], [o.t, o.ledger.t, o.stream.t], counts

    (start, *whole), steps, counts = run(False)
    (_, *parts), *same = run(True)
    assert same[0] == steps == [2, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(counts, same[1], strict=True))
    for before, a, b in zip([start, *whole], whole, parts, strict=False):
        torch.testing.assert_close(b, a, rtol=5e-7, atol=1e-5 * float((a - before).abs().max()))


def test_bad_gradients_are_counted_over_the_micro_batches():
    found = []
    for cuts in ([3], []):
        o = make(independence="assumed")
        batch, x = step_batch(o), X.clone()
        x[batch[[1, 6]]] = torch.nan
        with pytest.warns(
            NonFiniteGradientWarning, match=r"^2 of 8 per-sample gradients of step 0 "
        ):
            divided(o, np.split(batch, cuts), x)
        assert o.non_finite == 2
        found.append(weights(o))
        del o
    torch.testing.assert_close(*found)


def test_the_last_part_may_be_empty_and_every_part_is_probed():
    o = make()
    batch = step_batch(o)
    for part in np.split(batch, [3, 7]):
        backward(o, part)
        o.accumulate(part)
    o.step([])
    assert o.t == 1
    assert o._probe.probed == [0]  # though the last part is of one example, which shows nothing
    o = make()
    backward(o, batch[:4])
    o.accumulate(batch[:4])
    out = o.module(X[batch[4:]])
    (cross_entropy(out, Y[batch[4:]]) + out.var(0).sum()).backward()
    with pytest.raises(RootnoiseError, match=r"^loss \(\w+\) must not mix"):
        o.accumulate(batch[4:])


# ------------------------------------------------------------------------------- what is released


def test_a_crash_in_the_middle_releases_nothing_and_the_run_goes_on(tmp_path):
    """Killed after two of three parts; the saved state before is gone on with, bit by bit."""
    whole, part = make(), make()
    part.ledger.keep(tmp_path / "ledger.bin")
    parts = [np.split(whole.sampler.batch(t), [2, 5]) for t in range(3)]
    for t in range(2):
        divided(whole, parts[t])
    divided(part, parts[0])
    state = part.state_dict()
    saved = {name: w.clone() for name, w in part.module.state_dict().items()}
    noise = part.stream.t
    for p in part.module.parameters():
        p.grad = None
    for one in parts[1][:2]:
        backward(part, one)
        part.accumulate(one)
    assert part.stream.t == noise
    assert all(p.grad is None for p in part.module.parameters())
    assert all(torch.equal(w, saved[name]) for name, w in part.module.state_dict().items())
    assert part.ledger.t == 2  # on disk before the gradient counted
    with pytest.raises(
        RootnoiseError, match=r"^state must be that between two steps, got step 1 in"
    ):
        part.state_dict()
    rest = make()
    rest.module.load_state_dict(saved)
    rest.load_state_dict(state)
    rest.ledger.keep(tmp_path / "ledger.bin")
    divided(rest, parts[1])
    assert torch.equal(weights(rest), weights(whole))
    resumed = make()
    resumed.load_state_dict(state)
    resumed.ledger.keep(tmp_path / "ledger.bin")
    with pytest.raises(
        RootnoiseError, match=r"^step 1 must repeat its batch of before the run was"
    ):
        resumed.ledger.admit(1, resumed.sampler.batch(2))  # the noise of step 1 is its batch's


def test_the_ledger_admits_before_a_gradient_counts(monkeypatch):
    o = make()
    batch = step_batch(o)
    seen = []
    take = o._place.take

    def watched(rows):
        seen.append(o.ledger.t)
        take(rows)

    monkeypatch.setattr(o._place, "take", watched)
    backward(o, batch[:3])
    o.accumulate(batch[:3])
    assert seen == [1]


def test_zero_grad_drops_what_was_taken_and_the_step_begins_anew():
    o, twin = make(), make()
    batch = step_batch(o)
    backward(o, batch[:5])
    o.accumulate(batch[:5])
    backward(o, batch[5:])
    o.zero_grad()
    backward(o, batch[5:])
    with pytest.raises(
        RootnoiseError, match=r"^batch of step 0 must be whole, .* got 3 examples of"
    ):
        o.step(batch[5:])
    o.accumulate(batch[5:])
    backward(o, batch[:5])
    o.step(batch[:5])
    divided(twin, [batch[5:], batch[:5]])
    assert torch.equal(weights(o), weights(twin))


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_adds_no_example_twice(monkeypatch, late):
    o, twin = make(), make()
    batch = step_batch(o)
    add = o.module.add

    def interrupted(rule):
        if late:
            add(rule)
        else:
            o.module._adding = True
        raise KeyboardInterrupt

    backward(o, batch[:5])
    with monkeypatch.context() as patch:
        patch.setattr(o.module, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            o.accumulate(batch[:5])
    o._guard.reset()  # the guard alone would see a second forward
    backward(o, batch[:5])
    with pytest.raises(
        RootnoiseError, match=r"^micro-batches of step 0 must have each example once"
    ):
        o.accumulate(batch[:5])
    o.zero_grad()
    divided(o, [batch[:5], batch[5:]])
    divided(twin, [batch[:5], batch[5:]])
    assert torch.equal(weights(o), weights(twin))


# ---------------------------------------------------------------------------------------- refusals


def test_micro_batches_of_other_examples():
    o = make()
    batch, other = o.sampler.batch(0), o.sampler.batch(1)

    def refused(message, part, call=o.accumulate):
        o._guard.clear()
        backward(o, np.asarray(part))
        with pytest.raises(RootnoiseError, match=message) as refusal:
            call(part)
        assert "\n" not in str(refusal.value)

    refused(
        f"^micro-batch must be of the batch of step 0, got example {other[0]}, which", other[:2]
    )
    backward(o, batch[:3])
    o._guard.clear()
    backward(o, batch[:3])
    o.accumulate(batch[:3])
    refused(f"^micro-batches of step 0 must have each example once, got {batch[2]} tw", batch[2:4])
    refused(f"^micro-batches of step 0 must have each example once, got {batch[0]}", batch, o.step)
    refused(r"^batch of step 0 must be whole, .* got 7 examples of its 8 ", batch[4:], o.step)
    both = [*batch[3:], other[0]]
    refused(r"^batch of step 0 must be whole, .* got 9 examples of its 8 ", both, o.step)
    o.zero_grad()
    o.accumulate([])
    backward(o, batch[:3])
    with pytest.raises(RootnoiseError, match=r"^indices must be one a gradient row \(3\), got 2"):
        o.accumulate(batch[:2])
    with pytest.raises(
        RootnoiseError, match=r"^batch of step 0 must stay that of its first micro-"
    ):
        o.accumulate(batch[:3], other)
    o.accumulate(batch[:3], batch[::-1])
    backward(o, batch[3:])
    o.step(batch[3:])
    assert o.t == 1


def test_two_backwards_are_no_micro_batch():
    o = make()
    batch = step_batch(o)
    backward(o, batch[:3])
    backward(o, batch[3:])
    with pytest.raises(RootnoiseError, match=r"^forward must run once a step"):
        o.accumulate(batch[3:])
    assert o.ledger.t == 0


def test_batches_of_ones_own_are_declared_with_the_first_part():
    o, twin = make(own=True), make()
    for t in range(2):
        batch = twin.sampler.batch(t)
        backward(o, batch[:3])
        if t == 0:
            with pytest.raises(
                RootnoiseError, match=r"^batch must be given with the first micro-ba"
            ):
                o.accumulate(batch[:3])
        o.accumulate(batch[:3], batch)
        backward(o, batch[3:])
        o.step(batch[3:])
        divided(twin, [batch[:3], batch[3:]])
    assert torch.equal(weights(o), weights(twin))
    again = twin.sampler.batch(0)
    backward(o, again[:3])
    with pytest.raises(RootnoiseError, match="breaks the participation"):
        o.accumulate(again[:3], again)


def test_sharded_models_take_whole_batches():
    o = make()
    o._place = Shards.__new__(Shards)
    with pytest.raises(
        RootnoiseError, match=r"^micro-batches must be of a model that each process"
    ):
        o.accumulate(step_batch(o))


def test_ranks_may_take_different_numbers_of_parts(tmp_path):
    launch(2, parallel_runs.run_divided, tmp_path, N_STEPS)
    first, optimizer = alone(N_STEPS)
    for found in results(tmp_path, 2):
        assert_close(found, optimizer, first)
        assert torch.equal(found["optimizer"]["ledger"]["count"], torch.full((24,), 3).int())
    lines = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert lines[0].startswith(
        "batch of step 0 must be whole, its micro-batches joined over ranks;"
    )
    assert "must be the sampler's, sampler.batch(0), joined over ranks" in lines[1]
