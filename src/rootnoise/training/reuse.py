"""Refuses to use the same noise for two different gradients within a process.

Two releases of the same (key, mechanism, step) have the same noise, so their difference is the
difference of their gradients. So every optimizer records a checksum of what it releases, 8 bytes a
step, and no optimizer may release anything else in a step that another live one has taken with the
same key and mechanism. A run that is repeated bit for bit, such as one resumed from a saved state,
is allowed. Other processes, and optimizers that no longer exist, are not seen: use a key for one
run only.
"""

from __future__ import annotations

import gc
import hashlib
import secrets
import struct
from weakref import WeakSet

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rootnoise._check import RootnoiseError

WIDTH = 8  # bytes per step: a different release goes unnoticed with probability 2^-64
LANES = {"cpu": 2**24, "gpu": 2**20}  # numbers processed at a time

_HASH = AESGCM(secrets.token_bytes(16))  # checksums are compared within a process only

_LIVE: dict[tuple[str, str], WeakSet[Releases]] = {}


class Releases:
    """What an optimizer has released, visible to others with its key and mechanism while it lives.

    Args:
        key_id: identifies the noise key.
        fingerprint: identifies the mechanism.
    """

    def __init__(self, key_id: str, fingerprint: str) -> None:
        self._first, self._digests = 0, bytearray()
        self._family = _LIVE.setdefault((key_id, fingerprint), WeakSet())
        self._family.add(self)

    def check(self, t: int, release: torch.Tensor, by: float = 1.0) -> None:
        """Record the vector that step t is about to release, a sum over the divisor `by`.

        Raises:
            RootnoiseError: another live optimizer has released a different vector in step t, or by
                another divisor.
        """
        digest = _digest(release, by)
        if self._conflicts(t, digest):
            gc.collect()  # unreachable optimizers do not count as alive
            if self._conflicts(t, digest):
                raise RootnoiseError(
                    f"noise of step {t} must not protect two gradients: another live optimizer has "
                    "released a step with this key and mechanism; give each run a key of its own"
                )
        if not self._digests:
            self._first = t
        self._digests += digest

    def _conflicts(self, t: int, digest: bytes) -> bool:
        found = (other._at(t) for other in list(self._family) if other is not self)
        return any(other not in (b"", digest) for other in found)

    def _at(self, t: int) -> bytes:
        start = (t - self._first) * WIDTH
        return bytes(self._digests[start : start + WIDTH]) if start >= 0 else b""


def _digest(release: torch.Tensor, by: float = 1.0) -> bytes:
    """Return a checksum of every bit, in one pass on the tensor's device."""
    if release.device.type == "cpu":
        found = _tags(release)
    else:
        found = _fletcher(release, LANES["gpu"]).cpu().numpy().tobytes()
    return hashlib.blake2b(struct.pack("d", by) + found, digest_size=WIDTH).digest()


def _tags(release: torch.Tensor) -> bytes:
    """Return the tags of GMAC of its parts: universal hashing, at 20 GB/s and more by AES units.

    Two parts of n bytes collide with probability (n / 16 + 1) 2^-128 over the key (McGrew & Viega,
    2004). The nonce may stay the same, for tags and key are never shown.
    """
    parts = (part.numpy().data.cast("B") for part in torch.split(release, LANES["cpu"]))
    return b"".join(_HASH.encrypt(bytes(12), b"", part) for part in parts)


def _fletcher(release: torch.Tensor, lanes: int) -> torch.Tensor:
    """Return Fletcher's (1982) checksum, of 64 bits in each lane.

    Sums of the rows, and sums of those sums, in which every row has a weight of its own.
    """
    rows = len(release) // lanes
    row = release.new_empty(lanes if rows else 0, dtype=torch.float64)
    bits = row.view(torch.int64)
    sums, weighted = torch.zeros_like(bits), torch.zeros_like(bits)
    for values in release[: rows * lanes].view(rows, lanes):
        row.copy_(values)
        sums += bits
        weighted += sums
    rest = release[rows * lanes :].double().view(torch.int64)
    return torch.cat([sums, weighted, rest])
