"""Ahead of time, with no GPU: what a launch would compile, compiled for a target, and what came out, counted.

    PYTHONPATH=.:tests python -m kernels.aot --only 'sm_90 bf16 n128 160'    prints what those cases compile to
    PYTHONPATH=.:tests python -m kernels.aot --write                         compiles every case and writes aot.json

The launchers run on tensors without memory; a recorder takes the place of the JIT, so kernels, arguments and tiles are
the shipped ones. "issue" is what a scheduler must issue in the main loop for every clock of the tensor cores there:
instructions of a warp x warps / 4 schedulers / tensor clocks. From 1 on the tensor cores must starve. (A scheduler of
gfx942 takes one instruction of each kind in a clock and four clocks for most, so there it only compares versions.)
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from kernels.shipped import Shipped, cases
from torch import Tensor

from wrn_fast.kernels.bound import Bound, options
from wrn_fast.kernels.configs import ARCHS, Arch, arch_of, heuristic, in_fp8
from wrn_fast.masks import shape as mask_shape
from wrn_fast.problem import ConvProblem

TABLE = Path(__file__).with_name("aot.json")
# Multiplications and additions that the tensor cores of an SM or CU finish in a clock, dense, 16-bit.
_FMA_PER_CLOCK = {"sm_80": 1024, "sm_89": 256, "sm_90": 2048, "gfx942": 1024}
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


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


class Launch(NamedTuple):
    """A kernel, its arguments by name, its options."""

    kernel: Any
    values: dict[str, Any]
    options: dict[str, Any]


def launches(case: Shipped) -> list[Launch]:
    """Every launch, in order."""
    seen: list[Launch] = []

    def record(self, grid, tensors, numbers, constants, warps=4, stages=None):
        values = zip((p.name for p in self.kernel.params), (*tensors, *numbers, *constants), strict=True)
        seen.append(Launch(self.kernel, dict(values), options(warps, stages)))

    with mock.patch.object(Bound, "__call__", record):
        _call(case)
    return seen


def arch_of_target(target: str) -> Arch:
    """What the rule knows of a target."""
    return ARCHS[target] if target in ARCHS else arch_of((int(target[3]), int(target[4:])), ARCHS["sm_86"].sms)


def _ranges(case: Shipped) -> Any:
    from wrn_fast.kernels.fp8 import Ranges

    if case.precision != "fp8":
        return None
    one = torch.empty(1, device="meta")
    dtype = torch.float8_e4m3fnuz if case.target.startswith("gfx") else torch.float8_e4m3fn
    return Ranges(one, one if case.problem.short_C else None, dtype)


def _call(case: Shipped) -> None:
    from kernels.interpreted import FPROP, PROLOGUE

    from wrn_fast.kernels import bn_bwd_apply, dgrad, dropout, fprop, head, masks, stats, wgrad

    op, problem, t = case.op, case.problem, tensors(case.problem)
    tile = ()
    if op in ("fprop", "dgrad", "wgrad", "input_grad"):
        arch = arch_of_target(case.target)
        config = replace(heuristic("dgrad" if op == "input_grad" else op, problem, arch), box=case.box)
        tile = (in_fp8(config, problem, arch) if case.precision == "fp8" else config, case.precision)
    vectors = [t[n] for n in PROLOGUE]
    calls: dict[str, Callable] = {
        "fprop": lambda: fprop.fprop(problem, *tile, *[t[n] for n in FPROP], _ranges(case)),
        "dgrad": lambda: dgrad.dgrad(problem, *tile, t["dy"], t["x"], t["w"], *vectors),
        "wgrad": lambda: wgrad.wgrad(problem, *tile, t["dy"], t["x"], *vectors),
        "bn_bwd_apply": lambda: bn_bwd_apply.bn_bwd_apply(
            problem, t["x"], t["x"], t["stats"], t["gamma"], torch.empty((2, problem.C), device="meta")
        ),
        "input_grad": lambda: dgrad.input_grad(
            problem,
            *tile,
            t["dy"],
            t["w"],
            torch.empty(mask_shape(t["x"].shape), dtype=torch.uint8, device="meta"),
            torch.empty(problem.C, device="meta"),
        ),
        "act_mask": lambda: masks.act_mask(problem, t["x"], *vectors),
        "channel_stats": lambda: stats.channel_stats(problem, t["x"]),
        "dropout": lambda: dropout.dropout(problem, t["x"], t["rng"]),
        "head": lambda: head.head(
            problem, t["x"], *vectors, torch.empty((problem.K, problem.C), device="meta"), t["bias"]
        ),
        "head_bwd": lambda: head.head_bwd(
            problem, torch.empty((problem.N, problem.C), device="meta"), t["x"], *vectors
        ),
    }
    calls["renew"] = lambda: _renew(problem)
    calls[op]()


def _renew(problem: ConvProblem) -> None:
    """What a graph's filters and BatchNorms are made again by."""
    from wrn_fast.kernels.triton_weights import Norm, Renewer

    renewer, p = Renewer(torch.device("meta")), problem
    w = torch.empty((p.K, p.C, p.R, p.S), dtype=p.w_dtype, device="meta")
    renewer.add_filter(w, torch.empty((p.K, p.R, p.S, p.C), dtype=p.dtype, device="meta"))
    of_norm = p.w_dtype, p.w_dtype, p.stats_dtype
    renewer.add_norm(Norm(1e-5, True, True, p.dtype.itemsize > 2, *of_norm), p.C, *(0,) * 6)
    renewer.renew(True)


