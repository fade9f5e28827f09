"""Opening a checkpoint file that someone else wrote: nothing runs, and nothing is allocated that the file cannot hold.

Order of trust: safetensors; zip archives of `torch.save` (checked entry by entry first); the pickles of torch before
1.6, whose claimed sizes are checked first. Tensors are read by `torch.load(weights_only=True)` only.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import itertools
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from wrn_fast.errors import WrnFastError

MAX_ENTRIES = 10_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5  # magic, protocol, system, the object, storage keys


def read(src: str | os.PathLike | bytes | BinaryIO) -> Any:
    """The object in a checkpoint file: dicts of tensors, as its writer nested them.

    Raises:
        WrnFastError: the file is damaged, hostile, or of no known format; the message says which.
    """
    data = _bytes(src)
    if data[:4] == b"PK\x03\x04":
        _check_zip(data)
    elif _is_safetensors(data):
        return _safetensors(data)
    elif data[:1] == b"\x80":
        _check_legacy(data)
    else:
        what = "an empty file" if not data else f"a file that starts with {data[:8]!r}"
        raise WrnFastError(f"`src`: expected a file of torch.save or safetensors, got {what}")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the archive reader raise many kinds
        if isinstance(error, pickle.UnpicklingError):
            # its own text advises weights_only=False
            found = re.search(r"WeightsUnpickler error: ?(.*)", str(error))
            what = f"({found[1][:120]})" if found else ""
            raise WrnFastError(f"`src`: the pickle is not one that holds tensors only {what}") from error
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise WrnFastError(f"`src`: cannot be read: {text[0][:200]}") from error


def _bytes(src: str | os.PathLike | bytes | BinaryIO) -> bytes:
    if isinstance(src, bytes):
        return src
    if isinstance(src, (str, os.PathLike)):
        path = Path(src)
        if not path.is_file():
            raise WrnFastError(f"`src`: expected a file, got {os.fspath(src)!r}, which is none")
        return path.read_bytes()
    if hasattr(src, "read"):
        return src.read()
    raise WrnFastError(f"`src`: expected a path, bytes, a file or a dict of tensors, got {type(src).__name__}")


def _check_zip(data: bytes) -> None:
    """Stored entries with plain names that add up to no more than the file, and whose checksums hold."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise WrnFastError(f"`src`: expected at most {MAX_ENTRIES} entries in the archive, got {len(entries)}")
            names = [entry.filename for entry in entries]
            for entry in entries:
                parts = entry.filename.replace("\\", "/").split("/")
                if ".." in parts or entry.filename.startswith(("/", "\\")) or ":" in entry.filename:
                    raise WrnFastError(f"`src`: the archive has an entry outside itself: {entry.filename!r}")
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise WrnFastError(f"`src`: expected stored entries, got a compressed one: {entry.filename!r}")
            if len(set(names)) != len(names):
                raise WrnFastError("`src`: the archive has two entries of one name")
            claimed = sum(entry.file_size for entry in entries)
            if claimed > 1.1 * len(data):
                raise WrnFastError(f"`src`: the archive claims {claimed} bytes in a file of {len(data)}")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        if isinstance(error, WrnFastError):
            raise
        raise WrnFastError(f"`src`: the archive is damaged: {error}") from error
    if damaged is not None:
        raise WrnFastError(f"`src`: the archive is damaged: the checksum of {damaged!r} is wrong")


def _check_legacy(data: bytes) -> None:
    """The numbers in the pickles cannot claim more elements than the file has bytes."""
    stream, total = io.BytesIO(data), 0
    try:
        for index in range(_LEGACY_PICKLES):
            numbers = [arg for _, arg, _ in pickletools.genops(stream) if isinstance(arg, int)]
            if index == 0 and _LEGACY_MAGIC not in numbers:
                raise WrnFastError("`src`: a bare pickle; expected a file of torch.save or safetensors")
            if index == 3:
                total = sum(abs(n) for n in numbers)
    except WrnFastError:
        raise
    except Exception as error:  # pickletools raises many kinds on bytes that are no pickle
        raise WrnFastError(f"`src`: the pickle is damaged: {str(error)[:200]}") from error
    if total > len(data):
        raise WrnFastError(f"`src`: the pickle claims {total} elements in a file of {len(data)} bytes")


