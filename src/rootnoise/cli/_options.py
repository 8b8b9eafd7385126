"""Options that several commands share, and the values that they describe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer

from rootnoise._check import RootnoiseError, integer
from rootnoise.participation import FixedCycle, MinSeparation, SingleParticipation
from rootnoise.runs.settings import Options

if TYPE_CHECKING:
    from rootnoise.accounting import Trials
    from rootnoise.mechanism import Mechanism
    from rootnoise.planner import Fleet, Speed

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def saved(path: Path) -> Mechanism:
    """Read a mechanism, or that of a run's folder; devices, which may never end, are refused."""
    from rootnoise.mechanism import Mechanism

    if path.is_dir():
        path = path / "mechanism.json"

    if path.is_char_device():
        raise RootnoiseError(f"mechanism must be a file, got the device {path}")
    return Mechanism.load(path)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options: each field becomes an option.

    The `panel` of such a class is the heading of its options in the help; a run's settings have
    their own. In a class with `several`, settings for tuning are texts, read by `numbers`.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {n: hint for n, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _parameters(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @wraps(command)
    def flat(**values: Any) -> None:
        made = {
            name: group(**{f.name: values.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    parameters = []
    for f in fields(group):
        hint, default, how = hints[f.name], f.default, dict(f.metadata)
        if how:  # a setting
            hint = how.pop("kind", hint)
            if how.pop("tuned", False) and getattr(group, "several", False):
                hint, default = str, f"{default}"
                how |= {"metavar": "<float,...>", "help": f"{how['help']} Several are tried."}
            hint = Annotated[hint, typer.Option(*how.pop("flags", ()), **how)]
        else:
            (info,) = hint.__metadata__
            info.rich_help_panel = group.panel
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(f.name, kind, default=default, annotation=hint))
    return parameters


class Kind(StrEnum):
    """Who may take part when."""

    SINGLE = "single"
    MIN_SEP = "min-sep"
    FIXED_CYCLE = "fixed-cycle"


@dataclass(frozen=True)
class Who:
    """The options that say who takes part when."""

    panel: ClassVar[str] = "Who takes part when"

    participation: Annotated[
        Kind | None,
        typer.Option(help="Who takes part when [default: single; min-sep with --min-sep]."),
    ] = None
    min_sep: Annotated[
        int | None,
        typer.Option(help="Least separation b of a record's steps (period of a fixed cycle)."),
    ] = None
    participations: Annotated[
        int | None, typer.Option(help="Most steps k of one record [default: as many as fit].")
    ] = None

    def value(self, n_steps: int) -> SingleParticipation | MinSeparation | FixedCycle:
        """Return the participation that the options describe."""
        kind = self.participation
        if kind is None:
            alone = self.min_sep is None and self.participations is None
            kind = Kind.SINGLE if alone else Kind.MIN_SEP
        if kind is Kind.SINGLE:
            for name in ("min_sep", "participations"):
                value = getattr(self, name)
                if value is not None:
                    raise RootnoiseError(
                        f"{name.replace('_', '-')} must be left out for single participation, "
                        f"got {value}"
                    )
            return SingleParticipation()
        if self.min_sep is None:
            raise RootnoiseError(f"min-sep must be given for participation {kind.value}, got none")
        b = integer("min-sep", self.min_sep, 1)
        k = -(-n_steps // b) if self.participations is None else self.participations
        return FixedCycle(b, k) if kind is Kind.FIXED_CYCLE else MinSeparation(b, k)


@dataclass(frozen=True)
class Devices:
    """The options that say how large the model is, and what trains it."""

    panel: ClassVar[str] = "What a rank holds"

    n_params: Annotated[
        int | None, typer.Option(help="Trainable parameters: adds memory, traffic and time.")
    ] = None
    ranks: Annotated[int, typer.Option(help="Processes, each with one device.")] = 1
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Parameters cut by FSDP2, not copied (DDP).")
    ] = False
    dtype: Annotated[str, typer.Option(help="Of the parameters.")] = "float32"
    device_memory: Annotated[
        float | None, typer.Option(help="GB (1e9 bytes) of a device [default: no limit].")
    ] = None
    normals_per_second: Annotated[
        float | None,
        typer.Option(help="Of a rank [default: measured here, on one thread]."),
    ] = None

    def fleet(self, momentum: bool) -> Fleet | None:
        """Return the model and its ranks, None where the model's size is not given."""
        from rootnoise.planner import Fleet

        if self.n_params is None:
            for f in fields(self):
                if getattr(self, f.name) != f.default:
                    name, got = f.name.replace("_", "-"), getattr(self, f.name)
                    raise RootnoiseError(f"{name} must come with --n-params, got {got} alone")
            return None
        memory = None if self.device_memory is None else 1e9 * self.device_memory
        return Fleet(self.n_params, self.ranks, self.sharded, self.dtype, memory, momentum)

    def speed(self) -> Speed:
        """Return how fast a rank makes noise: as given, or measured now."""
        from rootnoise.planner import Speed

        if self.normals_per_second is not None:
            return Speed.given(self.normals_per_second)
        from rootnoise.noise.speed import measured

        said = "measured now on one thread of this machine"
        return Speed(*measured(), said)


@dataclass(frozen=True)
class Tried:
    """The options that say of how many trials the best is released."""

    panel: ClassVar[str] = "The best of several trials"

    trials: Annotated[
        float | None,
        typer.Option(
            help="Expected number of trials, of which the best alone is released; how many there "
            "are is drawn at random, and stays secret."
        ),
    ] = None
    trials_shape: Annotated[
        str | None,
        typer.Option(
            help="How their number varies: 0 (most), 1 (geometric), more, or poisson (least), and "
            "the less it does, the more it costs [default: 1]."
        ),
    ] = None

    def value(self, default: float | None = None) -> Trials | None:
        """Return the distribution of their number, None where none is given nor the default."""
        from rootnoise.accounting import Trials

        mean = default if self.trials is None else self.trials
        if mean is None:
            if self.trials_shape is not None:
                rule = "trials-shape must come with --trials"
                raise RootnoiseError(f"{rule}, got {self.trials_shape} alone")
            return None
        shape: Any = "1" if self.trials_shape is None else self.trials_shape
        with suppress(ValueError):
            shape = float(shape)
        try:
            return Trials.from_dict({"mean": mean, "shape": shape})
        except RootnoiseError as reason:
            raise RootnoiseError(f"trials: {reason}") from None


@dataclass(frozen=True)
class Split(Options):
    """The options of all mechanisms, as typed on the command line."""

    def given(self) -> dict[str, Any]:
        """Return the options in the form that `factorize` takes, without those left out."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return values | ({"bands": bands(values["bands"])} if "bands" in values else {})


def bands(typed: str | int | None) -> str | int | None:
    """Return the number of bands, or auto."""
    try:
        return typed if typed in (None, "auto") else int(typed)
    except ValueError:
        raise RootnoiseError(f"bands must be an integer or auto, got {typed!r}") from None


def rate(typed: str | float) -> str | float:
    """Return the learning rate, or auto."""
    try:
        return "auto" if typed == "auto" else float(typed)
    except ValueError:
        raise RootnoiseError(f"lr must be a number or auto, got {typed!r:.60}") from None


def numbers(name: str, typed: str) -> list[float]:
    """Return the numbers in a text, with commas between.

    >>> numbers("lr", "0.1, 0.5")
    [0.1, 0.5]
    """
    try:
        return [float(part) for part in typed.split(",")]
    except ValueError:
        rule = f"{name} must be numbers with commas between"
        raise RootnoiseError(f"{rule}, got {typed!r:.60}") from None
