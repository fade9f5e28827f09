"""Tiles measured on this GPU, into a folder beside the report; `wrn-fast tune` does the same for a user."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.battery import FAILED, OK, Result, Step, Steps, result
from benchmarks.battery.parity import extensions
from benchmarks.machine import ROOT
from wrn_fast import tune
from wrn_fast.errors import WrnFastError
from wrn_fast.problem import ConvProblem

# (depth, width, batch, dtype), expected seconds: some 25 classes of problems, 20 tiles each.
WIDE = {(28, 10, 128, "bf16"): 200, (28, 10, 1, "bf16"): 90}
NARROW = {(28, 2, 512, "bf16"): 80, (16, 4, 512, "bf16"): 80, (28, 10, 128, "fp16"): 200}


def wide_steps(dry: bool) -> Steps:
    """Of WRN-28-10."""
    return {"one layer, interpreted": Step(interpreted, 5)} if dry else _steps(WIDE)


def narrow_steps(dry: bool) -> Steps:
    """Of networks that are bound by memory, and the other dtype."""
    return wide_steps(True) if dry else _steps(NARROW)


def _steps(networks: dict[tuple[int, int, int, str], int]) -> Steps:
    return {"extensions": extensions()} | {
        f"WRN-{depth}-{width} batch {batch} {dtype}": Step(partial(network, depth, width, batch, dtype), seconds)
        for (depth, width, batch, dtype), seconds in networks.items()
    }


def network(depth: int, width: int, batch: int, dtype: str, seconds: float) -> Result:
    """Goes on where an earlier run stopped; what is left is a failure of this step, so that it is run again."""
    return _told(tune.run(tune.tasks(depth, width, batch, dtype), folder=_folder(), limit_s=0.9 * seconds))


def interpreted(seconds: float) -> Result:
    """A layer of 4 channels; a clock that likes fewer stages."""
    import torch

    problem = ConvProblem("cpu", torch.float32, torch.float32, 1, 4, 4, 4, 4, 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        return _told(tune.run([("fprop", problem)], folder=Path(folder)))


def _folder() -> Path:
    chosen = os.environ.get("WRN_FAST_TUNED_DIR")
    return Path(chosen) if chosen else ROOT / "benchmarks" / "results" / "tuned"


def _told(done: dict) -> Result:
    counts = {name: done[name] for name in ("measured", "kept", "failed", "left")}
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    if not done["rows"]:
        raise WrnFastError(f"`tune`: expected at least one row, got none: {text}")
    return result(FAILED if counts["left"] else OK, text, **counts, path=done["path"])
