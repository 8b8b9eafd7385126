"""Files written whole or not at all, and the JSON of tagged values, read back by their checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from rootnoise._check import RootnoiseError

T = TypeVar("T")
K = TypeVar("K")


def write_whole(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace `path` in one move once `content` is on disk: a crash leaves the old or the new file.

    When it returns, the new file survives a crash of the machine. What is there and no regular
    file, such as /dev/stdout, is written to and never replaced: root would turn it into a file.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary = partial(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a part of it would fill the disk
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, is on disk
        finally:
            os.close(folder)


def partial(path: Path) -> Path:
    """Return where `write_whole` writes first; a crash can leave that file behind."""
    return path.with_name(f".{path.name}.partial")


def lock(descriptor: int) -> bool:
    """Lock an open file against all other processes; False if one of them holds it.

    The lock dies with its holder, or when the descriptor is closed.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Kinds(Generic[T]):
    """The kinds of one sort of value, each by the "type" of its JSON object.

    An object holds the fields that rebuild the value: nothing else, and none left out.

    Args:
        rule: begins the refusal of anything else.

    >>> from dataclasses import dataclass
    >>> shapes = Kinds("shape must be a known one")
    >>> @shapes.add("square")
    ... @dataclass(frozen=True)
    ... class Square:
    ...     sides: Any
    >>> shapes.to_dict(Square(np.ones(2)))
    {'type': 'square', 'sides': [1.0, 1.0]}
    >>> shapes.from_dict({"type": "square", "sides": [1.0, 1.0]})
    Square(sides=[1.0, 1.0])
    """

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._kinds: dict[str, tuple[type[T], dict[str, type]]] = {}
        self._tags: dict[type[T], str] = {}

    def add(self, tag: str, **sorts: type) -> Callable[[type[K]], type[K]]:
        """Let a dataclass be written and read under a tag.

        Args:
            tag: the "type".
            sorts: the fields of the JSON object in order, and what each is read as; those of the
                constructor, left to its checks, where none are given.
        """

        def added(kind: Any) -> Any:
            any_sort: type = object
            every = {field.name: any_sort for field in fields_of(kind) if field.init}
            self._kinds[tag], self._tags[kind] = (kind, sorts or every), tag
            return kind

        return added

    def to_dict(self, value: T) -> dict[str, Any]:
        """Return a JSON-ready description, read back by `from_dict`.

        Raises:
            RootnoiseError: a value of another kind.
        """
        tag = self._tags.get(type(value))
        if tag is None:
            raise self._refusal(value)
        names = self._kinds[tag][1]
        return {"type": tag} | {name: _plain(getattr(value, name)) for name in names}

    def from_dict(self, fields: dict[str, Any]) -> T:
        """Rebuild a value from `to_dict`; every check of its constructor runs again.

        Raises:
            RootnoiseError: an unknown type, fields that are missing or do not belong, or what the
                constructor refuses.
        """
        known = self._kinds.get(str(fields.get("type"))) if isinstance(fields, dict) else None
        if known is None or fields.keys() != {"type", *known[1]}:
            raise self._refusal(fields)
        kind, sorts = known
        if not all(isinstance(fields[name], sort) for name, sort in sorts.items()):
            raise self._refusal(fields)
        parts = {name: fields[name] for name in sorts}
        nested = {name: self.from_dict(part) for name, part in parts.items() if sorts[name] is dict}
        return kind(**parts | nested)

    def _refusal(self, found: Any) -> RootnoiseError:
        return RootnoiseError(f"{self._rule}, got {found!s:.60}")


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return value if isinstance(value, bool | int | float | str) else np.asarray(value).tolist()
