"""`wrn-fast tune`: measures the tiles of this GPU's kernels; a later run goes on where an earlier one stopped."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from wrn_fast import tune

NAME = "tune"
HELP = "measure the tiles of this GPU's kernels once; says so where there is nothing to measure"


def options(parser: argparse.ArgumentParser) -> None:
    """The network whose layers are measured, and a time limit."""
    parser.add_argument("--depth", type=int, default=28, help="of WRN-depth-width; default: %(default)s")
    parser.add_argument("--width", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--dtype", choices=tune.DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="S", help="seconds after which no layer is begun"
    )


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], Sequence[Any]]:
    """Measure what the table does not have; on a CPU the reason why there is nothing to measure is the answer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason: str | None
    if device == "cpu":
        reason = "its kernels choose by a fixed rule of shape and batch, so results never depend on a timing"
    else:
        reason = tune.unsupported()
    tasks = tune.tasks(arguments.depth, arguments.width, arguments.batch, arguments.dtype)
    if reason:
        return 0, {"device": device, "tuned": [], "reason": reason}, [f"Nothing to tune on {device}: {reason}."]
    done = tune.run(tasks, limit_s=arguments.limit)
    counts = ", ".join(f"{done[name]} {name}" for name in ("measured", "kept", "failed", "left"))
    table = Table(
        "operator", "C", "K", "image", "stride", "dtype", "tile", "us", "runner-up", title=done["head"]["gpu"]
    )
    for row in done["rows"]:
        t = row["tile"]
        tile = f"{t['rows']}x{t['cols'][0]}+{t['cols'][1]}x{t['red']}, {t['warps']} warps, {t['stages']} stages"
        table.add_row(
            row["op"], str(row["C"]), str(row["K"]), f"{row['P']}x{row['Q']}", str(row["stride"]), row["dtype"], tile,
            f"{row['us']:.1f}", f"{row['runner_up_us']:.1f}",
        )  # fmt: skip
    return 0, {"device": device, "tuned": done["rows"], **done}, [table, f"{counts}; kept in {done['path']}"]
