"""The workload that a command's options describe: SGD, a schedule, a torch optimizer, or a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import typer
from numpy.typing import NDArray

from rootnoise import _limits
from rootnoise._check import RootnoiseError, integer, one_of, real
from rootnoise.cli import _number_files

if TYPE_CHECKING:  # imported where they are used: `rootnoise --help` needs no SciPy
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from rootnoise.workload import Workload

Array = NDArray[np.float64]

OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Options:
    """The options that describe a workload."""

    panel: ClassVar[str] = "Workload"

    momentum: Annotated[
        float | None,
        typer.Option(help="Momentum beta of SGD or beta1 of Adam [default: 0; 0.9 for Adam]."),
    ] = None
    decay: Annotated[
        float | None,
        typer.Option(help="Factor alpha on the parameters at each step [default: 1, no decay]."),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="<cosine|linear|exponential|step|FILE>",
            help="Learning-rate schedule, or a file with one rate per step.",
        ),
    ] = None
    warmup: Annotated[
        int | None, typer.Option(help="Steps of linear warm-up before the schedule.")
    ] = None
    final: Annotated[
        float | None,
        typer.Option(
            help="Where the schedule ends, relative to its peak "
            "[default: 0; 0.01 for exponential and step]."
        ),
    ] = None
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="<sgd|adam|adamw>",
            help="Take what this torch optimizer does, with PyTorch's defaults (of Adam the first "
            "moment; the second is ignored).",
        ),
    ] = None
    lr: Annotated[float | None, typer.Option(help="Its learning rate, or the schedule's peak.")] = (
        None
    )
    weight_decay: Annotated[float | None, typer.Option(help="Its weight decay.")] = None
    dampening: Annotated[float | None, typer.Option(help="Its dampening (sgd).")] = None
    nesterov: Annotated[bool, typer.Option("--nesterov", help="It looks ahead (sgd).")] = False
    workload: Annotated[
        Path | None,
        typer.Option(
            help="Instead of all these a file, .npy, .npz, .csv or .json: a lower-triangular "
            "matrix, or the coefficients of a Toeplitz one."
        ),
    ] = None

    def described(self) -> dict[str, Any]:
        """Return the options that describe the workload by name, defaults of SGD included."""
        given = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
            if value is not None and value is not False
        }
        own = {"momentum": 0.0, "decay": 1.0}
        return given if self.workload or self.optimizer else own | given

    def value(self, steps: int | None) -> Workload:
        """Return the workload, with `steps` steps if given."""
        from rootnoise.workload import SGD, ScheduledSGD

        if steps is not None:
            integer("steps", steps, 1)
        self._refuse_mixtures()
        if self.workload is not None:
            work = _from_file(self.workload)
            _refuse_other_steps(self.workload, work.n_steps, steps)
            return work
        rates = self._rates(steps)
        n = steps if rates is None else rates.size
        if n is None:
            raise RootnoiseError("steps must be given unless a file says how many, got none")
        if self.optimizer is not None:
            return self._torch(n, rates)
        beta = 0.0 if self.momentum is None else self.momentum
        alpha = 1.0 if self.decay is None else self.decay
        sgd = SGD(n, beta, alpha)
        peak = 1.0 if self.lr is None else self.lr
        return sgd if rates is None else ScheduledSGD(peak * rates, beta, decay=alpha)

    def _refuse_mixtures(self) -> None:
        """Refuse options that do not go together."""
        if self.workload is not None:
            self._leave_out("with --workload", *(set(vars(self)) - {"workload"}))
        if self.optimizer is None:
            self._leave_out("without --optimizer", "weight_decay", "dampening", "nesterov")
        else:
            self._leave_out("with --optimizer (see --weight-decay)", "decay")
        if self.optimizer in ("adam", "adamw"):
            self._leave_out(f"with --optimizer {self.optimizer}", "dampening", "nesterov")
        if self.schedule is None:
            self._leave_out("without --schedule", "warmup", "final")
            if self.optimizer is None:
                self._leave_out("without --optimizer or --schedule", "lr")
        elif _number_files.named(self.schedule):
            self._leave_out("with a schedule from a file", "warmup", "final")
        if self.lr is not None:
            real("lr", self.lr, above=0)

    def _leave_out(self, when: str, *names: str) -> None:
        for name in sorted(names):
            value = getattr(self, name)
            if value is not None and value is not False:
                raise RootnoiseError(
                    f"{name.replace('_', '-')} must be left out {when}, got {value}"
                )

    def _rates(self, steps: int | None) -> Array | None:
        """Return the learning rates relative to --lr, or None without a schedule."""
        from rootnoise.workload import learning_rates

        if self.schedule is None:
            return None
        if _number_files.named(self.schedule):
            rates = _number_files.read(Path(self.schedule))
            if rates.ndim != 1:
                raise RootnoiseError(
                    f"schedule must be a list of learning rates, got shape {rates.shape}"
                )
            _refuse_other_steps(Path(self.schedule), rates.size, steps)
            return rates
        if steps is None:
            raise RootnoiseError("steps must be given unless a file says how many, got none")
        return learning_rates(self.schedule, steps, self.warmup or 0, self.final)

    def _torch(self, n: int, rates: Array | None) -> Workload:
        """Return the workload of the torch optimizer with these learning rates."""
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        from torch import optim

        from rootnoise.workload import from_optimizer

        settings: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            kind: type[Optimizer] = optim.SGD
            settings |= {"momentum": self.momentum, "dampening": self.dampening}
            settings["nesterov"] = self.nesterov or None
        else:
            kind = optim.Adam if self.optimizer == "adam" else optim.AdamW
            settings["betas"] = None if self.momentum is None else (self.momentum, 0.999)
        given = {name: value for name, value in settings.items() if value is not None}

        if rates is None:
            return from_optimizer(partial(kind, **given), n)
        factors = rates.tolist()

        def scheduler(made: Optimizer) -> LRScheduler:
            return optim.lr_scheduler.LambdaLR(made, lambda t: factors[min(t, n - 1)])

        return from_optimizer(partial(kind, **given), n, scheduler)


def _from_file(path: Path) -> Workload:
    """Return a file's workload: from `Workload.to_dict`, a matrix, or coefficients."""
    from rootnoise.workload import MatrixWorkload, ToeplitzWorkload

    if path.suffix == ".json":
        found = _described(path)
        if found is not None:
            _limits.steps(found.n_steps)
            return found
    array = _number_files.read(path)
    if array.ndim == 1:
        _limits.steps(array.size)
        return ToeplitzWorkload(array)
    if array.ndim == 2 and array.shape[0] == array.shape[1] and _symmetric(array):
        raise RootnoiseError(
            f"workload must be lower-triangular, got a symmetric one in {path}: add --offline"
        )
    toeplitz = array.ndim == 2 and np.array_equal(array[1:, 1:], array[:-1, :-1])
    if array.ndim == 2 and not toeplitz:
        _limits.dense(len(array))
    work = MatrixWorkload(array)
    return ToeplitzWorkload(array[:, 0]) if toeplitz else work


def _described(path: Path) -> Workload | None:
    """Return the workload of a JSON object, or None if the file holds something else."""
    from rootnoise.workload import from_dict

    _number_files.refuse_size(path)
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # reading the numbers says what is wrong
    return from_dict(fields) if isinstance(fields, dict) else None


def _symmetric(array: Array) -> bool:
    return bool(np.triu(array, 1).any()) and np.allclose(array, array.T)


def _refuse_other_steps(path: Path, n: int, steps: int | None) -> None:
    if steps not in (None, n):
        raise RootnoiseError(f"steps must be {n}, as many as {path} has, got {steps}")
