"""Memory that tells: canaries behind what is allocated, and buffers that end where a page begins that nobody may touch.

As a script: random problems of the cpu backend whose every tensor ends at such a page. A kernel that reads or writes
one element too far ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CANARY = 12345.0
BEHIND = 64


@contextlib.contextmanager
def canaries() -> Iterator[Callable[[], int]]:
    """Floating tensors from torch.empty and torch.empty_like hold NaN and have a canary behind them.

    Gives a function that counts the canaries that were written over.
    """
    empty, empty_like = torch.empty, torch.empty_like
    kept: list[Tensor] = []

    def guard(v: Tensor) -> Tensor:
        if not v.is_floating_point() or v.device.type == "meta":
            return v
        memory = empty(v.numel() + BEHIND, dtype=v.dtype, device=v.device)
        memory[: v.numel()] = float("nan")
        memory[v.numel() :] = CANARY
        kept.append(memory[v.numel() :])
        return memory.as_strided(v.shape, v.stride())

    torch.empty = lambda *args, **kwargs: guard(empty(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: guard(empty_like(*args, **kwargs))
    try:
        yield lambda: sum(int((canary != torch.tensor(CANARY, dtype=canary.dtype)).sum()) for canary in kept)
    finally:
        torch.empty, torch.empty_like = empty, empty_like


_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_maps: list[tuple[mmap.mmap, object]] = []


def ended_by_a_page(v: Tensor) -> Tensor:
    """The same values and strides in memory whose last byte is followed by a page without access."""
    size = v.untyped_storage().nbytes()
    pages = -(-size // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if _libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    memory = (ctypes.c_char * size).from_buffer(area, pages * mmap.PAGESIZE - size)
    _maps.append((area, memory))
    flat = torch.frombuffer(memory, dtype=v.dtype)
    return flat.as_strided(v.shape, v.stride()).copy_(v)


def guarding(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make` with a page behind what it gives."""

    def guarded(*args: object, **kwargs: object) -> Tensor:
        v = make(*args, **kwargs)
        return ended_by_a_page(v) if v.numel() and v.is_floating_point() else v

    return guarded


def run(seed: int, count: int) -> None:
    """`count` random problems in each dtype."""
    from backends import test_cpu
    from kernels import oracle

    from wrn_fast.backends import cpu

    empty, empty_like = torch.empty, torch.empty_like
    for dtype in test_cpu.DTYPES:
        for case in test_cpu.cases(seed, dtype, count):
            tensors = {
                name: v if v is None or not v.numel() else ended_by_a_page(v) for name, v in case.tensors.items()
            }
            case = oracle.Case(case.problem, tensors)
            torch.empty, torch.empty_like = guarding(empty), guarding(empty_like)
            try:
                test_cpu.fprop(cpu, case)
                test_cpu.dgrad(cpu, case)
                drop = tensors["rng"] if case.problem.drop_at == "prologue" else None
                sources = (tensors[name] for name in ("dy", "x", "stats", "gamma", "beta"))
                cpu.wgrad(test_cpu.source_problem(case), *sources, drop)
            finally:
                torch.empty, torch.empty_like = empty, empty_like
            _maps.clear()


def one_byte_too_far() -> None:
    """Reads behind the end of a guarded tensor, which ends the process if the guard is alive."""
    v = ended_by_a_page(torch.zeros(5))
    ctypes.string_at(v.data_ptr() + v.numel() * v.element_size(), 1)


if __name__ == "__main__":
    if sys.argv[1] == "plant":
        one_byte_too_far()
    else:
        run(int(sys.argv[1]), int(sys.argv[2]))
    print("survived")
