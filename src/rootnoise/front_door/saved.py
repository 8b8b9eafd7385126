"""The file of `LoopOptimizer.save`: everything that a run needs to continue."""

from __future__ import annotations

import io
import pickle  # for the name of its error
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.training import PrivateOptimizer

VERSION = 1


class Saved(NamedTuple):
    """The contents of the file."""

    key: Key
    weights: dict[str, Any]
    optimizer: dict[str, Any]


def read(path: Path, made: Mechanism) -> Saved:
    """Return what `LoopOptimizer.save` wrote, for a run with the same mechanism."""
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
        return Saved(Key(bytes.fromhex(saved["key"])), saved["weights"], saved["optimizer"])
    except (KeyError, TypeError, ValueError):  # the text may be a secret
        raise RootnoiseError(f"resume must be a file of save, got a damaged one {path}") from None


def write(path: Path, private: PrivateOptimizer) -> None:
    """Write the file atomically, readable by its owner alone.

    Raises:
        RootnoiseError: a step failed midway, or the file cannot be written.
    """
    content = {
        "version": VERSION,
        "fingerprint": private.mechanism.fingerprint,
        "key": private.stream.key.secret.hex(),
        "weights": private.module.state_dict(),
        "optimizer": private.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        write_whole(path, buffer.getvalue(), mode=0o600)
    except OSError as reason:
        raise RootnoiseError(f"path must be writable, got {path}: {reason.strerror}") from None
