"""The head of a report: machine, versions, commit, command, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path

import torch

import wrn_fast
from wrn_fast.machine import processor

ROOT = Path(__file__).resolve().parents[1]
# Environment variables that change a timing.
VARIABLES = ("WRN_FAST_", "OMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_")


def _output(*command: str) -> str:
    """What a command prints, empty where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu() -> str:
    """Name, family and model, and the vector instructions that matter here."""
    name = processor(torch.device("cpu"))
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{name}, {os.cpu_count()} cores"
    found = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text.split("\n\n")[0], re.MULTILINE))
    flags = set(found.get("flags", "").split())
    isa = " ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    chip = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return f"{name} ({chip}), {os.cpu_count()} cores, {isa}"


def clocks() -> str:
    """Clock rates now: each GPU's, else the CPU's as the kernel knows them."""
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"
    rates = _output("nvidia-smi", query, "--format=csv,noheader") if torch.cuda.is_available() else ""
    if rates:
        return rates.replace("\n", "; ")
    try:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return ""
    return f"{min(map(float, found)):.0f} to {max(map(float, found)):.0f} MHz" if found else ""


def load() -> float:
    """Runnable processes, averaged over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _kernel_isa() -> str:
    """The instruction set that the CPU extension chose, or why it is not there."""
    from wrn_fast.backends import cpu as backend

    return backend.isa() or "the CPU extension is not built: plain PyTorch runs"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def head(device: str, threads: int, arguments: list[str]) -> dict[str, str]:
    """Everything that a reader needs to judge a figure or to repeat it, as words."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    if _output("git", "status", "--porcelain", "--untracked-files=no", "--", "wrn_fast", "csrc", "benchmarks/*.py"):
        commit += " with changes"
    found = {
        "device": device,
        "cpu": cpu(),
        "threads": str(threads),
        "kernels": _kernel_isa(),
        "versions": f"wrn_fast {wrn_fast.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"openvino {_version('openvino')}, onnxruntime {_version('onnxruntime')}",
        "commit": commit,
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "environment": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)) or "-",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "clocks before": clocks(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        limit = _output("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader").split("\n")[0]
        found["gpu"] = f"{properties.name}, {properties.multi_processor_count} SMs, driver and power limit {limit}"
        found["versions"] += f", CUDA {torch.version.cuda}, triton {_version('triton')}"
        found["tf32"] = f"matmul {torch.backends.cuda.matmul.allow_tf32}, cudnn {torch.backends.cudnn.allow_tf32}"
    return found


def slug(device: str) -> str:
    """The machine as a file name: `cpu-amd-epyc`, `cuda-nvidia-h100-80gb-hbm3`."""
    name = processor(torch.device(device))
    return f"{device}-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
