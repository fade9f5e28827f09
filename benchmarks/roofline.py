"""Each layer's achieved rate against the two ceilings of the machine that were measured beside it: arithmetic, memory.

x is arithmetic intensity: FLOP of the direct convolution by bytes of each tensor once. The roof is the lower of the
matrix product's rate and intensity times the rate of a copy. Winograd may stand above it: it does fewer operations.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from benchmarks.peers import FAST

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LAYER = re.compile(r"layer (\d+)->(\d+) @(\d+)(?: /(\d+))?$")


class Point(NamedTuple):
    """One layer: FLOP a byte, and GFLOP/s of each variant."""

    name: str
    intensity: float
    rates: dict[str, float]


def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    n = 1 << (28 if device == "cuda" else 26)
    a, b = (torch.ones(n, device=device) for _ in range(2))
    timer = Timer("b.copy_(a)", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 8 * n / timer.blocked_autorange(min_run_time=0.5).median


def bytes_of(subject: str, batch: int, dtype: str) -> int | None:
    """Bytes of input, filter and output of a layer, each once; None for what is not a layer."""
    found = LAYER.match(subject)
    if found is None:
        return None
    c, k, size, stride = (int(group or 1) for group in found.groups())
    return BYTES[dtype] * (batch * size * size * c + 9 * c * k + batch * (size // stride) ** 2 * k)


def points(report: dict[str, Any]) -> list[Point]:
    """The report's layers."""
    found = []
    for row in report["rows"]:
        size = bytes_of(row["subject"], row["batch"], row["dtype"])
        if size is not None and row["variants"]:
            rates = {v["name"]: row["gflop"] / (v["ms"] / 1e3) for v in row["variants"]}
            found.append(
                Point(f"{row['subject'].removeprefix('layer ')} {row['task']}", row["gflop"] * 1e9 / size, rates)
            )
    return found


def plot(report: dict[str, Any], file: Path) -> None:
    """Writes a PNG.

    Raises:
        ValueError: the report has no layer, or was made without the copy's rate.
    """
    found, ceiling = points(report), report.get("copy_gbytes")
    if not found or not ceiling:
        raise ValueError("a roofline needs layers: python -m benchmarks --parts layers --width 10 --roofline FILE")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    roof = max(row["matmul_gflops"] for row in report["rows"])
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    low, high = (f(p.intensity for p in found) for f in (min, max))
    ends = [low / 2, roof / ceiling, high * 2]
    axes.plot(ends, [min(roof, x * ceiling) for x in ends], color="black", label="ceilings: copy, matrix product")
    for name, colour, marker in ((FAST, "#D55E00", "o"), ("eager-channels-last", "#0072B2", "s")):
        of = [p for p in found if name in p.rates]
        axes.plot([p.intensity for p in of], [p.rates[name] for p in of], marker, color=colour, label=name)
    for p in found:
        if FAST in p.rates:
            axes.annotate(p.name, (p.intensity, p.rates[FAST]), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="FLOP of the direct convolution a byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    head = report["head"]
    axes.set_title(f"{head.get('gpu', head['cpu'])}, {head['threads']} threads", fontsize=9, loc="left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
