"""Files written whole or not at all; imports nothing of ours."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace `path` in one move once `content` is on disk: a crash leaves the old or the new file.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
