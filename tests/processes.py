"""Processes that start in a twentieth of a second, and one that dies where it is told to.

A fork server loads torch once; its children are real processes, which have threads, locks and
descriptors of their own and can be killed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

import rootnoise

CONTEXT = multiprocessing.get_context("forkserver")
# Loaded once and not by every child: pictures and what typer asks of pydantic take a third of a
# second each, and the last, which torch imports in the first optimizer, a second and a half.
CONTEXT.set_forkserver_preload(
    [
        "rootnoise.runs.run",
        "sklearn.datasets",
        "matplotlib.figure",
        "pydantic.type_adapter",
        "torch._dynamo",
    ]
)

PACKAGE = str(Path(rootnoise.__file__).parent)


def start(target: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def outcome(target: Callable[..., object], *arguments: Any) -> int:
    """Return how a process that calls `target` ends: 0, or -9 when it was killed."""
    process = start(target, *arguments)
    process.join(60)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{target.__name__} did not end in 60 s")
    return process.exitcode


def launch(size: int, target: Callable[..., object], *arguments: Any) -> None:
    """Call `target(rank, size, *arguments)` in `size` processes; each must end well."""
    ranks = [start(target, rank, size, *arguments) for rank in range(size)]
    for process in ranks:
        process.join(60)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0] * size


def kill_at_line(fuse: int, files: tuple[str, ...]) -> None:
    """Let this process die by SIGKILL before the line number `fuse` (from 0) that runs in `files`.

    The files are of the package; lines are counted as they run, loops over and over.
    """
    lines = itertools.count()
    _at_each_line(files, lambda: next(lines) == fuse)


def kill_at_state(fuse: int, folder: Path, files: tuple[str, ...]) -> None:
    """Let this process die in the state number `fuse` (from 0) of a folder that it changes.

    A state is what the folder holds, by name, size and time, before a line of `files`.
    """
    seen: set[frozenset[tuple[str, int, int]]] = set()

    def new() -> bool:
        stats = [(f.name, f.stat()) for f in folder.iterdir()] if folder.exists() else []
        seen.add(frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
        return len(seen) > fuse + 1  # the first is what the process found

    _at_each_line(files, new)


def _at_each_line(files: tuple[str, ...], now: Callable[[], bool]) -> None:
    watched = {f"{PACKAGE}/{file}" for file in files}

    def line(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and now():
            die()
        return line

    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in watched else None)


def kill_inside_write(fuse: int) -> None:
    """Let this process die half through its file number `fuse` (from 0) opened by `os.fdopen`."""
    real, left = os.fdopen, fuse

    def fdopen(*arguments: Any) -> Any:
        nonlocal left
        file = real(*arguments)
        if left == 0:
            write, flush = file.write, file.flush

            def half(content: Any) -> None:
                write(content[: len(content) // 2])
                flush()
                die()

            file = _Wrapped(file, half)
        left -= 1
        return file

    os.fdopen = fdopen  # type: ignore[assignment]


class _Wrapped:
    """A file with another `write`."""

    def __init__(self, file: Any, write: Callable[[Any], None]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
