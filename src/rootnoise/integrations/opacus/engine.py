"""`PrivacyEngine`, in the shape of Opacus's: it makes a run with rootnoise's noise.

Batches are drawn, gradients clipped and the ledger kept as by `make_private`. Features of Opacus
that are not supported here, or that would void epsilon, are refused with a one-line error.
"""

from __future__ import annotations

import os
from inspect import signature
from typing import IO, Any

import torch
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader

from rootnoise._check import RootnoiseError
from rootnoise.front_door import LoopOptimizer, make_private
from rootnoise.integrations.opacus.checkpoint import load, save
from rootnoise.integrations.opacus.loop import EngineLoader, EngineOptimizer, Hooks

# Most epochs and steps of a run with independent noise whose script does not say how many it will
# run. Such noise does not depend on their number, but more are refused.
OPEN_EPOCHS, OPEN_STEPS = 200, 100_000

# Opacus's ways to compute per-sample gradients. Here there is one way, whatever the name.
MODES = ("hooks", "ew", "functorch", "ghost")
# Options of Opacus that have only one allowed value here, and why.
ONLY = {
    "batch_first": (True, "a row an example"),
    "clipping": ("flat", "a norm that follows the data, or the layer, is not what epsilon means"),
    "noise_generator": (None, "give key=Key.from_seed(...) to repeat an experiment"),
    "rand_on_empty": (False, "a step that drew nobody has a batch of no rows"),
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
        save(path, module, optimizer, checkpoint_dict, options)

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
        return load(path, module, optimizer, options)

    def _check_own(self, optimizer: Any) -> None:
        if self._optimizer is None or optimizer is not self._optimizer:
            raise RootnoiseError(
                "optimizer must be the one that this engine made private, for its state is that of "
                f"noise and ledger, got {type(optimizer).__name__}"
            )
