"""Which algorithm was measured as the fastest for a convolution on this CPU: read under WRN_FAST_PIN_ALGO=measured.

One JSON file an instruction set and number of threads, in the folder `algorithms` of the cache. `wrn-fast tune` is its
only writer. A file of another processor, of another format or that was damaged counts for nothing: then the written
policy decides, as it does for every shape without a row. The schema is closed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wrn_fast import cache, machine
from wrn_fast.errors import WrnFastError
from wrn_fast.problem import ConvProblem

FORMAT = 2  # raised with every change of the algorithms too: their times are then others
FOLDER = "algorithms"
OPS = ("fprop", "dgrad")
PINS = ("f4", "f3", "f2", "direct")
HEAD = ("cpu", "isa", "threads", "date")


class Key(NamedTuple):
    """The convolutions that share a choice."""

    op: str
    dtype: str
    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: int


def key(op: str, problem: ConvProblem) -> Key:
    """The class of a problem."""
    p = problem
    return Key(op, str(p.dtype).removeprefix("torch."), p.N, p.H, p.W, p.C, p.K, p.R, p.S, p.stride)


def key_of(row: dict[str, Any]) -> Key:
    """The class of a row."""
    return Key(*(row[name] for name in Key._fields))


def path(isa: str, threads: int, create: bool = False) -> Path | None:
    """The file of an instruction set and number of threads; None where there is no folder that can be trusted."""
    folder = cache.folder(FOLDER, create)
    return None if folder is None else folder / f"{isa}-{threads}.json"


def validate(value: object) -> None:
    """Nothing, if `value` is a document.

    Raises:
        WrnFastError: a field is unknown, absent or of another type, or names what does not exist.
    """
    document = cache.fields("document", value, {"format": int, "head": dict, "rows": list})
    if document["format"] != FORMAT:
        raise WrnFastError(f"`format`: expected {FORMAT}, got {document['format']}")
    cache.fields("head", document["head"], dict.fromkeys(HEAD, str))
    kinds = {name: str if name in ("op", "dtype") else int for name in Key._fields}
    for row in document["rows"]:
        row = cache.fields("row", row, {**kinds, "pin": str, "us": dict})
        for name, choices in (("op", OPS), ("pin", PINS)):
            if row[name] not in choices:
                raise WrnFastError(f"`row.{name}`: expected one of {', '.join(choices)}, got {row[name]!r}")


def head(isa: str, threads: int) -> dict[str, str]:
    """What has to be the same for a row to count; the date aside."""
    found = machine.head(torch.device("cpu"))
    return {"cpu": found["device"], "isa": isa, "threads": str(threads), "date": found["date"]}


def rows(isa: str, threads: int) -> list[dict[str, Any]]:
    """The rows that count here: none of a file of another processor, or of one that was damaged."""
    file = path(isa, threads)
    document: Any = None if file is None else cache.read(file)
    try:
        validate(document)
    except WrnFastError:
        return []
    here, there = head(isa, threads), document["head"]
    return document["rows"] if all(here[name] == there[name] for name in HEAD if name != "date") else []


@functools.cache
def table(isa: str, threads: int) -> dict[Key, str]:
    """Every choice that counts here, read once a process."""
    return {key_of(row): row["pin"] for row in rows(isa, threads)}


def lookup(op: str, problem: ConvProblem, isa: str, threads: int) -> str:
    """The algorithm to pin for a problem, or '' where the policy decides."""
    return table(isa, threads).get(key(op, problem), "")


def forget() -> None:
    """Read the files again at the next call."""
    table.cache_clear()
