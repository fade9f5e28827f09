"""`wrn-fast info`: versions, chips, extensions, and for typical problems which backend runs each operator and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from wrn_fast import __version__, dispatch, machine, native, packing
from wrn_fast._build import missing_extension_reason
from wrn_fast.backends import cpu, cuda
from wrn_fast.errors import WrnFastError
from wrn_fast.precision import current, pinned
from wrn_fast.problem import ConvProblem

NAME = "info"
HELP = "what each operator would use here, and why not the others"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
OPS = ("fprop", "dgrad", "wgrad", "bn_bwd_apply")
_OPENMP = re.compile(r"lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*$")


def options(parser: argparse.ArgumentParser) -> None:
    """--batch, --depth and --width, for the problems."""
    parser.add_argument("--batch", type=int, default=8, help="images of the typical problems (default 8)")
    parser.add_argument("--depth", type=int, default=28, help="of the network whose layers are shown (default 28)")
    parser.add_argument("--width", type=int, default=10, help="its widening factor (default 10)")


def layers(width: int) -> tuple[tuple, ...]:
    """Layers of a WRN-n-`width`, one of each kind: name, C, K, image, stride, C of the 1x1 shortcut."""
    one, two, three = 16 * width, 32 * width, 64 * width
    return (
        ("stem", 3, 16, 32, 1, 0),
        ("first", 16, one, 32, 1, 0),
        ("group 1", one, one, 32, 1, 0),
        ("stride 2", one, two, 32, 2, 0),
        ("shortcut", two, two, 16, 1, one),
        ("group 2", two, two, 16, 1, 0),
        ("group 3", three, three, 8, 1, 0),
    )


def problem(layer: tuple, op: str, dtype: torch.dtype, device: str, batch: int) -> ConvProblem:
    """One operator of a training step of WRN-28-10 as the dispatcher sees it."""
    name, c, k, image, stride, short = layer
    common: dict[str, Any] = {"N": batch, "H": image, "W": image, "C": c, "eps": 1e-5}
    if op == "bn_bwd_apply":
        return ConvProblem(
            device, dtype, dtype, K=c, R=1, S=1, prologue=True, affine=True, batch_stats=True, want_stats=True, **common
        )
    common |= {"K": k, "R": 3, "S": 3, "stride": stride, "pad": (1, 1, 1, 1)}
    if name != "stem":
        common |= {"act": "relu", "prologue": True, "affine": True, "batch_stats": True}
    if op == "fprop" and short:
        common |= {
            "short_C": short,
            "short_stride": 2,
            "short_prologue": True,
            "short_affine": True,
            "short_act": "relu",
        }
    return ConvProblem(
        device, dtype, dtype, residual=op == "fprop" and name.startswith("group"), want_stats=op != "wgrad", **common
    )


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes mapped into this process: more than one means two pools of threads."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    paths = {
        line.split()[-1] for line in maps.read_text(encoding="utf-8", errors="replace").splitlines() if "/" in line
    }
    return sorted({Path(path).name for path in paths if _OPENMP.search(path)})


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of each visible GPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        found.append({"name": about.name, "capability": capability, "bytes": about.total_memory})
    return found


def extensions() -> dict[str, str]:
    """Each extension: what it was built for, or why it is not there."""
    found = {"_cpu": f"built, runs {native.isa()}" if native.isa() else missing_extension_reason("_cpu")}
    named = "not run on a GPU yet, so it serves only where WRN_FAST_BACKEND names cuda or a tuned row prefers it"
    return {**found, "_cuda": cuda.missing() or f"built; {named}"}


def choices(device: str, batch: int, width: int = 10) -> list[dict[str, Any]]:
    """For each problem: the backend of each operator, and every other's reason."""
    rows = []
    for layer in layers(width):
        for dtype in DTYPES:
            uses: dict[str, str | None] = {}
            why_not: dict[str, str] = {}
            for op in OPS:
                asked = problem(layer, op, dtype, device, batch)
                reasons = dispatch.explain(op, asked)
                uses[op] = _name(next((name for name, reason in reasons.items() if reason is None), None), op, asked)
                why_not |= {name: reason for name, reason in reasons.items() if reason is not None}
            rows.append(
                {"layer": layer[0], "problem": _text(layer, batch), "device": device, "dtype": _short(dtype),
                 "uses": uses, "why_not": why_not}
            )  # fmt: skip
    return rows