def _is_safetensors(data: bytes) -> bool:
    return len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _safetensors(data: bytes) -> dict[str, torch.Tensor]:
    if importlib.util.find_spec("safetensors") is None:
        raise WrnFastError("`src`: a safetensors file, but the package safetensors is not installed")
    try:
        return importlib.import_module("safetensors.torch").load(data)
    except Exception as error:  # the reader's own exception class is in the optional package
        raise WrnFastError(f"`src`: the safetensors file is damaged: {error}") from error


CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "ema")


def state_dict(loaded: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The mapping of names to tensors inside what was loaded, and notes on how it was found.

    Raises:
        WrnFastError: there is none.
    """
    notes: list[str] = []
    seen: set[int] = set()
    while True:
        if not isinstance(loaded, Mapping):
            raise WrnFastError(f"`src`: expected a dict of tensors, got {type(loaded).__name__}")
        if id(loaded) in seen:
            raise WrnFastError("`src`: a dict that contains itself")
        seen.add(id(loaded))
        found = [k for k in CONTAINERS if isinstance(loaded.get(k), Mapping)]
        if not found or any(isinstance(v, torch.Tensor) and v.dim() == 4 for v in loaded.values()):
            break
        notes.append(f"read from {found[0]!r}" + (f"; the file also has {', '.join(found[1:])}" if found[1:] else ""))
        loaded = loaded[found[0]]
    for key in loaded:
        if not isinstance(key, str):
            raise WrnFastError(f"`src`: expected names as keys, got {key!r}")
    others = [k for k, v in loaded.items() if not isinstance(v, torch.Tensor)]
    if others:
        notes.append(f"not tensors, left out: {', '.join(others[:6])}")
    tensors = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise WrnFastError("`src`: expected tensors in the dict, found none")
    return tensors, notes


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Each tensor is what a weight may be: dense, real, in memory of its own, finite; variances are not negative.

    Raises:
        WrnFastError: names the first that is not.
    """
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for key, t in tensors.items():
        counter = key.endswith("num_batches_tracked")
        if t.layout != torch.strided or t.device.type == "meta" or t.is_quantized:
            raise WrnFastError(f"`src`: {key!r}: expected a dense tensor with data, got {t.layout} on {t.device}")
        if not (t.dtype.is_floating_point or (counter and t.dtype == torch.int64)) or t.dtype.itemsize < 2:
            raise WrnFastError(f"`src`: {key!r}: expected a real floating dtype, got {t.dtype}")
        storage = t.untyped_storage()
        end = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1 if t.numel() else 0
        if any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride())) or end * t.dtype.itemsize > storage.nbytes():
            raise WrnFastError(f"`src`: {key!r}: {list(t.shape)} in a storage of {storage.nbytes()} bytes")
        span = (int(t.storage_offset()) * t.dtype.itemsize, int(end) * t.dtype.itemsize, key)
        spans.setdefault(storage.data_ptr(), []).append(span)
    for shared in spans.values():
        shared.sort()
        for (_, end, a), (start, _, b) in itertools.pairwise(shared):
            if start < end:
                raise WrnFastError(f"`src`: {a!r} and {b!r} are the same memory")
    for key, t in tensors.items():
        if not torch.isfinite(t).all():
            raise WrnFastError(f"`src`: {key!r}: expected finite values, got NaN or infinity")
        if key.endswith("running_var") and (t < 0).any():
            raise WrnFastError(f"`src`: {key!r}: expected variances of at least 0, got {t.min().item()}")
