"""What is said where the noise was planned for another optimizer, and that it is true."""

import numpy as np
import pytest
import torch

from rootnoise import SGD, FixedCycle, Mechanism, ScheduledSGD, factorize, from_optimizer
from rootnoise.diagnostics import mismatch
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.runs.config import RunConfig
from rootnoise.runs.run import run
from rootnoise.training import PrivateOptimizer, UnplannedOptimizerWarning, privatize

CYCLE, N = FixedCycle(20, 3), 60


def made(workload=None, name="bsr", cycle=CYCLE, **options):
    split = factorize(workload or SGD(N, momentum=0.9), cycle, name, **options)
    return Mechanism.calibrate(split, cycle, epsilon=2.0, delta=1e-5)


def weights():
    return [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]


def sgd(**settings):
    return torch.optim.SGD(weights(), **({"lr": 0.1, "momentum": 0.9} | settings))


@pytest.mark.parametrize(
    ("mechanism", "optimizer", "decay"),
    [
        (made(), sgd(), 1.0),
        (made(), sgd(lr=7.0), 1.0),
        (made(), sgd(maximize=True), 1.0),
        (made(), sgd(lr=1e-300), 1.0),
        (made(), sgd(lr=1e300), 1.0),
        (made(SGD(N, 0.9, decay=0.99)), sgd(), 0.99),
        (made(from_optimizer(sgd(weight_decay=0.01), N)), sgd(weight_decay=0.01), 1.0),
        (made(from_optimizer(torch.optim.Adam(weights()), N)), torch.optim.Adam(weights()), 1.0),
        (made(name="identity"), sgd(momentum=0.0), 1.0),  # no workload is in its noise
        (made(), sgd(momentum=0.899), 1.0),  # costs next to nothing
        (made(), sgd(weight_decay=0.1), 0.99),  # not known
    ],
)
def test_what_suits_is_not_warned_of(mechanism, optimizer, decay):
    assert mismatch(mechanism, optimizer, decay=decay) == ""


def test_rates_of_a_scheduler_are_not_known():
    optimizer = sgd()
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    assert mismatch(made(), optimizer) == ""


@pytest.mark.parametrize(
    ("mechanism", "optimizer", "decay"),
    [
        (made(), sgd(momentum=0.0), 1.0),
        (made(SGD(N, 0.0)), sgd(), 1.0),
        (made(), sgd(), 0.8),
        (made(ScheduledSGD(np.linspace(1, 0.01, N), 0.9)), sgd(momentum=0.0), 1.0),
        (made(), torch.optim.RMSprop(weights(), lr=0.1), 1.0),
        (made(SGD(10_020, 0.9), cycle=FixedCycle(3340, 3)), sgd(momentum=0.0), 1.0),
    ],
)
def test_another_optimizer_is_warned_of_in_one_line(mechanism, optimizer, decay):
    line = mismatch(mechanism, optimizer, decay=decay)
    kind = type(optimizer).__name__
    assert line.startswith(
        f"optimizer should be the one that the noise was planned for, got {kind}"
    )
    assert "epsilon holds" in line
    assert "\n" not in line
    assert ("%" in line) == (kind == "SGD" and mechanism.n_steps == N)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_the_loss_is_that_of_dense_matrices(momentum):
    mechanism, actual = made(), SGD(N, momentum)
    own = factorize(actual, CYCLE, "bsr", bands=mechanism.strategy.bands)

    def rmse(strategy, sens):
        decoder = np.linalg.solve(strategy.dense().T, actual.matrix.dense().T).T
        return sens * np.linalg.norm(decoder) / np.sqrt(N)

    def of(strategy):  # columns of one record do not overlap: the largest sum of three squares
        squares = np.square(strategy.dense()).sum(0)
        return max(np.sqrt(squares[i::20].sum()) for i in range(20))

    assert mechanism.strategy.bands <= 20
    loss = rmse(mechanism.strategy, of(mechanism.strategy)) / rmse(own.strategy, of(own.strategy))
    line = mismatch(mechanism, sgd(momentum=momentum))
    assert f" {loss - 1:.0%} larger" in line if momentum < 0.9 else (loss < 1) == (line == "")


def private(mechanism, module, optimizer):
    sampler = FixedCycleSampler(n_examples=20, batch_size=1, epochs=3)
    return PrivateOptimizer(optimizer, module, mechanism, sampler)


def test_a_private_optimizer_says_so_once():
    module = privatize(torch.nn.Linear(2, 2))
    other = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.warns(UnplannedOptimizerWarning, match=r"error is \d+% larger") as said:
        private(made(), module, other)
    assert len(said) == 1
    assert said[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_a_planned_private_optimizer_says_nothing():
    module = privatize(torch.nn.Linear(2, 2))
    private(made(), module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.filterwarnings("error")
def test_schedules_of_train_are_planned_for(tmp_path):
    small = {"dataset": "digits", "model": "logistic", "epsilon": 4.0, "batch_size": 500}
    run(RunConfig(**small, epochs=2, schedule="cosine", warmup=1, decay=0.999), tmp_path / "run")
