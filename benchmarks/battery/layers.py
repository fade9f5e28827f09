"""Each layer of WRN-28-10 in each direction: TFLOP/s of our kernels beside a matrix product, cuDNN and Triton; passes.

Our road of a layer is measured with what is fused into it. A goal is stated where it holds: at least 75 % of the rate
of a square product of the same FLOPs for 3x3 convolutions at stride 1 between equal widths, at least 1.2 times the
library's convolution alone for all 3x3 at stride 1, both from batch 128 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.battery import NOT_RUN, OK, Goal, Result, Step, Steps, result
from benchmarks.battery.parity import extensions
from benchmarks.battery.passes import passes
from benchmarks.battery.rates import (
    COPY_BYTES,
    Call,
    Layer,
    arguments,
    launching,
    library,
    medians,
    predicted,
    problem_of,
    product,
    square,
)
from benchmarks.battery.replaced import on_the_cpu
from wrn_fast.backends import aten, cuda, triton

OF_PRODUCT, OF_LIBRARY = 0.75, 1.2
REGULAR = (Layer(160, 160, 32), Layer(320, 320, 16), Layer(640, 640, 8))
WIDENING = (Layer(16, 160, 32), Layer(160, 320, 32, 2), Layer(320, 640, 16, 2))
# conv2 of a first block: its shortcut rides on it forwards and is a convolution of its own backwards.
WITH_SHORTCUT = (
    Layer(160, 160, 32, short_C=16), Layer(320, 320, 16, short_C=160, short_stride=2),
    Layer(640, 640, 8, short_C=320, short_stride=2),
)  # fmt: skip
SHORTCUTS = (Layer(16, 160, 32, 1, 1), Layer(160, 320, 32, 2, 1), Layer(320, 640, 16, 2, 1))
STEM = Layer(3, 16, 32)
TRAINING, INFERENCE, LEAST = 256, 512, 128
SOURCE: dict[str, Any] = {"prologue": True, "affine": True, "act": "relu", "eps": 1e-5}


def steps(dry: bool) -> Steps:
    """By name."""
    if dry:
        small = Layer(16, 16, 8, short_C=16)
        found = {f"{op} {small} batch 1": partial(row, op, small, 1, "cpu") for op in ("fprop", "dgrad", "wgrad")}
        found["passes"] = partial(bandwidth, "cpu")
        return {name: Step(partial(on_the_cpu, run), 5) for name, run in found.items()}
    found_rows = {f"{op} {layer} batch {n}": Step(partial(row, op, layer, n, "cuda"), 10) for op, layer, n in rows()}
    return {"extensions": extensions(), **found_rows, "passes": Step(partial(bandwidth, "cuda"), 15)}


def rows() -> list[tuple[str, Layer, int]]:
    """(op, layer, batch), the layers with a goal first."""
    found = [(op, layer, LEAST) for layer in REGULAR for op in ("fprop", "dgrad", "wgrad")]
    found += [("fprop", layer, INFERENCE) for layer in REGULAR]
    found += [(op, layer, TRAINING) for layer in REGULAR for op in ("dgrad", "wgrad", "fprop")]
    found += [("fprop", layer, INFERENCE) for layer in (*WITH_SHORTCUT, *WIDENING, STEM)]
    found += [(op, layer, TRAINING) for layer in (*WIDENING, *SHORTCUTS) for op in ("dgrad", "wgrad")]
    return [*found, ("wgrad", STEM, TRAINING), *(("fprop", layer, 1) for layer in REGULAR)]


def variants(op: str, layer: Layer) -> dict[str, dict[str, Any]]:
    """What is fused into the layer, by the use that it is for.

    In inference a layer writes the next one's activation: conv2 beside y, which is a residual later, conv1 instead.
    """
    if layer.C == STEM.C:
        return {"training": {"want_stats": True}} if op == "fprop" else {}
    if op != "fprop":
        return {"training": {**SOURCE, "want_stats": op == "dgrad"}}
    rides = {"residual": True} if layer.regular and not layer.short_C else {}
    first = {} if layer.regular else {"want_y": False}
    return {
        "inference": {**rides, **first, "act_out": "relu"},
        "training": {**SOURCE, **rides, "want_stats": True},
    }


def row(op: str, layer: Layer, n: int, device: str, seconds: float) -> Result:
    """Times of one layer by every road, what the plan predicted, and its goals."""
    plain = problem_of(layer, n, device)
    whole, flops = square(plain)
    roads: dict[str, tuple[Call, int]] = {
        "square product": (whole, flops),
        "product": (product(op, plain), plain.flops),
        "library": (library(op, plain), plain.flops),
    }
    missing = {}
    chosen = {use: plain._replace(**parts) for use, parts in variants(op, layer).items()}
    if layer.regular or not chosen:
        chosen["plain"] = plain
    for name, module in (("cuda", cuda), ("triton", triton)):
        for use, problem in chosen.items():
            reason = module.unsupported(op, problem)
            if reason:
                missing[f"{name} {use}"] = reason
            else:
                roads[f"{name} {use}"] = (launching(module, op, problem), problem.flops)
    if op == "fprop" and layer.regular and n == INFERENCE and cuda.unsupported("fprop_fp8", plain) is None:
        largest = torch.full((1,), 4.0, device=device)
        e4m3 = partial(cuda.launch, "fprop_fp8", plain, None, *arguments(op, plain), (largest, None))
        roads["cuda plain in e4m3"] = (e4m3, plain.flops)
    torch.backends.cudnn.benchmark = True
    times = medians({name: call for name, (call, _) in roads.items()}, device)
    rates = {name: work / times[name] / 1e12 for name, (_, work) in roads.items()}
    count = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 132
    expected = predicted(op, layer, plain, count)
    text = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
    return result(
        OK, f"TFLOP/s: {text}; predicted {plain.flops / expected / 1e12:.4g}", goals_of(layer, n, times, rates), us={
            name: 1e6 * t for name, t in times.items()}, tflops=rates, predicted_us=1e6 * expected, missing=missing,
    )  # fmt: skip


def goals_of(layer: Layer, n: int, times: dict[str, float], rates: dict[str, float]) -> list[Goal]:
    """Of our own roads with what is fused into them; fewer images than LEAST have none."""
    found: list[Goal] = []
    if n < LEAST:
        return found
    for name in (name for name in times if name.startswith("cuda ") and "plain" not in name):
        if layer.regular:
            ratio = rates[name] / rates["square product"]
            found.append(Goal(f"{name}, of the matrix product", OF_PRODUCT, ratio))
        if layer.taps == 3 and layer.stride == 1:
            found.append(Goal(f"{name}, times the library's convolution", OF_LIBRARY, times["library"] / times[name]))
    return found


def totals(found: Mapping[str, Result]) -> list[str]:
    """What the measured layers add up to in one pass of WRN-28-10, beside what was predicted; of complete sums only.

    Args:
        found: the results of this stage by step.
    """
    forth = [*((6, layer) for layer in REGULAR), *((1, layer) for layer in (*WITH_SHORTCUT, *WIDENING, STEM))]
    back = [*((7, layer) for layer in REGULAR), *((1, layer) for layer in (*WIDENING, *SHORTCUTS))]
    sums = {
        f"inference, batch {INFERENCE}": ("fprop", INFERENCE, "cuda inference", forth),
        f"dgrad, batch {TRAINING}": ("dgrad", TRAINING, "cuda training", back),
        f"wgrad, batch {TRAINING}": ("wgrad", TRAINING, "cuda training", [*back, (1, STEM)]),
    }
    lines = []
    for name, (op, n, road, parts) in sums.items():
        steps_of = [(count, found.get(f"{op} {layer} batch {n}", {}), layer) for count, layer in parts]
        times = [(count, _of_road(step, road, layer), step.get("predicted_us")) for count, step, layer in steps_of]
        known = [(count, us, expected) for count, us, expected in times if us is not None and expected is not None]
        if len(known) == len(parts):
            measured, planned = (sum(line[0] * line[i] for line in known) / 1e3 for i in (1, 2))
            lines.append(f"convolutions of {name}: {measured:.2f} ms, predicted {planned:.2f} ms")
    return lines


def _of_road(found: Result, road: str, layer: Layer) -> float | None:
    """Microseconds; the stem, which has less to fuse, by what it has."""
    us = found.get("us", {})
    return us.get(road, next((us[name] for name in us if name.startswith("cuda ")), None) if layer == STEM else None)


def bandwidth(device: str, seconds: float) -> Result:
    """GB/s of the passes that are bound by memory, by every backend, beside a copy's."""
    calls: dict[str, Call] = {}
    sizes, missing = {}, {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    for shape in ((TRAINING, 160, 32), (TRAINING, 640, 8)) if device == "cuda" else ((2, 16, 4),):
        for module in (cuda, triton, aten):
            for op, (call, size, problem) in passes(module, torch.device(device), dtype, *shape).items():
                name = f"{module.NAME} {op} {shape[1]} @{shape[2]}"
                reason = module.unsupported(op, problem)
                if reason:
                    missing[name] = reason
                else:
                    calls[name], sizes[name] = call, size
    if not calls:
        return result(NOT_RUN, next(iter(missing.values())))
    copy = roofline.copy_rate(device) if device == "cuda" else 1.0
    times = medians(calls, device)
    rates = {name: sizes[name] / times[name] / 1e9 for name in calls}
    text = f"GB/s: copy {copy / 1e9:.4g}, " + ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
    expected = {name: 1e6 * size / COPY_BYTES for name, size in sizes.items()}
    return result(OK, text, us={name: 1e6 * t for name, t in times.items()}, gbytes=rates, predicted_us=expected,
                  missing=missing)  # fmt: skip
