"""`make_private`: the unchanged loop makes the very run that the five objects make by hand."""

import copy
import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader

from front_door_parts import BATCH, EPOCHS, GOAL, bsr, data, parts, train, weights
from rootnoise import (
    CyclicPoissonSampler,
    FixedCycleSampler,
    Key,
    Mechanism,
    PrivateOptimizer,
    RootnoiseError,
    SingleParticipation,
    factorize,
    from_optimizer,
    make_private,
    privacy_cost,
    privatize,
)
from rootnoise.front_door.adaptive import AdaptiveOptimizerWarning, choose
from rootnoise.planner import Job, plan


def test_the_loop_makes_the_bits_of_the_five_objects():
    key, seed = Key.from_seed(3), 5
    model, sgd = parts()
    run = make_private(
        model, sgd, data(), batch_size=BATCH, mechanism="bsr", key=key, seed=seed, **GOAL
    )
    train(*run)

    other, sgd = parts()
    sampler = FixedCycleSampler(24, BATCH, EPOCHS, seed)
    split = factorize(from_optimizer(sgd, sampler.n_steps), sampler.participation, "bsr")
    mechanism = Mechanism.calibrate(split, sampler.participation, epsilon=4.0, delta=1e-5)
    module = privatize(other)
    optimizer = PrivateOptimizer(sgd, module, mechanism, sampler, key.derive("again"))
    optimizer._stream = optimizer._new_stream(key)  # two live optimizers of one key are refused
    x, y = data().tensors
    for batch in sampler:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
        optimizer.step(batch)
    assert run.optimizer.private.mechanism.fingerprint == mechanism.fingerprint
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("sampling", ["fixed-cycle", "poisson", "balls-in-bins"])
def test_every_sampling_runs_to_its_end_and_no_further(sampling):
    name = "identity" if sampling == "poisson" else "bsr"
    model, sgd = parts()
    run = make_private(
        model, sgd, data(), batch_size=2, mechanism=name, sampling=sampling, seed=0, **GOAL
    )
    before = weights(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some per-sample|.*not finite")
        train(*run)
    assert run.optimizer.t == run.optimizer.private.mechanism.n_steps == EPOCHS * len(run.loader)
    assert not torch.equal(before, weights(model))
    assert run.optimizer.epsilon_spent() == run.optimizer.private.mechanism.epsilon <= 4.0
    with pytest.raises(RootnoiseError, match=r"^loader must not be read past the planned steps=36"):
        next(iter(run.loader))


def test_a_step_that_draws_nobody_is_a_batch_of_no_rows():
    model, sgd = parts()
    run = make_private(
        model, sgd, data(), batch_size=1, mechanism="identity", sampling="poisson", seed=0, **GOAL
    )
    sampler = run.optimizer.private.sampler
    assert isinstance(sampler, CyclicPoissonSampler)
    t = next(t for t in range(sampler.n_steps) if sampler.batch(t).size == 0)
    for step, (x, y) in enumerate(run.loader):
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x), y, reduction="sum").backward()
        run.optimizer.step()
        if step == t:
            assert x.shape == (0, 5)
            assert y.shape == (0,)
            break
    assert torch.isfinite(weights(model)).all()


def test_the_planner_chooses_and_the_sampling_may_be_told():
    plans = {}
    for sampling in ("auto", "fixed-cycle", "poisson", "balls-in-bins"):
        model, sgd = parts()
        run = make_private(model, sgd, data(), batch_size=BATCH, sampling=sampling, **GOAL)
        plans[sampling] = run.optimizer.private.mechanism
    error = {name: m.noise_multiplier * m.rmse for name, m in plans.items()}
    bins = error.pop("balls-in-bins")
    assert error["auto"] <= 1.02 * min(error.values())
    assert bins < error["fixed-cycle"]  # but is planned only where it is asked for
    assert plans["poisson"].participation.type == "cyclic-poisson"
    assert plans["balls-in-bins"].participation.type == "balls-in-bins"
    assert plans["auto"].participation.type != "balls-in-bins"


@pytest.mark.parametrize("as_function", [False, True])
def test_the_noise_is_planned_for_the_real_schedule(as_function):
    model, sgd = parts()
    steps = EPOCHS * 3
    made = CosineAnnealingLR(sgd, steps)
    scheduler = (lambda o: CosineAnnealingLR(o, steps)) if as_function else made
    run = make_private(
        model, sgd, data(), batch_size=BATCH, mechanism="bsr", scheduler=scheduler, **GOAL
    )
    rates = []
    for _ in range(EPOCHS):
        for x, y in run.loader:
            run.optimizer.zero_grad()
            nn.functional.cross_entropy(run.model(x), y).backward()
            rates.append(run.optimizer.param_groups[0]["lr"])
            run.optimizer.step()
            made.step()
    planned = run.optimizer.private.mechanism.workload
    np.testing.assert_allclose(planned.to_dict()["learning_rates"], rates, rtol=1e-12)


def test_a_scheduler_may_step_once_an_epoch():
    model, sgd = parts()
    scheduler = StepLR(sgd, 1, gamma=0.5)
    run = make_private(
        model, sgd, data(), batch_size=BATCH, mechanism="bsr", scheduler=scheduler,
        scheduler_interval="epoch", **GOAL,
    )  # fmt: skip
    planned = run.optimizer.private.mechanism.workload.to_dict()["learning_rates"]
    np.testing.assert_allclose(planned, np.repeat([0.5, 0.25, 0.125], 3), rtol=1e-12)
    assert sgd.param_groups[0]["lr"] == 0.5  # planning has moved nothing


