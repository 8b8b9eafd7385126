"""The settings of a run as a TOML file: `rootnoise train --config run.toml`.

A key is the name of a flag without its dashes in front: `batch-size = 500`. Noise keys are drawn
anew in each run, so no secret has a name here.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rootnoise._check import RootnoiseError
from rootnoise.runs.settings import Settings

# Flags of `train` that say how a run is made rather than what it is.
BESIDE = ("out", "checkpoint_every")
HEAD = "# The settings of a run: rootnoise train --config run.toml --out FOLDER"


def read(path: Path) -> dict[str, int | float | str]:
    """Return the settings in a file by the names of their fields, unchecked but for their kind.

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
    values: dict[str, int | float | str] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            rule = f"{path.name} must hold settings of `train`, such as lr, without sections"
            raise RootnoiseError(f"{rule}, got [{key}]")
        if name not in NAMES:
            nearest = max(NAMES, key=lambda known: similarity(name, known))
            rule = f"{path.name} must hold settings of `train`, such as {_flag(nearest)}"
            raise RootnoiseError(f"{rule}, got {key!r}")
        if name in values:
            raise RootnoiseError(f"{path.name} must name {_flag(name)} once, got it twice")
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            rule = f"{_flag(name)} in {path.name} must be a number or a text"
            raise RootnoiseError(f"{rule}, got {value!r:.40}")
        values[name] = value
    return values


def text(settings: Mapping[str, Any]) -> bytes:
    """Return the content of the file for these settings by name; those that are None are left out.

    >>> print(text({"mechanism": "bsr", "epsilon": 4.0, "bands": None}).decode())
    # The settings of a run: rootnoise train --config run.toml --out FOLDER
    mechanism = "bsr"
    epsilon = 4.0
    <BLANKLINE>
    """
    lines = [
        f"{_flag(name)} = {_written(value)}"
        for name, value in settings.items()
        if value is not None
    ]
    try:
        return "\n".join([HEAD, *lines, ""]).encode()
    except UnicodeEncodeError:  # the name of a folder may be any bytes
        raise RootnoiseError("settings must be Unicode, got a path that is not") from None


def similarity(a: str, b: str) -> float:
    """Return how alike two words are, in [0, 1]."""
    return difflib.SequenceMatcher(None, a, b).ratio()


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _written(value: int | float | str) -> str:
    # A string of JSON is one of TOML, but for DEL.
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


NAMES = (*(field.name for field in fields(Settings)), *BESIDE)
