"""Packed filters, kept as long as their weight stays what it was.

A filter is packed anew in each call until a call finds it unchanged since the call before: then its pack is kept. So a
training step, which changes every filter, keeps nothing, and inference, attacks and Monte-Carlo sampling pack once.

Unchanged means: the same object, with equal (pointer, dtype, shape, strides, version) and an equal fingerprint. The
version alone is not enough: fused optimizers, broadcasts of DistributedDataParallel and writes through `.data` do not
move it. The fingerprint reads 64 elements, so a hidden write to a few others goes unseen: `refresh` is for that.

`WRN_FAST_PACK_CACHE=0` keeps nothing: every call packs into scratch memory.
"""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wrn_fast.checks import check_model

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


@dataclass
class _Derived:
    """What was known of several tensors when they were last seen, and what was made of them, if it is kept."""

    refs: tuple[weakref.ref, ...]
    state: tuple
    made: tuple[Tensor, ...] | None = None


_entries: dict[int, _Entry] = {}
_derived: dict[int, _Derived] = {}
_refreshed = 0  # calls of `refresh`


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


def derived(
    sources: Sequence[Tensor], constants: Hashable, make: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`make()`, kept by the rule of `lookup` while none of the tensors that it reads changes.

    Args:
        sources: the tensors, dense, on the CPU; the first is nobody else's first.
        constants: what else the result depends on.
        make: reads the sources and makes new tensors.
    """
    if not enabled():
        return make()
    key = id(sources[0])
    entry = _derived.get(key)
    state = (constants, *(_state(t, fingerprint(t)) for t in sources))
    same = entry is not None and all(ref() is t for ref, t in zip(entry.refs, sources, strict=False))
    if entry is None or not same or entry.state != state:
        refs = (weakref.ref(sources[0], _forget_derived(key)), *(weakref.ref(t) for t in sources[1:]))
        _derived[key] = _Derived(refs, state)
        return make()
    if entry.made is None:
        entry.made = make()
    return entry.made


def fingerprint(v: Tensor) -> int:
    """A hash of SAMPLES elements of a dense tensor, `sample_step` apart, by their bits: NaN equals itself."""
    count = v.numel()
    bits = v.detach().as_strided((count,), (1,)).view(_BITS[v.element_size()])
    return hash(tuple(bits[_positions(count)].tolist()))


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.lru_cache(maxsize=1024)
def _positions(count: int) -> Tensor:
    return torch.arange(min(count, SAMPLES), device="cpu") * sample_step(count) % count


def _forget_derived(key: int) -> Callable[[weakref.ref], None]:
    def forget(ref: weakref.ref) -> None:
        entry = _derived.get(key)
        if entry is not None and entry.refs[0] is ref:
            del _derived[key]

    return forget


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

    Args:
        model: any module; None: every model.

    Raises:
        WrnFastError: `model` is neither.
    """
    global _refreshed
    _refreshed += 1
    if model is None:
        _entries.clear()
        _derived.clear()
        return
    check_model(model)
    for w in model.parameters():
        _entries.pop(id(w), None)
        _derived.pop(id(w), None)


def generation() -> int:
    """A number that each `refresh` moves."""
    return _refreshed


def report() -> list[Row]:
    """The packs that are kept now."""
    packs = [
        Row(tuple(entry.state[2]), key, pack.numel() * pack.element_size())
        for entry in list(_entries.values())
        for key, pack in list(entry.packs.items())
        if pack is not None
    ]
    folded = [
        Row(tuple(v.shape), "folded", v.numel() * v.element_size())
        for entry in list(_derived.values())
        for v in entry.made or ()
    ]
    return packs + folded


def kept_bytes() -> int:
    """Bytes of all kept packs."""
    return sum(row.bytes for row in report())
