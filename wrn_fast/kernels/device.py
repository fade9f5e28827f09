"""The GPU that a launch is for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one."""
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device.index) if other else nullcontext()
