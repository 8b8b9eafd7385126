"""Private training in the loop that people already have: `make_private`.

It only composes public parts (planner, factorize, Mechanism, sampler, PrivateOptimizer), so that
every batch is still checked by the ledger. The loader knows which records it drew and tells the
optimizer; the loop itself never sees an index.
"""

from __future__ import annotations

import copy
import io
import os
import pickle  # for the name of its error
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.batches.loader import data_loader, refuse_mixing, refuse_repeats
from rootnoise.batches.samplers import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedCycleSampler,
    Indices,
    Sampler,
)
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    Participation,
    SingleParticipation,
)
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.planner import Job, plan
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.workload import Workload, from_optimizer

Sampling = Literal["auto", "fixed-cycle", "poisson", "cyclic-poisson", "balls-in-bins"]
Scheduler = LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler]

# What `mechanism="auto"` may keep of noise vectors of the model's size, unless told.
MEMORY_ROWS = 64
VERSION = 1  # of the file of `LoopOptimizer.save`


_KINDS = {
    "model": "a torch module",
    "optimizer": "a torch optimizer",
    "options": "a mapping",
    "resume": "a path",
}


class Private(NamedTuple):
    """What an unchanged training loop needs, in the order in which it is usually written."""

    model: nn.Module
    optimizer: LoopOptimizer
    loader: PrivateLoader


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Any,
    *,
    epsilon: float,
    delta: float,
    epochs: int,
    clip_norm: float = 1.0,
    batch_size: int | None = None,
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
) -> Private:
    """Return model, optimizer and loader that train privately in an unchanged loop.

    The loop must take every batch of the loader once, with one forward, one backward and one
    `optimizer.step()`; an epoch is one pass over the loader. The loss must be a sum or a mean over
    examples, each example's term a function of that example alone.

    Args:
        model: in training mode; each output row a function of its own input row alone.
        optimizer: any torch optimizer of the model's parameters; the noise is planned for what it
            makes of its gradients (momentum, weight decay, learning rates).
        data: a map-style data set, or a DataLoader of one, of which data set, batch size,
            collate function and workers are taken: the order of its batches is not.
        epsilon: privacy loss of the whole run, for one record.
        delta: its failure probability.
        epochs: passes over the data.
        clip_norm: largest l2 norm of one record's gradient.
        batch_size: records a step, on average under random sampling; the DataLoader's when None.
        mechanism: a name of `mechanisms()`, or "auto": the first row of `plan` in `memory_rows`.
        sampling: how batches are drawn. "auto" is the planner's choice, and for a mechanism given
            by name fixed cycles.
        scheduler: of the learning rate: one that was made for `optimizer`, or a function that
            makes one; the noise is planned for its rates.
        scheduler_interval: whether the loop steps the scheduler after each step or each epoch.
        memory_rows: most noise vectors of the model's size to keep, for "auto".
        options: of the mechanism, such as {"bands": 16}.
        loss_reduction: "mean" or "sum", what the loss does over the batch.
        key: fixes the noise; fresh from OS entropy when None. Keep it secret.
        seed: fixes the batches; from OS entropy when None. Keep it secret.
        independence: "probed" or "assumed", see `PrivateOptimizer`.
        resume: a file of `LoopOptimizer.save`, from which a run of the same arguments goes on.

    Raises:
        RootnoiseError: parts that cannot be trained privately, or do not fit each other.

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
    if isinstance(optimizer, LoopOptimizer) or isinstance(data, PrivateLoader):
        raise RootnoiseError("make_private must be called once a run, got its own result again")
    for name, value, kinds in (
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
        ("options", options or {}, Mapping),
        ("resume", resume or "", str | os.PathLike),
    ):
        if not isinstance(value, kinds):
            raise RootnoiseError(f"{name} must be {_KINDS[name]}, got {type(value).__name__}")
    dataset, batch, loading = _data(data, batch_size)
    refuse_repeats(dataset)
    job = Job(len(dataset), batch, epochs, epsilon, delta, memory_rows)
    workload = _workload(optimizer, job, scheduler, scheduler_interval)
    made, sampler = _calibrated(workload, job, mechanism, sampling, options or {}, clip_norm, seed)
    saved = None if resume is None else _read(Path(resume), made)
    if saved is not None:
        if key is not None:
            raise RootnoiseError("key must be left out on resume, which reads it from the file")
        key = saved.key
    collate = loading.get("collate_fn", default_collate)
    if independence == "probed" and collate is not default_collate:
        refuse_mixing(dataset, collate)
    module = privatize(model, loss_reduction)
    loop = LoopOptimizer(
        PrivateOptimizer(optimizer, module, made, sampler, key, independence=independence)
    )
    if saved is not None:
        loop.load_state_dict(saved.optimizer)
        try:
            module.load_state_dict(saved.weights)
        except (RuntimeError, TypeError) as reason:
            line = " ".join(str(reason).split())
            raise RootnoiseError(f"resume must be of this model, got {line:.120}") from None
    return Private(module, loop, PrivateLoader(dataset, loop, job.period, loading))


def _data(data: Any, batch_size: int | None) -> tuple[Any, int, dict[str, Any]]:
    """Return the data set, the batch size, and what else a DataLoader was told."""
    loading: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        plain = (RandomSampler, SequentialSampler)
        if data.batch_size is None or not isinstance(data.sampler, plain):
            raise RootnoiseError(
                "loader must draw single examples at random or in order, for make_private draws "
                f"the batches, got {type(data.sampler).__name__} and batch_size={data.batch_size}"
            )
        names = ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn")
        loading = {name: getattr(data, name) for name in names}
        if data.num_workers:
            loading |= {n: getattr(data, n) for n in ("prefetch_factor", "multiprocessing_context")}
        batch_size = data.batch_size if batch_size is None else batch_size
        data = data.dataset
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        kind = type(data).__name__
        raise RootnoiseError(f"data must be a map-style data set of known length, got {kind}")
    if batch_size is None:
        raise RootnoiseError("batch_size must be given with a data set, got None")
    return data, batch_size, loading


def _workload(
    optimizer: torch.optim.Optimizer, job: Job, scheduler: Scheduler | None, interval: str
) -> Workload:
    """Return what optimizer and scheduler make of the gradients of the whole run."""
    if scheduler is not None and not (isinstance(scheduler, LRScheduler) or callable(scheduler)):
        rule = "scheduler must be one of torch, or a function that makes one"
        raise RootnoiseError(f"{rule}, got {type(scheduler).__name__}")
    if interval not in ("step", "epoch"):
        raise RootnoiseError(f"scheduler_interval must be step or epoch, got {interval!r}")
    if scheduler is None:
        return from_optimizer(optimizer, job.n_steps)
    every = 1 if interval == "step" else job.period
    if isinstance(scheduler, LRScheduler) and scheduler.optimizer is not optimizer:
        raise RootnoiseError("scheduler must be the optimizer's own, got another's")

    def build(fresh: torch.optim.Optimizer) -> Any:
        if not isinstance(scheduler, LRScheduler):
            return _Every(scheduler(fresh), every)
        for group, original in zip(fresh.param_groups, optimizer.param_groups, strict=False):
            group["initial_lr"] = original["initial_lr"]
            group["lr"] = original["lr"]
        return _Every(copy.deepcopy(scheduler, {id(optimizer): fresh}), every)

    with warnings.catch_warnings():  # the copy was not told that its optimizer steps
        for text in ("Detected call of `lr_scheduler.step", "Seems like `optimizer.step"):
            warnings.filterwarnings("ignore", text, UserWarning)
        return from_optimizer(optimizer, job.n_steps, build)


class _Every:
    """A scheduler that makes one step of several."""

    def __init__(self, scheduler: LRScheduler, every: int) -> None:
        self.scheduler, self.every, self.calls = scheduler, every, 0

    def step(self) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            self.scheduler.step()


def _calibrated(
    workload: Workload,
    job: Job,
    name: str,
    sampling: str,
    options: Mapping[str, Any],
    clip_norm: float,
    seed: int | None,
) -> tuple[Mechanism, Sampler]:
    """Return the mechanism, planned or made as told, and the sampler of its participation."""
    if name == "auto":
        if options:
            raise RootnoiseError(f"options must be left out with mechanism auto, got {options}")
        rows = [r for r in plan(workload, job).rows if sampling in ("auto", r.sampling)]
        if not rows:
            raise RootnoiseError(f"sampling must be one that the plan has, got {sampling!r}")
        who, name, options = rows[0].participation, rows[0].mechanism, rows[0].options
    else:
        who = _participation(job, "fixed-cycle" if sampling == "auto" else sampling)
    split = factorize(workload, who, name, **options)
    made = Mechanism.calibrate(
        split, who, epsilon=job.epsilon, delta=job.delta, clip_norm=clip_norm
    )
    return made, _sampler(job, who, seed)


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


def _sampler(job: Job, who: Participation, seed: int | None) -> Sampler:
    size, batch = job.n_examples, job.batch_size
    match who:
        case BallsInBins():
            return BallsInBinsSampler(size, batch, job.epochs, seed)
        case FixedCycle():
            return FixedCycleSampler(size, batch, job.epochs, seed)
        case CyclicPoisson(groups, _):
            return CyclicPoissonSampler(size, batch, job.n_steps, groups, seed)
    raise RootnoiseError(f"sampling must have a sampler, got {who}")  # pragma: no cover


class _Saved(NamedTuple):
    key: Key
    weights: dict[str, Any]
    optimizer: dict[str, Any]


def _read(path: Path, made: Mechanism) -> _Saved:
    """Return what `LoopOptimizer.save` wrote, of a run of the same mechanism."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as reason:
        raise RootnoiseError(f"resume must be readable, got {path}: {reason.strerror}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as reason:
        line = str(reason).partition("\n")[0]
        raise RootnoiseError(f"resume must be a file of save, got {path}: {line}") from None
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        raise RootnoiseError(f"resume must be a file of save, version {VERSION}, got {path}")
    if saved.get("fingerprint") != made.fingerprint:
        raise RootnoiseError(
            f"resume must be of the mechanism that these arguments make, {made.fingerprint[:16]}, "
            f"got {saved.get('fingerprint')!s:.16}"
        )
    try:
        return _Saved(Key(bytes.fromhex(saved["key"])), saved["weights"], saved["optimizer"])
    except (KeyError, TypeError, ValueError):  # the text may be a secret
        raise RootnoiseError(f"resume must be a file of save, got a damaged one {path}") from None


class LoopOptimizer(torch.optim.Optimizer):
    """A `PrivateOptimizer` that is called like any torch optimizer: `step()`, without indices.

    The batch is the one that the loader gave last. Groups of parameters, defaults and state are
    those of the optimizer inside, so that schedulers and hosts read and write the real ones.

    Attributes:
        private: the optimizer of the whole privacy guarantee.
    """

    def __init__(self, private: PrivateOptimizer) -> None:
        self.private = private
        self._indices: Indices | None = None
        self._ready = False
        groups, state = private.optimizer.param_groups, private.optimizer.state
        super().__init__(list(groups), private.optimizer.defaults)
        self.state, self._ready = state, True

    # torch's constructor and hosts assign these two; they are the inner optimizer's.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of parameters of the optimizer inside."""
        return self.private.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.private.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the optimizer inside."""
        return self.private.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.private.optimizer.state = state

    @property
    def t(self) -> int:
        """Steps made."""
        return self.private.t

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, whatever `set_to_none` says: none is kept for the next step."""
        self.private.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make the next private step with the loader's batch, after `closure` if one is given.

        Raises:
            RootnoiseError: no new batch was drawn, a gradient scaler, or what
                `PrivateOptimizer.step` refuses.
        """
        if hasattr(self, "grad_scale"):  # torch's GradScaler has set it
            raise RootnoiseError(
                "step must get gradients as they are (train in bfloat16 instead), got a GradScaler"
            )
        if self._indices is None:
            raise RootnoiseError(
                "step must follow a new batch of the loader that make_private returned, got none"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.private.step(self._indices)
        self._indices = None
        return loss

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that `make_private(..., resume=path)` needs, whole or not at all.

        The file holds the weights, the key of the noise and the seed of the batches, readable by
        its owner alone: keep it as secret as the data. Release what depends on a step only after
        the save that contains it, and go on from a file once: two runs that do share noise.

        Raises:
            RootnoiseError: a step was broken off, or the file cannot be written.
        """
        content = {
            "version": VERSION,
            "fingerprint": self.private.mechanism.fingerprint,
            "key": self.private.stream.key.secret.hex(),
            "weights": self.private.module.state_dict(),
            "optimizer": self.private.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            write_whole(Path(path), buffer.getvalue(), mode=0o600)
        except OSError as reason:
            raise RootnoiseError(f"path must be writable, got {path}: {reason.strerror}") from None

    # torch's GradScaler then tells `step`, which refuses it, instead of dividing gradients that are
    # not there yet.
    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse parameters that come later: the mechanism does not cover them."""
        if self._ready:
            rule = "parameters must all be the optimizer's before make_private"
            raise RootnoiseError(f"{rule}, got {len(list(param_group['params']))} more")
        super().add_param_group(param_group)

    def epsilon_spent(self) -> float:
        """Return an upper bound on the privacy loss, at the mechanism's delta, of the steps so far.

        It is that of the steps made, where the strategy is Toeplitz and batches are not random
        (C restricted to them is a strategy of its own); else that of the whole run.
        It is for a number of steps that was fixed beforehand: a run that stops because of what it
        has shown costs what the whole run costs.
        """
        made, t = self.private.mechanism, self.t
        if t == 0:
            return 0.0
        c = made.strategy.coefficients
        if t == made.n_steps or c is None or made.participation.amplified:
            return made.epsilon
        who = made.participation
        if isinstance(who, FixedCycle):
            who = FixedCycle(who.period, -(-t // who.period))
        elif not isinstance(who, SingleParticipation):
            return made.epsilon
        sens = sensitivity(Toeplitz(c[:t], t), who).value
        sigma = made.noise_std / (made.clip_norm * sens)
        return min(made.epsilon, accounting.privacy_cost(who, t, sigma, made.delta).epsilon)

    def claim(self) -> str:
        """Return the guarantee of the whole run, as `PrivateOptimizer.claim` states it."""
        return self.private.claim()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs but the key and the weights: `PrivateOptimizer`'s."""
        return self.private.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved run; see `PrivateOptimizer.load_state_dict`."""
        self.private.load_state_dict(state_dict)


class PrivateLoader:
    """The batches of the private run, an epoch a pass, in the form that the data set gives them.

    A pass begins where the optimizer stands, so that a resumed run goes on in the middle of an
    epoch. Each batch must be stepped on before the next is drawn.
    """

    def __init__(
        self, dataset: Any, optimizer: LoopOptimizer, period: int, loading: Mapping[str, Any]
    ) -> None:
        self.dataset, self._optimizer, self._period = dataset, optimizer, period
        self._loading = dict(loading)

    @property
    def batch_size(self) -> int:
        """Records a batch, expected under random sampling."""
        return self._optimizer.private.sampler.batch_size

    def __len__(self) -> int:
        return self._period

    def __iter__(self) -> Iterator[Any]:
        loop, private = self._optimizer, self._optimizer.private
        sampler = private.sampler
        t = private.t
        if t == sampler.n_steps:
            raise RootnoiseError(
                f"loader must not be read past the planned steps={sampler.n_steps}: give "
                "make_private more epochs"
            )
        end = min(sampler.n_steps, (t // self._period + 1) * self._period)
        batches = data_loader(self.dataset, sampler, start=t, stop=end, **self._loading)
        for indices, batch in batches:
            if private.t != t:
                raise RootnoiseError(
                    f"each batch must be stepped on once before the next, got step {private.t} "
                    f"at batch {t}"
                )
            loop._indices = indices.numpy()
            yield self._nobody() if batch is None else batch
            t += 1

    def _nobody(self) -> Any:
        """Return a batch of no rows, shaped like the others, for a step that drew nobody."""
        collate = self._loading.get("collate_fn") or torch.utils.data.default_collate
        one = collate([self.dataset[0]])
        return tree_map(lambda x: x[:0] if isinstance(x, torch.Tensor) else x, one)
