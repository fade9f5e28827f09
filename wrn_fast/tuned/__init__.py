"""Measured tiles: JSON files, one a GPU, that the written rule gives way to. `wrn-fast tune` is their only writer.

Looked up in this order: `WRN_FAST_TUNED_DIR` or the user's cache folder, then the files beside this one; in each a file
of the very GPU goes before one of its architecture. A file is an object of `format`, `head` (what was measured on what)
and `rows`; the schema is closed: a field too many is an error.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wrn_fast import cache
from wrn_fast.errors import WrnFastError
from wrn_fast.problem import ConvProblem

FORMAT = 3
BACKENDS = ("triton", "cuda")
OPS = ("fprop", "dgrad", "wgrad")
DTYPES = ("float16", "bfloat16", "float32")
HEAD = ("gpu", "arch", "sms", "driver", "cuda", "torch", "triton", "wrn_fast", "date", "command")
TILE = {"rows": int, "red": int, "cols": list, "warps": int, "stages": int, "apply": bool, "splits": int, "box": bool}
_FOLDER = Path(__file__).parent


class Key(NamedTuple):
    """A class of problems that share a tile. Batch and image count by the power of two nearest to their pixels."""

    backend: str
    op: str
    dtype: str
    C: int
    K: int
    R: int
    S: int
    stride: int
    P: int
    Q: int
    source: bool  # does act(bn(.)) stand before the convolution?
    second: bool  # are both y and its activated copy written?
    pixels_log2: int


def key(backend: str, op: str, problem: ConvProblem) -> Key:
    """The class of a problem."""
    pixels = max(1, problem.N * problem.P * problem.Q)
    nearest = ((2 * pixels * pixels).bit_length() - 1) // 2
    return Key(
        backend, op, str(problem.dtype).removeprefix("torch."), problem.C, problem.K, problem.R, problem.S,
        problem.stride, problem.P, problem.Q, problem.prologue or problem.act != "identity",
        problem.want_y and problem.act_out != "none", nearest,
    )  # fmt: skip


def validate(value: object) -> dict[Key, dict[str, Any]]:
    """The rows of a document by class.

    Raises:
        WrnFastError: it is no document of this format, or has a field that is unknown, absent or of another type.
    """
    document = cache.fields("document", value, {"format": int, "head": dict, "rows": list})
    if document["format"] != FORMAT:
        raise WrnFastError(f"`format`: expected {FORMAT}, got {document['format']}")
    head = cache.fields("head", document["head"], {name: int if name == "sms" else str for name in HEAD})
    if not head["gpu"]:
        raise WrnFastError("`head.gpu`: expected the name of a GPU, got ''")
    kinds = {"backend": str, "op": str, "dtype": str, "source": bool, "second": bool}
    wanted = {name: kinds.get(name, int) for name in Key._fields}
    rows: dict[Key, dict[str, Any]] = {}
    for row in document["rows"]:
        row = cache.fields("row", row, {**wanted, "tile": dict, "us": (float, int), "runner_up_us": (float, int)})
        for name, choices in (("backend", BACKENDS), ("op", OPS), ("dtype", DTYPES)):
            if row[name] not in choices:
                raise WrnFastError(f"`row.{name}`: expected one of {', '.join(choices)}, got {row[name]!r}")
        tile = cache.fields("tile", row["tile"], TILE)
        if len(tile["cols"]) != 2 or any(type(c) is not int for c in tile["cols"]):
            raise WrnFastError(f"`tile.cols`: expected two widths, got {tile['cols']}")
        rows[Key(*(row[name] for name in Key._fields))] = row
    return rows


def user_folder(create: bool = False) -> Path | None:
    """Where `wrn-fast tune` writes: `WRN_FAST_TUNED_DIR`, or the cache."""
    chosen = os.environ.get("WRN_FAST_TUNED_DIR")
    return Path(chosen) if chosen else cache.folder("tuned", create)


def _documents(gpu: str, arch: str) -> Iterator[dict[Key, dict[str, Any]]]:
    """The files that speak of this GPU or its architecture, the ones to prefer first."""
    user = user_folder()
    for folder in (user, _FOLDER) if user else (_FOLDER,):
        of_gpu, of_arch = [], []
        for path in sorted(folder.glob("*.json")):
            value = cache.read(path)
            try:
                rows = validate(value)
            except WrnFastError as e:
                warnings.warn(f"wrn_fast: {path} is left out: {e}", stacklevel=2)
                continue
            head = value["head"]  # type: ignore[index]
            if head["gpu"] == gpu:
                of_gpu.append(rows)
            elif head["arch"] == arch:
                of_arch.append(rows)
        yield from of_gpu + of_arch


@functools.cache
def table(gpu: str, arch: str) -> dict[Key, dict[str, Any]]:
    """Every row for this GPU, read once a process."""
    rows: dict[Key, dict[str, Any]] = {}
    for document in _documents(gpu, arch):
        rows = {**document, **rows}
    return rows


def lookup(backend: str, op: str, problem: ConvProblem, gpu: str, arch: str) -> dict[str, Any] | None:
    """The tile that was measured as the fastest for the problem's class on this GPU, or None."""
    row = _row(backend, op, problem, gpu, arch)
    return None if row is None else row["tile"]


def us(backend: str, op: str, problem: ConvProblem, gpu: str, arch: str) -> float | None:
    """Microseconds that the fastest tile took, or None."""
    row = _row(backend, op, problem, gpu, arch)
    return None if row is None else float(row["us"])


def _row(backend: str, op: str, problem: ConvProblem, gpu: str, arch: str) -> dict[str, Any] | None:
    rows = table(gpu, arch)
    return rows.get(key(backend, op, problem)) if rows else None
