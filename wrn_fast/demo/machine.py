"""What the demo runs on: processor, threads, versions, and the backend of each operator."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from wrn_fast import __version__, dispatch
from wrn_fast.backends import cpu
from wrn_fast.problem import ConvProblem


def processor(device: torch.device) -> str:
    """The name of the chip behind `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def backends(device: torch.device) -> tuple[dict[str, str], dict[str, str]]:
    """(operator -> backend that serves a typical training layer, backend -> why it does not serve one)."""
    layer = ConvProblem(
        device.type, torch.float32, torch.float32, N=64, H=32, W=32, C=64, K=64, R=3, S=3, pad=(1, 1, 1, 1), act="relu",
        eps=1e-5, prologue=True, affine=True, batch_stats=True, residual=True, want_stats=True,
    )  # fmt: skip
    serves, refuses = {}, {}
    for op in dispatch.OPS:
        for name, reason in dispatch.explain(op, layer).items():
            if reason is None:
                serves[op] = name
                break
            refuses[name] = reason
    return serves, refuses


def describe(device: torch.device) -> dict[str, Any]:
    """Everything above, for the first lines of the demo and for demo.json."""
    serves, refuses = backends(device)
    return {
        "device": device.type,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() if device.type == "cpu" else None,
        "backends": serves,
        "not_used": refuses,
        "wrn_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
