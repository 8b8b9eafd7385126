"""Numbers that a command reads from a file: .npy, .npz, .csv or .json."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rootnoise import _limits
from rootnoise._check import RootnoiseError

FORMATS = ".npy, .npz, .csv or .json"


def named(text: str) -> bool:
    """Whether a text is the name of a file of numbers, by its ending."""
    return Path(text).suffix in _READERS


def read(path: Path) -> NDArray[np.float64]:
    """Return the numbers in a file, or refuse it."""
    refuse_size(path)
    try:
        found: Any = _READERS[path.suffix](path)
    except KeyError:
        raise RootnoiseError(f"file must be {FORMATS}, got {path}") from None
    except OSError as reason:
        raise RootnoiseError(
            f"file must be readable, got {path}: {reason.strerror or 'no such file'}"
        ) from None
    except (ValueError, EOFError, zipfile.BadZipFile) as reason:
        raise RootnoiseError(f"file must hold numbers, got {path}: {reason}") from None
    try:
        array = np.asarray(found)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iuf":
        raise RootnoiseError(f"file must hold real numbers, got {array.dtype} in {path}")
    return array.astype(np.float64)


def refuse_size(path: Path) -> None:
    """Refuse a file whose numbers do not fit into memory, before reading them."""
    try:
        size = _size(path)
    except (OSError, ValueError, IndexError, zipfile.BadZipFile):
        return  # `read` says what is wrong
    _limits.memory(f"the numbers of {path}", size, "a smaller file")


def _size(path: Path) -> float:
    """Return the most memory, in bytes, that reading a file takes."""
    if path.suffix == ".npy":
        with path.open("rb") as file:
            return _array_size(file)
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
            return _array_size(file)
    # A number has at least two characters and takes 8 bytes, or up to 40 as an item of a list.
    return path.stat().st_size * (24.0 if path.suffix == ".json" else 8.0)


def _array_size(file: IO[bytes]) -> float:
    """Return the bytes of an array, both as stored and as float64."""
    form = np.lib.format
    first = form.read_magic(file) == (1, 0)
    read_header = form.read_array_header_1_0 if first else form.read_array_header_2_0
    shape, _, kind = read_header(file)
    return math.prod(map(float, shape)) * (kind.itemsize + 8)


def _npz(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as arrays:
        if len(arrays.files) != 1:
            raise ValueError(f"{len(arrays.files)} arrays instead of one")
        return arrays[arrays.files[0]]


_READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".npz": _npz,
    ".csv": lambda path: np.loadtxt(path, delimiter=",", ndmin=1),
    ".json": lambda path: json.loads(path.read_text()),
}
