"""The folder of one federated run: atomic files, one process at a time, commit before release.

    mechanism.json   the calibrated mechanism; claim.txt, what it guarantees to a user
    noise.key        SECRET, until `finish`: determines all noise
    state.pt         SECRET, until `finish`: the last round that counts, with recent noise
    clients.jsonl, cohorts.bin   who took part when (`clients`): never published
    model.pt         the released weights, the only file that may be published
    .lock            held while a process runs in the folder

A round is released when it is in model.pt or returned to the caller; both happen only after
state.pt with the round is on disk. So a round that a crash undoes has released nothing, and may be
repeated with whoever replies then.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rootnoise._check import RootnoiseError, integer
from rootnoise._files import lock, partial, write_whole
from rootnoise.federated import clients
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism

DIGEST_SIZE = 32  # bytes of BLAKE2b at the end of state.pt
STATE, MODEL, KEY = "state.pt", "model.pt", "noise.key"
# In order of creation: if state.pt exists, so do the others.
FILES = (".lock", "mechanism.json", "claim.txt", KEY, *clients.FILES, MODEL, STATE)


class Store:
    """Opens the folder, creates it if necessary, and keeps other processes out.

    Raises:
        RootnoiseError: it is in use, holds other files, or belongs to a run that has ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = {*FILES, *(partial(path / name).name for name in FILES)}
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            found = {file.name for file in path.iterdir()}
        except OSError as reason:
            raise RootnoiseError(
                f"folder must be writable, got {path}: {reason.strerror}"
            ) from None
        try:
            if not lock(self._lock):
                rule = "folder must not be in use by another process"
                raise RootnoiseError(f"{rule}, got {path}")
            if found - known:
                raise RootnoiseError(
                    f"folder must be new or of a federated run, got {min(found - known)} in {path}"
                )
            self.begun = STATE in found
            if not self.begun and self.released():
                raise RootnoiseError(f"folder must be of a run that has not ended, got {path}")
        except RootnoiseError:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes in."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def create(self, mechanism: Mechanism, claim: str, key: Key) -> None:
        """Write the files that never change, over those of a run that was killed at this point."""
        for name in FILES[1:]:
            (self.path / name).unlink(missing_ok=True)
        mechanism.save(self.path / "mechanism.json")
        write_whole(self.path / "claim.txt", claim.encode() + b"\n")
        key.save(self.path / KEY)

    def refuse_other_claim(self, claim: str) -> None:
        """Refuse a claim.txt that is not the mechanism's claim.

        Raises:
            RootnoiseError: it is missing or was edited.
        """
        try:
            found = (self.path / "claim.txt").read_bytes()
        except OSError:
            found = b""
        if found != claim.encode() + b"\n":
            raise RootnoiseError(f"claim.txt must be as a run wrote it, got another in {self.path}")

    def mechanism(self) -> Mechanism:
        """Read the mechanism, recompute it and compare."""
        return Mechanism.load(self.path / "mechanism.json")

    def key(self) -> Key:
        """Read the key.

        Raises:
            RootnoiseError: it is missing or damaged, so that the run cannot continue.
        """
        try:
            return Key.load(self.path / KEY)
        except OSError as reason:
            rule = f"{KEY} must be readable to go on"
            raise RootnoiseError(f"{rule}, got {self.path}: {reason.strerror}") from None

    def commit(self, state: Mapping[str, Any]) -> None:
        """Replace state.pt: from then on its rounds count, and may be released."""
        data = _serialised(state)
        self._write(STATE, data + _digest(data), 0o600)

    def state(self) -> dict[str, Any]:
        """Read state.pt.

        Raises:
            RootnoiseError: it is damaged, or older than what was released.
        """
        data = (self.path / STATE).read_bytes()
        data, digest = data[:-DIGEST_SIZE], data[-DIGEST_SIZE:]
        if digest != _digest(data):  # torch.load alone would not notice a changed weight
            raise RootnoiseError(f"{STATE} must be as a run wrote it, got other bytes")
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        if state["t"] < self.released():
            raise RootnoiseError(
                f"{STATE} must be the newest, got one at round {state['t']} though "
                f"{self.released()} were released: their noise would be used again"
            )
        return state

    def release(self, t: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace model.pt with the weights after t rounds."""
        self._write(MODEL, _released(t, weights), 0o644)

    def holds(self, t: int, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether model.pt is what `release` would write for these weights."""
        path = self.path / MODEL
        return path.exists() and path.read_bytes() == _released(t, weights)

    def released(self) -> int:
        """Return the number of rounds in model.pt, 0 if it does not exist."""
        if not (self.path / MODEL).exists():
            return 0
        try:
            return integer("t", torch.load(self.path / MODEL, weights_only=True)["t"], 0)
        except (RuntimeError, LookupError, EOFError, ValueError, pickle.UnpicklingError):
            raise RootnoiseError(f"{MODEL} must be as a run wrote it, got other bytes") from None

    def finish(self) -> None:
        """Delete the secrets, so that the run cannot be resumed."""
        for name in (partial(self.path / STATE).name, KEY, STATE):
            (self.path / name).unlink(missing_ok=True)
        self.close()

    def _write(self, name: str, data: bytes, mode: int) -> None:
        try:
            write_whole(self.path / name, data, mode)
        except OSError as reason:
            raise RootnoiseError(
                f"{name} must be writable, got {self.path}: {reason.strerror}"
            ) from None


def _released(t: int, weights: Mapping[str, torch.Tensor]) -> bytes:
    return _serialised({"t": t, "weights": dict(weights)})


def _serialised(content: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()
