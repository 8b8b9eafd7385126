"""What an audit reports: one condition a line, whether it holds, and how values are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rootnoise.auditing.recompute import Range


@dataclass(frozen=True)
class Check:
    """One condition that must hold.

    Attributes:
        name: what was checked.
        held: whether it holds.
        stated: what the files say.
        found: what the auditor found, and how.
    """

    name: str
    held: bool
    stated: str
    found: str


def ranged(name: str, value: float, found: Range, tolerance: float) -> Check:
    """Hold a number to the range that it must lie in."""
    span = f"{found.low:.9g}" if found.high == found.low else f"{found.low:.9g} to {found.high:.9g}"
    return Check(name, found.holds(value, tolerance), f"{value:.9g}", f"{span} ({found.method})")


def fields(name: str, stated: Mapping[str, Any], found: Mapping[str, Any]) -> Check:
    """Compare field by field, and show the fields that differ."""
    names = sorted({*stated, *found})
    off = [key for key in names if not _equal(stated.get(key), found.get(key))]
    said, seen = ({key: each.get(key) for key in off} for each in (stated, found))
    return Check(name, not off, _short(said or f"{len(names)} fields"), _short(seen or "the same"))


def same(name: str, stated: Any, found: Any) -> Check:
    """Compare two values; recomputed numbers may differ in their last bits."""
    return Check(name, _equal(stated, found), f"{_short(stated)}", f"{_short(found)}")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    return type(a) is type(b) and bool(a == b)


def _short(value: Any) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())[:80]
