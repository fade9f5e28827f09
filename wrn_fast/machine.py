"""What a figure depends on: chip, threads, versions, date."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch


def processor(device: torch.device) -> str:
    """The name of the chip behind `device`; the architecture where the system does not tell a CPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def head(device: torch.device) -> dict[str, str]:
    """The head of a report, as text throughout."""
    return {
        "device": f"{processor(device)} ({device.type})",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