def compile_launch(launch: Launch, target: str, **more: Any) -> Any:
    """The compiled kernel of a launch; aligned pointers, as torch's allocator gives them. `more` are options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel, values, options = launch
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        v = values[parameter.name]
        if parameter.is_constexpr or v is None:
            signature[parameter.name], constants[(i,)] = "constexpr", v
        elif isinstance(v, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{_POINTERS[v.base.dtype][1:]}{list(v.block_shape)}>"
        elif isinstance(v, Tensor):
            signature[parameter.name], attributes[(i,)] = _POINTERS[v.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(v, float) else "i32"
    backend = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=backend, options=options | more)


def compiled(case: Shipped) -> list[dict[str, Any]]:
    """Counts of each kernel of a case, one a distinct kernel and tile."""
    found: dict[str, dict[str, Any]] = {}
    for launch in launches(case):
        kernel = compile_launch(launch, case.target)
        if kernel.hash not in _counted:
            _counted[kernel.hash] = {
                "kernel": launch.kernel.__name__.strip("_"),
                **count(kernel, launch, case),
            }
        found[kernel.hash] = _counted[kernel.hash]
    return list(found.values())


_counted: dict[str, dict[str, Any]] = {}


def count(kernel: Any, launch: Launch, case: Shipped) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, tensor instructions, narrow loads and the issue rate."""
    gfx = case.target.startswith("gfx")
    out = _count_gfx(kernel.asm["amdgcn"]) if gfx else _count_sm(kernel.asm)
    out["smem"] = kernel.metadata.shared
    listing = out.pop("listing")
    if not case.box:
        out.pop("tma", None)
    tensor = ("v_mfma",) if gfx else ("HGMMA", "HMMA", "QGMMA", "QMMA")  # Q: of e4m3
    length = _main_loop(listing, tensor)
    v = launch.values
    if "COLS0" in v and length:
        rows, red = v.get("BLOCK_ROWS", v.get("BLOCK_C")), v.get("BLOCK_RED", v.get("BLOCK_PIXELS"))
        columns = v["COLS0"] + v["COLS1"]
        clocks = rows * columns * red / _FMA_PER_CLOCK[case.target]
        # tf32 has half the rate of 16 bits, and is multiplied three times where it stands for float32.
        clocks *= {"tf32": 2, "tf32x3": 6, "bf16x6": 6, "fp8": 0.5}.get(case.precision, 1)
        out["issue"] = round(length * launch.options["num_warps"] / 4 / clocks, 3)
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
        "tma": names.count("UTMALDG.4D"),
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
    main()
