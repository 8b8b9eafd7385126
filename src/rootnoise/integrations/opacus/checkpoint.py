"""A run as one file in the shape of Opacus's checkpoints: weights, noise, ledger and key."""

from __future__ import annotations

import io
import os
import pickle  # for the name of its error
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.front_door import LoopOptimizer
from rootnoise.keys import Key

VERSION = 1  # version of the checkpoint format


def save(
    path: str | os.PathLike[str] | IO[bytes],
    module: nn.Module,
    optimizer: LoopOptimizer,
    checkpoint_dict: dict[str, Any] | None,
    options: dict[str, Any],
) -> None:
    """Write the run, as `PrivacyEngine.save_checkpoint` describes."""
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
            "settings": private.mechanism.settings(),
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


def load(
    path: str | os.PathLike[str] | IO[bytes],
    module: nn.Module,
    optimizer: LoopOptimizer,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Continue the run, as `PrivacyEngine.load_checkpoint` describes."""
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
    made = optimizer.private.mechanism
    if own["version"] != VERSION:
        raise RootnoiseError(f"path must be of version {VERSION}, got {own['version']}")
    if own["fingerprint"] != made.fingerprint:
        rule = "path must be of the mechanism that was made"
        raise RootnoiseError(f"{rule}, got {made.unlike(own.get('settings'))}")
    optimizer.follow(Key(bytes.fromhex(own["key"])))
    optimizer.load_state_dict(state)
    module.load_state_dict(weights, **also)
    return dict(content)


def _refuse_schedulers(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise RootnoiseError(
            "noise and clip norm must stay as calibrated, and checkpoints hold no more, got "
            f"{', '.join(given)}"
        )
