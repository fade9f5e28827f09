"""What the rates of a layer need: problems of WRN-28-10, arguments, clocks, yardsticks, and what the plan predicted.

The predictions stand beside each measurement, so that the first report is a log of both.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from wrn_fast import tune
from wrn_fast.problem import TENSORS, ConvProblem

ROUNDS = 20
Call = Callable[[], Any]

# The model of the plan for H100 SXM, by calculation: a tile of 256 pixels x 160 channels is 4 products of 64 x 160 x 16
# a step of the reduction, 80 clocks each; 92 % of the clocks of a main loop at work, 2,500 clocks of epilogue that
# nothing hides, 2 us a launch, 1.6 GHz under load (matrix products there run at the power limit).
TILE_PIXELS, TILE_CHANNELS, PRODUCT_CLOCKS = 256, 160, 80
BUSY, EPILOGUE_CLOCKS, LAUNCH_S, CLOCK_HZ = 0.92, 2500, 2e-6, 1.6e9
# The budgets of the same plan for a training step of 14,000 img/s or more, and "about half rate" for the layers that
# are not 3x3 at stride 1 between equal widths.
DGRAD_FLOPS, WGRAD_FLOPS, REST_FLOPS = 560e12, 500e12, 300e12
# A layer of a few images, whose reduction is split over all multiprocessors: 4 to 6 us.
SPLIT_S = 5e-6
# A copy on an H100, bytes read and written, as seen on one.
COPY_BYTES = 3.0e12


class Layer(NamedTuple):
    """A convolution of the network: `image` is its input's side; a 1x1 shortcut may ride on it."""

    C: int
    K: int
    image: int
    stride: int = 1
    taps: int = 3
    short_C: int = 0
    short_stride: int = 1

    @property
    def regular(self) -> bool:
        """One of the three kinds that are 95 % of the work: 3x3 at stride 1 between equal widths."""
        return self.C == self.K and self.taps == 3 and self.stride == 1

    def __str__(self) -> str:
        kind = "" if self.taps == 3 else f" {self.taps}x{self.taps}"
        short = f" + 1x1 of {self.short_C}" if self.short_C else ""
        return f"{self.C}->{self.K} @{self.image}{kind}" + (f" /{self.stride}" if self.stride > 1 else "") + short


def problem_of(layer: Layer, n: int, device: str, **parts: Any) -> ConvProblem:
    """The layer at batch n in bfloat16; on the CPU in float16, which Triton's interpreter can."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    c, k, image, stride, taps = layer[:5]
    short = {"short_C": layer.short_C, "short_stride": layer.short_stride} if layer.short_C else {}
    pad = (taps // 2,) * 4
    return ConvProblem(device, dtype, dtype, n, image, image, c, k, taps, taps, stride, pad, **{**short, **parts})


def arguments(op: str, problem: ConvProblem) -> list[Tensor | None]:
    """Those of `op`. What a product reads is half zeros: x after relu, or what the prologue makes of a normal x."""
    p, device = problem, torch.device(problem.device)
    found = tune.tensors(op, p, device)
    at = 1 if op in ("dgrad", "wgrad") else 0
    x = found[at]
    assert x is not None
    if not p.prologue:
        found[at] = torch.relu(x).contiguous(memory_format=torch.channels_last)
    if p.p > 0:
        found[TENSORS.index("rng") if op == "fprop" else -1] = torch.tensor([1, 2], device=device)
    if op != "fprop":
        return found
    if p.short_C:
        h, w = (p.P - 1) * p.short_stride + 1, (p.Q - 1) * p.short_stride + 1
        short = torch.relu(torch.randn(p.N, p.short_C, h, w, device=device)).to(p.dtype)
        found[TENSORS.index("x_short")] = short.contiguous(memory_format=torch.channels_last)
        found[TENSORS.index("w_short")] = torch.randn(p.K, p.short_C, 1, 1, device=device).to(p.dtype)
    if p.act_out != "none":
        for name in ("out_scale", "out_shift"):
            found[TENSORS.index(name)] = torch.rand(p.K, device=device) + 0.5
    return found


def launching(module: ModuleType, op: str, problem: ConvProblem, tile: Any = None) -> Call:
    """A launch of a backend on arguments of its own."""
    return partial(module.launch, op, problem, tile, *arguments(op, problem))


class _Runnable(NamedTuple):
    run_it: Call

    def prepare(self) -> None:
        return None

    def run(self, state: None) -> Any:
        return self.run_it()


def medians(calls: Mapping[str, Call], device: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each call, all called once a round in an order drawn anew, by the clock of the suite."""
    clock, draw, order = timing.clock_for(device), random.Random(0), list(calls)
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds if device == "cuda" else 1):
        draw.shuffle(order)
        for name in order:
            samples[name].append(clock.sample(_Runnable(calls[name]), 1))
    return {name: statistics.median(values) for name, values in samples.items()}


