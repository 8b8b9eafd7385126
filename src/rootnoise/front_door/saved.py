"""The file of `LoopOptimizer.save`: everything that a run needs to continue.

It ends with a digest of the bytes before, so that a damaged file is refused before it is read. The
digest protects against accidents alone: whoever can write the file also has the key in it.
"""

from __future__ import annotations

import hashlib
import io
import pickle  # for the name of its error
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.training import PrivateOptimizer, whole

VERSION = 2
DIGEST_SIZE = 32


class Saved(NamedTuple):
    """The contents of the file."""

    key: Key
    weights: dict[str, Any]
    optimizer: dict[str, Any]


def read(path: Path, made: Mechanism, dataset: Any) -> Saved:
    """Return what `LoopOptimizer.save` wrote, for a run with the same mechanism and data."""
    try:
        content = path.read_bytes()
    except OSError as reason:
        raise RootnoiseError(f"resume must be readable, got {path}: {reason.strerror}") from None
    content, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
    if digest != _digest(content):
        raise RootnoiseError(f"resume must be a file of save, got {path}: not as it was written")
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as reason:
        line = str(reason).partition("\n")[0]
        raise RootnoiseError(f"resume must be a file of save, got {path}: {line}") from None
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        raise RootnoiseError(f"resume must be a file of save, version {VERSION}, got {path}")
    if saved.get("fingerprint") != made.fingerprint:
        raise RootnoiseError(
            "resume must be of the mechanism that these arguments make, got "
            + made.unlike(saved.get("settings"))
        )
    try:
        key, data = Key(bytes.fromhex(saved["key"])), saved["data"]
        found = Saved(key, saved["weights"], saved["optimizer"])
    except (KeyError, TypeError, ValueError):  # the text may be a secret
        raise RootnoiseError(f"resume must be a file of save, got a damaged one {path}") from None
    ours = identity(dataset, key)
    if data != ours:
        what = "other contents" if data[:1] == ours[:1] else f"{ours[0]} records, not {data[0]}"
        raise RootnoiseError(f"data must be those of the run that is resumed, got {what}")
    return found


def identity(dataset: Any, key: Key) -> list[Any]:
    """Return the number of records, and a keyed digest of their contents, or None.

    Contents are known of `TensorDataset`, and of `Subset` and `ConcatDataset` of it. Any other data
    set may give a record anew each time (augmentation).
    """
    digest = hashlib.blake2b(key=key.derive("data").secret, digest_size=DIGEST_SIZE)
    return [len(dataset), digest.hexdigest() if _read_all(dataset, digest) else None]


def _read_all(dataset: Any, digest: Any) -> bool:
    """Feed the contents of a data set to a digest, and return whether they are known."""
    match dataset:
        case TensorDataset():
            for tensor in dataset.tensors:
                values = tensor.detach().cpu().contiguous()
                digest.update(f"{values.dtype} {tuple(values.shape)} ".encode())
                digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
            return True
        case Subset():
            digest.update(f"subset {[int(i) for i in dataset.indices]} ".encode())
            return _read_all(dataset.dataset, digest)
        case ConcatDataset():
            return all(_read_all(part, digest) for part in dataset.datasets)
    return False


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE, person=b"rootnoise save").digest()


def sealed(content: Any) -> bytes:
    """Return the bytes of a file that holds `content`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue() + _digest(buffer.getvalue())


def write(path: Path, private: PrivateOptimizer, data: list[Any]) -> None:
    """Write the file atomically, readable by its owner alone; of several ranks, by rank 0.

    Raises:
        RootnoiseError: a step failed midway, or the file cannot be written.
    """
    content = {
        "version": VERSION,
        "fingerprint": private.mechanism.fingerprint,
        "settings": private.mechanism.settings(),
        "key": private.stream.key.secret.hex(),
        "data": data,
        "weights": whole.whole(private.module.state_dict()),
        "optimizer": whole.state_dict(private),
    }

    def put() -> None:
        try:
            write_whole(path, sealed(content), mode=0o600)
        except OSError as reason:
            raise RootnoiseError(f"path must be writable, got {path}: {reason.strerror}") from None

    private._ranks.by_first(put)
