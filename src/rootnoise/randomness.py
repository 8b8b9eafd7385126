"""Keyed randomness: every draw is a pure function of (key, step, chunk), of no global generator.

The fast source is NumPy's Philox4x64-10 (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3"): counter-based, with a 128-bit key and a 256-bit counter whose words carry (step, chunk):
two pairs can never share a draw. A seeded `torch.Generator` would not do: on the CPU its mt19937
keeps only the low 32 bits of the seed. Measured with torch 2.13: `torch.randn` gives equal draws
for the seeds s and s + 2**32, s + 2**40 and s + 7 * 2**50; by the birthday bound, two of 65,000
(step, chunk) pairs hashed to such seeds would share their noise with probability 0.39.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError, integer

Float32 = NDArray[np.float32]

_WORD = 2**64 - 1  # a counter word is 64 bits


@dataclass(frozen=True, repr=False)
class Key:
    """32 secret bytes that fix all noise of a run: whoever holds them can subtract it.

    Raises:
        RootnoiseError: `secret` is not 32 bytes.

    >>> Key.from_seed(7)
    Key(id='04f7efd6309ecc69')
    """

    secret: bytes

    def __post_init__(self) -> None:
        secret: Any = self.secret  # the message must not show it, right or wrong
        if not isinstance(secret, bytes):
            raise RootnoiseError(f"secret must be 32 bytes, got {type(secret).__name__}")
        if len(secret) != 32:
            raise RootnoiseError(f"secret must be 32 bytes, got {len(secret)}")

    @classmethod
    def fresh(cls) -> Key:
        """Return a new key from the operating system's entropy: the one to release with."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def from_seed(cls, seed: int) -> Key:
        """Return the key of an integer seed >= 0, for experiments that must be repeatable.

        Never release a model trained with it: whoever knows or guesses the seed can compute the
        noise and subtract it, and then there is no privacy.
        """
        digits = str(integer("seed", seed, 0)).encode()
        return cls(hashlib.blake2b(digits, digest_size=32, person=b"rootnoise seed").digest())

    @classmethod
    def load(cls, path: str | Path) -> Key:
        """Return the key that `save` wrote to `path`; OSError if the file cannot be read."""
        text = Path(path).read_bytes().strip()
        try:
            return cls(bytes.fromhex(text.decode("ascii")))
        except ValueError:  # also RootnoiseError and UnicodeDecodeError; the text may be a secret
            raise RootnoiseError(f"key file must hold 64 hex digits, got {path}") from None

    def save(self, path: str | Path) -> None:
        """Write the secret to a new file that only its owner can read (mode 0600).

        Raises:
            RootnoiseError: the file exists: a run whose key is overwritten cannot be resumed.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise RootnoiseError(f"key file must not exist yet, got {path}") from None
        with os.fdopen(descriptor, "w") as file:
            file.write(self.secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that outlives its key cannot be resumed

    @property
    def id(self) -> str:
        """A short public hash (16 hex digits) that names the key and does not reveal it."""
        return hashlib.blake2b(self.secret, digest_size=8, person=b"rootnoise id").hexdigest()

    def derive(self, purpose: str) -> Key:
        """Return an independent key for one purpose; no other purpose, nor the id, leads to it."""
        digest = hashlib.blake2b(
            purpose.encode(), key=self.secret, digest_size=32, person=b"rootnoise derive"
        )
        return Key(digest.digest())

    def generator(self, t: int = 0, chunk: int = 0) -> Generator:
        """Return a NumPy generator whose stream is a pure function of (key, t, chunk)."""
        t, chunk = integer("t", t, 0, _WORD), integer("chunk", chunk, 0, _WORD)
        words = hashlib.blake2b(self.secret, digest_size=16, person=b"rootnoise philox").digest()
        # Philox counts in the lowest word: 2**64 blocks of four until it would meet the next chunk.
        counter = np.array([0, chunk, t, 0], dtype=np.uint64)
        return Generator(Philox(key=int.from_bytes(words, "little"), counter=counter))

    def __repr__(self) -> str:
        return f"Key(id={self.id!r})"


class NoiseSource(Protocol):
    """Standard normals by position: what `NoiseStream` asks of a source, built as `source(key)`."""

    @property
    def name(self) -> str:
        """Names the algorithm; a saved stream is not continued with another one."""

    def fill(self, t: int, chunk: int, out: Float32) -> None:
        """Fill the contiguous 1-D `out` with normals that depend on (key, t, chunk) alone."""


@dataclass(frozen=True)
class GaussianSource:
    """The fast source: Philox words through NumPy's single-precision ziggurat.

    It protects against reuse and collision: distinct (t, chunk) never share words, and a draw does
    not depend on call order, threads, or any other generator. It does not protect against an
    adversary who breaks Philox, which passes statistical tests but is no cryptographic generator,
    nor against attacks on the floating-point lattice of the samples (Mironov, 2012, "On
    significance of the least significant bits for differential privacy"). NumPy keeps the words of
    Philox stable but may change the ziggurat (NEP 19): a test pins its first values.

    >>> out = np.empty(3, dtype=np.float32)
    >>> GaussianSource(Key.from_seed(7)).fill(t=0, chunk=0, out=out)
    """

    key: Key
    name: ClassVar[str] = "philox4x64-ziggurat32"

    def fill(self, t: int, chunk: int, out: Float32) -> None:
        """Fill the contiguous float32 `out`; a shorter `out` gets a prefix of a longer one."""
        self.key.generator(t, chunk).standard_normal(dtype=np.float32, out=out)
