"""Files of a training run: each is written aside, flushed and renamed, so that a crash leaves the old one whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from wrn_fast.errors import WrnFastError


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """The file `path`, made by `write` on an open temporary file beside it."""
    number, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers and text, as `torch.load(weights_only=True)` reads them."""
    replace(path, lambda file: torch.save(state, file))


def save_history(path: Path, rows: list[dict[str, float]]) -> None:
    """One object an epoch."""
    replace(path, lambda file: file.write((json.dumps(rows, indent=1) + "\n").encode()))


def load_checkpoint(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of this program, of a run with the same plan; nothing in it is run.

    Raises:
        WrnFastError: damaged, of another program, or of a run with other options, each named.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["plan"]
    except Exception as error:  # of a damaged archive: RuntimeError, EOFError, KeyError, UnpicklingError...
        raise WrnFastError(f"--resume: {path} is no checkpoint of this program: {type(error).__name__}") from error
    changed = [
        f"{name} {saved.get(name)!r} there, {value!r} here" for name, value in plan.items() if saved.get(name) != value
    ]
    if changed:
        raise WrnFastError(f"--resume: expected the options of the run in {path}, got {'; '.join(changed)}")
    return state
