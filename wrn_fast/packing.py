"""Packed filters, kept as long as their weight stays what it was.

A filter is packed anew in each call until a call finds it unchanged since the call before: then its pack is kept. So a
training step, which changes every filter, keeps nothing, and inference, attacks and Monte-Carlo sampling pack once.

Unchanged means: the same object, with equal (pointer, dtype, shape, strides, version) and an equal fingerprint. The
version alone is not enough: fused optimizers, broadcasts of DistributedDataParallel and writes through `.data` do not
move it. The fingerprint reads 64 elements, so a hidden write to a few others goes unseen: `refresh` is for that.

`WRN_FAST_PACK_CACHE=0` keeps nothing: every call packs into scratch memory.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

SAMPLES = 64


class Row(NamedTuple):
    """One kept pack."""

    shape: tuple[int, ...]  # of the filter
    key: Hashable  # algorithm, direction, instruction set: the backend's words
    bytes: int


@dataclass
class _Entry:
    """What was known of a filter when it was last seen, and its packs: None where it was seen but not kept."""

    ref: weakref.ref
    state: tuple
    packs: dict[Hashable, Tensor | None]


_entries: dict[int, _Entry] = {}


def sample_step(count: int) -> int:
    """The distance of SAMPLES samples over `count` elements: coprime to it, so that none falls on another."""
    step = max(1, count * 5 // (8 * SAMPLES)) | 1
    while math.gcd(step, count) != 1:
        step += 2
    return step


def enabled() -> bool:
    """False under WRN_FAST_PACK_CACHE=0."""
    return os.environ.get("WRN_FAST_PACK_CACHE", "1") != "0"


def _state(w: Tensor, fingerprint: int) -> tuple:
    version = -1 if w.is_inference() else w._version
    return w.data_ptr(), w.dtype, w.shape, w.stride(), version, fingerprint


def lookup(
    w: Tensor, key: Hashable, fingerprint: Callable[[Tensor], int], make: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The pack of `w` under `key`; None where this call has to pack for itself.

    Args:
        w: the filter.
        key: what else the pack depends on.
        fingerprint: a hash of SAMPLES elements of w, `sample_step` apart.
        make: packs w into a new tensor.
    """
    if not enabled():
        return None
    entry, state = _entries.get(id(w)), _state(w, fingerprint(w))
    if entry is None or entry.ref() is not w or entry.state != state:
        _entries[id(w)] = _Entry(weakref.ref(w, _forget_after(id(w))), state, {key: None})
        return None
    if key not in entry.packs:
        entry.packs[key] = None
        return None
    pack = entry.packs[key]
    if pack is None:
        pack = entry.packs[key] = make(w)
    return pack


def _forget_after(key: int) -> Callable[[weakref.ref], None]:
    def forget(ref: weakref.ref) -> None:
        entry = _entries.get(key)
        if entry is not None and entry.ref is ref:
            del _entries[key]

    return forget


def refresh(model: nn.Module | None = None) -> None:
    """Forget what was derived from the weights of `model` (of every model where it is None).

    Needed only after an edit that hides from PyTorch's version counter and touches a few elements, such as
    `model.conv1.weight.data[0, 0, 0, 0] = 0`.
    """
    if model is None:
        _entries.clear()
        return
    for w in model.parameters():
        _entries.pop(id(w), None)


def report() -> list[Row]:
    """The packs that are kept now."""
    return [
        Row(tuple(entry.state[2]), key, pack.numel() * pack.element_size())
        for entry in list(_entries.values())
        for key, pack in list(entry.packs.items())
        if pack is not None
    ]


def kept_bytes() -> int:
    """Bytes of all kept packs."""
    return sum(row.bytes for row in report())
