"""`make_private`: take a loop's own parts, plan the noise for them, and wrap them."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from rootnoise._check import RootnoiseError, integer, real, warn_of_delta
from rootnoise.factorization import Factorization, factorize
from rootnoise.front_door import adaptive, saved
from rootnoise.front_door.loop import LoopOptimizer, PrivateLoader
from rootnoise.front_door.several import compare, together
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    Participation,
    SingleParticipation,
)
from rootnoise.participation.loader import Split, refuse_mixing, refuse_repeats
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.planner import MEMORY_ROWS, Job, plan
from rootnoise.training import PrivateOptimizer, privatize, whole
from rootnoise.training.ranks import Ranks
from rootnoise.workload import Workload, from_optimizer

Sampling = Literal["auto", "fixed-cycle", "poisson", "cyclic-poisson", "balls-in-bins"]
Scheduler = LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler]

SCHEDULED = ("lr", "momentum", "betas")  # the optimizer settings that schedulers change

# Models that are already private, and their training data.
_MADE: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_KINDS = {
    "model": "a torch module",
    "optimizer": "a torch optimizer",
    "options": "a mapping",
    "resume": "a path",
}


class Private(NamedTuple):
    """The parts that an unchanged training loop needs, in the usual order."""

    model: nn.Module
    optimizer: LoopOptimizer
    loader: PrivateLoader


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Any,
    *,
    epsilon: float | None = None,
    delta: float,
    epochs: int,
    noise_multiplier: float | None = None,
    clip_norm: float = 1.0,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    mechanism: str = "auto",
    sampling: Sampling = "auto",
    scheduler: Scheduler | None = None,
    scheduler_interval: Literal["step", "epoch"] = "step",
    memory_rows: int = MEMORY_ROWS,
    options: Mapping[str, Any] | None = None,
    loss_reduction: str = "mean",
    key: Key | None = None,
    seed: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    independence: str = "probed",
    workload: Workload | None = None,
) -> Private:
    """Return model, optimizer and loader that train privately in an unchanged loop.

    The returned model is the one given, with hooks: its weights keep their names. Load them like
    those of any torch model, `fresh.load_state_dict(model.state_dict())`.

    The loop must use every batch of the loader once, with one forward, one backward and one
    `optimizer.step()`; an epoch is one pass over the loader. The loss must be a sum or a mean over
    examples, each example's term a function of that example alone.

    In several processes that have met (`torch.distributed.init_process_group`), the loop is the
    same on each, with the same arguments and data: the loader gives each its part of every batch,
    and the ledger checks the joined batch. The model may be plain, of `DistributedDataParallel`
    (the one inside is returned), or cut by `fully_shard`.

    Args:
        model: in training mode; each output row must depend on its own input row alone.
        optimizer: any torch optimizer of the model's parameters; the noise is planned for how it
            uses gradients (momentum, weight decay, learning rates). Frozen parameters are removed
            from it.
        data: a map-style data set, or a DataLoader, whose data set, batch size, collate function
            and workers are used, but not the order of its batches.
        epsilon: privacy loss of the whole run, for one record.
        noise_multiplier: instead of epsilon, for a mechanism given by name: the standard deviation
            of Z divided by clip_norm and by the largest column norm of C, which is 1 for
            independent noise. So it is relative to one participation, whatever their number;
            `epsilon_spent` returns what it costs.
        delta: failure probability of epsilon.
        epochs: passes over the data.
        clip_norm: largest l2 norm of one record's gradient.
        batch_size: records per step, on average under random sampling; the DataLoader's when None.
        micro_batch_size: most records that the loader gives at a time, for batches that do not fit
            into memory; whole batches when None. The loop stays as it is: `optimizer.step()` adds
            up the parts of a batch, `zero_grad()` between them keeps the sum, and weights change
            with the last. `scheduler` steps with batches alone; one that make_private is not given
            must step unless `optimizer.step_was_skipped`.
        mechanism: a name from `mechanisms()`, or "auto": the row that `plan` recommends within
            `memory_rows`; with Adam and the like the first of independent noise, for correlated
            noise needs a larger learning rate there, and a warning says how much larger.
        sampling: how batches are drawn. "auto" is the planner's choice, or fixed cycles for a
            mechanism given by name.
        scheduler: a learning-rate scheduler of `optimizer`, or a function that makes one; the noise
            is planned for its rates.
        scheduler_interval: whether the loop steps the scheduler after each step or each epoch.
        memory_rows: most noise vectors of the model's size to keep, for "auto".
        options: options of the mechanism, such as {"bands": 16}.
        loss_reduction: "mean" or "sum", how the loss reduces the batch.
        key: fixes the noise; fresh from OS entropy when None. Keep it secret.
        seed: fixes the batches; from OS entropy when None. Keep it secret.
        independence: "probed" or "assumed", see `PrivateOptimizer`.
        resume: a file of `LoopOptimizer.save`; the run continues, with the same arguments. Another
            number of records is refused, and other contents of torch's `TensorDataset`, `Subset`
            and `ConcatDataset`; those of other data sets are not compared.
        workload: the workload to plan the noise for; that of optimizer and scheduler when None.

    Raises:
        RootnoiseError: parts that cannot be trained privately, or do not fit together.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = TensorDataset(torch.ones(12, 3), torch.zeros(12, dtype=torch.int64))
    >>> model = torch.nn.Linear(3, 2)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model, optimizer, loader = make_private(
    ...     model, sgd, DataLoader(data, batch_size=4), epsilon=8, delta=1e-5, epochs=2
    ... )
    >>> for epoch in range(2):
    ...     for x, y in loader:
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.cross_entropy(model(x), y).backward()
    ...         optimizer.step()
    >>> optimizer.t, round(optimizer.epsilon_spent(), 2)
    (6, 8.0)
    """
    _check_parts(model, optimizer, data)
    model, ranks = together(model)
    _check_kind("options", options or {}, Mapping)
    _check_kind("resume", resume or "", str | os.PathLike)
    dataset, batch, loading = _data(data, batch_size)
    split_by = _micro_batches(ranks, micro_batch_size)
    refuse_repeats(dataset)
    goal = {"epsilon": epsilon, "noise_multiplier": noise_multiplier}
    if sum(value is not None for value in goal.values()) != 1:
        raise RootnoiseError(f"give exactly one of epsilon and noise_multiplier, got {goal}")
    job = Job(len(dataset), batch, epochs, 1.0 if epsilon is None else epsilon, delta, memory_rows)
    warn_of_delta(delta, len(dataset))
    rates: list[float] = []
    if workload is None:
        workload, rates = _workload(optimizer, job, scheduler, scheduler_interval)
    settings: dict[str, Any] = goal | {
        "epochs": epochs,
        "delta": delta,
        "clip_norm": clip_norm,
    }
    settings |= {"batch_size": batch}
    settings |= {"mechanism": mechanism, "sampling": sampling, "memory_rows": memory_rows}
    settings |= {"options": options, "loss_reduction": loss_reduction, "resume": resume is None}
    settings |= {"independence": independence, "learning rates": rates}
    compare(ranks, dataset, settings)

    by_plan = None if epsilon is None else optimizer

    def calibrated() -> Mechanism:
        split, who = _split(workload, job, mechanism, sampling, options or {}, by_plan)
        return Mechanism.calibrate(
            split,
            who,
            epsilon=epsilon,
            noise_multiplier=_of_the_run(noise_multiplier, split, who),
            delta=delta,
            clip_norm=clip_norm,
        )

    made = ranks.by_first(calibrated)
    before = None
    if resume is not None:
        before = ranks.by_first(lambda: _before(Path(resume), made, dataset, key))
        key = before.key
    collate = loading.get("collate_fn", default_collate)
    if independence == "probed" and collate is not default_collate:
        refuse_mixing(dataset, collate)
    module = privatize(model, loss_reduction)
    _MADE[model] = dataset  # from here on it has hooks, even if something is refused below
    for group in optimizer.param_groups:  # torch skips frozen ones, which get no gradient
        group["params"] = [p for p in group["params"] if p.requires_grad]
    sampler = job.sampler(made.participation, seed)
    # Planned for this optimizer, or for the workload that the caller chose.
    private = PrivateOptimizer(
        optimizer,
        module,
        made,
        sampler,
        key,
        process_group=ranks.group,
        independence=independence,
        planned=True,
    )
    loop = LoopOptimizer(private, rates if made.strategy.bands > 1 else (), dataset)
    if micro_batch_size is not None:
        loop.pace(scheduler)
    if before is not None:
        whole.load_state_dict(private, before.optimizer)
        _load(module, before.weights)
    return Private(model, loop, PrivateLoader(dataset, loop, job.period, loading, split_by))


def _micro_batches(ranks: Ranks, most: int | None) -> Split:
    """Return how the loader of this rank divides each batch."""
    own = Split(rank=ranks.rank, size=ranks.size)
    if most is None:
        return own
    return dataclasses.replace(own, most=integer("micro_batch_size", most, 1))


def _before(path: Path, made: Mechanism, dataset: Any, key: Key | None) -> saved.Saved:
    found = saved.read(path, made, dataset)
    if key is not None:
        raise RootnoiseError("key must be left out on resume, which reads it from the file")
    return found


def training_set(model: nn.Module) -> Any:
    """Return the data set that a model was made private for, or None."""
    return _MADE.get(model)


def _check_kind(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise RootnoiseError(f"{name} must be {_KINDS[name]}, got {type(value).__name__}")


def _check_parts(model: Any, optimizer: Any, data: Any) -> None:
    """Refuse parts that are not a model or an optimizer, or that are already private."""
    if isinstance(optimizer, LoopOptimizer) or isinstance(data, PrivateLoader):
        raise RootnoiseError("make_private must be called once a run, got its own result again")
    _check_kind("model", model, nn.Module)
    _check_kind("optimizer", optimizer, torch.optim.Optimizer)
    if any(module in _MADE for module in model.modules()):
        raise RootnoiseError(
            "make_private must be called once a model, got one that it has been called with: load "
            "its weights into a fresh one"
        )


def _load(module: nn.Module, weights: dict[str, Any]) -> None:
    try:
        whole.load_weights(module, weights)
    except (RuntimeError, TypeError) as reason:
        line = " ".join(str(reason).split())
        raise RootnoiseError(f"resume must be of this model, got {line:.120}") from None


def _data(data: Any, batch_size: int | None) -> tuple[Any, int, dict[str, Any]]:
    """Return the data set, the batch size, and the other settings of a DataLoader."""
    loading: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        plain = (RandomSampler, SequentialSampler)
        if data.batch_size is None or not isinstance(data.sampler, plain):
            raise RootnoiseError(
                "loader must draw single examples at random or in order, for make_private draws "
                f"the batches, got {type(data.sampler).__name__} and batch_size={data.batch_size}"
            )
        names = (
            "collate_fn",
            "num_workers",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "generator",
        )
        loading = {name: getattr(data, name) for name in names}
        if data.num_workers:
            loading |= {n: getattr(data, n) for n in ("prefetch_factor", "multiprocessing_context")}
        batch_size = data.batch_size if batch_size is None else batch_size
        data = data.dataset
    if isinstance(data, tuple) and data and all(isinstance(x, torch.Tensor) for x in data):
        raise RootnoiseError(
            f"data must be a data set, got a tuple of {len(data)} tensors: TensorDataset(*data)"
        )
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        kind = type(data).__name__
        raise RootnoiseError(f"data must be a map-style data set of known length, got {kind}")
    if batch_size is None:
        raise RootnoiseError("batch_size must be given with a data set, got None")
    return data, batch_size, loading


def _workload(
    optimizer: torch.optim.Optimizer, job: Job, scheduler: Scheduler | None, interval: str
) -> tuple[Workload, list[float]]:
    """Return the workload of optimizer and scheduler over the whole run, and the learning rates."""
    if scheduler is not None and not (isinstance(scheduler, LRScheduler) or callable(scheduler)):
        rule = "scheduler must be one of torch, or a function that makes one"
        raise RootnoiseError(f"{rule}, got {type(scheduler).__name__}")
    if interval not in ("step", "epoch"):
        raise RootnoiseError(f"scheduler_interval must be step or epoch, got {interval!r}")
    if scheduler is None:
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        return from_optimizer(optimizer, job.n_steps), rates[:1]
    every = 1 if interval == "step" else job.period
    if isinstance(scheduler, LRScheduler) and scheduler.optimizer is not optimizer:
        raise RootnoiseError("scheduler must be the optimizer's own, got another's")
    runs: list[_Every] = []

    def build(fresh: torch.optim.Optimizer) -> Any:
        if not isinstance(scheduler, LRScheduler):
            runs.append(_Every(scheduler(fresh), every, fresh))
            return runs[-1]
        for group, original in zip(fresh.param_groups, optimizer.param_groups, strict=False):
            # Keep what schedulers added when they were made, such as max_lr and the first rate.
            kept = {n: v for n, v in original.items() if n not in group or n in SCHEDULED}
            group.update({"initial_lr": original["lr"]} | kept)
        runs.append(_Every(copy.deepcopy(scheduler, {id(optimizer): fresh}), every, fresh))
        return runs[-1]

    with warnings.catch_warnings():  # the copy was not told that its optimizer steps
        for text in ("Detected call of `lr_scheduler.step", "Seems like `optimizer.step"):
            warnings.filterwarnings("ignore", text, UserWarning)
        workload = from_optimizer(optimizer, job.n_steps, build)
    return workload, max((run.rates for run in runs), key=len)


class _Every:
    """Steps a scheduler once every several steps, and records the rate of each step."""

    def __init__(
        self, scheduler: LRScheduler, every: int, optimizer: torch.optim.Optimizer
    ) -> None:
        self.scheduler, self.every, self.calls = scheduler, every, 0
        self._group = optimizer.param_groups[0]
        self.rates = [float(self._group["lr"])]

    def step(self) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            self.scheduler.step()
        self.rates.append(float(self._group["lr"]))


def _split(
    workload: Workload,
    job: Job,
    name: str,
    sampling: str,
    options: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
) -> tuple[Factorization, Participation]:
    """Return the factorization, planned for an optimizer or as requested, and the participation."""
    if name == "auto":
        if optimizer is None:
            raise RootnoiseError(
                "mechanism must be given by name with noise_multiplier, for a plan needs epsilon, "
                "got auto"
            )
        if options:
            raise RootnoiseError(f"options must be left out with mechanism auto, got {options}")
        bins = None if sampling == "auto" else sampling == "balls-in-bins"
        made = plan(workload, job, bins=bins)
        first = made.recommended(sampling)
        rows = [row for row in made.rows if sampling in ("auto", row.sampling)]
        row = adaptive.choose([first, *rows], workload, optimizer)
        who, name, options = row.participation, row.mechanism, row.options
    else:
        who = _participation(job, "fixed-cycle" if sampling == "auto" else sampling)
    return factorize(workload, who, name, **options), who


def _of_the_run(multiplier: float | None, split: Factorization, who: Participation) -> float | None:
    """Convert a noise multiplier relative to one participation to that of the whole run."""
    if multiplier is None:
        return None
    one = sensitivity(split.strategy, SingleParticipation()).value
    return (
        real("noise_multiplier", multiplier, above=0) * one / sensitivity(split.strategy, who).value
    )


def _participation(job: Job, sampling: str) -> Participation:
    match sampling:
        case "fixed-cycle":
            return FixedCycle(job.period, job.epochs)
        case "balls-in-bins":
            return BallsInBins(job.period, job.epochs)
        case "poisson":
            return CyclicPoisson(1, job.batch_size / job.n_examples)
    raise RootnoiseError(
        "sampling must be auto, fixed-cycle, poisson or balls-in-bins for a mechanism given by "
        f"name, got {sampling!r}"
    )
