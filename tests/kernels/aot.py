"""Ahead of time, with no GPU: what a launch would compile, compiled for a target, and what came out, counted.

    python tests/kernels/aot.py --only 'sm_90 bf16 n128 160'    prints what those cases compile to
    python tests/kernels/aot.py --write                         compiles every case and writes aot.json

The launchers run on tensors without memory; a recorder takes the place of the JIT, so kernels, arguments and tiles are
the shipped ones. "issue" is what a scheduler must issue in the main loop for every clock of the tensor cores there:
instructions of a warp x warps / 4 schedulers / tensor clocks. From 1 on the tensor cores must starve.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wrn_fast.kernels.configs import ARCHS, heuristic
from wrn_fast.problem import ConvProblem

TABLE = Path(__file__).with_name("aot.json")
TARGETS = ("sm_80", "sm_90", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Multiplications and additions that the tensor cores of an SM or CU finish in a clock, dense, 16-bit.
_FMA_PER_CLOCK = {"sm_80": 1024, "sm_90": 2048, "gfx942": 1024}
_PRECISION = {"sm_80": "tf32x3", "sm_90": "tf32x3", "gfx942": "bf16x6"}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
ACT = {"prologue": True, "affine": True, "act": "relu", "eps": 1e-5}


@dataclass(frozen=True)
class Aot:
    """One launch of a network's layer: its operator, problem and target."""

    name: str
    op: str
    problem: ConvProblem
    target: str


