"""`make_private` in the loops that people have: their losses, schedulers, averages and mistakes."""

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rootnoise import (
    CyclicPoisson,
    Key,
    RootnoiseError,
    SingleParticipation,
    evaluate,
    make_private,
    privacy_cost,
)

EPOCHS, STEPS, BATCH = 2, 3, 8
GOAL: dict[str, Any] = {"delta": 1e-5, "epochs": EPOCHS, "batch_size": BATCH, "mechanism": "bsr"}


def data():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, generator=rng)
    return TensorDataset(x, (x[:, 0] > 0).long())


def private(model=None, scheduler=None, dataset=None, **settings):
    model = nn.Linear(5, 2) if model is None else model
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    made = None if scheduler is None else scheduler(sgd)
    settings = GOAL | {"epsilon": 8.0} | settings
    run = make_private(model, sgd, dataset or data(), scheduler=made, **settings)
    return run, made


def train(run, loss=None, scheduler=None, epochs=EPOCHS):
    rates = []
    for _ in range(epochs):
        for batch in run.loader:
            run.optimizer.zero_grad()
            (loss or plain)(run.model, batch).backward()
            rates.append(run.optimizer.param_groups[0]["lr"])
            run.optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return rates


def plain(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


# ----------------------------------------------------------------------------------------- losses


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(2, 3)

    def forward(self, a, *, b):
        return (self.left(a) * self.right(b)).sum(1)


def next_token(model, batch):
    (tokens,) = batch
    each = cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    return each.mean(1).mean()


def named(rows):
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate("aby")}


def pairs():
    rng = torch.Generator().manual_seed(2)
    draw = [torch.randn(24, *shape, generator=rng) for shape in ((5,), (2,), ())]
    return DataLoader(TensorDataset(*draw), batch_size=BATCH, collate_fn=named)


def tokens():
    rng = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randint(7, (24, 6), generator=rng))


LOOPS = {
    "tokens": (Tokens, tokens, next_token),
    "regression": (
        lambda: nn.Linear(5, 1),
        data,
        lambda model, batch: mse_loss(model(batch[0])[:, 0], batch[1].float()),
    ),
    "own loss": (
        lambda: nn.Linear(5, 2),
        data,
        lambda model, batch: (1 - model(batch[0]).softmax(1)[range(len(batch[1])), batch[1]])
        .square()
        .mean(),
    ),
    "several inputs": (
        Pair,
        pairs,
        lambda model, batch: mse_loss(model(batch["a"], b=batch["b"]), batch["y"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_losses_and_inputs_of_every_kind(name):
    make, dataset, loss = LOOPS[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    run, _ = private(model, dataset=dataset())
    train(run, loss)
    assert run.optimizer.t == EPOCHS * STEPS
    assert run.model is model
    after = model.state_dict()
    assert all(torch.isfinite(t).all() and not torch.equal(t, before[n]) for n, t in after.items())


# ------------------------------------------------------------------------------------- schedulers

KINDS = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "step": lambda o: schedulers.StepLR(o, 2),
    "steps": lambda o: schedulers.MultiStepLR(o, [1, 4]),
    "constant": lambda o: schedulers.ConstantLR(o, total_iters=3),
    "linear": lambda o: schedulers.LinearLR(o, total_iters=4),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.8),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=8),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=7),
    "averaging": lambda o: SWALR(o, 0.05, anneal_epochs=3),
    "one after another": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_of_every_kind_do_as_planned(kind):
    run, scheduler = private(scheduler=KINDS[kind])
    rates = train(run, scheduler=scheduler)
    np.testing.assert_allclose(run.optimizer.rates, rates, rtol=1e-12)
    assert len(set(rates)) > 1


def test_a_plateau_cannot_be_planned():
    with pytest.raises(
        RootnoiseError, match=r"^optimizer and scheduler must step alone, got .*met"
    ):
        private(scheduler=schedulers.ReduceLROnPlateau)


@pytest.mark.parametrize("planned", [False, True])
def test_rates_off_the_plan_are_told_once(planned):
    run, _ = private(scheduler=KINDS["exponential"] if planned else None)
    other = schedulers.StepLR(run.optimizer.private.optimizer if planned else run.optimizer, 1, 0.5)
    with pytest.warns(UserWarning, match=r"^learning rate of step 1 should be 0\.") as told:
        train(run, scheduler=other)
    (line,) = [str(w.message) for w in told if "learning rate" in str(w.message)]
    assert ("0.08, as planned, got 0.05" if planned else "0.1, as planned, got 0.05") in line
    assert "epsilon holds" in line
    assert run.optimizer.t == EPOCHS * STEPS


def test_independent_noise_has_no_plan_for_rates():
    run, _ = private(mechanism="identity", sampling="poisson")
    train(run, scheduler=schedulers.StepLR(run.optimizer, 1, 0.5))  # a warning would be an error


# --------------------------------------------------------------------- copies, averages, evaluation


def test_weights_are_averaged_beside_and_load_into_a_fresh_model(tmp_path):
    run, _ = private(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)))
    average = AveragedModel(run.model)
    for _ in range(EPOCHS):
        train(run, epochs=1)
        average.update_parameters(run.model)
    assert list(average.module.state_dict()) == list(run.model.state_dict())
    assert evaluate(average, data()) == evaluate(average.module, data())

    torch.save(run.model.state_dict(), tmp_path / "model.pt")
    fresh = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert evaluate(fresh, data()) == evaluate(run.model, data())


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps])
def test_optimizer_and_loader_are_not_copied(attempt):
    run, _ = private()
    with pytest.raises(RootnoiseError, match=r"^private optimizer must not be copied or pickled"):
        attempt(run.optimizer)
    if attempt is not copy.copy:
        with pytest.raises(RootnoiseError, match=r"^private optimizer must not be copied or pick"):
            attempt(run.loader)


