"""Workloads of every kind: matrices, schedules, real torch optimizers, and norms without n x n."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import ASGD, LBFGS, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

import oracle
from rootnoise import causal, workload
from rootnoise._check import RootnoiseError
from rootnoise.causal import Dense, Inverse, Product, Toeplitz, series, streamed_norms
from rootnoise.causal.momentum import Descent
from rootnoise.factorization import factorize
from rootnoise.participation import FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload
from rootnoise.workload.optimizer import from_optimizer
from rootnoise.workload.schedule import sgd_roots
from rootnoise.workload.triangular import square_root

N = 40
TORCH_SGD = torch.optim.SGD


def lower(n: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.tril(rng.normal(size=(n, n)), -1) + np.diag(rng.uniform(0.5, 2, n))


# ----------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("n", [1, 2, 33, 100])
def test_triangular_root_is_the_recurrence_of_bjorck_and_hammarling(n):
    a = lower(n)
    root = square_root(a)
    np.testing.assert_allclose(root @ root, a, atol=1e-13)
    np.testing.assert_allclose(root, oracle.square_root(a), atol=1e-12)


def test_matrix_workload_repeats_the_toeplitz_one():
    sgd = SGD(64, momentum=0.9, decay=0.99)
    matrix = MatrixWorkload(sgd.matrix.dense())
    np.testing.assert_allclose(matrix.root(64).dense(), sgd.root(64).dense(), atol=1e-12)
    participation = MinSeparation(16, 4)
    for mechanism in ("identity", "square-root", "bsr"):
        ours, theirs = (factorize(w, participation, mechanism) for w in (matrix, sgd))
        assert ours.rmse(participation) == pytest.approx(theirs.rmse(participation), rel=1e-11)


def test_square_root_of_a_matrix_has_no_error_but_its_own():
    a = lower(50)
    split = factorize(MatrixWorkload(a), mechanism="square-root")
    np.testing.assert_allclose(split.decoder.dense() @ split.strategy.dense(), a, atol=1e-13)
    banded = factorize(MatrixWorkload(a), mechanism="bsr", bands=5)
    assert banded.strategy.bands == 5
    expected = oracle.decoder(a, oracle.banded(oracle.square_root(a), 5))
    np.testing.assert_allclose(banded.decoder.dense(), expected, atol=1e-12)


# ---------------------------------------------------------------------------------------- schedules

SETTINGS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampened": {"momentum": 0.5, "dampening": 0.3},
    "weight decay": {"momentum": 0.9, "weight_decay": 0.4},
    "all decay": {"momentum": 0.9, "weight_decay": 0.2, "nesterov": True, "decay": 0.98},
    "one a step": {
        "momentum": 0.475 + 0.475 * np.sin(np.arange(N) ** 2),
        "weight_decay": 0.1,
        "decay": 0.95 + 0.05 * np.cos(np.arange(N) ** 2),
    },
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
RATES = 0.1 + 0.9 * np.cos(np.linspace(0, 1.5, N))


def slow_sgd(rates, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, decay=1.0):
    """Run the update of torch.optim.SGD on unit gradients, one column each."""
    n = len(rates)
    momentum, decay = np.broadcast_to(momentum, n), np.broadcast_to(decay, n)
    result = np.zeros((n, n))
    for j in range(n):
        theta = buffer = 0.0
        for t in range(n):
            d = -float(t == j) + weight_decay * theta
            buffer = d if t == 0 else momentum[t] * buffer + (1 - dampening) * d
            step = d + momentum[t] * buffer if nesterov else buffer
            theta = decay[t] * theta - rates[t] * step
            result[t, j] = theta
    return result


@each_setting
def test_scheduled_sgd_is_the_update_of_pytorch(settings):
    rng = np.random.default_rng(3)
    scheduled = ScheduledSGD(RATES, **settings)
    expected = slow_sgd(RATES, **settings)
    matrix = scheduled.matrix
    np.testing.assert_allclose(matrix.dense(), expected, atol=1e-13)
    x = rng.normal(size=(N, 2))
    np.testing.assert_allclose(matrix.solve(expected @ x), x, atol=1e-11)
    np.testing.assert_allclose(matrix.inverse().dense(), np.linalg.inv(expected), atol=1e-10)
    np.testing.assert_allclose(matrix.row_norms(), np.linalg.norm(expected, axis=1), rtol=1e-12)
    np.testing.assert_allclose(matrix.column_norms(), np.linalg.norm(expected, axis=0), rtol=1e-12)
    again = workload.from_dict(scheduled.to_dict())
    np.testing.assert_array_equal(again.matrix.dense(), matrix.dense())
    reread = causal.from_dict(matrix.to_dict())
    np.testing.assert_array_equal(reread.dense(), matrix.dense())


@each_setting
@pytest.mark.parametrize("m", [1, 7, N])
def test_scheduled_sgd_streams(settings, m):
    rng = np.random.default_rng(3)
    matrix = ScheduledSGD(RATES, **settings).matrix
    assert matrix.state_size == 2
    x = rng.normal(size=(N, 2))
    np.testing.assert_allclose(oracle.streamed(matrix, x, m), matrix.dense() @ x, atol=1e-12)


def test_a_schedule_multiplies_the_momentum_not_the_gradient():
    prefix, filtered = SGD(N).matrix.dense(), oracle.lower_toeplitz(0.9 ** np.arange(N), N)
    a = ScheduledSGD(RATES, momentum=0.9).matrix.dense()
    np.testing.assert_allclose(a, prefix @ np.diag(RATES) @ filtered, atol=1e-12)


@pytest.mark.parametrize("sgd", [SGD(N), SGD(N, 0.9), SGD(N, 0.5, 0.9)])
def test_constant_settings_are_sgd(sgd):
    matrix = ScheduledSGD(np.ones(N), sgd.momentum, decay=sgd.decay).matrix.dense()
    np.testing.assert_allclose(matrix, sgd.matrix.dense(), rtol=1e-12)
    np.testing.assert_allclose(sgd.recurrence.dense(), sgd.matrix.dense(), rtol=1e-12)


@each_setting
@pytest.mark.parametrize("mechanism", ["identity", "square-root", "bsr"])
def test_toeplitz_strategies_on_a_schedule(settings, mechanism):
    scheduled, participation = ScheduledSGD(RATES, **settings), FixedCycle(8, 5)
    split = factorize(scheduled, participation, mechanism)
    c = split.strategy.dense()
    b = oracle.decoder(scheduled.matrix.dense(), c)
    sens = split.sensitivity(participation)
    largest = oracle.sensitivity(c, 8, 5, fixed=True)
    assert sens.value == pytest.approx(largest) if sens.exact else sens.value > largest
    expected = sens.value * np.linalg.norm(b) / math.sqrt(N)
    assert split.rmse(participation) == pytest.approx(expected, rel=1e-11)


def test_a_warm_up_from_zero_has_errors_but_no_inverse():
    rates = np.minimum(np.arange(N) / 10, 1)
    warm = ScheduledSGD(rates, momentum=0.9)
    np.testing.assert_allclose(warm.matrix.dense(), slow_sgd(rates, momentum=0.9), atol=1e-13)
    split = factorize(warm, mechanism="bsr", bands=4)
    b = oracle.decoder(warm.matrix.dense(), split.strategy.dense())
    np.testing.assert_allclose(split.decoder.row_norms(), np.linalg.norm(b, axis=1), atol=1e-13)
    for use in (warm.matrix.inverse, lambda: warm.matrix.solve(np.ones(N))):
        with pytest.raises(RootnoiseError, match=r"non-zero .* an inverse, got 0.0 at step 0"):
            use()


@pytest.mark.parametrize("bands", [100, 10_000])
def test_ten_thousand_scheduled_steps(bands):
    n = 10_000
    rates = np.cos(np.linspace(0, np.pi / 2, n, endpoint=False))
    scheduled, participation = ScheduledSGD(rates, momentum=0.9), MinSeparation(100, 100)
    split = factorize(scheduled, participation, "bsr", bands=bands)
    rmse = split.rmse(participation)
    # P diag(rates) is the rest of the workload once its momentum has met the strategy.
    rows = Product(SGD(n).recurrence, causal.Diagonal(rates))
    m = series.divide(split.noising.column(0), np.array([1.0, -0.9]), n)
    expected = np.linalg.norm(streamed_norms.row_norms_after(rows, m)) / math.sqrt(n)
    assert rmse == pytest.approx(split.sensitivity(participation).value * expected, rel=1e-12)


# ------------------------------------------------------------------------------- norms by recursion


@pytest.mark.parametrize("n", [1, 5, 60, 200])
def test_gramians_are_the_norms(n):
    rng = np.random.default_rng(3)
    c = Toeplitz(series.sgd_power(1, 0.9, 0.5, min(6, n)), n)
    dense = Dense(np.tril(np.triu(rng.normal(size=(n, n)), -2)) + 3 * np.eye(n))
    for matrix in (c, Inverse(c), dense, Product(dense, Inverse(c)), Product(Inverse(c), dense)):
        a = matrix.dense()
        for norms, axis in ((streamed_norms.row_norms, 1), (streamed_norms.column_norms, 0)):
            np.testing.assert_allclose(norms(matrix), np.linalg.norm(a, axis=axis), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 5, 60])
def test_rows_after_a_long_filter(n):
    rng = np.random.default_rng(3)
    before = Descent(rng.uniform(0.1, 1, n), 0.9)
    m = series.sgd_power(1, 0.9, -0.5, n)
    expected = np.linalg.norm(before.dense() @ oracle.lower_toeplitz(m, n), axis=1)
    np.testing.assert_allclose(streamed_norms.row_norms_after(before, m), expected, rtol=1e-12)


# --------------------------------------------------------------------------------- torch optimizers

sgd = partial(TORCH_SGD, lr=0.1)
heavy = partial(sgd, momentum=0.9)


class HeavyBall(torch.optim.Optimizer):
    """A linear optimizer that is not torch's: theta <- theta - lr (g + 0.5 times the last step)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                step = self.state[p].get("step", 0.0) * 0.5 + p.grad
                self.state[p]["step"] = step
                p.data.sub_(group["lr"] * step)