def _layer(
    c: int, k: int, h: int, batch: int, dtype: torch.dtype, taps: int = 3, stride: int = 1, **parts
) -> ConvProblem:
    return ConvProblem("cuda", dtype, dtype, batch, h, h, c, k, taps, taps, stride, (taps // 2,) * 4, **parts)


def _problems(dtype: torch.dtype, batch: int) -> Iterator[tuple[str, str, ConvProblem]]:
    """(name, operator, problem) of the layers of WRN-d-10, d-4, d-2 and d-1 on 32x32 images."""
    sizes = {160: 32, 320: 16, 640: 8, 64: 32, 128: 16, 256: 8, 32: 32, 16: 32}
    for width, h in sizes.items():
        layer = partial(_layer, width, width, h, batch, dtype)
        yield f"{width} conv1", "fprop", layer(**ACT, want_stats=True)
        yield f"{width} conv2", "fprop", layer(**ACT, residual=True, want_stats=True)
        yield f"{width} eval", "fprop", layer(residual=True, bias=True, act_out="relu")
        yield f"{width} dgrad", "dgrad", layer(**ACT, want_stats=True)
        yield f"{width} wgrad", "wgrad", layer(**ACT)
    for c, k, h, stride in ((16, 160, 32, 1), (160, 320, 32, 2), (320, 640, 16, 2), (32, 64, 32, 2), (64, 128, 32, 2)):
        short = {
            "short_C": c,
            "short_stride": stride,
            "short_prologue": True,
            "short_affine": True,
            "short_act": "relu",
        }
        out = h // stride
        yield f"{c}-{k} conv1", "fprop", _layer(c, k, h, batch, dtype, stride=stride, **ACT, want_stats=True)
        yield f"{c}-{k} conv2", "fprop", _layer(k, k, out, batch, dtype, **ACT, **short, want_stats=True)
        yield f"{c}-{k} dgrad", "dgrad", _layer(c, k, h, batch, dtype, stride=stride, **ACT, want_stats=True)
        yield f"{c}-{k} wgrad", "wgrad", _layer(c, k, h, batch, dtype, stride=stride, **ACT)
        yield (
            f"{c}-{k} short dgrad",
            "dgrad",
            _layer(c, k, h, batch, dtype, taps=1, stride=stride, **ACT, want_stats=True),
        )
    yield "3-16 conv1", "fprop", _layer(3, 16, 32, batch, dtype, want_stats=True)
    yield "3-16 wgrad", "wgrad", _layer(3, 16, 32, batch, dtype)
    for width, h in ((160, 32), (16, 32)):
        layer = partial(_layer, width, width, h, batch, dtype, 1)
        yield f"{width} bn_bwd_apply", "bn_bwd_apply", layer(prologue=True, affine=True, batch_stats=True)
        yield f"{width} channel_stats", "channel_stats", layer()
        yield f"{width} dropout", "dropout", layer(p=0.3, drop_at="output")


# Layers compiled besides those of bf16 at batch 128 on sm_90: elsewhere the code is the same but for constants.
_FEWER = {
    "sm_80": ("160 ", "320 ", "640 conv1", "64 ", "16 conv1", "160-320 ", "3-16 "),
    "gfx942": ("160 ", "640 conv1", "64 ", "16 conv1", "160-320 ", "3-16 "),
    "fp16": ("160 conv1", "160 dgrad", "160 wgrad"),
    "fp32": ("160 ", "64 conv1", "160-320 conv2", "3-16 "),
    "n1": ("160 eval", "320 eval", "640 eval", "32 eval"),
}


def cases() -> dict[str, Aot]:
    """Every launch that is compiled, by name."""
    found = {}
    for target in TARGETS:
        for dtype, batch in (("bf16", 128), ("bf16", 1), ("fp16", 128), ("fp32", 128)):
            for what, op, problem in _problems(DTYPES[dtype], batch):
                if all(what.startswith(_FEWER[key]) for key in (target, dtype, f"n{batch}") if key in _FEWER):
                    name = f"{target} {dtype} n{batch} {what}"
                    found[name] = Aot(name, op, problem, target)
    return found


def tensors(problem: ConvProblem) -> dict[str, Tensor | None]:
    """Tensors without memory that fit the problem."""
    p = problem
    wide = p.stats_dtype

    def nhwc(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=p.dtype, device="meta").contiguous(memory_format=torch.channels_last)

    def vector(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=wide, device="meta") if wanted else None

    short = p.short_C > 0
    return {
        "x": nhwc(p.N, p.C, p.H, p.W), "w": nhwc(p.K, p.C, p.R, p.S), "dy": nhwc(p.N, p.K, p.P, p.Q),
        "stats": vector(p.prologue, 2, p.C), "gamma": vector(p.affine, p.C), "beta": vector(p.affine, p.C),
        "bias": vector(p.bias, p.K), "residual": nhwc(p.N, p.K, p.P, p.Q) if p.residual else None,
        "x_short": nhwc(p.N, p.short_C, p.P * p.short_stride, p.Q * p.short_stride) if short else None,
        "w_short": nhwc(p.K, p.short_C, 1, 1) if short else None,
        "stats_short": vector(p.short_prologue, 2, p.short_C), "gamma_short": vector(p.short_affine, p.short_C),
        "beta_short": vector(p.short_affine, p.short_C),
        "rng": torch.empty(2, dtype=torch.int64, device="meta") if p.p > 0 else None,
        "out_scale": vector(p.act_out != "none", p.K), "out_shift": vector(p.act_out != "none", p.K),
    }  # fmt: skip


def launches(case: Aot) -> list[tuple[Any, tuple, dict]]:
    """(kernel, arguments, keywords) of every launch, in order."""
    from triton.runtime.jit import JITFunction

    seen: list[tuple[Any, tuple, dict]] = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: seen.append((self, args, kwargs))
    try:
        _call(case)
    finally:
        JITFunction.run = run
    return seen


def _call(case: Aot) -> None:
    from kernels.interpreted import FPROP, PROLOGUE

    from wrn_fast.kernels import bn_bwd_apply, dgrad, dropout, fprop, stats, wgrad

    op, problem, t = case.op, case.problem, tensors(case.problem)
    tile = ()
    if op in ("fprop", "dgrad", "wgrad"):
        precision = _PRECISION[case.target] if problem.dtype == torch.float32 else "ieee"
        tile = (heuristic(op, problem, ARCHS[case.target]), precision)
    vectors = [t[n] for n in PROLOGUE]
    calls: dict[str, Callable] = {
        "fprop": lambda: fprop.fprop(problem, *tile, *[t[n] for n in FPROP]),
        "dgrad": lambda: dgrad.dgrad(problem, *tile, t["dy"], t["x"], t["w"], *vectors),
        "wgrad": lambda: wgrad.wgrad(problem, *tile, t["dy"], t["x"], *vectors),
        "bn_bwd_apply": lambda: bn_bwd_apply.bn_bwd_apply(
            problem, t["x"], t["x"], t["stats"], t["gamma"], torch.empty((2, problem.C), device="meta")
        ),
        "channel_stats": lambda: stats.channel_stats(problem, t["x"]),
        "dropout": lambda: dropout.dropout(problem, t["x"], t["rng"]),
    }
    calls[op]()


def compile_launch(launch: tuple[Any, tuple, dict], target: str, **more: Any) -> Any:
    """The compiled kernel of a launch; aligned pointers, as torch's allocator gives them. `more` are options."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, args, keywords = launch
    values = dict(zip((p.name for p in kernel.params), args))
    values |= {name: v for name, v in keywords.items() if name in {p.name for p in kernel.params}}
    options = {name: v for name, v in keywords.items() if name not in values}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        v = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", v
        elif isinstance(v, Tensor):
            signature[parameter.name], attributes[(i,)] = _POINTERS[v.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(v, float) else "i32"
    backend = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=backend, options=options | more)


def compiled(case: Aot) -> list[dict[str, Any]]:
    """Counts of each kernel of a case, one a distinct kernel and tile."""
    found: dict[str, dict[str, Any]] = {}
    for launch in launches(case):
        kernel = compile_launch(launch, case.target)
        if kernel.hash not in _counted:
            _counted[kernel.hash] = {"kernel": launch[0].__name__.strip("_"), **count(kernel, launch[2], case)}
        found[kernel.hash] = _counted[kernel.hash]
    return list(found.values())


_counted: dict[str, dict[str, Any]] = {}


def count(kernel: Any, keywords: dict, case: Aot) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, tensor instructions, narrow loads and the issue rate."""
    gfx = case.target.startswith("gfx")
    out = _count_gfx(kernel.asm["amdgcn"]) if gfx else _count_sm(kernel.asm)
    out["smem"] = kernel.metadata.shared
    listing = out.pop("listing")
    tensor = ("v_mfma",) if gfx else ("HGMMA", "HMMA")
    length = _main_loop(listing, tensor)
    if "COLS0" in keywords and length and not gfx:
        rows = keywords.get("BLOCK_ROWS", keywords.get("BLOCK_C"))
        red = keywords.get("BLOCK_RED", keywords.get("BLOCK_PIXELS"))
        columns = keywords["COLS0"] + keywords["COLS1"]
        clocks = rows * columns * red / _FMA_PER_CLOCK[case.target]
        if case.problem.dtype == torch.float32:
            clocks *= 6  # three tf32 products at half the rate, or six bf16 ones
        out["issue"] = round(length * keywords["num_warps"] / 4 / clocks, 3)
    return out


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True, timeout=120).stdout


def _count_sm(asm: dict) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    ptx = asm["ptx"]
    tensor = collections.Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k\d+)", ptx))
    tensor += collections.Counter(re.findall(r"mma\.sync\.aligned\.(m16n8k\d+)", ptx))
    listing = re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)", sass, re.M)
    names = [name for _, name, _ in listing]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spilled": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "tensor": dict(sorted(tensor.items())),
        "narrow": sum(name.startswith(("LDG.E.U16", "LDG.E.S16", "LDG.U16")) for name in names),
        "listing": listing,
    }


