"""The folder of one run: which files it holds, all written atomically, and which are secret.

    config.json      the run's settings; --resume refuses any other
    run.toml         the same for people: `rootnoise train --config run.toml` makes the run again
    mechanism.json   the calibrated mechanism (none for a run without privacy)
    claim.txt        the privacy claim
    privacy.json, privacy.md   the run's statement about its privacy (`runs.statement`)
    metrics.jsonl    one line per evaluation, on the test set
    checkpoint.pt    SECRET, until the run ends: weights, optimizer, recent noise, sampler seed
    noise.key        SECRET, until the run ends: determines all noise, and keys the digest of the
                     checkpoint (which is its only use in a run without privacy)
    ledger.bin       for the auditor: who took part when (`participation.ledger_file`); stays
    .lock            held while a process runs in the folder, until the run ends
    model.pt, model.safetensors   the final weights, for torch alone and for everything else; the
                     second says which model they are of (`runs.inference`)
    curves.png, report.html (of `rootnoise train`), result.json   when the run has ended

Whoever holds a secret can subtract noise, so both have mode 0600 and are deleted when the run ends.
The ledger has mode 0600 too: under Poisson sampling there is no amplification against whoever reads
it. A run that was stopped keeps its secrets, because it cannot continue bit for bit without the
key: resume it, or delete them by hand.

Integrity: the checkpoint holds the hash of every file that was written at the start and ends with a
digest keyed by the run's own key. It thus binds settings, mechanism, claim, statement, evaluations,
ledger and key to each other. `reopen` refuses a file that is not as this run wrote it, and names
it. Whoever has the key can forge all of this; the audit's recomputation, and a seal that is kept
elsewhere, protect against them.

Commit before release: what is computed from steps past the checkpoint is not written, shown or
returned before the next checkpoint is on disk. A step that a crash undoes has released nothing, and
repeating it, with whatever gradient, uses its noise for the first time.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from rootnoise._check import RootnoiseError
from rootnoise._files import lock, partial, write_whole
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.ledger import Ledger
from rootnoise.runs import settings_file, statement
from rootnoise.runs.settings import as_of_today, resuming
from rootnoise.runs.statement import Statement

SECRETS = ("checkpoint.pt", "noise.key")
# Written at the start and never changed, except that the end of the run adds to privacy.json.
BOUND = ("config.json", "run.toml", "mechanism.json", "claim.txt", "privacy.json")
DIGEST_SIZE = 32  # bytes of keyed BLAKE2b at the end of a checkpoint


class RunFolder:
    """Reads and writes the files above; `path` need not exist before `create`.

    `create` and `reopen` keep every other process out until the folder is left:
    `with RunFolder(path) as folder`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._bound: dict[str, str] = {}  # the hash of each file of BOUND

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
        key: Key,
        state: Mapping[str, Any],
    ) -> None:
        """Make the folder of a new run, with its first checkpoint.

        Raises:
            RootnoiseError: it is in use or cannot be written.
        """
        settings, readable = as_json(config), settings_file.text(config)
        with self._writing():
            self.take()
            self._describe(readable, stated, mechanism)
            key.save(self.path / "noise.key")
            self._bound = self._hashes() | {"config.json": _hash(settings)}
            self.save_checkpoint(state)
            write_whole(self.path / "metrics.jsonl", b"")
            # Last: if it exists, everything that a resumed run needs is on disk.
            write_whole(self.path / "config.json", settings)

    def take(self) -> None:
        """Make the folder, unless there is an empty one, and keep other processes out.

        Raises:
            RootnoiseError: it is in use, not free for a new run, or cannot be written.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
        self.refuse_used()

    def describe(
        self,
        config: Mapping[str, Any],
        stated: Statement,
        mechanism: Mechanism,
        history: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write what `create` does for a run that has taken its last step: no checkpoint, no key.

        Raises:
            RootnoiseError: it cannot be written.
        """
        with self._writing():
            self._describe(settings_file.text(config), stated, mechanism)
            lines = [as_json(entry, indent=None) + b"\n" for entry in history]
            write_whole(self.path / "metrics.jsonl", b"".join(lines))
            write_whole(self.path / "config.json", as_json(config))

    def _describe(self, readable: bytes, stated: Statement, mechanism: Mechanism | None) -> None:
        write_whole(self.path / "run.toml", readable)
        write_whole(self.path / "claim.txt", stated["claim"].encode() + b"\n")
        self._write_privacy(stated)
        if mechanism is not None:
            mechanism.save(self.path / "mechanism.json")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as reason:
            raise RootnoiseError(
                f"out must be writable, got {self.path}: {reason.strerror}"
            ) from None

    def config(self) -> dict[str, Any]:
        """Read the settings of the unfinished run that is here.

        Raises:
            RootnoiseError: no run, or a finished one.
        """
        if (self.path / "result.json").exists():
            self.delete_secrets()  # in case the run was killed just before deleting them
            raise RootnoiseError(f"out must hold an unfinished run, got a finished one {self.path}")
        try:
            saved = json.loads((self.path / "config.json").read_bytes())
            if not isinstance(saved, dict):
                raise ValueError
        except (OSError, ValueError):
            raise RootnoiseError(f"out must hold a run's config.json, got {self.path}") from None
        return as_of_today(saved)

    def reopen(self, config: Mapping[str, Any]) -> None:
        """Check that an unfinished run with these settings is here, and its files are unchanged.

        Args:
            config: all or some settings, which must equal those of the run.

        Raises:
            RootnoiseError: no run, a finished one, one in use, one with a changed file, or one with
                other settings.
        """
        saved = self.config()
        self._acquire()
        for problem in self.changed():
            raise RootnoiseError(problem)
        others = [
            f"{name} must be {saved.get(name)!r}, as when the run began, got {value!r}"
            for name, value in config.items()
            if saved.get(name) != value
        ]
        if others:
            raise RootnoiseError("; ".join(others))

    def changed(self) -> Iterator[str]:
        """Yield a line for each file of an unfinished run that is not as the run wrote it.

        The ledger is compared step by step when it is reopened (`Ledger.keep`).
        """
        try:
            self._metrics(self.checkpoint().get("history", []))
        except RootnoiseError as reason:
            yield str(reason)
        if not self._bound:  # no checkpoint to compare with
            return
        found = self._hashes()
        for name in sorted({*found, *self._bound}):
            if name not in found:
                yield f"{name} must be readable, got none in {self.path}"
            elif found[name] != self._bound.get(name):
                yield f"{name} must be as when the run began, got an edited one in {self.path}"
        try:
            stated = self.statement()
        except RootnoiseError as reason:
            yield str(reason)
            return
        pages = [statement.as_markdown(each) for each in (stated, statement.begun(stated))]
        if _content(self.path / "privacy.md") not in pages:
            yield f"privacy.md must say what privacy.json says, got another one in {self.path}"

    def _hashes(self) -> dict[str, str]:
        """Return the hash of each file of BOUND that is here."""
        contents = {name: _content(self.path / name) for name in BOUND}
        found = {name: _hash(content) for name, content in contents.items() if content is not None}
        try:
            stated = self.statement()
            if contents["privacy.json"] == statement.as_json(stated):
                found["privacy.json"] = _hash(statement.as_json(statement.begun(stated)))
        except RootnoiseError:
            pass  # then the file is compared as it stands
        return found

    def _acquire(self) -> None:
        """Take the lock, which dies with the process: two live runs would share one key."""
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        if not lock(self._lock):
            raise RootnoiseError(f"out must not be in use by another run, got {self.path}")

    def mechanism(self) -> Mechanism:
        """Read the run's mechanism, recompute it and compare.

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
            key = Key.load(self.path / "noise.key")
        except OSError as reason:
            raise RootnoiseError(
                f"noise.key must be readable to resume, got {self.path}: {reason.strerror}"
            ) from None
        except RootnoiseError:
            raise RootnoiseError(f"noise.key must hold 64 hex digits, got {self.path}") from None
        return key

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint (mode 0600) atomically: a crash leaves the old or the new one."""
        content = _serialised({"files": self._bound, "run": dict(state)})
        digest = _digest(content, self.key())
        write_whole(self.path / "checkpoint.pt", content + digest, 0o600)

    def checkpoint(self) -> dict[str, Any]:
        """Read the checkpoint: tensors and primitives only.

        Raises:
            RootnoiseError: it is missing, damaged, or does not belong to this run and its key.
        """
        try:
            content = (self.path / "checkpoint.pt").read_bytes()
        except OSError as reason:
            raise RootnoiseError(
                f"checkpoint.pt must be readable, got {self.path}: {reason.strerror}"
            ) from None
        content, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
        key = self.key()
        if not hmac.compare_digest(digest, _digest(content, key)):
            raise RootnoiseError(self._unbound(key, len(content)))
        saved = torch.load(io.BytesIO(content), weights_only=True)
        self._bound = saved["files"]
        state: dict[str, Any] = saved["run"]
        return state

    def _unbound(self, key: Key, size: int) -> str:
        """Say whether checkpoint or key is not the run's: privacy.json has the key's identifier."""
        try:
            named = self.statement().get("key_id", key.id)
        except RootnoiseError:
            named = key.id
        if named != key.id:
            return f"noise.key must be the one of this run, {named}, got {key.id}"
        return (
            "checkpoint.pt must be as a run wrote it, under the noise.key of its folder, "
            f"got {size} other bytes"
        )

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write all evaluations of the checkpoint, one JSON object per line.

        Raises:
            RootnoiseError: the file is missing, or already holds other evaluations: an older
                checkpoint was put in place, and continuing from it would reuse the noise of
                released steps.
        """
        write_whole(self.path / "metrics.jsonl", self._metrics(history))

    def _metrics(self, history: Sequence[Mapping[str, Any]]) -> bytes:
        """Return the expected metrics.jsonl; a crash may leave the file one evaluation behind."""
        lines = [as_json(entry, indent=None) + b"\n" for entry in history]
        whole, found = b"".join(lines), _content(self.path / "metrics.jsonl")
        if found is None:
            raise RootnoiseError(f"metrics.jsonl must be readable, got none in {self.path}")
        if found not in (whole, b"".join(lines[:-1])):
            raise RootnoiseError(
                "checkpoint.pt must be of the run that wrote metrics.jsonl and no older, "
                f"got one with {len(history)} evaluations"
            )
        return whole

    def finish(
        self,
        weights: Mapping[str, Any],
        about: Mapping[str, str],
        result: Mapping[str, Any],
        stated: Statement,
        ledger: Ledger | None,
    ) -> None:
        """Write the final weights, privacy statement and result, then delete the secrets.

        Args:
            weights: tensors by the names of the plain model, whatever wrapped it in training.
            about: says of which model they are, in model.safetensors.
            result: the content of result.json.
            stated: the privacy statement of the run's beginning.
            ledger: who took part.
        """
        write_whole(self.path / "model.pt", _serialised(weights))
        whole = {name: tensor.contiguous() for name, tensor in weights.items()}
        write_whole(self.path / "model.safetensors", save(whole, dict(about)))
        last = as_json(result)
        files = {name: (self.path / name).read_bytes() for name in self.evidence()}
        self._write_privacy(statement.completed(stated, ledger, files | {"result.json": last}))
        write_whole(self.path / "result.json", last)
        self.delete_secrets()

    def evidence(self) -> list[str]:
        """Return the names of the files whose hashes `privacy.json` holds, in order."""
        names = (file.name for file in self.path.iterdir() if not file.name.startswith("."))
        return sorted(set(names) - {*SECRETS, "privacy.json", "privacy.md"})

    @property
    def resume(self) -> str:
        """The command that continues the run."""
        return resuming(self.path)

    def statement(self) -> Statement:
        """Read the run's privacy statement.

        Raises:
            RootnoiseError: it is missing, or it was edited.
        """
        return statement.read(self.path / "privacy.json")

    def _write_privacy(self, stated: Statement) -> None:
        write_whole(self.path / "privacy.json", statement.as_json(stated))
        write_whole(self.path / "privacy.md", statement.as_markdown(stated))

    def delete_secrets(self) -> None:
        """Delete the key, the checkpoint, which holds noise, and the lock, no longer needed."""
        for name in (partial(self.path / "checkpoint.pt").name, *SECRETS, ".lock"):
            (self.path / name).unlink(missing_ok=True)


def _serialised(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def as_json(value: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """Return a JSON object; raises ValueError if it would hold NaN or infinity."""
    return json.dumps(value, indent=indent, allow_nan=False).encode()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(content: bytes, key: Key) -> bytes:
    secret = key.derive("folder of the run").secret
    return hashlib.blake2b(content, key=secret, digest_size=DIGEST_SIZE).digest()