def test_a_model_is_made_private_once():
    run, _ = private()
    for model in (run.model, nn.Sequential(run.model)):
        with pytest.raises(RootnoiseError, match=r"^make_private must be called once a model, got"):
            private(model)
    train(run)
    with pytest.raises(RootnoiseError, match=r"^make_private must be called once a model, got"):
        private(run.model)


def test_a_refused_call_leaves_the_model_as_it_was():
    model = nn.Linear(5, 2)
    with pytest.raises(RootnoiseError, match="sampling must be"):
        private(model, sampling="magic")
    private(model)

    model, others = nn.Linear(5, 2), nn.Linear(5, 2)  # refused when it has hooks already
    with pytest.raises(RootnoiseError, match=r"^optimizer must hold each of the module's 2 train"):
        make_private(model, torch.optim.SGD(others.parameters()), data(), epsilon=8.0, **GOAL)
    with pytest.raises(RootnoiseError, match=r"^make_private must be called once a model, got"):
        private(model)


def test_a_gradient_scaler_is_refused_after_unscaling_too():
    run, _ = private()
    scaler = torch.amp.GradScaler("cpu")
    batch = next(iter(run.loader))
    scaler.scale(plain(run.model, batch)).backward()
    scaler.unscale_(run.optimizer)
    with pytest.raises(RootnoiseError, match=r"^step must get gradients as they are .* GradScaler"):
        scaler.step(run.optimizer)


def test_hooks_of_torch_are_called():
    run, _ = private()
    called = []
    run.optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(run, epochs=1)
    assert called == ["before", "after"] * STEPS


def test_evaluation_between_epochs_disturbs_nothing():
    results = []
    for watched in (False, True):
        model = nn.Linear(5, 2)
        model.load_state_dict({"weight": torch.zeros(2, 5), "bias": torch.zeros(2)})
        run, _ = private(model, key=Key.from_seed(1), seed=1)
        for _ in range(EPOCHS):
            train(run, epochs=1)
            if watched:
                evaluate(run.model, data())
                assert run.model.training
        results.append(model.weight.detach().clone())
        del run
    assert torch.equal(*results)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def test_evaluate():
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    model[0].eval()  # a mode of its own, which comes back
    rows = TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    for batch_size in (1, 2, 256):  # the last batch is smaller
        assert evaluate(model, rows, batch_size=batch_size) == pytest.approx(2 / 3)
    assert [model.training, model[0].training, model[1].training] == [True, False, True]
    assert evaluate(model, DataLoader(rows, 2)) == pytest.approx(2 / 3)
    three = [(torch.eye(2), torch.zeros(2, 2), torch.tensor([1.0, 1.0]))]
    assert evaluate(nn.Bilinear(2, 2, 1), three, lambda out, y: y.mean()) == 1
    with pytest.raises(RootnoiseError, match=r"^data must have at least one row to evaluate, got"):
        evaluate(model, DataLoader(Stream()))
    with pytest.raises(RootnoiseError, match=r"^data must give batches .*, got dict"):
        evaluate(model, [{"x": 1}])


def test_metrics_of_the_training_set_are_refused():
    training = data()
    run, _ = private(dataset=training)
    for same in (training, DataLoader(training, 4), run.loader):
        with pytest.raises(
            RootnoiseError, match=r"^data must be held out, for epsilon does not co"
        ):
            evaluate(run.model, same)
    assert 0 <= evaluate(run.model, training, release_unnoised=True) <= 1
    assert 0 <= evaluate(nn.Linear(5, 2), training) <= 1  # of another model
    assert 0 <= evaluate(run.model, data()) <= 1


# ---------------------------------------------------------------------------------- what it costs


