"""Builds the host-run tool (machine.h) and calls whole Hopper kernels on the CPU, on tensors of this process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc" / "cuda"
# In place of CUDA's headers, so that the tool needs no toolkit.
STUB = HERE / "stub"
ACTS = ("identity", "relu", "silu", "leaky_relu")
TILES = ("fetch9", "shift3")
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
# Blocks of 16, 32 and (shift3) 64 channels alone: a fifth of the compiler's time.
NARROW = ("-DHOST_RUN_NARROW",)


class ConvShape(Structure):
    _fields_ = [(name, c_int64) for name in "NHWCKPQ"] + [
        (name, c_int32) for name in ("R", "S", "stride", "pad_left", "pad_right", "pad_top", "pad_bottom")
    ]


class Prologue(Structure):
    _fields_ = [("scale", c_void_p), ("shift", c_void_p), ("act", c_int32), ("slope", c_float)]


class Mask(Structure):
    _fields_ = [("rng", c_void_p), ("threshold", c_uint32), ("scale", c_double)]


class Launch(Structure):
    _fields_ = [("splits", c_int32), ("partials", c_void_p), ("counters", c_void_p), ("early", c_bool)]


class Fprop(Structure):
    _fields_ = [
        ("launch", Launch),
        ("shape", ConvShape), ("dtype", c_int32), ("tile", c_int32), ("x", c_void_p), ("prologue", Prologue),
        ("w", c_void_p), ("x_short", c_void_p), ("short_H", c_int64), ("short_W", c_int64), ("short_C", c_int64),
        ("short_stride", c_int32), ("short_prologue", Prologue), ("w_short", c_void_p), ("factor", c_void_p),
        ("factor_short", c_void_p), ("bias", c_void_p), ("residual", c_void_p), ("mask", Mask), ("drop_act", c_bool),
        ("y", c_void_p), ("y_act", c_void_p), ("act_out", c_int32), ("slope_out", c_float), ("out_scale", c_void_p),
        ("out_shift", c_void_p), ("counts", c_void_p), ("moments", c_void_p),
    ]  # fmt: skip


class Dgrad(Structure):
    _fields_ = [
        ("launch", Launch),
        ("shape", ConvShape), ("dtype", c_int32), ("tile", c_int32), ("dy", c_void_p), ("w", c_void_p),
        ("x", c_void_p), ("prologue", Prologue), ("mean", c_void_p), ("rstd", c_void_p), ("g", c_void_p),
        ("sums", c_void_p),
    ]  # fmt: skip


class Wgrad(Structure):
    _fields_ = [("shape", ConvShape), ("dtype", c_int32)] + [
        (name, c_void_p) for name in ("dy", "x", "workspace", "dw")
    ]


def compiler() -> str:
    found = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


def compile_all(folder: Path, jobs: list[tuple[str, str]], csrc: Path, flags: tuple[str, ...] = ()) -> list[str]:
    """Object files of (source, optimisation level)."""
    common = [
        compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-ffp-contract=off",
        f"-I{csrc}", f"-I{HERE}", f"-I{STUB}", *flags,
    ]  # fmt: skip

    def compile_one(job: tuple[str, str]) -> str:
        source, level = job
        out = str(folder / f"{source}.o")
        result = subprocess.run([*common, level, "-c", str(HERE / source), "-o", out], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        return out

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, jobs))


def compile_machine(folder: Path, everywhere: tuple[str, ...] = ()) -> list[str]:
    return compile_all(folder, [("machine.cpp", "-O3"), ("asynchronous.cpp", "-O3")], CSRC, everywhere)


def library(
    folder: Path, *, csrc: Path = CSRC, flags: tuple[str, ...] = (), objects: list[str] | None = None,
    everywhere: tuple[str, ...] = (),
) -> str:  # fmt: skip
    """The file of the tool. `flags` are for the kernels, `everywhere` for the machine and the linker too."""
    machine = compile_machine(folder, everywhere) if objects is None else objects
    kernels = compile_all(folder, [("host_run.cpp", "-O1")], csrc, (*flags, *everywhere))
    file = str(folder / "host_run.so")
    subprocess.run([compiler(), "-shared", *everywhere, *machine, *kernels, "-o", file], check=True)
    return file


def build(folder: Path, *, csrc: Path = CSRC, flags: tuple[str, ...] = (), objects: list[str] | None = None) -> Tool:
    """The tool with the kernels of `csrc`; a broken copy of them is built the same way."""
    return Tool(library(folder, csrc=csrc, flags=flags, objects=objects))


def pointer(v: Tensor | None) -> int | None:
    return None if v is None else v.data_ptr()


class Tool:
    """The built tool. Tensors are dense and in memory order: activations NHWC, filters KRSC."""

    def __init__(self, library: str) -> None:
        self.lib = ctypes.CDLL(library)
        for name in ("host_packed_bytes", "host_parts", "host_wgrad_workspace", "host_partial_bytes", "host_counters"):
            getattr(self.lib, name).restype = c_int64
        self.lib.host_wgrad_workspace.argtypes = [POINTER(ConvShape), c_int]
        self.lib.host_partial_bytes.argtypes = [POINTER(ConvShape), c_int, c_int]
        self.lib.host_counters.argtypes = [POINTER(ConvShape), c_int]
        self.lib.host_packed_bytes.argtypes = [c_int64, c_int64, c_int, c_int, c_int]
        self.lib.host_parts.argtypes = [POINTER(ConvShape), c_int, c_int]
        self.lib.host_refuses.restype = c_char_p
        self.lib.host_refuses.argtypes = [c_char_p, POINTER(ConvShape), c_int, c_int]
        self.lib.host_pack.argtypes = [c_void_p, c_int64, c_int64, c_int, c_int, c_int, c_int, c_void_p]
        for name in ("host_fprop", "host_dgrad", "host_wgrad"):
            getattr(self.lib, name).argtypes = [c_void_p, c_uint64, c_int, c_char_p, c_int]
        sizes = [self.lib.host_sizes(i) for i in range(4)]
        assert sizes == [ctypes.sizeof(t) for t in (Fprop, Dgrad, ConvShape, Wgrad)], "not the structures of sm90.h"

    def pack(self, w: Tensor, transpose: bool = False) -> Tensor:
        """The packed image of w [K,R,S,C]; `transpose` for dgrad: the rows are C then."""
        K, R, S, C = w.shape
        if transpose:
            K, C = C, K
        size = self.lib.host_packed_bytes(K, C, R, S, w.itemsize)
        out = torch.empty(size + 16, dtype=torch.uint8)
        out = out[-out.data_ptr() % 16 :][:size]
        self.lib.host_pack(w.contiguous().data_ptr(), K, C, R, S, transpose, w.itemsize, out.data_ptr())
        return out

    def parts(self, shape: ConvShape, dgrad: bool, tile: str) -> int:
        return self.lib.host_parts(byref(shape), dgrad, TILES.index(tile))

    def wgrad_workspace(self, shape: ConvShape, multiprocessors: int) -> int:
        return self.lib.host_wgrad_workspace(byref(shape), multiprocessors)

    def scratch(self, shape: ConvShape, dgrad: bool, splits: int) -> tuple[Tensor, Tensor]:
        """Partial sums, poisoned, and counters of a split reduction."""
        partials = torch.full((self.lib.host_partial_bytes(byref(shape), dgrad, splits) // 4,), torch.nan)
        return partials, torch.zeros(self.lib.host_counters(byref(shape), dgrad), dtype=torch.int32)

    def refuses(self, op: str, shape: ConvShape, dtype: torch.dtype, tile: str) -> str | None:
        reason = self.lib.host_refuses(op.encode(), byref(shape), DTYPES[dtype], TILES.index(tile))
        return None if reason is None else reason.decode()

    def run(self, op: str, args: Structure, seed: int, blocks: int) -> str:
        """What went wrong, or an empty string. `blocks`: of the persistent kernels; multiprocessors for wgrad."""
        message = ctypes.create_string_buffer(1000)
        getattr(self.lib, f"host_{op}")(byref(args), seed, blocks, message, len(message))
        return message.value.decode()
