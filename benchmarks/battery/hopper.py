"""What only a Hopper GPU can say: the kernels' beliefs about the chip, and what the parts of a kernel cost.

The experiments decide between designs: does the hardware read the layouts as the model does (E1), may a swizzled start
lie off its period (E2), do fills of shared memory compete with the products (E3), how fast are boxes by the bytes of a
row and shared between two blocks (E4), what do main loop, epilogue and prologue cost by themselves, and what does a
prologue against a second output or a pass of its own (E5). Rates are with half of the activations zero, as after relu.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.battery import FAILED, NOT_RUN, OK, Result, Step, Steps, result
from benchmarks.battery.layers import REGULAR, SOURCE
from benchmarks.battery.parity import extensions
from benchmarks.battery.rates import PRODUCT_CLOCKS, Call, Layer, launching, medians, predicted, problem_of, square
from benchmarks.battery.replaced import on_the_cpu
from benchmarks.machine import ROOT
from wrn_fast.backends import cuda
from wrn_fast.kernels.cuda_launch import Tile

SOURCE_FILE = Path(__file__).with_name("hopper.cu")
EXPERIMENTS = {"multiply": "E1", "shift": "E2", "supply": "E3", "boxes": "E4"}
SAMPLE_S = 2.0
# wgmma 64 x 160 x 16 reads 7,168 bytes of shared memory, which has 128 bytes a clock; in the model fills share them.
PRODUCT_BYTES, SHARED_BYTES = 7168.0, 128.0
# What others measured an SM to get out of L2 on this chip: 35 to 37 B/clk. Two blocks that share get it twice.
L2_BYTES = 36.0


def steps(dry: bool) -> Steps:
    """By name, in the order in which they decide."""
    if dry:
        return {
            "E5 16->16 @8": Step(partial(on_the_cpu, partial(parts, Layer(16, 16, 8), "cpu")), 5),
        }
    found = {"extensions": extensions(), "E0 clock and power": Step(clocks, 15)}
    for name, number in EXPERIMENTS.items():
        # The first one compiles the program.
        found[f"{number} {name}"] = Step(partial(experiment, name), 30 if name == "multiply" else 8)
    return found | {f"E5 {layer}": Step(partial(parts, layer, "cuda"), 25) for layer in REGULAR}


def not_hopper() -> str | None:
    """Why the experiments cannot run, or None."""
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"for compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"


def nvcc() -> str | None:
    """The compiler: on PATH or under CUDA_HOME."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(beside) if beside.is_file() else None)


def compile_command(program: Path) -> list[str]:
    """How the experiments are built."""
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}"]
    return [nvcc() or "nvcc", *flags, str(SOURCE_FILE), "-o", str(program)]


