"""Keys: every draw is a pure function of a secret and a place, and of no global generator.

Noise is drawn by `noise.sources`. The order of examples, and who is drawn, come from
`Key.generator`: NumPy's Philox4x64-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1,
2, 3") has a 128-bit key and a 256-bit counter whose words carry (step, chunk), so that two pairs
never share a draw. It is no cryptographic generator; nothing that a run releases shows its words.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator, Philox

from rootnoise._check import RootnoiseError, integer

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