class Careless(TORCH_SGD):
    """Looks like torch's SGD from its settings."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            p.data.mul_(0.5)


def written_out(build, n, scheduler=None):
    """Row t: how far the n parameters have moved when the gradient is e_t at step t."""
    parameter = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = build([parameter])
    schedule = scheduler(optimizer) if scheduler else None
    rows = []
    for gradient in torch.eye(n, dtype=torch.float64):
        parameter.grad = gradient
        optimizer.step()
        if schedule:
            schedule.step()
        rows.append(-parameter.detach().numpy().copy())
    return np.array(rows) * (-1 if optimizer.param_groups[0].get("maximize") else 1)


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, N)


def warm_up(optimizer):
    return LambdaLR(optimizer, lambda t: min(1, t / 10))


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=1.0, total_steps=N + 1)


@pytest.mark.parametrize(
    ("build", "scheduler", "kind"),
    [
        (sgd, None, ToeplitzWorkload),
        (heavy, None, ToeplitzWorkload),
        (partial(heavy, maximize=True), None, ToeplitzWorkload),
        (partial(heavy, weight_decay=0.01), None, ToeplitzWorkload),  # real roots
        (partial(heavy, weight_decay=0.5), None, ToeplitzWorkload),  # complex roots
        (partial(heavy, weight_decay=0.1, nesterov=True), None, ToeplitzWorkload),
        (partial(sgd, dampening=0.5), None, ToeplitzWorkload),
        (partial(heavy, dampening=0.5, weight_decay=0.1), None, ScheduledSGD),
        (sgd, cosine, ScheduledSGD),
        (heavy, warm_up, ScheduledSGD),
        (partial(heavy, weight_decay=0.1), cosine, ScheduledSGD),
        (partial(heavy, weight_decay=0.1, nesterov=True), warm_up, ScheduledSGD),
        (partial(heavy, dampening=0.5), cosine, ScheduledSGD),
        (heavy, one_cycle, ScheduledSGD),  # changes the momentum too
        (heavy, partial(ConstantLR, factor=1.0), ToeplitzWorkload),
        (partial(HeavyBall, lr=0.1), None, ToeplitzWorkload),
        (partial(HeavyBall, lr=0.1), cosine, MatrixWorkload),
        (partial(Careless, lr=0.1), None, ToeplitzWorkload),
        (partial(ASGD, lr=0.1, lambd=0.1), None, MatrixWorkload),
        (partial(ASGD, lr=0.1, lambd=0.1, maximize=True), None, MatrixWorkload),
    ],
)
def test_workload_is_what_the_optimizer_does(build, scheduler, kind):
    found = from_optimizer(build, N, scheduler)
    assert type(found) is kind
    np.testing.assert_allclose(
        found.matrix.dense(), written_out(build, N, scheduler), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_that_exists_is_that_which_is_built(kind):
    """AdamW keeps a setting of Adam among its defaults that it does not take."""
    made = kind([torch.nn.Parameter(torch.zeros(2))], lr=0.1, weight_decay=0.01)
    built = from_optimizer(partial(kind, lr=0.1, weight_decay=0.01), N)
    assert from_optimizer(made, N).to_dict() == built.to_dict()


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("scheduler", [None, cosine])
def test_adam_is_its_first_moment(kind, decay, scheduler):
    found = from_optimizer(partial(kind, lr=0.1, weight_decay=decay), N, scheduler)
    # An epsilon above all gradients makes the denominator a constant, here one that is divided out.
    large = 1e12
    scaled = decay if kind is AdamW else decay * large
    build = partial(kind, lr=0.1, weight_decay=scaled, eps=large)
    expected = written_out(build, N, scheduler) * large
    np.testing.assert_allclose(found.matrix.dense(), expected, rtol=1e-9, atol=1e-11)


def test_adam_without_momentum():
    found = from_optimizer(partial(Adam, lr=0.1, betas=(0.0, 0.9)), 5)
    np.testing.assert_allclose(found.matrix.dense(), 0.1 * np.tril(np.ones((5, 5))))


def test_real_roots_are_the_closed_form():
    alpha, beta = sgd_roots(0.1, 0.9, 0.01) or (0.0, 0.0)
    found = from_optimizer(partial(heavy, weight_decay=0.01), 1000).matrix.column(0)
    np.testing.assert_array_equal(found, 0.1 * SGD(1000, beta, alpha).matrix.column(0))


def test_an_optimizer_object_is_read_and_left_alone():
    net = torch.nn.Linear(3, 2)
    optimizer = TORCH_SGD(net.parameters(), lr=0.2, momentum=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    np.testing.assert_allclose(from_optimizer(optimizer, 3).matrix.column(0), [0.2, 0.3, 0.35])
    attached = StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    attached.step()  # the rate is 0.1 by now, but the run starts at 0.2
    found = from_optimizer(optimizer, 3, lambda o: StepLR(o, 1, gamma=0.5))
    np.testing.assert_allclose(np.diag(found.matrix.dense()), [0.2, 0.1, 0.05])
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.1


# ----------------------------------------------------------------------------------------- refusals

two = torch.nn.Linear(2, 2)
two_rates = TORCH_SGD([{"params": two.weight, "lr": 0.1}, {"params": two.bias, "lr": 0.2}])
followed = TORCH_SGD(two.parameters(), lr=0.1)
follower = StepLR(followed, 5)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: MatrixWorkload(np.ones((2, 3))), r"matrix must be square, got shape \(2, 3\)"),
        (lambda: MatrixWorkload(np.ones((2, 2))), r"\(causal\), got 1 at \(0, 1\)"),
        (lambda: MatrixWorkload([[np.nan]]), "matrix must be finite, got 1 NaN or infinite"),
        (lambda: MatrixWorkload([[0.0]]), r"matrix must be invertible, got 0.0 at \(0, 0\)"),
        (lambda: MatrixWorkload([[-1.0]]), r"positive diagonal .* got -1 at \(0, 0\)"),
        (
            lambda: MatrixWorkload([[1.0]]).square_root(1),
            "Toeplitz strategy, got a matrix of 1 ste",
        ),
        (lambda: ScheduledSGD([1.0, -1.0]), "learning_rates must be a finite number >= 0, got -1"),
        (lambda: ScheduledSGD([]), "learning_rates must be a non-empty 1-D array"),
        (lambda: ScheduledSGD([0.0, 0.0]), "learning_rates must not all be 0.0, got 2 of them"),
        (lambda: ScheduledSGD([1.0], momentum=1.0), "momentum must be .* >= 0 and < 1, got 1.0"),
        (lambda: ScheduledSGD([1.0], decay=1.1), "decay must be .* >= 0 and <= 1, got 1.1"),
        (lambda: ScheduledSGD([1.0], dampening=1), "dampening must be .* >= 0 and < 1, got 1.0"),
        (lambda: ScheduledSGD([1.0], weight_decay=-1), "weight_decay must be .* >= 0, got -1.0"),
        (
            lambda: ScheduledSGD([1.0], momentum=0.5, dampening=0.5, nesterov=True),
            "dampening must be 0 with nesterov, got 0.5",
        ),
        (
            lambda: ScheduledSGD([1.0] * 3, momentum=[0.5] * 2),
            "momentum must be one number or n_steps=3 many, got 2",
        ),
        (lambda: workload.from_dict({"type": "scheduled-sgd"}), "must be of a known type"),
        (lambda: workload.from_dict({"type": "matrix", "entries": 1}), "got {'type': 'matrix'"),
        (lambda: causal.from_dict({"type": "descent"}), "matrix must be a known causal map"),
        (lambda: from_optimizer(sgd, 0), "n_steps must be >= 1, got 0"),
        (
            lambda: from_optimizer(partial(RMSprop, lr=0.1), 9),
            "must be linear .* got RMSprop, whose",
        ),
        (
            lambda: from_optimizer(partial(Adagrad, lr=0.1), 9),
            "must be linear .* got Adagrad, whose",
        ),
        (lambda: from_optimizer(partial(LBFGS, lr=0.1), 9), "must step alone, got .*'closure'"),
        pytest.param(
            lambda: from_optimizer(partial(torch.optim.Muon, lr=0.1), 9),
            "list of 1-D parameters, got Muon only",
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="since torch 2.9"),
        ),
        (lambda: from_optimizer(TORCH_SGD, 9, ReduceLROnPlateau), "step alone, got .*'metrics'"),
        (
            lambda: from_optimizer(partial(ASGD, lr=0.1, lambd=0.1), 2049),
            r"n_steps must be in \[1, 2048\] for an optimizer .* got 2049 for ASGD",
        ),
        (lambda: from_optimizer(two_rates, 9), "lr must be the same .* got 0.1 and 0.2"),
        (lambda: from_optimizer(followed, 9), "scheduler must be given for an optimizer that has"),
        (
            lambda: from_optimizer(followed, 9, follower),
            "scheduler must be a function .* got StepLR",
        ),
        (
            lambda: from_optimizer(partial(AdamW, lr=0.1), N, one_cycle),
            r"betas must not change, got \(0.95, 0.999\) and then",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


def test_a_formula_that_pytorch_does_not_follow_is_refused(monkeypatch):
    original = TORCH_SGD.step

    def step(self, closure=None):
        original(self)
        self.param_groups[0]["params"][0].data.mul_(0.5)

    monkeypatch.setattr(TORCH_SGD, "step", step)
    with pytest.raises(RootnoiseError, match="must step by its formula, got a way that is off by"):
        from_optimizer(sgd, 5)


def test_single_participation_is_the_default_for_schedules():
    split = factorize(ScheduledSGD(RATES), mechanism="bsr", bands=3)
    assert split.sensitivity(SingleParticipation()).exact
