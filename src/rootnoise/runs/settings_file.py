"""The settings of a run as a TOML file: `rootnoise train --config run.toml`.

A key is the name of a flag without its dashes in front: `batch-size = 500`. Noise keys are drawn
anew in each run, so no secret has a name here.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rootnoise._check import RootnoiseError
from rootnoise.runs.settings import Settings
from rootnoise.runs.tuning import BESIDE as TRIED
from rootnoise.runs.tuning import TUNED, Tuning

# Flags of `train` that say how a run is made rather than what it is.
BESIDE = ("out", "checkpoint_every")
HEAD = "# The settings of a run: rootnoise train --config run.toml --out FOLDER"
TUNED_HEAD = "# The settings of a tuning: rootnoise tune --config run.toml --out FOLDER"

Value = int | float | str | Sequence[float]


def read(path: Path, tuning: bool = False) -> dict[str, Value]:
    """Return the settings in a file by the names of their fields, unchecked but for their kind.

    Args:
        path: the file.
        tuning: also take what `tune` has beside `train`: lists of values, and the trials. Without
            it they are refused: a run is no tuning, and its claim has no price of one.

    Raises:
        RootnoiseError: the file cannot be read, is no TOML, or names something that is no setting.
    """
    try:
        found = tomllib.loads(path.read_bytes().decode())
    except OSError as reason:
        raise RootnoiseError(f"config must be readable, got {path}: {reason.strerror}") from None
    except ValueError as reason:  # UnicodeDecodeError and TOMLDecodeError are of this kind
        line = " ".join(str(reason).split())
        cure = ' (a text needs quotes: mechanism = "bsr")' if "Invalid value" in line else ""
        raise RootnoiseError(f"config must hold TOML, got {path}: {line:.100}{cure}") from None
    values: dict[str, Value] = {}
    known = (*NAMES, *TRIED) if tuning else NAMES
    for key, value in found.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            rule = f"{path.name} must hold settings of `train`, such as lr, without sections"
            raise RootnoiseError(f"{rule}, got [{key}]")
        if not tuning and (name in TRIED or (name in TUNED and isinstance(value, list))):
            cure = "rootnoise tune --config takes it"
            raise RootnoiseError(f"{path.name} must be of one run, got a tuning's {key}: {cure}")
        if name not in known:
            nearest = max(known, key=lambda one: similarity(name, one))
            rule = f"{path.name} must hold settings of `train`, such as {_flag(nearest)}"
            raise RootnoiseError(f"{rule}, got {key!r}")
        if name in values:
            raise RootnoiseError(f"{path.name} must name {_flag(name)} once, got it twice")
        several = isinstance(value, list) and name in TUNED
        single = [value] if not several else value
        if any(isinstance(one, bool) or not isinstance(one, int | float | str) for one in single):
            rule = f"{_flag(name)} in {path.name} must be a number or a text"
            raise RootnoiseError(f"{rule}, got {value!r:.40}")
        values[name] = value
    return values


def text(settings: Mapping[str, Any]) -> bytes:
    """Return the content of the file for these settings by name; those that are None are left out.

    Of a tuning, which is a `Tuning` or its fields, all that was tried is written.

    >>> print(text({"mechanism": "bsr", "epsilon": 4.0, "bands": None}).decode())
    # The settings of a run: rootnoise train --config run.toml --out FOLDER
    mechanism = "bsr"
    epsilon = 4.0
    <BLANKLINE>
    """
    head = HEAD if settings.get("tuning") is None else TUNED_HEAD
    lines = [f"{_flag(name)} = {_written(value)}" for name, value in flat(settings).items()]
    try:
        return "\n".join([head, *lines, ""]).encode()
    except UnicodeEncodeError:  # the name of a folder may be any bytes
        raise RootnoiseError("settings must be Unicode, got a path that is not") from None


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the file has them: those of a tuning among the others, none that is None.

    >>> flat({"lr": 0.2, "tuning": {"grid": {"lr": [0.1, 0.2]}, "public": "mnist"}})
    {'lr': [0.1, 0.2], 'public': 'mnist'}
    """
    rest = {name: value for name, value in settings.items() if name != "tuning"}
    tuning = settings.get("tuning")
    if tuning is not None:
        made = tuning if isinstance(tuning, Tuning) else Tuning.from_dict(tuning)
        rest |= made.options()
    return {name: value for name, value in rest.items() if value is not None}


def similarity(a: str, b: str) -> float:
    """Return how alike two words are, in [0, 1]."""
    return difflib.SequenceMatcher(None, a, b).ratio()


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _written(value: Any) -> str:
    # A string of JSON is one of TOML, but for DEL.
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, list) else repr(value)


NAMES = (*(field.name for field in fields(Settings)), *BESIDE)
