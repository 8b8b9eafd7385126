"""Opacus's calls: its scripts run with the import changed, and epsilon is never less than due."""

import gc
import io
import itertools
import math
import runpy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.schedulers import ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusMemoryManager
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from hosts import Recorder, white
from rootnoise import CyclicPoisson, FixedCycle, Key, RootnoiseError, privacy_cost
from rootnoise.integrations.opacus import OPEN_EPOCHS, OPEN_STEPS, BatchMemoryManager, PrivacyEngine

DELTA = 1e-5


class Net(nn.Module):
    """Large enough for a sharp test of its noise."""

    settings = ()

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(100, 10)

    def forward(self, x):
        return self.layer(x)


def data(n=24, width=5, classes=2):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, width, generator=rng)
    return TensorDataset(x, torch.arange(n) % classes)


def loader(n=24, batch_size=4, **more):
    return DataLoader(data(n, **more), batch_size=batch_size, shuffle=True)


def private(engine=None, *, model=None, n=24, batch_size=4, **settings):
    model = nn.Linear(5, 2) if model is None else model
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = loader(n, batch_size, width=next(model.parameters()).shape[1])
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0} | settings
    return (engine or PrivacyEngine()).make_private(
        module=model, optimizer=sgd, data_loader=batches, **settings
    )


def planned(engine=None, *, model=None, epochs=2, **settings):
    model = nn.Linear(5, 2) if model is None else model
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"mechanism": "bsr", "poisson_sampling": False, "max_grad_norm": 1.0} | settings
    return (engine or PrivacyEngine()).make_private_with_epsilon(
        module=model,
        optimizer=sgd,
        data_loader=loader(width=next(model.parameters()).shape[1]),
        target_epsilon=8.0,
        target_delta=DELTA,
        epochs=epochs,
        **settings,
    )


def train(model, optimizer, batches, epochs=1, criterion=cross_entropy):
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_script_of_opacus_runs():
    """The loop of Opacus's tutorials, with epsilon as they print it."""
    engine = PrivacyEngine(accountant="rdp")
    model = PrivacyEngine.get_compatible_module(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)))
    engine.validate(module=model, optimizer=None, data_loader=None)
    assert engine.is_compatible(module=model, optimizer=None, data_loader=None)
    model, optimizer, batches = private(engine, model=model, noise_multiplier=1.1)
    before, epsilons = weights(model), [engine.accountant.get_epsilon(delta=DELTA)]
    for _ in range(2):
        losses, top1 = [], []
        for images, target in batches:
            optimizer.zero_grad()
            output = model(images)
            loss = nn.CrossEntropyLoss()(output, target)
            guess = np.argmax(output.detach().cpu().numpy(), axis=1)
            top1.append((guess == target.numpy()).mean() if len(target) else 0.0)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
        epsilons.append(engine.get_epsilon(DELTA))
    assert optimizer.t == 12
    assert not torch.equal(before, weights(model))
    assert model._module.state_dict().keys() == model.state_dict().keys()
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert (optimizer.max_grad_norm, optimizer.expected_batch_size) == (1.0, 4)
    assert optimizer.original_optimizer is optimizer.private.optimizer
    assert batches.sample_rate == 4 / 24
    due = [privacy_cost(CyclicPoisson(1, 4 / 24), t, 1.1, DELTA).epsilon for t in (6, 12)]
    assert epsilons == [0.0, *due]


def test_the_noise_multiplier_is_opacus_own_for_one_participation():
    _, optimizer, _ = private(noise_multiplier=1.3, max_grad_norm=0.5)
    made = optimizer.private.mechanism
    assert (made.name, made.noise_std) == ("identity", 1.3 * 0.5)
    assert made.participation == CyclicPoisson(1, 4 / 24)

    _, optimizer, _ = private(
        noise_multiplier=1.3, mechanism="bsr", epochs=3, poisson_sampling=False
    )
    made = optimizer.private.mechanism
    column = np.linalg.norm(made.strategy.dense(), axis=0).max()
    assert made.noise_std == pytest.approx(1.3 * column, rel=1e-12)
    assert optimizer.noise_multiplier == made.noise_multiplier < 1.3


