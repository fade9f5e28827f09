"""A fresh interpreter with the checkout on its path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Deterministic: what it prints is the same wherever the same code runs.
CALL = """
import torch, wrn_fast
torch.manual_seed(0)
x, w = torch.randn(2, 16, 8, 8), torch.randn(32, 16, 3, 3)
y = wrn_fast.bn_act_conv(x, w).y
want = torch.nn.functional.conv2d(torch.relu(x).double(), w.double(), padding=1)
assert wrn_fast.parity.error(y, want) <= wrn_fast.parity.WINOGRAD["f4"], "wrong"
print("right")
"""


def start(code: str, *arguments: str, options: tuple[str, ...] = (), drop: tuple[str, ...] = (), **environment: str):
    """`code` in a process of its own, with these environment variables and without those in `drop`."""
    variables = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith("PYTEST_")}
    variables |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, *options, "-c", code, *arguments], env=variables, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    """What it printed; an assertion with its errors where it failed or hung."""
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"still running after {timeout} s") from None
    assert process.returncode == 0, (process.returncode, errors[-3000:])
    return out


def run(code: str, *arguments: str, **how) -> str:
    """`start` and `finish`."""
    return finish(start(code, *arguments, **how))