def _count_gfx(assembly: str) -> dict[str, Any]:
    field = lambda name: int(re.search(name + r":?\s+(\d+)", assembly).group(1))
    listing = re.findall(r"^(\.LBB\d+_\d+):|^\s+([a-z][a-z0-9_]+)(.*)", assembly, re.M)
    names = [name for _, name, _ in listing]
    return {
        "registers": field(r"\.vgpr_count"),
        "spilled": 4 * field(r"\.vgpr_spill_count"),
        "tensor": dict(sorted(collections.Counter(n.removeprefix("v_mfma_") for n in names if "v_mfma" in n).items())),
        "narrow": sum(bool(re.match(r"(buffer|global)_load_(ushort|short|u16)", name)) for name in names),
        "listing": listing,
    }


def _main_loop(listing: list[tuple[str, str, str]], tensor: tuple[str, ...]) -> int:
    """Instructions of the smallest loop with a tensor instruction; 0 where a short loop was unrolled."""
    labels: dict[str, int] = {}
    names: list[str] = []
    best = 0
    for label, name, rest in listing:
        if label:
            labels[label] = len(names)
            continue
        names.append(name)
        jump = re.search(r"\.L_x_\d+|\.LBB\d+_\d+", rest)
        if name.startswith(("BRA", "s_cbranch", "s_branch")) and jump and jump.group(0) in labels:
            body = names[labels[jump.group(0)] :]
            if any(n.startswith(tensor) for n in body) and (not best or len(body) < best):
                best = len(body)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="count what the shipped kernels compile to")
    parser.add_argument("--write", action="store_true", help=f"make {TABLE.name} anew")
    parser.add_argument("--more", action="store_true", help="add the cases that it does not have")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    args = parser.parse_args()
    import triton

    table = json.loads(TABLE.read_text()) if TABLE.exists() and args.more else {"triton": "", "rows": {}}
    same = table["triton"] == triton.__version__
    rows = {name: row for name, row in table["rows"].items() if same and name in cases()}
    for name, case in cases().items():
        if not re.search(args.only, name) or name in rows:
            continue
        rows[name] = compiled(case)
        print(name, *rows[name], sep="\n    ", flush=True)
        if args.write or args.more:
            lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(row)}" for n, row in sorted(rows.items()))
            TABLE.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "rows": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(root / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
