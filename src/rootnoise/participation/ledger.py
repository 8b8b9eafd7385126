"""The ledger: who took part when, held to the Participation.

It checks every batch, whoever made it, before its gradient is computed; `keep` also writes it to a
file first, for the auditor.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rootnoise._check import RootnoiseError, integer, same
from rootnoise.participation import (
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
    Participation,
    SingleParticipation,
    to_dict,
)
from rootnoise.participation.ledger_file import Indices, Journal, first_line, pack

if TYPE_CHECKING:
    import torch


class Ledger:
    """Counts every example's appearances and refuses a batch that breaks the participation.

    `admit` comes before the gradient of the batch is computed. Memory is two int32 arrays of
    `n_examples`: 8 MB for a million.

    Under single, min-sep and fixed-cycle participation that is the whole rule. Under an amplified
    one it is only a necessary condition: no list of batches shows that they were drawn at random,
    and ten records in every Poisson step pass. There `PrivateOptimizer` also compares each batch
    with the sampler's; whoever uses a ledger alone must pass `drawn`, or answer for the draws.

    Attributes:
        t: steps admitted.
        digest: BLAKE2b chain over all admitted batches, keyed with a secret salt: it commits to who
            took part when, and tells those who do not know the salt nothing about it.

    >>> ledger = Ledger(MinSeparation(min_sep=2, max_participations=5), n_examples=4)
    >>> ledger.admit(0, [0, 1])
    >>> ledger.admit(1, [1, 2])
    Traceback (most recent call last):
    rootnoise._check.RootnoiseError: example 1 at step 1 breaks the participation (at most 5 steps \
each, at least 2 apart): steps so far 1, the last one 0
    """

    def __init__(self, participation: Participation, n_examples: int) -> None:
        self.participation = participation
        self.n_examples = integer("n_examples", n_examples, 1, 2**32, high_name="2**32")
        self.t = 0
        self._least, self._modulus, self._most = _rule(participation)
        self._last = np.zeros(self.n_examples, dtype=np.int32)
        self._count = np.zeros(self.n_examples, dtype=np.int32)
        self._journal: Journal | None = None
        self._ahead: Iterator[bytes] = iter(())  # steps that the journal holds beyond t
        self._salt = secrets.token_hex(16)
        self.digest = self._first_digest()

    def keep(self, path: str | os.PathLike[str]) -> None:
        """Write each batch to `path` (format: `ledger_file`) as it is admitted, from step 0 on.

        Under secret sampling the file is as secret as the seed. A resumed ledger goes on with its
        file. Steps that the file holds beyond those of the saved state were made before a crash,
        and their noise may have been released: they must be repeated with the same batches.

        Raises:
            RootnoiseError: the file is missing though steps were made, is another ledger's or was
                changed, or cannot be written.
        """
        file = Path(path)
        if not file.exists() and self.t == 0:
            self._journal = Journal.create(file, self._header())
            return
        journal = Journal.reopen(file, self._header())
        records, digest, found = journal.records(), self._first_digest(), 0
        for found, record in zip(range(1, self.t + 1), records, strict=False):  # noqa: B007
            digest = chain(digest, record, self._salt)
        if found != self.t or digest != self.digest:
            raise RootnoiseError(
                f"ledger file must hold the {self.t} steps of the saved state, got others in {file}"
            )
        journal.cut()
        self._journal, self._ahead = journal, records

    def write_again(self, path: str | os.PathLike[str], batches: Iterable[Indices]) -> None:
        """Write the file that `keep` would have written, from the same batches again.

        Args:
            path: a new file.
            batches: one for each step so far, as the sampler draws them.

        Raises:
            RootnoiseError: other batches than were admitted, or a file that cannot be written.
        """
        journal, digest = Journal.create(Path(path), self._header()), self._first_digest()
        for batch in batches:
            record = pack(batch)
            journal.append(record)
            digest = chain(digest, record, self._salt)
        journal.sync()
        if digest != self.digest:
            raise RootnoiseError(
                f"batches must be those of the {self.t} steps that were admitted, got others"
            )

    def admit(self, t: int, indices: ArrayLike, drawn: Indices | None = None) -> None:
        """Record that the examples `indices` take part in step t; nothing is recorded on refusal.

        Args:
            t: the step; it must be the one after the last admitted step, 0 at first.
            indices: distinct integers in [0, n_examples), in any order; none is a legal batch.
            drawn: the sampler's batch of step t, which `indices` must be; None if it is unknown.

        Raises:
            RootnoiseError: another step, bad indices, an example that may not appear in step t, or
                another batch than the sampler's, or than that of a run before a crash in step t.
        """
        if integer("t", t) != self.t:
            raise RootnoiseError(f"step must be the next one, {self.t} (once, in order), got {t}")
        batch = self.checked(indices)
        last, count = self._last[batch], self._count[batch]
        gap = self.t - last
        broken = (gap < self._least) | (gap % self._modulus != 0) | (count >= self._most)
        broken &= count > 0  # who has not taken part yet may join at any step
        if broken.any():
            i = int(np.argmax(broken))
            raise RootnoiseError(
                f"example {batch[i]} at step {t} breaks the participation ({self.participation}): "
                f"steps so far {count[i]}, the last one {last[i]}"
            )
        if drawn is not None and not np.array_equal(batch, drawn):
            raise RootnoiseError(
                f"batch of step {t} must be the sampler's, sampler.batch({t}), joined over ranks; "
                f"got {batch.size} examples, {np.isin(batch, drawn).sum()} of its {len(drawn)} "
                "(declare batches of your own by OwnBatches)"
            )
        self._write(pack(batch))
        self._last[batch] = self.t
        self._count[batch] += 1
        self.t += 1

    def _write(self, record: bytes) -> None:
        """Append the record to the journal, or compare it with the one there; extend the digest."""
        before = next(self._ahead, None)
        if before is None and self._journal is not None:
            self._journal.append(record)
        elif before not in (None, record):
            raise RootnoiseError(
                f"step {self.t} must repeat its batch of before the run was stopped: its noise "
                "must not protect two gradients"
            )
        self.digest = chain(self.digest, record, self._salt)

    def checked(self, indices: ArrayLike) -> Indices:
        """Return the indices sorted, or refuse what can never be a batch.

        Raises:
            RootnoiseError: they are not distinct integers in [0, n_examples).
        """
        raw = np.asarray(indices)
        if raw.ndim != 1 or (raw.size and not np.issubdtype(raw.dtype, np.integer)):
            raise RootnoiseError(
                f"indices must be 1-D integers, got {raw.dtype} of shape {raw.shape}"
            )
        batch = np.sort(raw)
        if batch.size and (batch[0] < 0 or batch[-1] >= self.n_examples):
            bad = batch[0] if batch[0] < 0 else batch[-1]
            raise RootnoiseError(f"indices must be in [0, n_examples={self.n_examples}), got {bad}")
        batch = batch.astype(np.int64)
        twice = batch[1:][batch[1:] == batch[:-1]]
        if twice.size:
            raise RootnoiseError(f"indices must be distinct within a batch, got {twice[0]} twice")
        return batch

    def _identity(self) -> dict[str, Any]:
        return {
            "version": 1,
            "participation": to_dict(self.participation),
            "n_examples": self.n_examples,
        }

    def _header(self) -> dict[str, Any]:
        return self._identity() | {"salt": self._salt}

    def _first_digest(self) -> str:
        return chain("", first_line(self._header()), self._salt)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives that `torch.load(weights_only=True)` reads.

        It holds the salt: keep it as secret as the file of `keep`, which is on disk by now.
        """
        import torch  # here: auditing needs ledgers, but no torch

        if self._journal is not None:
            self._journal.sync()
        tensors = {"last_step": self._last, "count": self._count}
        copies = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        return self._header() | {"t": self.t, "digest": self.digest} | copies

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved ledger; only a fresh one can, for what was admitted stays admitted.

        Raises:
            RootnoiseError: this ledger has admitted a step or has a file, or the saved one is of
                another participation or size, or damaged.
        """
        if self.t:
            raise RootnoiseError(f"ledger must be at step 0 to load a state, got step {self.t}")
        self.check_unkept()
        same("ledger", self._identity(), state)
        t = integer("saved ledger's t", state.get("t", -1), 0)
        last = self._restored("last_step", state.get("last_step"), max(t - 1, 0))
        count = self._restored("count", state.get("count"), t)
        salt, digest = _hex("salt", 32, state), _hex("digest", 64, state)
        self.t, self._last, self._count, self._salt, self.digest = t, last, count, salt, digest

    def check_unkept(self) -> None:
        """Refuse if `keep` was called: its file has this ledger's salt, not that of a saved one."""
        if self._journal is not None:
            raise RootnoiseError(
                f"ledger must be kept in a file after a state is loaded, got {self._journal.path} "
                "before: call load_state_dict first, then keep"
            )

    def _restored(self, name: str, tensor: torch.Tensor | None, most: int) -> NDArray[np.int32]:
        array: NDArray[Any] = np.empty(0) if tensor is None else tensor.numpy().copy()
        sound = array.dtype == np.int32 and array.shape == (self.n_examples,)
        if not sound or array.min() < 0 or array.max() > most:
            raise RootnoiseError(
                f"saved ledger's {name} must be {self.n_examples} int32 values in [0, {most}], "
                f"got {array.dtype} of shape {array.shape}, or values out of range"
            )
        return array


def chain(digest: str, record: bytes, salt: str) -> str:
    """Return the digest after one more record; the header is the record that comes after ""."""
    key, text = bytes.fromhex(salt), bytes.fromhex(digest)
    return hashlib.blake2b(text + record, key=key, digest_size=32).hexdigest()


def _hex(name: str, digits: int, state: Mapping[str, Any]) -> str:
    value = state.get(name)
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        rule = f"saved ledger's {name} must be {digits} hex digits"
        raise RootnoiseError(f"{rule}, got {value!r:.80}")
    return value


def _rule(participation: Participation) -> tuple[int, int, float]:
    """Return the least gap and the divisor of all gaps of one example, and its most appearances."""
    match participation:
        case SingleParticipation():
            return 1, 1, 1
        case MinSeparation(min_sep, most):
            return min_sep, 1, most
        case FixedCycle(period, epochs):
            return period, period, epochs
        case CyclicPoisson(groups, _):
            return groups, groups, np.inf
        case MinSepPoisson(min_sep, _):
            return min_sep, 1, np.inf
    raise RootnoiseError(f"participation must be a known kind, got {participation!r}")