def test_the_noise_multiplier_may_be_given():
    run, _ = private(
        epsilon=None, noise_multiplier=1.5, mechanism="identity", sampling="poisson", seed=0
    )
    made = run.optimizer.private.mechanism
    assert (made.noise_multiplier, made.participation) == (1.5, CyclicPoisson(1, 8 / 24))
    train(run, epochs=1)
    for delta in (1e-5, 1e-3):
        due = privacy_cost(made.participation, STEPS, 1.5, delta).epsilon
        assert run.optimizer.epsilon_spent(delta) == due < made.epsilon
    assert run.optimizer.epsilon_spent() == run.optimizer.epsilon_spent(1e-5)

    run, _ = private(epsilon=None, noise_multiplier=1.5)
    made = run.optimizer.private.mechanism
    column = np.linalg.norm(made.strategy.dense(), axis=0).max()
    assert made.noise_std == pytest.approx(1.5 * column, rel=1e-12)

    with pytest.raises(RootnoiseError, match=r"^give exactly one of epsilon and noise_multiplier"):
        private(noise_multiplier=1.0)
    with pytest.raises(RootnoiseError, match=r"^give exactly one of epsilon and noise_multiplier"):
        private(epsilon=None)
    with pytest.raises(RootnoiseError, match=r"^mechanism must be given by name with noise_mult"):
        private(epsilon=None, noise_multiplier=1.0, mechanism="auto")
    with pytest.raises(RootnoiseError, match=r"^noise_multiplier must be a finite number > 0"):
        private(epsilon=None, noise_multiplier=0.0)


def test_epsilon_of_cyclic_poisson_is_that_of_the_steps_made():
    """A prefix of a banded Toeplitz strategy is one, with columns no longer than before."""
    run, _ = private(dataset=data(), mechanism="auto", sampling="cyclic-poisson", batch_size=2,
                     epochs=4, epsilon=4.0)  # fmt: skip
    made = run.optimizer.private.mechanism
    groups = made.participation.groups
    spent = [0.0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not finite")
        for epoch in range(4):
            train(run, epochs=1)
            spent.append(run.optimizer.epsilon_spent())
            t = run.optimizer.t
            assert t == 12 * (epoch + 1)
            if made.strategy.coefficients is not None and groups <= t:
                c = made.strategy.coefficients[:t]
                sigma = made.noise_std / float(np.linalg.norm(c))
                due = privacy_cost(CyclicPoisson(groups, 2 * groups / 24), t, sigma, 1e-5).epsilon
                assert spent[-1] == pytest.approx(min(due, made.epsilon), rel=1e-9)
    assert spent == sorted(spent)
    assert spent[-1] == made.epsilon


def test_epsilon_in_the_middle_of_an_epoch_counts_those_who_took_part_twice():
    """After step 4 of epochs of 3, the records of step 0 have taken part twice."""
    run, _ = private()
    made = run.optimizer.private.mechanism
    strategy, spent = made.strategy.dense(), []
    assert (strategy >= 0).all()
    for _ in range(EPOCHS):
        for batch in run.loader:
            run.optimizer.zero_grad()
            plain(run.model, batch).backward()
            run.optimizer.step()
            t = run.optimizer.t
            prefix = strategy[:t, :t]
            worst = max(np.linalg.norm(prefix[:, first::STEPS].sum(1)) for first in range(STEPS))
            sigma = made.noise_std / worst
            due = privacy_cost(SingleParticipation(), t, sigma, 1e-5).epsilon
            spent.append(run.optimizer.epsilon_spent())
            assert spent[-1] == pytest.approx(due, rel=1e-9)
    assert spent == sorted(spent)
    assert spent[2] < spent[3]


def test_frozen_parameters_may_be_in_the_optimizer():
    """As in fine-tuning: `SGD(model.parameters())` of a model whose first layers are frozen."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    frozen = model.state_dict()["0.weight"].clone()
    sgd = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[1].parameters()}],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
    )
    run = make_private(model, sgd, data(), epsilon=8.0, **GOAL)
    train(run)
    assert torch.equal(model.state_dict()["0.weight"], frozen)
    assert run.optimizer.t == EPOCHS * STEPS


@pytest.mark.parametrize(
    ("name", "value"), [("momentum", 0.5), ("weight_decay", 0.1), ("nesterov", True)]
)
def test_settings_that_leave_the_plan_are_warned_of_once(name, value):
    run, _ = private()
    run.optimizer.param_groups[0][name] = value
    before = {"momentum": 0.9, "weight_decay": 0, "nesterov": False}[name]
    message = f"^{name} should be {before}, as planned, got {value} at step 0: epsilon holds"
    with pytest.warns(UserWarning, match=message) as seen:
        train(run)
    assert len(seen) == 1


def test_momentum_that_its_scheduler_moves_is_planned():
    cycle = partial(schedulers.OneCycleLR, max_lr=0.1, total_steps=7)
    run, scheduler = private(scheduler=cycle, mechanism="bandmf")
    train(run, scheduler=scheduler)  # warnings are errors
    assert run.optimizer.t == 6