def test_a_scheduler_made_afterwards_moves_the_real_rate():
    _model, sgd, run = bsr()
    scheduler = StepLR(run.optimizer, 1, gamma=0.5)
    x, y = next(iter(run.loader))
    nn.functional.cross_entropy(run.model(x), y).backward()
    run.optimizer.step()
    scheduler.step()
    assert sgd.param_groups[0]["lr"] == 0.25


def test_what_a_loader_says_is_kept():
    def collate(rows):
        return torch.stack([x for x, _ in rows]) * 2, torch.stack([y for _, y in rows])

    model, sgd = parts()
    loader = DataLoader(data(), batch_size=BATCH, shuffle=True, collate_fn=collate)
    run = make_private(model, sgd, loader, mechanism="bsr", seed=5, **GOAL)
    x, _ = next(iter(run.loader))
    first = FixedCycleSampler(24, BATCH, EPOCHS, 5).batch(0)
    assert torch.equal(x, data().tensors[0][first] * 2)
    assert (run.loader.batch_size, len(run.loader)) == (BATCH, 3)


def test_closures_run_before_the_step():
    _model, _sgd, run = bsr()
    x, y = next(iter(run.loader))

    def closure():
        run.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run.model(x), y)
        loss.backward()
        return loss

    assert run.optimizer.step(closure).item() > 0
    assert run.optimizer.t == 1


def test_it_is_an_optimizer_in_what_hosts_look_at():
    _model, sgd, run = bsr()
    optimizer, calls = run.optimizer, []
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is sgd.param_groups
    assert optimizer.state is sgd.state
    assert optimizer.defaults["momentum"] == 0.9
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    x, y = next(iter(run.loader))
    nn.functional.cross_entropy(run.model(x), y).backward()
    optimizer.step()
    assert calls == ["after"]
    assert "momentum_buffer" in next(iter(optimizer.state.values()))
    assert "differential privacy" in run.optimizer.claim()


def test_epsilon_spent_grows_to_the_claim_and_is_that_of_the_steps_made():
    _model, _sgd, run = bsr()
    spent = [run.optimizer.epsilon_spent()]
    for _ in range(EPOCHS):
        train(*run, epochs=1)
        spent.append(run.optimizer.epsilon_spent())
    assert spent[0] == 0
    assert spent[-1] == run.optimizer.private.mechanism.epsilon
    assert spent == sorted(spent)
    # One epoch of three: one participation, whose sensitivity is the first column's norm.
    mechanism = run.optimizer.private.mechanism
    column = np.linalg.norm(mechanism.strategy.dense()[:3, 0])
    alone = privacy_cost(SingleParticipation(), 3, mechanism.noise_std / column, 1e-5)
    assert spent[1] == pytest.approx(alone.epsilon, rel=1e-9)


def test_auto_takes_independent_noise_for_adam_and_says_so():
    """Large epsilon and many epochs: the plan's first is correlated, as it is for SGD."""
    goal = {"epsilon": 64.0, "delta": 1e-5, "epochs": 8, "batch_size": BATCH}
    model, sgd = parts()
    first = make_private(model, sgd, data(), **goal).optimizer.private.mechanism
    assert first.strategy.bands > 1
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        model, _ = parts()
        with pytest.warns(AdaptiveOptimizerWarning, match=r"^mechanism auto takes ind") as w:
            run = make_private(model, kind(model.parameters(), lr=0.1), data(), **goal)
        (line,) = [str(x.message) for x in w if x.category is AdaptiveOptimizerWarning]
        assert "\n" not in line
        assert run.optimizer.private.mechanism.strategy.bands == 1
    ratio = float(line.split("about ")[1].split()[0])
    model, _ = parts()
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    plan_of = plan(from_optimizer(adam, 24), Job(24, BATCH, 8, 64.0, 1e-5, 64))
    best, plain = plan_of.recommended(), next(row for row in plan_of.rows if row.bands == 1)
    noises = []
    for row in (best, plain):  # by dense matrices
        split = factorize(from_optimizer(adam, 24), row.participation, row.mechanism, **row.options)
        rows = np.linalg.norm(np.linalg.inv(split.strategy.dense()), axis=1)
        noises.append(row.noise_multiplier * row.sensitivity * np.sqrt(np.mean(rows**2)))
    assert ratio == pytest.approx(noises[0] / noises[1], rel=0.05)
    assert ratio > 1
    with warnings.catch_warnings():  # what is asked for by name is taken, in silence
        warnings.simplefilter("error")
        run = make_private(model, adam, data(), mechanism="bsr", **goal)
    assert run.optimizer.private.mechanism.strategy.bands > 1


@pytest.mark.parametrize("gain", [1.04, 1.06])
def test_a_plan_hardly_better_is_passed_over_in_silence(gain):
    """Rows of a plan in which independent noise comes second by a factor."""
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    workload, job = from_optimizer(adam, 24), Job(24, BATCH, 8, 64.0, 1e-5)
    rows = plan(workload, job).rows
    first, plain = rows[0], next(row for row in rows if row.bands == 1)
    plain = replace(plain, rmse_per_example=gain * first.rmse_per_example)
    with pytest.warns(AdaptiveOptimizerWarning) if gain > 1.05 else nullcontext():
        assert choose([first, plain], workload, adam) is plain
    assert choose([first], workload, adam) is first
    assert choose([plain, first], workload, adam) is plain


def test_weights_can_be_averaged_beside():
    model, _sgd, run = bsr()
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(parts()[0]))
    for x, y in run.loader:
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        average.update_parameters(model)
    assert int(average.n_averaged) == 3
