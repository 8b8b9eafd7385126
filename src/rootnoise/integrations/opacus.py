"""Opacus's interface with rootnoise's noise: an Opacus script only changes its import.

    from rootnoise.integrations.opacus import PrivacyEngine    # was: from opacus import ...

Batches are drawn, gradients clipped and the ledger kept as by `make_private`. Features of Opacus
that are not supported here, or that would void epsilon, are refused with a one-line error.
"""

from __future__ import annotations

import io
import os
import pickle  # for the name of its error
from collections.abc import Iterator
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, default_collate

from rootnoise._check import RootnoiseError, integer
from rootnoise._files import write_whole
from rootnoise.batches.loader import Split
from rootnoise.batches.samplers import Indices
from rootnoise.front_door import LoopOptimizer, PrivateLoader, make_private
from rootnoise.keys import Key

# Most epochs and steps of a run with independent noise whose script does not say how many it will
# run. Such noise does not depend on their number, but more are refused.
OPEN_EPOCHS, OPEN_STEPS = 200, 100_000
VERSION = 1  # version of the checkpoint format

# Opacus's ways to compute per-sample gradients. Here there is one way, whatever the name.
MODES = ("hooks", "ew", "functorch", "ghost")
MICRO_BATCHES = "BatchMemoryManager splits a batch of the loader into physical ones"
# Options of Opacus that have only one allowed value here, and why.
ONLY = {
    "batch_first": (True, "a row an example"),
    "clipping": ("flat", "a norm that follows the data, or the layer, is not what epsilon means"),
    "noise_generator": (None, "give key=Key.from_seed(...) to repeat an experiment"),
    "rand_on_empty": (False, "a step that drew nobody has a batch of no rows"),
}
# Attributes of Opacus's optimizer that are not supported here, and what applies instead.
REFUSED = {
    "virtual_step": MICRO_BATCHES,
    "accumulated_iterations": MICRO_BATCHES,
    "attach_step_hook": "use torch's register_step_post_hook",
    "grad_samples": "gradients are clipped inside of step",
    "clip_and_accumulate": "gradients are clipped inside of step",
    "add_noise": "noise is added inside of step",
    "pre_step": "all is done inside of step",
    "scale_grad": "gradients are divided by the planned batch size inside of step",
}


