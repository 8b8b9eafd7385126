"""The file of a ledger: one packed batch a step, appended before its gradient is computed.

    header   one line of JSON
    record   size (uint32), width (uint8), then `size` gaps of `width` bits; little-endian

The gaps are those between the sorted indices of a batch. A batch drawn with probability q has gaps
near 1/q, the largest of them about ln(size) times that: some 13 bits a participation at q = 1e-3,
where its entropy is 11.4.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole

Indices = NDArray[np.int64]

HEAD = struct.Struct("<IB")


def pack(batch: Indices) -> bytes:
    """Return the record of a batch of sorted, distinct indices in [0, 2**32).

    >>> pack(np.array([3, 4, 9])).hex(), unpack(pack(np.array([3, 4, 9]))).tolist()
    ('03000000030301', [3, 4, 9])
    """
    gaps = (np.diff(batch, prepend=-1) - 1).astype("<u4")
    width = int(gaps.max(initial=0)).bit_length()
    bits = np.unpackbits(gaps.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")[:, :width]
    return HEAD.pack(batch.size, width) + np.packbits(bits, bitorder="little").tobytes()


def unpack(record: bytes) -> Indices:
    """Return the batch of a record."""
    size, width = HEAD.unpack_from(record)
    packed = np.frombuffer(record, np.uint8, offset=HEAD.size)
    bits = np.zeros((size, 32), dtype=np.uint8)
    bits[:, :width] = np.unpackbits(packed, count=size * width, bitorder="little").reshape(
        size, width
    )
    gaps = np.packbits(bits, axis=1, bitorder="little").view("<u4").ravel()
    return np.cumsum(gaps.astype(np.int64) + 1) - 1


def first_line(header: Mapping[str, Any]) -> bytes:
    """Return the header as a journal begins with it."""
    return json.dumps(header, sort_keys=True).encode() + b"\n"


class Journal:
    """An append-only file of records that only its owner can read (mode 0600).

    No handle stays open: a process that is killed between two appends leaves whole records, and one
    killed within an append a torn one, which `cut` removes (its gradient was never computed).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Journal:
        """Make a new file.

        Raises:
            RootnoiseError: the file exists or cannot be written.
        """
        try:
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            write_whole(path, first_line(header), 0o600)
        except OSError as reason:
            raise RootnoiseError(
                f"ledger file must be new and writable, got {path}: {reason.strerror}"
            ) from None
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, header: Mapping[str, Any]) -> Journal:
        """Return the file of the same header.

        Raises:
            RootnoiseError: it cannot be read, or it is another ledger's.
        """
        journal = cls(path)
        if journal.first_line() != first_line(header):
            raise RootnoiseError(f"ledger file must be of this run, got another one's {path}")
        return journal

    def first_line(self) -> bytes:
        """Return the header as it is on disk.

        Raises:
            RootnoiseError: the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return file.readline()
        except OSError as reason:
            raise RootnoiseError(
                f"ledger file must be readable, got {self.path}: {reason.strerror}"
            ) from None

    def records(self) -> Iterator[bytes]:
        """Yield the whole records, in order."""
        with self.path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size
            file.readline()
            while len(head := file.read(HEAD.size)) == HEAD.size:
                size, width = HEAD.unpack(head)
                length = -(-size * width // 8)
                body = file.read(min(length, whole))  # a damaged size must not take all memory
                if len(body) < length:
                    return
                yield head + body

    def cut(self) -> None:
        """Remove a torn last record."""
        whole = len(self.first_line()) + sum(map(len, self.records()))
        with self.path.open("r+b") as file:
            file.truncate(whole)

    def append(self, record: bytes) -> None:
        """Add a record.

        Raises:
            RootnoiseError: it cannot be written whole.
        """
        try:
            with self.path.open("ab", buffering=0) as file:
                written = file.write(record)
        except OSError as reason:
            raise RootnoiseError(
                f"ledger file must be writable, got {self.path}: {reason.strerror}"
            ) from None
        if written != len(record):
            raise RootnoiseError(f"ledger file must be writable, got a full disk at {self.path}")

    def sync(self) -> None:
        """Return once the records are on disk: what refers to them may be written now."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
