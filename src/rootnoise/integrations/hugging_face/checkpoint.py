"""The private part of a checkpoint: one file in its folder, next to Trainer's own."""

from __future__ import annotations

import hashlib
import io
import pickle  # for the name of its error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.keys import Key
from rootnoise.training import PrivateOptimizer

STATE = "rootnoise.pt"
VERSION = 1


@dataclass(frozen=True)
class Saved:
    """The private part of a checkpoint."""

    key: Key
    fingerprint: str
    weights: str
    optimizer: dict[str, Any]
    settings: dict[str, Any] | None


def read(folder: Path) -> Saved:
    """Return the private state in a checkpoint's folder."""
    try:
        saved = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as reason:
        line = str(reason).partition("\n")[0]
        raise RootnoiseError(f"checkpoint must have a readable {STATE}, got {line:.80}") from None
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        raise RootnoiseError(f"{STATE} must be of version {VERSION}, got another in {folder}")
    key = Key(bytes.fromhex(saved["key"]))
    parts = {name: saved[name] for name in ("fingerprint", "weights", "optimizer")}
    return Saved(key, settings=saved.get("settings"), **parts)


def digest(model: nn.Module) -> str:
    """Return a hash of the names and values of the trainable parameters."""
    hashed = hashlib.sha256()
    for name, p in model.named_parameters():
        if p.requires_grad:
            hashed.update(name.encode())
            values = p.detach().cpu().contiguous().reshape(-1)
            hashed.update(values.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def write(folder: Path, private: PrivateOptimizer, model: nn.Module) -> None:
    """Write the private state to one file, readable by its owner alone."""
    content = {
        "version": VERSION,
        "fingerprint": private.mechanism.fingerprint,
        "settings": private.mechanism.settings(),
        "key": private.stream.key.secret.hex(),
        "weights": digest(model),
        "optimizer": private.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(folder / STATE, buffer.getvalue(), mode=0o600)
