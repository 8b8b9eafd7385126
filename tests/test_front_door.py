"""`make_private`: the unchanged loop makes the very run that the five objects make by hand."""

import copy
import io
import random  # noqa: TID251 - data sets use it
import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

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
from rootnoise.front_door.saved import _digest, identity, sealed
from rootnoise.front_door.several import _contents
from rootnoise.planner import Job, plan

EPOCHS, BATCH = 3, 8
GOAL = {"epsilon": 4.0, "delta": 1e-5, "epochs": EPOCHS}


def data(n=24):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=rng)
    return TensorDataset(x, (x[:, 0] > 0).long())


def parts(seed=0, **settings):
    with torch.random.fork_rng():
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        model = nn.Linear(5, 2)
    return model, torch.optim.SGD(model.parameters(), **({"lr": 0.5, "momentum": 0.9} | settings))


def train(model, optimizer, loader, *, scheduler=None, epochs=EPOCHS):
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


def bsr():
    model, sgd = parts()
    run = make_private(model, sgd, data(), batch_size=BATCH, mechanism="bsr", **GOAL)
    return model, sgd, run


def again(**settings):
    model, sgd = parts()
    return make_private(model, sgd, data(), **settings)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


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
    for sampling in ("auto", "fixed-cycle", "poisson"):
        model, sgd = parts()
        run = make_private(model, sgd, data(), batch_size=BATCH, sampling=sampling, **GOAL)
        plans[sampling] = run.optimizer.private.mechanism
    error = {name: m.noise_multiplier * m.rmse for name, m in plans.items()}
    assert error["auto"] <= 1.02 * min(error.values())
    assert plans["poisson"].participation.type == "cyclic-poisson"


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


def test_a_saved_run_goes_on_bit_by_bit(tmp_path):
    settings = {"batch_size": BATCH, "mechanism": "bsr"} | GOAL
    model, sgd = parts()
    run = make_private(model, sgd, data(), **settings)
    batches = iter(run.loader)
    for _ in range(2):  # in the middle of an epoch
        x, y = next(batches)
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
    file = tmp_path / "run.pt"
    run.optimizer.private.non_finite = 3  # as if
    run.optimizer.save(file)
    assert file.stat().st_mode & 0o077 == 0
    train(run.model, run.optimizer, batches, epochs=1)
    whole = weights(model)
    saved = torch.load(io.BytesIO(file.read_bytes()[:-32]), weights_only=True)
    del run, batches, sgd

    model, sgd = parts(seed=9)
    run = make_private(model, sgd, data(), resume=file, **settings)
    assert (run.optimizer.t, run.optimizer.private.non_finite) == (2, 3)
    train(*run, epochs=1)
    assert torch.equal(weights(model), whole)

    with pytest.raises(RootnoiseError, match=r"^resume must be of the mechanism that these arg"):
        again(resume=file, **(settings | {"epsilon": 5.0}))
    with pytest.raises(RootnoiseError, match=r"^key must be left out on resume"):
        again(resume=file, key=Key.fresh(), **settings)
    with pytest.raises(RootnoiseError, match=r"^resume must be readable, got .*: No such file"):
        again(resume=tmp_path / "none", **settings)
    for damaged in (saved | {"key": "no key"}, {n: saved[n] for n in saved if n != "optimizer"}):
        file.write_bytes(sealed(damaged))
        with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, got a damaged"):
            again(resume=file, **settings)
    file.write_bytes(sealed(saved | {"weights": saved["weights"] | {"more": torch.ones(1)}}))
    with pytest.raises(RootnoiseError, match=r"^resume must be of this model, got .*more"):
        again(resume=file, **settings)
    file.write_bytes(sealed(saved | {"version": 0}))
    with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, version 2"):
        again(resume=file, **settings)
    file.write_bytes(sealed(saved)[:-1] + b"x")
    with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, got .*: not as it"):
        again(resume=file, **settings)
    file.write_bytes(b"PK nothing" + _digest(b"PK nothing"))
    with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, got .*: "):
        again(resume=file, **settings)
    file.write_bytes(b"PK nothing")
    with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, got"):
        again(resume=file, **settings)
    with pytest.raises(RootnoiseError, match=r"^path must be writable, got .*: No such file"):
        run.optimizer.save(tmp_path / "no" / "where")


def other_data(change):
    x, y = data().tensors
    return {
        "fewer": lambda: Subset(data(), range(23)),
        "one number": lambda: TensorDataset(x + 1e-6 * (torch.arange(24) == 7)[:, None], y),
        "another type": lambda: TensorDataset(x.double(), y),
        "order": lambda: Subset(data(), [1, 0, *range(2, 24)]),
        "in two": lambda: ConcatDataset([Subset(data(), range(12)), Subset(data(), range(12))]),
    }[change]()


@pytest.mark.parametrize("change", ["fewer", "one number", "another type", "order", "in two"])
def test_a_run_goes_on_with_its_own_data_alone(change, tmp_path):
    settings = {"batch_size": BATCH, "mechanism": "bsr"} | GOAL
    run = again(**settings)
    run.optimizer.save(tmp_path / "run.pt")
    saved_key = run.optimizer.private.stream.key
    assert saved_key.secret.hex().encode() not in str(identity(data(), saved_key)).encode()
    del run
    settings["resume"] = tmp_path / "run.pt"
    line = "got 23 records, not 24" if change == "fewer" else "got other contents"
    model, sgd = parts()
    with pytest.raises(RootnoiseError, match=f"^data must be those of the run that is .*{line}$"):
        make_private(model, sgd, other_data(change), **settings)
    assert again(**settings).optimizer.t == 0


def test_data_that_may_change_are_known_by_their_number():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 5

    key = Key.from_seed(1)
    assert identity(Augmented(), key) == [5, None]
    assert identity(Subset(Augmented(), [0, 1]), key) == [2, None]
    assert identity(ConcatDataset([data(), Augmented()]), key) == [29, None]
    assert identity(data(), key) == identity(data(), key) != identity(data(), Key.from_seed(2))


class Drawn(torch.utils.data.Dataset):
    """Records that every global generator has a part in."""

    def __init__(self, name="x", shift=0):
        self.name, self.shift = name, shift

    def __len__(self):
        return 24

    def __getitem__(self, i):
        drawn = random.random(), np.random.rand(), torch.rand(2)  # noqa: S311
        return {self.name: drawn, "y": i + self.shift}


def test_ranks_compare_records_by_name_and_value_and_move_no_generator():
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state()

    before, found = states(), _contents(Drawn())
    assert before[:2] == states()[:2]
    assert torch.equal(before[2], states()[2])
    random.random(), np.random.rand(), torch.rand(1)  # noqa: S311
    assert _contents(Drawn()) == found
    assert _contents(Drawn("z")) != found != _contents(Drawn(shift=1))


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
    plan_of = plan(from_optimizer(adam, 24), Job(24, BATCH, 8, 64.0, 1e-5, 64)).rows
    best, plain = plan_of[0], next(row for row in plan_of if row.bands == 1)
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


def test_weights_can_be_averaged_beside():
    model, _sgd, run = bsr()
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(parts()[0]))
    for x, y in run.loader:
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        average.update_parameters(model)
    assert int(average.n_averaged) == 3
