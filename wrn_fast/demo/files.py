"""Readers of CIFAR-10, CIFAR-100 and SVHN as their authors publish them; reading one never runs code from it.

Sources: www.cs.toronto.edu/~kriz/cifar.html (binary and Python version), ufldl.stanford.edu/housenumbers (format 2).
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wrn_fast.errors import WrnFastError

PIXELS = 3 * 32 * 32


class Layout(NamedTuple):
    """How one published data set is stored."""

    name: str
    classes: int
    train: tuple[str, ...]  # files
    test: tuple[str, ...]
    label_bytes: int  # before each image of the binary version; the last one is the label
    label_key: str  # of the Python version


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = (
    Layout("CIFAR-10", 10, tuple(f"{b}.bin" for b in _BATCHES), ("test_batch.bin",), 1, ""),
    Layout("CIFAR-10", 10, _BATCHES, ("test_batch",), 0, "labels"),
    Layout("CIFAR-100", 100, ("train.bin",), ("test.bin",), 2, ""),
    Layout("CIFAR-100", 100, ("train",), ("test",), 0, "fine_labels"),
    Layout("SVHN", 10, ("train_32x32.mat",), ("test_32x32.mat",), 0, ""),
)
_EXPECTED = (
    "CIFAR-10 (data_batch_1.bin ... test_batch.bin, or data_batch_1 ... test_batch), CIFAR-100 (train.bin, test.bin, "
    "or train, test) or SVHN (train_32x32.mat, test_32x32.mat)"
)


class Images(NamedTuple):
    """Images as they lie in the files."""

    name: str
    classes: int
    train_x: np.ndarray  # uint8 [N, 3, 32, 32]
    train_y: np.ndarray  # int64 [N]
    test_x: np.ndarray
    test_y: np.ndarray


def read(path: str | Path) -> Images:
    """CIFAR-10, CIFAR-100 or SVHN in the folder `path`, or in a folder directly below it.

    Raises:
        WrnFastError: nothing of that kind is there, or a file is not what its name says; names the file.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise WrnFastError(f"--data: expected a folder with {_EXPECTED}, got the file {folder}; unpack archives first")
    if not folder.is_dir():
        raise WrnFastError(f"--data: expected a folder with {_EXPECTED}, got {folder}, which does not exist")
    for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        for layout in LAYOUTS:
            present = [name for name in (*layout.train, *layout.test) if (place / name).is_file()]
            if present and len(present) < len(layout.train) + len(layout.test):
                missing = next(name for name in (*layout.train, *layout.test) if name not in present)
                raise WrnFastError(f"--data: {place / present[0]} belongs to {layout.name}, but {missing} is missing")
            if present:
                return _read_layout(place, layout)
    raise WrnFastError(f"--data: expected {_EXPECTED} in {folder}, found none of them")


def _read_layout(place: Path, layout: Layout) -> Images:
    parts = []
    for names in (layout.train, layout.test):
        pieces = [_read_file(place / name, layout) for name in names]
        parts += [np.concatenate([x for x, _ in pieces]), np.concatenate([y for _, y in pieces])]
    return Images(layout.name, layout.classes, *parts)


def _read_file(file: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 3, 32, 32], labels int64 [N]) of one file."""
    if file.suffix == ".bin":
        x, y = read_binary(file, layout.label_bytes)
    elif file.suffix == ".mat":
        x, y = read_svhn(file)
    else:
        x, y = read_python(file, layout.label_key)
    if len(x) == 0 or y.min() < 0 or y.max() >= layout.classes:
        got = f"{y.min()} to {y.max()}" if len(x) else "no image"
        raise WrnFastError(f"{file}: expected labels 0 to {layout.classes - 1} ({layout.name}), got {got}")
    return x, y


def read_binary(file: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR's binary version: records of label bytes, then 3072 bytes red, green, blue, row by row."""
    record = label_bytes + PIXELS
    data = np.fromfile(file, dtype=np.uint8)
    if data.size % record:
        raise WrnFastError(f"{file}: expected a multiple of {record} bytes (one record an image), got {data.size}")
    data = data.reshape(-1, record)
    return data[:, label_bytes:].reshape(-1, 3, 32, 32), data[:, label_bytes - 1].astype(np.int64)


class _Dtype:
    """Stands for numpy.dtype in a pickle: remembers the code, makes nothing."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for numpy.ndarray in a pickle: only a whole uint8 array in C order becomes one."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        code = dtype.code.decode() if isinstance(dtype.code, bytes) else dtype.code
        if code not in ("u1", "|u1") or fortran or not isinstance(data, bytes):
            raise pickle.UnpicklingError(f"an array of {code!r}, where bytes in C order were expected")
        self.value = np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands for _codecs.encode, the way in which protocol 2 writes bytes."""
    return str(text).encode("latin-1")


class _Unpickler(pickle.Unpickler):
    """Numbers, text, bytes, lists, dicts and uint8 arrays; every other name in the file is refused."""

    _KNOWN: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return self._KNOWN[module, name]


def read_python(file: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR's Python version: a pickled dict with `data` uint8 [N, 3072] and a list of labels."""
    try:
        with open(file, "rb") as stream:
            batch = _Unpickler(stream, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        data, labels = batch["data"].value, np.asarray(batch[label_key], dtype=np.int64)
    except Exception as error:
        # A damaged pickle can raise anything: EOFError, KeyError, ValueError, AttributeError, ...
        reason = f"{type(error).__name__}: {error}"
        raise WrnFastError(
            f"{file}: expected a pickled CIFAR batch with uint8 `data` and `{label_key}`, got {reason}"
        ) from error
    if data is None or data.ndim != 2 or data.shape[1] != PIXELS or labels.shape != data.shape[:1]:
        shape = None if data is None else list(data.shape)
        raise WrnFastError(f"{file}: expected `data` [N, {PIXELS}] and N labels, got {shape} and {list(labels.shape)}")
    return data.reshape(-1, 3, 32, 32), labels


def read_svhn(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """SVHN's cropped digits: MATLAB 5 file with X uint8 [32, 32, 3, N] and y [N, 1], where 10 means the digit 0."""
    if importlib.util.find_spec("scipy") is None:
        raise WrnFastError(f"{file}: reading a .mat file needs scipy (pip install scipy), which is not installed")
    from scipy.io import loadmat

    try:
        content = loadmat(file, variable_names=("X", "y"))
    except Exception as error:
        raise WrnFastError(
            f"{file}: expected a MATLAB 5 file, got what scipy calls {type(error).__name__}: {error}"
        ) from error
    x, y = content.get("X"), content.get("y")
    good = x is not None and y is not None and x.ndim == 4 and x.shape[:3] == (32, 32, 3) and x.dtype == np.uint8
    if not good or y.size != x.shape[3]:
        got = {key: f"{value.dtype} {list(value.shape)}" for key, value in content.items() if key in ("X", "y")}
        raise WrnFastError(f"{file}: expected X uint8 [32, 32, 3, N] and y [N, 1], got {got or 'neither'}")
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1)), y.reshape(-1).astype(np.int64) % 10
