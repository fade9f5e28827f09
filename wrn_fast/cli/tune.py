"""`wrn-fast tune`: measures this machine's kernels once; a later run goes on where an earlier one stopped.

On a GPU tiles, used from then on; on a CPU algorithms, used where WRN_FAST_PIN_ALGO=measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from wrn_fast import tune, tune_cpu

NAME = "tune"
HELP = "measure this machine's kernels once: tiles on a GPU, algorithms on a CPU"

Answer = tuple[int, dict[str, Any], Sequence[Any]]


def options(parser: argparse.ArgumentParser) -> None:
    """The network whose layers are measured, and a time limit."""
    parser.add_argument("--depth", type=int, default=28, help="of WRN-depth-width; default: %(default)s")
    parser.add_argument("--width", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="default: 128 on a GPU, 8 on a CPU")
    parser.add_argument("--dtype", choices=tune.DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="S", help="seconds after which no layer is begun"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Measure what the table does not have; where nothing can be measured the reason is the answer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = tune.unsupported() if device == "cuda" else tune_cpu.unsupported()
    if reason:
        return 0, {"device": device, "tuned": [], "reason": reason}, [f"Nothing to tune on {device}: {reason}."]
    return _tiles(arguments) if device == "cuda" else _algorithms(arguments)


def _algorithms(arguments: argparse.Namespace) -> Answer:
    batch = 8 if arguments.batch is None else arguments.batch
    tasks = tune_cpu.tasks(arguments.depth, arguments.width, batch, arguments.dtype or "fp32")
    done = tune_cpu.run(tasks, limit_s=arguments.limit)
    counts = ", ".join(f"{done[name]} {name}" for name in ("measured", "kept", "left"))
    title = f"{done['head']['cpu']}, {done['head']['threads']} threads"
    table = Table("operator", "N", "C", "K", "image", "stride", "dtype", "fastest", "ms", title=title)
    for row in done["rows"]:
        table.add_row(
            row["op"], str(row["N"]), str(row["C"]), str(row["K"]), f"{row['H']}x{row['W']}", str(row["stride"]),
            row["dtype"], row["pin"], ", ".join(f"{name} {us / 1e3:.2f}" for name, us in row["us"].items()),
        )  # fmt: skip
    said = f"{counts}; kept in {done['path']}. WRN_FAST_PIN_ALGO=measured uses them."
    return 0, {"device": "cpu", "tuned": done["rows"], **done}, [table, said]


def _tiles(arguments: argparse.Namespace) -> Answer:
    batch = 128 if arguments.batch is None else arguments.batch
    tasks = tune.tasks(arguments.depth, arguments.width, batch, arguments.dtype or "bf16")
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
    return 0, {"device": "cuda", "tuned": done["rows"], **done}, [table, f"{counts}; kept in {done['path']}"]
