"""A ledger's file against the participation, by other code than that which wrote and checked it.

The file is parsed from its documented layout; the rule is checked person by person, over the sorted
steps of each, where the ledger goes step by step.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError
from rootnoise.participation import (
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
    Participation,
    SingleParticipation,
)

Indices = NDArray[np.int64]

# Pairs (person, step) sorted at once: 160 MB. More people are taken in several passes.
PAIRS = 10_000_000
# Standard deviations that a Poisson sampler's total may be off: once in 1.6 million runs.
DEVIATIONS = 5.0


@dataclass(frozen=True)
class Replay:
    """What a ledger's file says.

    Attributes:
        header: its first line.
        digest: its chain over header and records.
        steps: batches that it holds.
        participations: their sizes, summed.
        broken: the first thing that is wrong, or None.
    """

    header: dict[str, Any]
    digest: str
    steps: int
    participations: int
    broken: str | None


def replay(path: Path, participation: Participation) -> Replay:
    """Read the file and hold it to `participation`.

    Raises:
        RootnoiseError: it is no ledger's file, or it ends within a record.
    """
    try:
        with path.open("rb") as file:
            line = file.readline()
        header = json.loads(line)
        n, salt = int(header["n_examples"]), bytes.fromhex(header["salt"])
        digest = hashlib.blake2b(line, key=salt, digest_size=32).digest()
    except OSError as reason:
        raise RootnoiseError(f"ledger file must be readable, got {reason.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise RootnoiseError(f"ledger file must begin with its header, got {path}") from None
    sizes = []
    for record in _records(path, len(line)):
        digest = hashlib.blake2b(digest + record, key=salt, digest_size=32).digest()
        sizes.append(int.from_bytes(record[:4], "little"))
    total = sum(sizes)
    passes = max(1, math.ceil(total / PAIRS))
    edges = np.linspace(0, n, passes + 1).astype(np.int64)
    broken = _improbable(total, n, len(sizes), participation)
    for low, high in pairwise(edges):
        broken = broken or _broken(path, len(line), int(low), int(high), n, participation)
    return Replay(header, digest.hex(), len(sizes), total, broken)


def _records(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while head := file.read(5):
            size, width = int.from_bytes(head[:4], "little"), head[-1]
            body = file.read(-(-size * width // 8))
            if len(head) < 5 or width > 32 or 8 * len(body) < size * width:
                raise RootnoiseError(f"ledger file must hold whole records, got others in {path}")
            yield head + body


def _batch(record: bytes) -> Indices:
    """Unpack gaps of `width` bits by their place, a word at a time."""
    size, width = int.from_bytes(record[:4], "little"), record[4]
    if not width:
        return np.arange(size)
    data = np.frombuffer(record[5:] + bytes(8), np.uint8).astype(np.uint64)
    bit = np.arange(size, dtype=np.uint64) * np.uint64(width)
    byte = (bit >> np.uint64(3)).astype(np.int64)
    word = sum(data[byte + i] << np.uint64(8 * i) for i in range(6))  # 7 + 32 bits fit into 48
    gaps = (word >> (bit & np.uint64(7))) & np.uint64(2**width - 1)
    return np.asarray(np.cumsum(gaps.astype(np.int64) + 1) - 1)


def _broken(
    path: Path, start: int, low: int, high: int, n: int, participation: Participation
) -> str | None:
    """Return what is wrong with the people in [low, high), the first one and why."""
    people, steps = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for t, record in enumerate(_records(path, start)):
        # Before unpacking: a size that was edited may not fit into memory.
        batch = _batch(record) if int.from_bytes(record[:4], "little") <= n else np.array([n])
        if batch.size and batch[-1] >= n:
            return f"step {t} names an example that is none of {n}"
        mine = batch[(batch >= low) & (batch < high)]
        people.append(mine)
        steps.append(np.full(mine.size, t))
    who, when = np.concatenate(people), np.concatenate(steps)
    order = np.lexsort((when, who))
    who, when = who[order], when[order]
    gaps = np.diff(when)[np.diff(who) == 0]
    counts = np.bincount(who - low, minlength=1)
    least = int(gaps.min(initial=2**62))
    match participation:
        case SingleParticipation():
            return None if counts.max() <= 1 else f"an example has {counts.max()} steps"
        case FixedCycle(period, epochs):
            sound = counts.max() <= epochs and not (gaps % period).any()
        case MinSeparation(min_sep, most):
            sound = counts.max() <= most and least >= min_sep
        case CyclicPoisson(groups, _):
            sound = not (gaps % groups).any()
        case MinSepPoisson(min_sep, _):
            sound = least >= min_sep
        case _:
            return f"no rule is known for {participation}"
    return None if sound else f"an example has {counts.max()} steps, or two only {least} apart"


def _improbable(total: int, n: int, steps: int, participation: Participation) -> str | None:
    """Hold the total of a Poisson sampler to its probability: the q that the accountant used."""
    if not isinstance(participation, CyclicPoisson):
        return None
    q, groups = participation.probability, participation.groups
    mean = q * n * steps / groups
    # Groups may differ in size by one, which counts in the last cycle if that is not whole.
    deviation = math.sqrt(mean * (1 - q)) + q * (steps % groups)
    if abs(total - mean) <= DEVIATIONS * deviation:
        return None
    return f"{total} participations where {mean:.0f} +- {deviation:.0f} are expected at q = {q:.6g}"