def test_fixed_batches_are_accounted_for_as_such():
    """Opacus keeps a shuffled loader and reports the epsilon of Poisson sampling, which is less."""
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine, poisson_sampling=False, batch_size=6)
    seen = []
    for x, y in batches:
        seen += x[:, 0].tolist()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert sorted(seen) == sorted(data().tensors[0][:, 0].tolist())  # each record once
    due = privacy_cost(FixedCycle(4, 1), 4, 1.0, DELTA).epsilon
    assert engine.get_epsilon(DELTA) == pytest.approx(due, rel=1e-9)
    assert engine.get_epsilon(DELTA) > privacy_cost(CyclicPoisson(1, 0.25), 4, 1.0, DELTA).epsilon


def test_epsilon_is_for_any_delta_and_the_whole_run_for_the_planned_one():
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    train(model, optimizer, batches, epochs=2)
    assert engine.get_epsilon(DELTA) == optimizer.private.mechanism.epsilon <= 8.0
    made = optimizer.private.mechanism
    other = privacy_cost(made.participation, 12, made.noise_multiplier, 1e-8).epsilon
    assert engine.get_epsilon(1e-8) == other > 8.0
    with pytest.raises(RootnoiseError, match=r"^loader must not be read past the planned steps=12"):
        next(iter(batches))


def test_an_open_run_has_its_last_step():
    _, optimizer, batches = private(n=4, batch_size=2)
    assert optimizer.private.mechanism.n_steps == OPEN_EPOCHS * len(batches) == 400
    _, optimizer, batches = private(n=938, batch_size=1)  # as many steps an epoch as MNIST has
    assert len(batches) == 938
    assert optimizer.private.mechanism.n_steps == 106 * 938 <= OPEN_STEPS


@pytest.mark.parametrize("n", [93, 186])
def test_an_epoch_is_not_shortened_by_a_rounded_rate(n):
    """int(1 / (1 / n)) is n - 1 for these: Opacus's sampler loses a step of every epoch."""
    assert int(1 / (1 / n)) == n - 1
    model, optimizer, batches = private(n=n, batch_size=1)
    train(model, optimizer, batches)
    assert len(batches) == optimizer.t == n
    assert optimizer.private.sampler.n_steps == OPEN_EPOCHS * n


def test_the_rate_is_that_of_the_sampler_where_batches_do_not_divide_the_data():
    """Opacus: 1 / len(loader) = 1/3 for batches of 10 of 24, and 8 records a step."""
    _, optimizer, batches = private(n=24, batch_size=10)
    assert optimizer.private.mechanism.participation == CyclicPoisson(1, 10 / 24)
    assert (len(batches), optimizer.expected_batch_size) == (3, 10)


def test_a_step_that_drew_nobody_is_made():
    model, optimizer, batches = private(n=8, batch_size=1, seed=0)
    train(model, optimizer, batches, epochs=3)
    sizes = [len(optimizer.private.sampler.batch(t)) for t in range(optimizer.t)]
    assert 0 in sizes
    assert torch.isfinite(weights(model)).all()


def test_the_model_need_not_be_wrapped():
    model = nn.Linear(5, 2)
    hooks, optimizer, batches = private(model=model, wrap_model=False)
    train(model, optimizer, batches)
    assert optimizer.t == 6
    assert list(model.state_dict()) == ["weight", "bias"]
    hooks.cleanup()


def test_ghost_returns_the_criterion():
    criterion = nn.CrossEntropyLoss()
    model, optimizer, same, batches = private(grad_sample_mode="ghost", criterion=criterion)
    assert same is criterion
    train(model, optimizer, batches, criterion=same)
    assert optimizer.t == 6


@pytest.mark.parametrize("as_file", [True, False])
def test_a_saved_run_goes_on_bit_by_bit(as_file, tmp_path):
    path = tmp_path / "run.pt" if as_file else io.BytesIO()
    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    train(model, optimizer, batches)
    engine.save_checkpoint(
        path=path, module=model, optimizer=optimizer, checkpoint_dict={"epoch": 1}
    )
    train(model, optimizer, batches)
    whole, spent = weights(model), engine.get_epsilon(DELTA)
    seed = optimizer.private.sampler.state_dict()
    if as_file:
        assert path.stat().st_mode & 0o077 == 0
    else:
        path.seek(0)

    engine = PrivacyEngine()
    model, optimizer, batches = planned(engine)
    more = engine.load_checkpoint(path=path, module=model, optimizer=optimizer)
    assert more == {"epoch": 1}
    assert optimizer.private.sampler.state_dict() == seed
    train(model, optimizer, batches)
    assert torch.equal(weights(model), whole)
    assert engine.get_epsilon(DELTA) == spent

    if not as_file:
        path.seek(0)
    with pytest.raises(RootnoiseError, match=r"^key must be set before the first step, got step"):
        engine.load_checkpoint(path=path, module=model, optimizer=optimizer)


