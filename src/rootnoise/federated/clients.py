"""Who took part when, by stable ids: a ledger that grows, and its two files.

    clients.jsonl   one id per line, in the order of joining: a client's index is its line number
    cohorts.bin     one packed cohort of indices per round (see `participation.ledger_file`)

Both files are only appended to. A round counts once a saved state refers to it; anything beyond
belongs to a round that was killed before it released anything, and is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rootnoise._check import RootnoiseError, integer, same
from rootnoise.participation import MinSeparation, Participation, SingleParticipation, to_dict
from rootnoise.participation.ledger_file import Indices, Journal, first_line, pack, unpack

ClientId = str | int

FILES = IDS, COHORTS = "clients.jsonl", "cohorts.bin"


class Clients:
    """Every client's last round and number of rounds; enforces the participation.

    A client is identified by an id that never changes: a string or an integer, but the same type
    for all, so that 7 and "7" cannot be two clients. Ids may join at any time and then get dense
    indices. Memory per client is 8 bytes for the rounds and about 100 bytes for the id.

    Args:
        participation: a minimal separation, or a single participation. Participations with
            amplification are refused: the server would have to draw cohorts in secret, with exact
            probabilities, from clients who are always available. So are fixed cycles, in which each
            client must take part in an exact round.

    Attributes:
        t: number of rounds admitted.

    Raises:
        RootnoiseError: another participation.

    >>> clients = Clients(MinSeparation(min_sep=2, max_participations=5))
    >>> ann, bob = clients.join(["ann", "bob"])
    >>> clients.admit([ann])
    >>> clients.may_join([ann, bob]).tolist()
    [False, True]
    """

    def __init__(self, participation: Participation) -> None:
        self.participation = participation
        self._least, self._most = _rule(participation)
        self.t = 0
        self._index: dict[ClientId, int] = {}
        self._last = np.zeros(0, dtype=np.int32)
        self._count = np.zeros(0, dtype=np.int32)
        self._salt = secrets.token_hex(16)
        self._start()
        self._folder: Path | None = None
        self._torn = False

    def __len__(self) -> int:
        return len(self._index)

    def join(self, ids: Iterable[ClientId]) -> Indices:
        """Return the dense index of each id, shape (n,); new ids join.

        Raises:
            RootnoiseError: an id that is neither a string nor an integer, or of another type than
                earlier ones. Then no id has joined.
        """
        wanted = [checked_id(i) for i in ids]
        first = next(iter(self._index), next(iter(wanted), None))
        for client in wanted:
            if type(client) is not type(first):
                kind = type(first).__name__
                raise RootnoiseError(f"client ids must all be {kind}, as the first, got {client!r}")
        new = [i for i in dict.fromkeys(wanted) if i not in self._index]
        if new:
            lines = b"".join(map(_line, new))
            self._append(IDS, lines)
            self._ids_hash.update(lines)
            self._index.update(zip(new, range(len(self), len(self) + len(new)), strict=True))
            self._grow()
        return np.fromiter((self._index[i] for i in wanted), np.int64, len(wanted))

    def rounds(self, indices: Indices) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return how often each of these clients took part, and its last round (-1: never)."""
        count = self._count[indices]
        return count, np.where(count > 0, self._last[indices], -1)

    def may_join(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of the clients may take part in round t, shape (n,)."""
        count, rested = self._count[indices], self.t - self._last[indices] >= self._least
        return np.asarray((count == 0) | (rested & (count < self._most)), dtype=np.bool_)

    def admit(self, indices: ArrayLike) -> None:
        """Record that these clients take part in round t; a refusal records nothing.

        Args:
            indices: distinct indices of clients who have joined, in any order.

        Raises:
            RootnoiseError: unknown or repeated indices, a client who may not take part yet, or a
                file that cannot be written.
        """
        raw = np.asarray(indices)
        if raw.ndim != 1 or (raw.size and not np.issubdtype(raw.dtype, np.integer)):
            rule = "clients must be 1-D integers"
            raise RootnoiseError(f"{rule}, got {raw.dtype} of shape {raw.shape}")
        cohort = np.sort(raw.astype(np.int64))
        if cohort.size and not 0 <= cohort[0] <= cohort[-1] < len(self):
            raise RootnoiseError(
                f"clients must be in [0, {len(self)}), got {cohort[0]} to {cohort[-1]}"
            )
        twice = cohort[1:][cohort[1:] == cohort[:-1]]
        if twice.size:
            raise RootnoiseError(f"clients must be distinct within a round, got {twice[0]} twice")
        refused = cohort[~self.may_join(cohort)]
        if refused.size:
            (count,), (last,) = self.rounds(refused[:1])
            raise RootnoiseError(
                f"client {refused[0]} in round {self.t} breaks the participation "
                f"({self.participation}): rounds so far {count}, the last one {last}"
            )
        record = pack(cohort)
        self._append(COHORTS, record)
        self._record(record, cohort)

    def _append(self, name: str, content: bytes) -> None:
        """Append to a file, if there is one; refuse if an earlier write may be incomplete."""
        if self._torn:
            raise RootnoiseError("clients' files must be reopened after a failed write")
        if self._folder is not None:
            self._torn = True
            Journal(self._folder / name).append(content)
            self._torn = False

    def _record(self, record: bytes, cohort: Indices) -> None:
        self._cohorts_hash.update(record)
        self._last[cohort] = self.t
        self._count[cohort] += 1
        self.t += 1

    def keep(self, folder: Path) -> None:
        """Record everything from now on in new files in `folder`.

        Raises:
            RootnoiseError: the ledger is not empty, or the files exist or cannot be written.
        """
        if self.t or len(self):
            raise RootnoiseError(f"clients must be none to start a file, got {len(self)}")
        for name in FILES:
            Journal.create(folder / name, self._header())
        self._folder = folder

    @classmethod
    def reopen(
        cls, folder: Path, participation: Participation, state: Mapping[str, Any]
    ) -> Clients:
        """Return the ledger as of a saved state, replayed from its files.

        Raises:
            RootnoiseError: the files are missing, are for another participation, or hold other
                clients or cohorts than those that the state refers to.
        """
        clients = cls(participation)
        same("clients", clients._identity(), state)
        clients._salt = str(state.get("salt"))
        t = integer("saved clients' t", state.get("t", -1), 0)
        size = integer("saved clients' size", state.get("size", -1), 0)
        ids, cohorts = (Journal.reopen(folder / name, clients._header()) for name in FILES)
        clients._start()
        head = len(ids.first_line())
        with ids.path.open("rb") as file:
            file.seek(head)
            lines = list(islice(file, size))
        with suppress(ValueError):  # damaged files are reported by the comparison below
            clients.join([json.loads(line) for line in lines])
        n_bytes = 0
        for record in islice(cohorts.records(), t):
            cohort = unpack(record)
            if cohort.size and cohort[-1] >= len(clients):
                break
            clients._record(record, cohort)
            n_bytes += len(record)
        if clients.state_dict() != dict(state):
            raise RootnoiseError(
                f"clients' files must hold the {size} clients and {t} rounds of the saved state, "
                f"got {len(clients)} and {clients.t}, or others, in {folder}"
            )
        os.truncate(ids.path, head + sum(map(len, lines)))
        os.truncate(cohorts.path, len(cohorts.first_line()) + n_bytes)
        clients._folder = folder
        return clients

    def state_dict(self) -> dict[str, Any]:
        """Sync the files and return a few primitives that commit to all ids and cohorts in them.

        The state holds the salt: keep it as secret as the files.
        """
        if self._folder is not None:
            for name in FILES:
                Journal(self._folder / name).sync()
        return self._header() | {"t": self.t, "size": len(self), "digest": self.digest}

    @property
    def digest(self) -> str:
        """Return the BLAKE2b hash of ids and cohorts, keyed with a secret salt."""
        return self._ids_hash.hexdigest() + self._cohorts_hash.hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {"version": 1, "participation": to_dict(self.participation)}

    def _header(self) -> dict[str, Any]:
        return self._identity() | {"salt": self._salt}

    def _start(self) -> None:
        key, head = self._salt.encode(), first_line(self._header())
        self._ids_hash = hashlib.blake2b(head, key=key, digest_size=32)
        self._cohorts_hash = hashlib.blake2b(head, key=key, digest_size=32)

    def _grow(self) -> None:
        """Make room for all clients; sizes double, so that joining one by one stays cheap."""
        size = self._last.size
        if len(self) > size:
            extra = np.zeros(max(len(self), 2 * size, 1024) - size, dtype=np.int32)
            self._last = np.concatenate([self._last, extra])
            self._count = np.concatenate([self._count, extra])


def checked_id(client: ClientId) -> ClientId:
    """Return an id as a plain string or int.

    Raises:
        RootnoiseError: it is neither, empty, or an integer beyond 64 bits.
    """
    if isinstance(client, str):
        if not client:
            raise RootnoiseError("client id must not be empty, got ''")
        return str(client)
    return integer("client id that is not a string", client, -(2**63), 2**63 - 1)


def _line(client: ClientId) -> bytes:
    return json.dumps(client).encode() + b"\n"


def _rule(participation: Participation) -> tuple[int, int]:
    """Return the least gap between one client's rounds, and their largest number."""
    match participation:
        case SingleParticipation():
            return 1, 1
        case MinSeparation(min_sep, most):
            return min_sep, most
    cure = "clients come and go, so use MinSeparation"
    if participation.amplified:
        cure = f"amplification needs clients who are always there and secret draws, {cure}"
    raise RootnoiseError(
        f"participation of clients must be min-sep or single ({cure}), got {participation.type}"
    )