def program_file() -> Path:
    """Where the built experiments lie: by the hash of their sources."""
    sources = [SOURCE_FILE, *sorted((ROOT / "csrc" / "cuda").glob("sm90*"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    return ROOT / "build" / f"hopper-{digest}"


def experiment(name: str, seconds: float) -> Result:
    """One experiment of hopper.cu; a wrong product in a layout that the kernels use is a failure."""
    reason = not_hopper() or (None if nvcc() else "nvcc is neither on PATH nor under CUDA_HOME")
    if reason:
        return result(NOT_RUN, reason)
    program = program_file()
    if not program.is_file():
        program.parent.mkdir(exist_ok=True)
        part = program.with_suffix(".part")
        done = subprocess.run(compile_command(part), capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            return result(FAILED, (done.stderr.strip().splitlines() or ["no message"])[-1])
        part.rename(program)
    done = subprocess.run([str(program), name], capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        return result(FAILED, (done.stderr.strip().splitlines() or ["no message"])[-1])
    return told(name, [json.loads(line) for line in done.stdout.splitlines()])


def told(name: str, rows: list[dict[str, Any]]) -> Result:
    """What the rows of an experiment say."""
    if name == "supply":
        for row in rows:
            row["predicted clk"] = round(expected_clocks(row["filled B/clk"]), 1)
    if name == "boxes":
        for row in rows:
            row["predicted B/clk"] = L2_BYTES * row["blocks"]
    text = "; ".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in rows)
    wrong = sum(row.get("wrong", 0) > 0 for row in rows)
    return result(FAILED if wrong else OK, f"{VERDICTS[name](rows)}: {text}", rows=rows)


def expected_clocks(fill: float) -> float:
    """Clocks of a product while `fill` bytes a clock arrive, if both share the bandwidth of shared memory."""
    room = SHARED_BYTES - fill
    return max(PRODUCT_CLOCKS, PRODUCT_BYTES / room) if room > 0 else float("inf")


def _of_layouts(rows: list[dict[str, Any]]) -> str:
    wrong = [row["layout"] for row in rows if row.get("wrong", 0) or row.get("unused wrong", 0)]
    return f"not as the model has it: {', '.join(wrong)}" if wrong else "every layout is as the model has it"


def _of_shifts(rows: list[dict[str, Any]]) -> str:
    ways = {"wrong with base offset 0": "base offset 0", "wrong with base offset rows": "the manual's base offset"}
    right = [words for key, words in ways.items() if not any(row[key] for row in rows)]
    return f"starts off the period work with {' and '.join(right)}" if right else "no start off the period works"


def _of_supply(rows: list[dict[str, Any]]) -> str:
    """Nearer to the model in which fills compete, or to the rate alone?"""
    alone, most = rows[0]["clk per m64n160k16"], max(rows, key=lambda row: row["filled B/clk"])
    shared = expected_clocks(most["filled B/clk"])
    if shared <= 1.1 * PRODUCT_CLOCKS:
        return "the fills were too slow to tell"
    competes = most["clk per m64n160k16"] > (alone + shared) / 2
    return f"fills {'compete' if competes else 'do not compete'} with the products"


def _of_boxes(rows: list[dict[str, Any]]) -> str:
    """Rates beside that of 128-byte rows, which the kernels fetch, and what sharing gains."""
    rates = {(row["row bytes"], row["blocks"]): row["B/clk"] for row in rows}
    kernel = rates[128, 1]
    others = [f"{size} B {rate / kernel:.2f}" for (size, blocks), rate in rates.items() if blocks == 1 and size != 128]
    return f"beside rows of 128 B: {', '.join(others)}; shared by two blocks {rates[128, 2] / kernel:.2f}"


VERDICTS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "multiply": _of_layouts, "shift": _of_shifts, "supply": _of_supply, "boxes": _of_boxes,
}  # fmt: skip
# What is asked of both tiles at batch 128: fields of the problem. A kernel without a store there is not; the main loop
# alone is what twice the channels take more.
TWICE = "store, twice the channels"
PARTS: dict[str, dict[str, Any]] = {
    "store": {},
    TWICE: {},
    "residual": {"residual": True},
    "residual, second output": {"residual": True, "act_out": "relu"},
    "second output alone": {"act_out": "relu", "want_y": False},
    "statistics": {"want_stats": True},
    "prologue": SOURCE,
    "everything": {**SOURCE, "residual": True, "want_stats": True},
}
TILES = {"9 fetches": Tile(0), "3 shifts": Tile(1)}


def parts(layer: Layer, device: str, seconds: float) -> Result:
    """Both tiles at batch 128: the main loop alone, then each part of epilogue and prologue; three ways to activate."""
    calls: dict[str, Call] = {}
    for name, fields in PARTS.items():
        cut = layer._replace(C=2 * layer.C) if name == TWICE else layer
        problem = problem_of(cut, 128 if device == "cuda" else 1, device, **fields)
        reason = cuda.unsupported("fprop", problem)
        if reason:
            return result(NOT_RUN, reason)
        for tile_name, tile in TILES.items():
            if not cuda.legal("fprop", problem, tile):
                continue
            calls[f"{name}, {tile_name}"] = launching(cuda, "fprop", problem, tile)
            if name == "prologue":
                apply = tile._replace(apply=True)
                calls[f"pass and store, {tile_name}"] = launching(cuda, "fprop", problem, apply)
    us = {name: 1e6 * t for name, t in medians(calls, device).items()}
    for tile_name in TILES:
        if f"store, {tile_name}" in us:
            loop = us[f"{TWICE}, {tile_name}"] - us[f"store, {tile_name}"]
            us[f"main loop, {tile_name}"] = loop
            us[f"launch and epilogue, {tile_name}"] = us[f"store, {tile_name}"] - loop
    plain = problem_of(layer, 128, device)
    ways = {name: found for name in TILES if (found := activations(us, name))}
    text = "; ".join(
        f"{tile}: {', '.join(f'{way} {t:.1f}' for way, t in found.items())} us for a writer and a reader"
        for tile, found in ways.items()
    )
    expected = 1e6 * predicted("fprop", layer, plain, 132)
    return result(
        OK, f"us: {', '.join(f'{name} {t:.1f}' for name, t in us.items())}; predicted {expected:.1f}; {text}", us=us,
        activation_us=ways, predicted_us=expected,
    )  # fmt: skip


def activations(us: dict[str, float], tile: str) -> dict[str, float]:
    """Microseconds of a layer and of the next one that reads act(bn(y)), by where that is computed.

    Between blocks y is a residual later and is written in any case, inside a block it is not.
    """
    if f"prologue, {tile}" not in us:
        return {}
    store, prologue, apply, residual, both, alone = (
        us[f"{name}, {tile}"]
        for name in ("store", "prologue", "pass and store", "residual", "residual, second output",
                     "second output alone")
    )  # fmt: skip
    return {
        "prologue": residual + prologue,
        "second output": both + store,
        "pass of its own": residual + apply,
        "prologue inside": store + prologue,
        "second output inside": alone + store,
        "pass of its own inside": store + apply,
    }


def clocks(seconds: float) -> Result:
    """Clock, power and sustained rate under the library's product and under our kernels, from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return result(NOT_RUN, "nvidia-smi is not on PATH")
    problem = problem_of(REGULAR[0], 512, "cuda")
    reason = cuda.unsupported("fprop", problem)
    loads: dict[str, tuple[Call, int]] = {"product": square(problem)}
    if reason is None:
        for name, tile in TILES.items():
            loads[name] = (launching(cuda, "fprop", problem, tile), problem.flops)
    found = {name: _sampled(call, work) for name, (call, work) in loads.items()}
    text = "; ".join(
        f"{name} {mhz:.0f} MHz, {watts:.0f} W, {rate:.0f} TFLOP/s" for name, (mhz, watts, rate) in found.items()
    )
    return result(OK, text if reason is None else f"{text}; not cuda: {reason}", samples=found)


def _sampled(call: Call, flops: int) -> tuple[float, float, float]:
    """(MHz, W) in the middle of a run of SAMPLE_S seconds, and TFLOP/s over all of it."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]
    seen: list[str] = []

    def ask() -> None:
        time.sleep(SAMPLE_S / 2)
        seen.append(subprocess.run(query, capture_output=True, text=True, timeout=60).stdout)

    call()
    torch.cuda.synchronize()
    asker = threading.Thread(target=ask)
    asker.start()
    begin, count = time.monotonic(), 0
    while time.monotonic() < begin + SAMPLE_S or asker.is_alive():
        for _ in range(50):
            call()
        torch.cuda.synchronize()
        count += 50
    elapsed = time.monotonic() - begin
    asker.join()
    mhz, watts = seen[0].split(",")
    return float(mhz), float(watts), flops * count / elapsed / 1e12
