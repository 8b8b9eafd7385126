"""Files written whole or not at all; imports nothing of ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path


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
