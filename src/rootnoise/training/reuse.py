"""Noise of one key and mechanism must not protect two gradients within a process.

The difference of two releases of one (key, mechanism, step) holds no noise: it is the difference of
their gradients. So every optimizer notes what it releases, 8 bytes a step, and none may release
anything else in a step that another one, still alive, has made with the same key and mechanism. A
run that is repeated bit by bit, such as one resumed from a saved state, goes on. Runs of other
processes, and of optimizers that are gone, are not known here: a key is for one run.
"""

from __future__ import annotations

import gc
import hashlib
from weakref import WeakSet

import torch

from rootnoise._check import RootnoiseError

WIDTH = 8  # bytes a step: another release passes for the same with probability 2^-64
LANES = 64
ROWS = 1024  # of so many numbers at a time

_LIVE: dict[tuple[str, str], WeakSet[Releases]] = {}


class Releases:
    """What an optimizer has released, known to the others of its key and mechanism while it lives.

    Args:
        key_id: of the noise's key.
        fingerprint: the mechanism's.
    """

    def __init__(self, key_id: str, fingerprint: str) -> None:
        self._first, self._digests = 0, bytearray()
        self._family = _LIVE.setdefault((key_id, fingerprint), WeakSet())
        self._family.add(self)

    def check(self, t: int, release: torch.Tensor) -> None:
        """Note the float64 vector that step t is about to release.

        Raises:
            RootnoiseError: another live optimizer has released another one in step t.
        """
        digest = _digest(release)
        if self._conflicts(t, digest):
            gc.collect()  # one that is unreachable is no longer alive
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


def _digest(release: torch.Tensor) -> bytes:
    """Return a checksum of every bit, in one pass where the tensor is."""
    lanes = torch.zeros(LANES, dtype=torch.int64, device=release.device)
    rows = len(release) // LANES
    for start in range(0, rows, ROWS):  # in the cache
        stop = min(start + ROWS, rows)
        bits = _bits(release[start * LANES : stop * LANES]).view(-1, LANES)
        weights = (
            torch.arange(start, stop, device=release.device).mul_(2).add_(1)
        )  # odd: no bit lost
        lanes += (bits * weights[:, None]).sum(0)
    rest = _bits(release[rows * LANES :])
    whole = torch.cat([lanes, rest]).cpu().numpy().tobytes()
    return hashlib.blake2b(whole, digest_size=WIDTH).digest()


def _bits(release: torch.Tensor) -> torch.Tensor:
    return (release + 0.0).view(torch.int64)  # -0 is 0
