"""The C++ extension `_cpu` as a library: loading it, its threads, its memory."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wrn_fast._build import missing_extension_reason

# Elements below which a second thread costs more than it brings (a parallel region takes 2-3 us).
_ONE_THREAD_BELOW = 1 << 14

_in_child_of_fork = False


def _after_fork() -> None:
    """OpenMP's threads do not survive a fork, and a region that waits for them would hang: one thread from now on."""
    global _in_child_of_fork
    _in_child_of_fork = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """(the extension, None), or (None, the reason why it cannot be used)."""
    try:
        from wrn_fast import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        if "cannot import name" in str(error):
            return None, missing_extension_reason("_cpu")
        return None, f"extension _cpu cannot be loaded: {error}"
    try:
        _cpu.isa()
    except ValueError as error:
        return None, str(error)
    return _cpu, None


def extension() -> Any:
    """The extension itself.

    Raises:
        RuntimeError: it cannot be used; the reason.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    return module


@functools.cache
def isa() -> str | None:
    """The instruction set of the extension (`wrn-fast info`); None where there is no extension."""
    module, _ = load()
    return None if module is None else module.isa()


def threads(elements: int) -> int:
    """How many threads a pass over `elements` may use: torch's setting, read at each call."""
    if _in_child_of_fork or elements < _ONE_THREAD_BELOW:
        return 1
    return torch.get_num_threads()


def floats(count: int) -> Tensor:
    """[count] float32, on huge pages where it is large."""
    page = extension().HUGE_PAGE
    if 4 * count < page:
        return torch.empty(count, dtype=torch.float32, device="cpu")
    whole = (4 * count + page - 1) // page * page
    memory = torch.empty((whole + page) // 4, dtype=torch.float32, device="cpu")
    memory = memory[-memory.data_ptr() % page // 4 :]
    extension().advise_huge_pages(memory.data_ptr(), whole)
    return memory[:count]


def scratch_bytes() -> int:
    """Bytes of scratch and activations that the calling thread keeps."""
    return extension().scratch_bytes()