# Yardsticks.


def _half_zeros(rows: int, columns: int, problem: ConvProblem) -> Tensor:
    return torch.relu(torch.randn(rows, columns, device=problem.device)).to(problem.dtype)


def product(op: str, problem: ConvProblem) -> Call:
    """A matrix product of the shape of the implicit one (`wrn_fast/problem.py`), half of one side zero."""
    p = problem
    taps, outputs = p.R * p.S, p.N * p.P * p.Q
    m, n, k = {
        "fprop": (outputs, p.K, taps * p.C + p.short_C),
        "dgrad": (p.N * p.H * p.W, p.C, taps * p.K // p.stride**2),
        "wgrad": (p.K, taps * p.C, outputs),
    }[op]
    a, b = _half_zeros(m, k, p), torch.randn(k, n, device=p.device).to(p.dtype)
    return lambda: a @ b


def square(problem: ConvProblem) -> tuple[Call, int]:
    """A square product of about the layer's FLOPs, which is what the chip can do, and its FLOPs."""
    side = max(16, round((problem.flops / 2) ** (1 / 3) / 256) * 256) if problem.device == "cuda" else 64
    a, b = _half_zeros(side, side, problem), torch.randn(side, side, device=problem.device).to(problem.dtype)
    return (lambda: a @ b), 2 * side**3


def library(op: str, problem: ConvProblem) -> Call:
    """The convolution alone through torch, on channels_last tensors; with its shortcut's where it has one."""
    p = problem._replace(prologue=False, affine=False, residual=False, act="identity", act_out="none")
    given: list[Any] = arguments(op, p)
    pad = p.pad[0]
    if op == "fprop":
        x, w = given[:2]
        x_short, w_short = (given[TENSORS.index(name)] for name in ("x_short", "w_short"))
        if x_short is None:
            return lambda: F.conv2d(x, w, stride=p.stride, padding=pad)
        return lambda: (F.conv2d(x, w, stride=p.stride, padding=pad), F.conv2d(x_short, w_short, stride=p.short_stride))
    dy, x = given[:2]
    w = given[2] if op == "dgrad" else tune.tensors("fprop", p, torch.device(p.device))[1]
    mask = [op == "dgrad", op == "wgrad", False]
    size, padding = [p.stride] * 2, [pad] * 2
    return lambda: torch.ops.aten.convolution_backward(
        dy, x, w, None, size, padding, [1, 1], False, [0, 0], 1, mask
    )  # fmt: skip


def predicted(op: str, layer: Layer, problem: ConvProblem, multiprocessors: int) -> float:
    """Seconds, by the plan's model."""
    p = problem
    if not layer.regular:
        return max(p.flops / REST_FLOPS, p.bytes / COPY_BYTES) + LAUNCH_S
    if op != "fprop":
        return p.flops / (DGRAD_FLOPS if op == "dgrad" else WGRAD_FLOPS)
    tiles = ceil(p.N * p.P * p.Q / TILE_PIXELS) * ceil(p.K / TILE_CHANNELS)
    if 2 * tiles < multiprocessors:
        return SPLIT_S
    steps = (ceil(p.R * p.S * p.C / 16) + ceil(p.short_C / 16)) * TILE_PIXELS // 64
    clocks = ceil(tiles / multiprocessors) * (steps * PRODUCT_CLOCKS / BUSY + EPILOGUE_CLOCKS)
    return clocks / CLOCK_HZ + LAUNCH_S
