"""Small JSON files that may be lost at any time: where they lie, and how they are read and written.

`WRN_FAST_CACHE_DIR`, else `wrn_fast` in `XDG_CACHE_HOME` or `~/.cache`. What is found there is data that another
process may have cut short or another user may have planted: a folder that others own or may write is refused, a file
is validated by its reader, and a write goes to a temporary file that is renamed. No failure here stops a computation.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wrn_fast.errors import WrnFastError

_LIMIT_BYTES = 16 << 20  # a longer file is not one of ours


def root() -> Path:
    """The folder, whether it exists or not."""
    chosen = os.environ.get("WRN_FAST_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "wrn_fast"


def refused(path: Path) -> str | None:
    """A sentence that says why the folder `path` is not trusted, or None."""
    try:
        found = path.lstat()
    except OSError as e:
        return f"{path}: {e.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is not a folder"
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        return f"{path} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by other users"
    return None


def folder(name: str, create: bool = False) -> Path | None:
    """The private folder `name` of the cache, or None where there is none or it is not trusted."""
    try:
        path = root() / name
        if create:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return None if refused(path.parent) or refused(path) else path


def read(path: Path) -> object | None:
    """The JSON value in a file; None where it is absent, cut short, too long or no JSON."""
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
        return json.loads(data) if len(data) <= _LIMIT_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def fields(what: str, value: object, wanted: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """`value` as an object with exactly the wanted fields, each of exactly its type (or one of several).

    Raises:
        WrnFastError: it is something else; the message names the field.
    """
    if not isinstance(value, dict) or set(value) != set(wanted):
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise WrnFastError(f"`{what}`: expected exactly {', '.join(wanted)}, got {got}")
    for name, kind in wanted.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value[name]) not in kinds:
            raise WrnFastError(f"`{what}.{name}`: expected {kinds[0].__name__}, got {value[name]!r}")
    return value


def write(path: Path, value: object) -> bool:
    """Write aside and rename, so that a reader sees the old file or the new one. False where that is not possible."""
    temporary = None
    try:
        number, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return True
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