def test_one_checkpoint_does_not_noise_two_gradients(tmp_path):
    engine = PrivacyEngine()
    model, optimizer, _ = planned(engine)
    engine.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    del engine, model, optimizer
    runs = []
    for _ in range(2):  # models of their own weights would be loaded over: change one afterwards
        engine = PrivacyEngine()
        model, optimizer, batches = planned(engine)
        engine.load_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
        runs.append((model, optimizer, batches))
    with torch.no_grad():
        runs[1][0].weight.mul_(2)
    train(*runs[0])
    with pytest.raises(
        RootnoiseError, match=r"^noise of step \d must not protect two gradients"
    ):  # an empty batch is one bit pattern
        train(*runs[1])


def test_another_checkpoint_is_refused(tmp_path):
    engine, other = PrivacyEngine(), PrivacyEngine()
    model, optimizer, _ = planned(engine)
    mine = {"module": model, "optimizer": optimizer}
    engine.save_checkpoint(path=tmp_path / "run.pt", **mine)
    model2, optimizer2, _ = planned(other, epochs=3)
    with pytest.raises(
        RootnoiseError, match=r"^path must be of the mechanism that was made, got \w+: saved"
    ):
        other.load_checkpoint(path=tmp_path / "run.pt", module=model2, optimizer=optimizer2)
    with pytest.raises(RootnoiseError, match=r"^optimizer must be the one that this engine made"):
        other.load_checkpoint(path=tmp_path / "run.pt", **mine)
    with pytest.raises(RootnoiseError, match=r"^optimizer must be the one that this engine made"):
        PrivacyEngine().save_checkpoint(path=tmp_path / "x", **mine)
    with pytest.raises(RootnoiseError, match=r"^noise and clip norm must stay as calibrated, and"):
        engine.save_checkpoint(path=tmp_path / "x", noise_scheduler=1, **mine)
    with pytest.raises(RootnoiseError, match=r"^noise and clip norm must .* got grad_clip_sch"):
        engine.load_checkpoint(path=tmp_path / "run.pt", grad_clip_scheduler=1, **mine)
    with pytest.raises(RootnoiseError, match=r"^path must be writable, got .*: No such file"):
        engine.save_checkpoint(path=tmp_path / "no" / "x", **mine)
    with pytest.raises(RootnoiseError, match=r"^path must be readable, got .*: No such file"):
        engine.load_checkpoint(path=tmp_path / "none", **mine)
    torch.save({"module_state_dict": {}}, tmp_path / "opacus.pt")
    with pytest.raises(
        RootnoiseError, match=r"^path must be of save_checkpoint, got .*'rootnoise'"
    ):
        engine.load_checkpoint(path=tmp_path / "opacus.pt", **mine)