def _name(backend: str | None, op: str, asked: ConvProblem) -> str | None:
    """The backend, with the algorithm that it says it would run."""
    tell = getattr(dispatch.load(backend), "algorithm", None) if backend else None
    algorithm = tell(op, asked) if tell else None
    return f"{backend} {algorithm}" if algorithm else backend


def _text(layer: tuple, batch: int) -> str:
    _, c, k, image, stride, short = layer
    text = f"{batch}x{image}x{image}, {c} to {k}" + (f" stride {stride}" if stride > 1 else "")
    return text + (f" + 1x1 of {short}" if short else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory(batch: int, depth: int, width: int) -> dict[str, Any]:
    """What float32 inference by the cpu backend holds beside the memory of plain PyTorch, in bytes."""
    if native.isa() is None:
        return {}
    times = {"stem": 1, "first": 1, "stride 2": 1} | dict.fromkeys(("group 1", "group 2", "group 3"), depth // 3 - 2)
    one = layers(width)
    again = ("stride 2", one[3][2], 2 * one[3][2], 16, 2, 0)
    packed = sum(
        times.get(layer[0], 0) * cpu.packed_bytes(problem(layer, "fprop", torch.float32, "cpu", batch))
        for layer in (*one, again)
    )
    return {
        f"packed filters of WRN-{depth}-{width}": packed if packing.enabled() else 0,
        "activations kept at most": cpu.KEPT_BYTES,
        "scratch held now": native.scratch_bytes(),
    }


def gather(batch: int, depth: int, width: int) -> dict[str, Any]:
    """Everything that `info` says."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    kept = packing.report()
    return {
        "versions": {
            "wrn_fast": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "cuda of torch": torch.version.cuda, "hip of torch": torch.version.hip, "triton": _version("triton"),
            "system": platform.platform(),
        },
        "cpu": {
            "name": machine.processor(torch.device("cpu")), "torch's": torch.backends.cpu.get_cpu_capability(),
            "wrn_fast's": native.isa(), "threads": torch.get_num_threads(),
        },
        "gpus": gpus(),
        "extensions": extensions(),
        "openmp": openmp_runtimes(),
        "backends": list(dispatch.selection()),
        "precision": current(),
        "pinned algorithm": pinned(),
        "packed filters": {"kept": len(kept), "bytes": packing.kept_bytes()},
        "memory of inference": memory(batch, depth, width),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _watched(name)},
        "choices": [row for device in devices for row in choices(device, batch, width)],
    }  # fmt: skip


def _watched(name: str) -> bool:
    return name.startswith("WRN_FAST_") or name in ("OMP_NUM_THREADS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], Sequence[Any]]:
    """Gather and lay out."""
    depth, width = arguments.depth, arguments.width
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise WrnFastError(f"`--depth`, `--width`: expected 10, 16, 22, 28, ... and at least 1, got {depth}, {width}")
    data = gather(arguments.batch, depth, width)
    return 0, data, list(_lines(data, f"WRN-{depth}-{width}"))


def _lines(data: dict[str, Any], network: str) -> Sequence[Any]:
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in data.items():
        if key != "choices":
            facts.add_row(key, _plain(value))
    table = Table(f"layer of {network}", "problem", "device", "dtype", *OPS)
    reasons: dict[str, list[str]] = {}
    for row in data["choices"]:
        used = (row["uses"][op] or "none" for op in OPS)
        table.add_row(row["layer"], row["problem"], row["device"], row["dtype"], *used)
        for name, reason in row["why_not"].items():
            seen = reasons.setdefault(f"{name}: {reason}", [])
            if row["dtype"] not in seen:
                seen.append(row["dtype"])
    return [facts, table, *(f"not {reason} ({', '.join(dtypes)})" for reason, dtypes in reasons.items())]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None) or "none"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