class PrivacyEngine:
    """Makes one run private, with Opacus's interface.

    Without `mechanism`, `make_private` gives Opacus's own sampling and noise: Poisson batches, and
    independent noise of standard deviation noise_multiplier * max_grad_norm.
    `make_private_with_epsilon` uses the best noise that the planner finds for this optimizer and
    number of epochs. Epsilon always comes from rootnoise's accountant, for one record.

    Args:
        accountant: "prv", "rdp" or "gdp", accepted for compatibility; it has no effect.
        secure_mode: must be False: finite-precision attacks are not covered.

    Raises:
        RootnoiseError: another accountant, or secure_mode.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.ones(12, 3), torch.zeros(12, dtype=torch.int64))
    >>> model = nn.Linear(3, 2)
    >>> engine = PrivacyEngine()
    >>> model, optimizer, loader = engine.make_private_with_epsilon(
    ...     module=model,
    ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    ...     data_loader=DataLoader(data, batch_size=4),
    ...     target_epsilon=8.0,
    ...     target_delta=1e-5,
    ...     epochs=2,
    ...     max_grad_norm=1.0,
    ... )
    >>> for epoch in range(2):
    ...     for x, y in loader:
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.cross_entropy(model(x), y).backward()
    ...         optimizer.step()
    >>> round(engine.get_epsilon(1e-5), 2)
    8.0
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        if accountant not in ("prv", "rdp", "gdp"):
            raise RootnoiseError(f"accountant must be prv, rdp or gdp, got {accountant!r}")
        if secure_mode:
            raise RootnoiseError(
                "secure_mode must be False: keys come from the operating system anyway, but "
                "finite-precision attacks are not covered; got True"
            )
        self._optimizer: EngineOptimizer | None = None

    @property
    def accountant(self) -> PrivacyEngine:
        """The engine: scripts ask Opacus's accountant for `get_epsilon(delta)`."""
        return self

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        mechanism: str = "identity",
        epochs: int | None = None,
        delta: float = 1e-5,
        **options: Any,
    ) -> Any:
        """Return module, optimizer and loader, private.

        Args:
            module: plain, in training mode.
            optimizer: of all its trainable parameters.
            data_loader: gives data set, batch size, collate function and workers; q is exactly
                batch_size / n_examples.
            noise_multiplier: standard deviation of Z divided by max_grad_norm and by the largest
                column norm of C; for independent noise this is Opacus's own definition.
            max_grad_norm: largest l2 norm of one record's gradient.
            mechanism: a name from `mechanisms()`; any but identity needs `epochs`.
            epochs: passes over the data; without it a run with independent noise may have at most
                200 epochs and at most 100,000 steps.
            delta: the delta of the run's claim; `get_epsilon` takes any.
            options: Opacus's other options, and those of `rootnoise.make_private`.
                `poisson_sampling=False` draws fixed cycles, each record once an epoch, and accounts
                for them accordingly. `grad_sample_mode="ghost"` also returns the criterion, before
                the loader. `wrap_model=False` returns `Hooks` in place of the module, and the loop
                calls the module itself.

        Raises:
            RootnoiseError: a feature of Opacus that is not supported, or what
                `rootnoise.make_private` refuses.
        """
        if epochs is None and mechanism != "identity":
            raise RootnoiseError(
                f"epochs must be given for mechanism {mechanism!r}, whose noise is planned for the "
                "whole run, got None"
            )
        goal = {"noise_multiplier": noise_multiplier, "delta": delta}
        if epochs is None:
            epochs = max(1, min(OPEN_EPOCHS, OPEN_STEPS // (len(data_loader) + 1)))
        parts = (module, optimizer, data_loader, max_grad_norm, mechanism, epochs)
        return self._make(*parts, goal, options)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        mechanism: str = "auto",
        **options: Any,
    ) -> Any:
        """Return the same as `make_private`, with noise for `target_epsilon` at `target_delta`.

        Args:
            module: plain, in training mode.
            optimizer: the noise is planned for its momentum and learning rates.
            data_loader: gives the data and the batch size.
            target_epsilon: privacy loss of the whole run.
            target_delta: its failure probability.
            epochs: passes over the data; more are refused.
            max_grad_norm: largest l2 norm of one record's gradient.
            mechanism: "auto", the planner's choice of noise and sampling, or a name from
                `mechanisms()`.
            options: as for `make_private`.

        Raises:
            RootnoiseError: as for `make_private`.
        """
        goal = {"epsilon": target_epsilon, "delta": target_delta}
        parts = (module, optimizer, data_loader, max_grad_norm, mechanism, epochs)
        return self._make(*parts, goal, options)

    def _make(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        max_grad_norm: float,
        mechanism: str,
        epochs: int,
        goal: dict[str, Any],
        options: dict[str, Any],
    ) -> Any:
        if self._optimizer is not None:
            raise RootnoiseError("engine must make one run private, got a second call: take a new")
        if isinstance(max_grad_norm, list | tuple):
            raise RootnoiseError(f"max_grad_norm must be one number for all, got {max_grad_norm}")
        for name, (only, reason) in ONLY.items():
            value = options.pop(name, only)
            if value is not only and value != only:
                raise RootnoiseError(f"{name} must be {only!r} ({reason}), got {value!r:.80}")
        mode = options.pop("grad_sample_mode", "hooks")
        if mode not in MODES:
            raise RootnoiseError(f"grad_sample_mode must be one of {', '.join(MODES)}, got {mode}")
        wrap, criterion = options.pop("wrap_model", True), options.pop("criterion", None)
        sampling = "poisson" if mechanism == "identity" else "auto"
        if not options.pop("poisson_sampling", True):
            sampling = "fixed-cycle"
        known = signature(make_private).parameters
        for name in options:
            if name not in known:
                raise RootnoiseError(f"options must be Opacus's or make_private's, got {name}")
        settings: dict[str, Any] = {"sampling": sampling, "mechanism": mechanism, "epochs": epochs}
        settings |= goal | {"clip_norm": max_grad_norm} | options
        private, loop, loader = make_private(module, optimizer, data_loader, **settings)
        self._optimizer = EngineOptimizer(loop.private, loop.rates, loop.dataset)
        self._optimizer.pace(options.get("scheduler"))
        batches = EngineLoader(
            loader.dataset, self._optimizer, loader.period, loader.loading, loader.split
        )
        given = private if wrap else Hooks()
        vars(private)["_module"] = private  # scripts read this of Opacus's wrapper to save weights
        if mode == "ghost":
            return given, self._optimizer, criterion or nn.CrossEntropyLoss(), batches
        return given, self._optimizer, batches

    def get_epsilon(self, delta: float) -> float:
        """Return an upper bound on the privacy loss of the steps so far, at any delta."""
        return 0.0 if self._optimizer is None else self._optimizer.epsilon_spent(delta)

    def is_compatible(self, *, module: nn.Module, **_: Any) -> bool:
        """Whether Opacus's own checks find nothing wrong with the layers."""
        return bool(ModuleValidator.is_valid(module))

    def validate(self, *, module: nn.Module, **_: Any) -> None:
        """Refuse a module that Opacus's checks find something wrong with.

        Raises:
            RootnoiseError: the first problem that they find.
        """
        errors = ModuleValidator.validate(module)
        if errors:
            line = " ".join(str(errors[0]).split())
            raise RootnoiseError(f"module must pass Opacus's checks, got {line}")

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """Return the module with layers that mix examples replaced, as Opacus does."""
        fixed: nn.Module = ModuleValidator.fix_and_validate(module)
        return fixed

    def save_checkpoint(
        self,
        *,
        path: str | os.PathLike[str] | IO[bytes],
        module: nn.Module,
        optimizer: LoopOptimizer,
        checkpoint_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Write everything that `load_checkpoint` needs; keep it as secret as the data.

        The file is written atomically, readable by its owner alone.

        Args:
            path: path of the file, or an open binary file.
            module: its weights are saved.
            optimizer: its noise, ledger and key are saved.
            checkpoint_dict: other contents: tensors and plain values.
            options: `module_state_dict_kwargs` and `torch_save_kwargs` as in Opacus.

        Raises:
            RootnoiseError: another optimizer than the engine's, a scheduler of noise or clipping, a
                step that failed midway, or a file that cannot be written.
        """
        self._check_own(optimizer)
        how, also = (
            options.pop("torch_save_kwargs", None),
            options.pop("module_state_dict_kwargs", None),
        )
        _refuse_schedulers(options)
        private = optimizer.private
        content = dict(checkpoint_dict or {}) | {
            "module_state_dict": module.state_dict(**(also or {})),
            "optimizer_state_dict": optimizer.state_dict(),
            "rootnoise": {
                "version": VERSION,
                "fingerprint": private.mechanism.fingerprint,
                "key": private.stream.key.secret.hex(),
            },
        }
        buffer = io.BytesIO()
        torch.save(content, buffer, **(how or {}))
        try:
            if isinstance(path, str | os.PathLike):
                write_whole(Path(path), buffer.getvalue(), mode=0o600)
            else:
                path.write(buffer.getvalue())
        except OSError as reason:
            raise RootnoiseError(f"path must be writable, got {path}: {reason.strerror}") from None

    def load_checkpoint(
        self,
        *,
        path: str | os.PathLike[str] | IO[bytes],
        module: nn.Module,
        optimizer: LoopOptimizer,
        **options: Any,
    ) -> dict[str, Any]:
        """Continue the saved run bit for bit, and return the file's other contents.

        Args:
            path: the file of `save_checkpoint`.
            module: made private by the same call as the saved one.
            optimizer: the one which that call returned, before its first step.
            options: `module_load_dict_kwargs` and `torch_load_kwargs` as in Opacus.

        Raises:
            RootnoiseError: a file that cannot be read or is for another mechanism, or an optimizer
                that has taken a step.
        """
        self._check_own(optimizer)
        how = {"map_location": "cpu"} | (options.pop("torch_load_kwargs", None) or {})
        also = options.pop("module_load_dict_kwargs", None) or {}
        _refuse_schedulers(options)
        try:
            content = torch.load(path, **(how | {"weights_only": True}))
            own = content.pop("rootnoise")
            weights, state = content.pop("module_state_dict"), content.pop("optimizer_state_dict")
        except OSError as reason:
            raise RootnoiseError(f"path must be readable, got {path}: {reason.strerror}") from None
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as reason:
            line = str(reason).partition("\n")[0]
            raise RootnoiseError(f"path must be of save_checkpoint, got {path}: {line}") from None
        made = optimizer.private.mechanism.fingerprint
        if (own["version"], own["fingerprint"]) != (VERSION, made):
            raise RootnoiseError(
                f"path must be of the mechanism that was made, {made[:16]} in version {VERSION}, "
                f"got {own['fingerprint'][:16]} in {own['version']}"
            )
        optimizer.follow(Key(bytes.fromhex(own["key"])))
        optimizer.load_state_dict(state)
        module.load_state_dict(weights, **also)
        return dict(content)

    def _check_own(self, optimizer: Any) -> None:
        if self._optimizer is None or optimizer is not self._optimizer:
            raise RootnoiseError(
                "optimizer must be the one that this engine made private, for its state is that of "
                f"noise and ledger, got {type(optimizer).__name__}"
            )


def _refuse_schedulers(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise RootnoiseError(
            "noise and clip norm must stay as calibrated, and checkpoints hold no more, got "
            f"{', '.join(given)}"
        )


class EngineOptimizer(LoopOptimizer):
    """A `LoopOptimizer` with the names that Opacus's scripts read."""

    @property
    def original_optimizer(self) -> torch.optim.Optimizer:
        """The inner optimizer."""
        return self.private.optimizer

    @property
    def noise_multiplier(self) -> float:
        """The mechanism's noise multiplier for the whole run; it is fixed."""
        return self.private.mechanism.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        raise RootnoiseError(f"noise_multiplier must stay as calibrated, got {value}")

    @property
    def max_grad_norm(self) -> float:
        """The clip norm of one record's gradient; it is fixed."""
        return self.private.mechanism.clip_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        raise RootnoiseError(f"max_grad_norm must stay as calibrated, got {value}")

    @property
    def expected_batch_size(self) -> int:
        """The divisor of every sum."""
        return self.private.sampler.batch_size

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Be told by Opacus's BatchMemoryManager that more of the batch follows the next part."""
        self._skips_next = bool(do_skip)

    _skips_next = False

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        """Whether the next `step` only adds a physical batch; asking changes nothing."""
        return self.more

    @property
    def _is_last_step_skipped(self) -> bool:
        return self.step_was_skipped

    def __getattr__(self, name: str) -> Any:
        """Explain why an attribute of Opacus's optimizer is not supported."""
        if name in REFUSED:
            raise RootnoiseError(f"{name} must not be used: {REFUSED[name]}")
        raise AttributeError(name)


class EngineLoader(PrivateLoader):
    """A `PrivateLoader` with the names that Opacus's scripts read."""

    @property
    def sample_rate(self) -> float:
        """Fraction of the records in a step, on average."""
        return self.batch_size / len(self.dataset)

    # What follows is read by Opacus's own BatchMemoryManager, which makes a DataLoader of it. It
    # tells the optimizer whether a physical batch is the last, and collating it tells how many
    # examples it has: the next ones of the batch. So it is collated in this process, in order.
    num_workers, timeout, persistent_workers = 0, 0, False
    worker_init_fn = multiprocessing_context = prefetch_factor = None

    @property
    def pin_memory(self) -> bool:
        """Whether batches are copied to pinned memory, as the script's own loader said."""
        return bool(self.loading.get("pin_memory"))

    @property
    def generator(self) -> Any:
        """The generator of the script's own loader."""
        return self.loading.get("generator")

    @cached_property
    def batch_sampler(self) -> Batches:
        """The numbers of the examples of each batch of a pass."""
        return Batches(self)

    def collate_fn(self, examples: list[Any]) -> Any:
        """Collate the next examples of a batch, and tell the optimizer that they were drawn.

        Raises:
            RootnoiseError: the last examples of a batch are not those of its last physical one, as
                when two iterators over one manager take turns: then some would be taken twice.
        """
        loop: Any = self._optimizer
        part, last = self.batch_sampler.take(len(examples)), not loop._skips_next
        if last != (self.batch_sampler.left == 0):
            raise RootnoiseError(
                "physical batches must come in their order from one iterator, got "
                f"{'the last one' if last else 'another one'} with {self.batch_sampler.left} "
                "examples of the batch to come"
            )
        loop.draw(part, last)
        collate = self.loading.get("collate_fn") or default_collate
        return collate(examples) if examples else self._nobody()


class Batches:
    """The batches of a pass as lists, which remember how much of the last one was drawn."""

    def __init__(self, loader: EngineLoader) -> None:
        self._loader = loader
        self._rest = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._loader.period

    def __iter__(self) -> Iterator[list[int]]:
        loader = self._loader
        loop, steps = loader._optimizer, loader._steps()
        loop.restart()
        for t in steps:
            if loop.t != t:
                raise RootnoiseError(
                    f"each batch must be stepped on once before the next, got step {loop.t} at "
                    f"batch {t}"
                )
            self._rest = loop.private.sampler.batch(t)
            yield self._rest.tolist()

    @property
    def left(self) -> int:
        """How many examples of the last batch were not taken."""
        return self._rest.size

    def take(self, n: int) -> Indices:
        """Return the next n examples of the batch."""
        part, self._rest = self._rest[:n], self._rest[n:]
        return part


class Hooks:
    """What `wrap_model=False` returns: the loop goes on calling its own model."""

    def cleanup(self) -> None:
        """Do nothing: the model can be used, saved and evaluated as it is."""


class BatchMemoryManager:
    """Splits batches into physical ones, as Opacus's own does, but with the loader's workers.

    Opacus's works too. In either case `optimizer.step()` changes the weights only after the last
    part of a batch, and `zero_grad()` keeps the sum until then.

    Args:
        data_loader: the loader of `PrivacyEngine.make_private`.
        max_physical_batch_size: most examples at a time.
        optimizer: that of the same call.

    Raises:
        RootnoiseError: parts of another run, or a size below 1.
    """

    def __init__(
        self, *, data_loader: EngineLoader, max_physical_batch_size: int, optimizer: EngineOptimizer
    ) -> None:
        if not isinstance(data_loader, EngineLoader) or data_loader._optimizer is not optimizer:
            raise RootnoiseError(
                "data_loader and optimizer must be those that one engine made private, got "
                f"{type(data_loader).__name__} and {type(optimizer).__name__}"
            )
        most = integer("max_physical_batch_size", max_physical_batch_size, 1)
        self._loader = data_loader.divided(Split(most=most))

    def __enter__(self) -> EngineLoader:
        return self._loader

    def __exit__(self, *_: object) -> None:
        pass