REFUSED: dict[str, tuple[dict, str]] = {
    "per-layer norms": ({"max_grad_norm": [1.0, 2.0]}, "max_grad_norm must be one number for all"),
    "per-layer clipping": ({"clipping": "per_layer"}, r"clipping must be 'flat' .*'per_layer'"),
    "adaptive clipping": ({"clipping": "adaptive"}, r"clipping must be 'flat' .*'adaptive'"),
    "a generator": ({"noise_generator": torch.Generator()}, "noise_generator must be None"),
    "random batches": ({"rand_on_empty": True}, "rand_on_empty must be False"),
    "time first": ({"batch_first": False}, "batch_first must be True"),
    "a mode": ({"grad_sample_mode": "ghost_fsdp"}, "grad_sample_mode must be one of hooks, ew, "),
    "open correlated": ({"mechanism": "bsr"}, "epochs must be given for mechanism 'bsr'"),
    "a plan": ({"mechanism": "auto", "epochs": 2}, "mechanism must be given by name with noise_m"),
    "an option": ({"magic": 1}, "options must be Opacus's or make_private's, got magic"),
    "batch norm": ({"model": nn.BatchNorm1d(5)}, "layer model must not mix examples"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_wrong_use_is_refused_in_one_line(wrong):
    changes, line = REFUSED[wrong]
    if wrong == "batch norm":
        model = changes["model"]
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        parts = {"module": model, "optimizer": sgd, "data_loader": loader()}
        with pytest.raises(RootnoiseError, match=f"^{line}"):
            PrivacyEngine().make_private(**parts, noise_multiplier=1.0, max_grad_norm=1.0)
        with pytest.raises(RootnoiseError, match=r"^module must pass Opacus's checks, got"):
            PrivacyEngine().validate(module=model)
        return
    with pytest.raises(RootnoiseError, match=f"^{line}") as refusal:
        private(**changes)
    assert "\n" not in str(refusal.value)


def test_settings_of_the_engine():
    with pytest.raises(RootnoiseError, match=r"^accountant must be prv, rdp or gdp, got 'x'"):
        PrivacyEngine(accountant="x")
    with pytest.raises(RootnoiseError, match=r"^secure_mode must be False"):
        PrivacyEngine(secure_mode=True)
    assert PrivacyEngine().get_epsilon(DELTA) == 0
    engine = PrivacyEngine()
    private(engine)
    with pytest.raises(RootnoiseError, match=r"^engine must make one run private, got a second"):
        private(engine)


MANAGERS = pytest.mark.parametrize(
    "manager", [OpacusMemoryManager, BatchMemoryManager], ids=["Opacus's", "ours"]
)
SPLIT: dict[str, dict] = {
    "poisson": {"mechanism": "identity", "poisson_sampling": True, "batch_size": 1},
    "fixed": {},
    "scheduled": {"scheduled": True},
}  # fmt: skip


def split_run(manager, *, scheduled=False, batch_size=8, steps_on=1, **settings):
    """A run of two epochs in physical batches of 2 at most: its end, and their sizes."""
    with torch.random.fork_rng():
        torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
        model = nn.Linear(5, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rates = StepLR(sgd, 1, 0.5) if scheduled else None
    model, optimizer, batches = PrivacyEngine().make_private_with_epsilon(
        module=model, optimizer=sgd, data_loader=loader(batch_size=batch_size), target_epsilon=8.0,
        target_delta=DELTA, epochs=2, max_grad_norm=1.0, key=Key.from_seed(9), seed=5,
        loss_reduction="sum", scheduler=rates,
        **({"mechanism": "bsr", "poisson_sampling": False} | settings),
    )  # fmt: skip
    sizes, told = [], []
    parts = {"data_loader": batches, "max_physical_batch_size": 2, "optimizer": optimizer}
    for _ in range(2):
        with nullcontext(batches) if manager is None else manager(**parts) as physical:
            for x, y in physical:
                sizes.append(len(x))
                optimizer.zero_grad()
                cross_entropy(model(x), y, reduction="sum").backward()
                told.append(optimizer._check_skip_next_step(pop_next=False))
                optimizer.step()
                assert optimizer._is_last_step_skipped == told[-1]
                if rates is not None:
                    rates.step()
    private = optimizer.private
    state = private.stream.state_dict()["state"]
    end = weights(model).clone(), state, private.ledger.state_dict()["count"], optimizer.t
    assert told.count(False) == optimizer.t
    return end, sizes


@pytest.mark.parametrize("case", SPLIT)
@MANAGERS
def test_physical_batches_are_the_run_of_whole_ones(manager, case):
    whole, drawn = split_run(None, **SPLIT[case])
    gc.collect()
    split, sizes = split_run(manager, **SPLIT[case])
    torch.testing.assert_close(split[0], whole[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(split[1], whole[1])  # the noise, bit by bit
    assert torch.equal(split[2], whole[2])
    assert split[3] == whole[3]
    assert max(sizes) <= 2 < max(drawn)
    assert sum(sizes) == sum(drawn)
    if case == "poisson":
        assert 0 in drawn  # a seed under which a step draws nobody


@MANAGERS
def test_physical_batches_are_stepped_on_once_each(manager):
    model, optimizer, batches = planned()
    parts = {"data_loader": batches, "max_physical_batch_size": 2, "optimizer": optimizer}
    before = weights(model)
    with manager(**parts) as physical:
        walk = iter(physical)
        x, y = next(walk)
        cross_entropy(model(x), y).backward()
        optimizer.step()
        next(walk)  # the last of its batch, and no step
        with pytest.raises(RootnoiseError, match=r"^each batch must be stepped on once before the"):
            next(walk)
        walk = iter(physical)
        next(walk)
        with pytest.raises(RootnoiseError, match=r"^each batch must be stepped on once before the"):
            next(walk)
        walk = iter(physical)
        x, y = next(walk)
        cross_entropy(model(x[:1]), y[:1]).backward()
        with pytest.raises(RootnoiseError, match=r"^indices must be one a gradient row .1., got 2"):
            optimizer.step()
    assert torch.equal(before, weights(model))
    assert optimizer.t == 0
    with manager(**parts) as physical:  # a new pass begins with the batch
        train(model, optimizer, physical)
    assert optimizer.t == len(batches)
    assert physical.collate_fn is not None


def test_iterators_that_take_turns_are_refused():
    """Else the second part of a batch would be taken twice, under the numbers of the third."""
    model, optimizer, batches = planned()
    parts = {"data_loader": batches, "max_physical_batch_size": 1, "optimizer": optimizer}

    def take(walk, n=1):
        for x, y in itertools.islice(walk, n):
            cross_entropy(model(x), y).backward()
            optimizer.step()

    with OpacusMemoryManager(**parts) as physical:
        old, new = iter(physical), iter(physical)
        next(old)
        take(new)
        take(old)
        with pytest.raises(RootnoiseError, match=r"^physical batches must come in their order"):
            take(new, 2)
    assert optimizer.t == 0


def test_what_splits_no_batch_of_the_loader_is_refused():
    _model, optimizer, batches = private()
    _, another, _ = private()
    line = "must not be used: BatchMemoryManager splits a batch of the loader into physical ones"
    with pytest.raises(RootnoiseError, match=f"^virtual_step {line}"):
        optimizer.virtual_step()
    with pytest.raises(RootnoiseError, match=f"^accumulated_iterations {line}"):
        _ = optimizer.accumulated_iterations
    parts = {"data_loader": batches, "optimizer": another}
    with pytest.raises(RootnoiseError, match=r"^data_loader and optimizer must be those that one "):
        BatchMemoryManager(max_physical_batch_size=2, **parts)
    with pytest.raises(RootnoiseError, match=r"^max_physical_batch_size must be .*, got 0"):
        BatchMemoryManager(data_loader=batches, max_physical_batch_size=0, optimizer=optimizer)
    assert not hasattr(optimizer, "magic")


def test_noise_and_norm_stay_as_calibrated():
    _model, optimizer, _batches = private()
    with pytest.raises(RootnoiseError, match=r"^noise_multiplier must stay as calibrated, got 1.0"):
        ExponentialNoise(optimizer, gamma=0.5)
    with pytest.raises(RootnoiseError, match=r"^max_grad_norm must stay as calibrated, got 2"):
        optimizer.max_grad_norm = 2


@pytest.mark.parametrize("correlated", [False, True])
def test_c_times_the_noise_that_reaches_the_optimizer_is_white(correlated):
    model, clip = Net(), 0.7
    make = planned if correlated else private
    more = {"epochs": 2} if correlated else {"noise_multiplier": 1.0}
    wrapped, optimizer, batches = make(
        model=model, max_grad_norm=clip, key=Key.from_seed(4), seed=4, **more
    )
    recorder = Recorder(model, optimizer.original_optimizer, cross_entropy, clip, 4)
    for _ in range(2):
        for x, y in batches:
            recorder.batch = x, y
            train(wrapped, optimizer, [(x, y)])
    made = optimizer.private.mechanism
    assert len(recorder.noise) == 12
    assert white(made, recorder.noise)
    assert not white(made, recorder.noise, scale=1.1)
    assert not white(made, recorder.noise, scale=1 / 1.1)
    assert (made.strategy.bands > 1) == correlated
    assert math.isclose(made.clip_norm, clip)


def test_the_example_runs(capsys):
    path = Path(__file__).parents[1] / "examples" / "with_opacus.py"
    runpy.run_path(str(path))["main"](["--tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["independent noise", "planned noise"]
    assert all("at epsilon 2.00" in line or "at epsilon 1.99" in line for line in lines)
