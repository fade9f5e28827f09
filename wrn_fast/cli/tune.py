"""`wrn-fast tune`: measures tiles where a backend has a choice of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

NAME = "tune"
HELP = "measure the tiles of this GPU's kernels once; says so where there is nothing to measure"


def options(parser: argparse.ArgumentParser) -> None:
    """Nothing beyond --json."""


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], Sequence[Any]]:
    """There is nothing to tune on a CPU; the reason is the answer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        reason = "its kernels choose by a fixed rule of shape and batch, so results never depend on a timing"
    else:
        reason = "its kernels choose by a fixed rule of shape and chip"
    return 0, {"device": device, "tuned": [], "reason": reason}, [f"Nothing to tune on {device}: {reason}."]
