"""The folder of one run: what it holds, written atomically, and what of it is secret.

    config.json      the run's settings; --resume refuses any other
    mechanism.json   the calibrated mechanism (none for a run without privacy)
    claim.txt        the privacy claim
    privacy.json, privacy.md   all that the run says about its privacy (`privacy`)
    metrics.jsonl    one line an evaluation, on the test set
    checkpoint.pt    SECRET, until the run ends: weights, optimizer, recent noise, sampler seed
    noise.key        SECRET, until the run ends: all noise is a function of it
    ledger.bin       for the auditor: who took part in which step (`journal`); stays
    .lock            held while a process runs in the folder, until the run ends
    model.pt, curves.png, result.json   when the run has ended

Whoever holds a secret can subtract noise, so both have mode 0600 and are deleted when the run ends.
The ledger has mode 0600 too: under Poisson sampling amplification fails against whoever reads it.
A run that was stopped keeps them, for without the key it could not continue bit by bit: resume it,
or delete them by hand.

Commit before release: what is computed from steps past the checkpoint is not written, shown or
returned before the next checkpoint is on disk. A step that a crash undoes has released nothing, and
making it again, with whatever gradient, uses its noise for the first time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rootnoise._check import RootnoiseError
from rootnoise._files import partial, write_whole
from rootnoise.lab import privacy
from rootnoise.lab.privacy import Statement
from rootnoise.ledger import Ledger
from rootnoise.mechanism import Mechanism
from rootnoise.randomness import Key

SECRETS = ("checkpoint.pt", "noise.key")
DIGEST_SIZE = 32  # bytes of BLAKE2b at the end of a checkpoint


class RunFolder:
    """Reads and writes the files above; `path` need not exist before `create`.

    `create` and `reopen` keep every other process out until the folder is left:
    `with RunFolder(path) as folder`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def refuse_used(self) -> None:
        """Refuse a path that is not free for a new run.

        Raises:
            RootnoiseError: `path` is a file, or a folder that is not empty.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RootnoiseError(f"out must be a folder, got the file {self.path}")
        if self.path.is_dir() and any(file.name != ".lock" for file in self.path.iterdir()):
            raise RootnoiseError(
                f"out must be new or empty (--resume continues a run), got {self.path}"
            )

    def create(
        self,
        config: Mapping[str, Any],
        stated: Statement,
        mechanism: Mechanism | None,
        key: Key | None,
        state: Mapping[str, Any],
    ) -> None:
        """Make the folder of a new run, with its first checkpoint.

        Raises:
            RootnoiseError: it is in use or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self.refuse_used()
            write_whole(self.path / "claim.txt", stated["claim"].encode() + b"\n")
            self._write_privacy(stated)
        except OSError as reason:
            raise RootnoiseError(
                f"out must be writable, got {self.path}: {reason.strerror}"
            ) from None
        if mechanism is not None:
            mechanism.save(self.path / "mechanism.json")
        if key is not None:
            key.save(self.path / "noise.key")
        self.save_checkpoint(state)
        # Last: where it is, all that a resumed run needs is on disk.
        write_whole(self.path / "config.json", json.dumps(config, indent=1).encode())

    def reopen(self, config: Mapping[str, Any]) -> None:
        """Check that an unfinished run of the same settings is here.

        Raises:
            RootnoiseError: no run, a finished one, one with other settings, or one in use.
        """
        if (self.path / "result.json").exists():
            self.delete_secrets()  # had it been stopped just before
            raise RootnoiseError(f"out must hold an unfinished run, got a finished one {self.path}")
        try:
            saved = json.loads((self.path / "config.json").read_text())
            if not isinstance(saved, dict):
                raise ValueError
        except (OSError, ValueError):
            raise RootnoiseError(f"out must hold a run's config.json, got {self.path}") from None
        for name, value in config.items():
            if saved.get(name) != value:
                raise RootnoiseError(
                    f"{name} must be {saved.get(name)!r}, as when the run began, got {value!r}"
                )
        self._acquire()

    def _acquire(self) -> None:
        """Take the lock, which dies with the process: two live runs would share one key."""
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(self._lock, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RootnoiseError(
                f"out must not be in use by another run, got {self.path}"
            ) from None

    def mechanism(self) -> Mechanism:
        """Read the run's mechanism, recomputed and compared.

        Raises:
            RootnoiseError: it is missing, or it was edited.
        """
        return Mechanism.load(self.path / "mechanism.json")

    def key(self) -> Key:
        """Read the run's noise key.

        Raises:
            RootnoiseError: it is missing or damaged: the run cannot go on.
        """
        try:
            return Key.load(self.path / "noise.key")
        except OSError as reason:
            raise RootnoiseError(
                f"noise.key must be readable to resume, got {self.path}: {reason.strerror}"
            ) from None

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint (mode 0600) in one move: a crash leaves the old or the new."""
        content = _serialised(state)
        write_whole(self.path / "checkpoint.pt", content + _digest(content), 0o600)

    def checkpoint(self) -> dict[str, Any]:
        """Read the checkpoint, tensors and primitives only.

        Raises:
            RootnoiseError: it is missing or damaged.
        """
        try:
            content = (self.path / "checkpoint.pt").read_bytes()
        except OSError as reason:
            raise RootnoiseError(
                f"checkpoint.pt must be readable, got {self.path}: {reason.strerror}"
            ) from None
        content, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
        if digest != _digest(content):  # torch.load itself would not see a changed weight
            raise RootnoiseError(
                f"checkpoint.pt must be as a run wrote it, got {len(content)} other bytes"
            )
        state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        return state

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write all evaluations of the checkpoint, one JSON object a line.

        Raises:
            RootnoiseError: another evaluation is there already: an older checkpoint was put in
                place, and its run would use the noise of released steps once more.
        """
        path = self.path / "metrics.jsonl"
        lines = "".join(json.dumps(entry) + "\n" for entry in history).encode()
        if path.exists() and not lines.startswith(path.read_bytes()):
            raise RootnoiseError(
                "checkpoint.pt must be of the run that wrote metrics.jsonl and no older, "
                f"got one with {len(history)} evaluations"
            )
        write_whole(path, lines)

    def finish(
        self,
        weights: Mapping[str, Any],
        result: Mapping[str, Any],
        stated: Statement,
        ledger: Ledger | None,
    ) -> None:
        """Write the final weights, what the run says about its privacy and the result.

        The secrets are deleted after that.
        """
        write_whole(self.path / "model.pt", _serialised(weights))
        last = json.dumps(result, indent=1).encode()
        files = {name: (self.path / name).read_bytes() for name in self.evidence()}
        self._write_privacy(privacy.completed(stated, ledger, files | {"result.json": last}))
        write_whole(self.path / "result.json", last)
        self.delete_secrets()

    def evidence(self) -> list[str]:
        """Return the names of the files that `privacy.json` vouches for, in order."""
        names = (file.name for file in self.path.iterdir() if not file.name.startswith("."))
        return sorted(set(names) - {*SECRETS, "privacy.json", "privacy.md"})

    def statement(self) -> Statement:
        """Read what the run says about its privacy.

        Raises:
            RootnoiseError: it is missing, or it was edited.
        """
        return privacy.read(self.path / "privacy.json")

    def _write_privacy(self, stated: Statement) -> None:
        write_whole(self.path / "privacy.json", privacy.as_json(stated))
        write_whole(self.path / "privacy.md", privacy.as_markdown(stated))

    def delete_secrets(self) -> None:
        """Remove the key and the checkpoint, which holds noise; and the lock, which has no use."""
        for name in (partial(self.path / "checkpoint.pt").name, *SECRETS, ".lock"):
            (self.path / name).unlink(missing_ok=True)


def _serialised(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()
