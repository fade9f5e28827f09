"""What only a Hopper GPU can say: the kernels' beliefs about the chip, each layer's rate against a plain product.

The experiments decide between designs: does the hardware read the layouts as the model does, may a swizzled start lie
off its period, do fills of shared memory compete with the products, how fast are boxes by the bytes of a pixel, and
what main loop, epilogue and prologue cost by themselves. Rates are with half of the activations zero, as after relu.
"""

from __future__ import annotations

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
import torch.nn.functional as F

import wrn_fast
from benchmarks.battery import FAILED, NOT_RUN, OK, Result, result
from benchmarks.machine import ROOT
from wrn_fast import tune
from wrn_fast.backends import cuda, triton
from wrn_fast.kernels.cuda_launch import Tile
from wrn_fast.problem import ConvProblem

SOURCE = Path(__file__).with_name("hopper.cu")
EXPERIMENTS = {"multiply": "E1", "shift": "E2", "supply": "E3", "boxes": "E4"}
# (C = K, image) of the 3x3 convolutions at stride 1 of WRN-28-10.
SHAPES = ((160, 32), (320, 16), (640, 8))
BATCHES = (128, 512)
SMALL = (1, 8)
CALLS = 100
SAMPLE_S = 2.0


def steps(dry: bool) -> dict[str, Callable[[float], Result]]:
    """By name."""
    if dry:
        return {"layer 16 at 8x8, plain PyTorch": partial(layer, (16, 8), 1, "cpu")}
    found: dict[str, Callable[[float], Result]] = {
        f"{number} {name}": partial(experiment, name) for name, number in EXPERIMENTS.items()
    }
    found["E0 clock and power"] = clocks
    found |= {f"E5 {c} at {image}x{image}": partial(parts, (c, image)) for c, image in SHAPES}
    for n in BATCHES:
        found |= {f"layer {c} at {i}x{i} batch {n}": partial(layer, (c, i), n, "cuda") for c, i in SHAPES}
    found |= {f"latency WRN-28-10 batch {n}": partial(latency, n) for n in SMALL}
    return found


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
    return [nvcc() or "nvcc", *flags, str(SOURCE), "-o", str(program)]


def experiment(name: str, seconds: float) -> Result:
    """One experiment of hopper.cu; a wrong product in a layout that the kernels use is a failure."""
    reason = not_hopper() or (None if nvcc() else "nvcc is neither on PATH nor under CUDA_HOME")
    if reason:
        return result(NOT_RUN, reason)
    program = ROOT / "build" / "hopper"
    program.parent.mkdir(exist_ok=True)
    done = subprocess.run(compile_command(program), capture_output=True, text=True, timeout=seconds)
    if done.returncode == 0:
        done = subprocess.run([str(program), name], capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        return result(FAILED, (done.stderr.strip().splitlines() or ["no message"])[-1])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = sum(row.get("wrong", 0) > 0 for row in found)
    return result(FAILED if wrong else OK, "; ".join(_text(row) for row in found), rows=found)


def _text(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


def problem_of(shape: tuple[int, int], n: int, device: str, **parts: Any) -> ConvProblem:
    """A 3x3 layer at stride 1."""
    c, image = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return ConvProblem(device, dtype, dtype, n, image, image, c, c, 3, 3, 1, (1, 1, 1, 1), **parts)


def arguments(problem: ConvProblem) -> list[Any]:
    """Those of fprop; x is half zeros."""
    found = tune.tensors("fprop", problem, torch.device(problem.device))
    found[0] = torch.relu(found[0]).contiguous(memory_format=torch.channels_last)
    return found


def product(problem: ConvProblem) -> Callable[[], Any]:
    """A matrix product of the layer's FLOPs and shape, half of its left side zero."""
    m, k, n = problem.N * problem.P * problem.Q, problem.R * problem.S * problem.C, problem.K
    a = torch.relu(torch.randn(m, k, device=problem.device)).to(problem.dtype)
    b = torch.randn(k, n, device=problem.device).to(problem.dtype)
    return lambda: a @ b


def square(problem: ConvProblem) -> tuple[Callable[[], Any], int]:
    """A square product of about the layer's FLOPs, which is what the chip can do, and its FLOPs."""
    side = max(16, round((problem.flops / 2) ** (1 / 3) / 256) * 256) if problem.device == "cuda" else 64
    a = torch.relu(torch.randn(side, side, device=problem.device)).to(problem.dtype)
    b = torch.randn(side, side, device=problem.device).to(problem.dtype)
    return (lambda: a @ b), 2 * side**3


def layer(shape: tuple[int, int], n: int, device: str, seconds: float) -> Result:
    """TFLOP/s of a layer by every road, with its epilogue where we have it, and of matrix products."""
    plain = problem_of(shape, n, device)
    fused = plain._replace(residual=True, prologue=True, affine=True, act="relu", want_stats=True)
    clock = tune.event_clock if device == "cuda" else tune.wall_clock
    x, w = arguments(plain)[:2]
    whole, flops = square(plain)
    roads: dict[str, tuple[Callable[[], Any], int]] = {
        "square product": (whole, flops),
        "product": (product(plain), plain.flops),
        "library convolution": (lambda: F.conv2d(x, w, padding=1), plain.flops),
    }
    given = arguments(fused)
    missing = {}
    for name, module in (("cuda", cuda), ("triton", triton)):
        reason = module.unsupported("fprop", fused)
        if reason:
            missing[name] = reason
            continue
        roads[f"{name} fused"] = (partial(module.launch, "fprop", fused, None, *given), fused.flops)
        roads[f"{name} plain"] = (partial(module.launch, "fprop", plain, None, *arguments(plain)), plain.flops)
    if device == "cpu":
        roads["aten fused"] = (partial(wrn_fast.backends.aten.fprop, fused, *given), fused.flops)
    torch.backends.cudnn.benchmark = True
    rates = {name: work / clock(call) / 1e12 for name, (call, work) in roads.items()}
    text = ", ".join(f"{name} {rate:.4g} TFLOP/s" for name, rate in rates.items())
    return result(OK, text, tflops=rates, missing=missing)


def parts(shape: tuple[int, int], seconds: float) -> Result:
    """Both tiles at batch 128: the main loop alone, then with each part of epilogue and prologue."""
    kinds = {
        "main loop": {},
        "residual": {"residual": True},
        "residual, second output": {"residual": True, "act_out": "relu"},
        "statistics": {"want_stats": True},
        "prologue": {"prologue": True, "affine": True, "act": "relu"},
        "everything": {"prologue": True, "affine": True, "act": "relu", "residual": True, "want_stats": True},
    }  # fmt: skip
    found: dict[str, float] = {}
    for name, fields in kinds.items():
        problem = problem_of(shape, 128, "cuda", **fields)
        for tile in (Tile(0), Tile(1), *((Tile(1, True),) if problem.prologue else ())):
            reason = cuda.unsupported("fprop", problem)
            if reason:
                return result(NOT_RUN, reason)
            if cuda.legal("fprop", problem, tile):
                call = partial(cuda.launch, "fprop", problem, tile, *arguments(problem))
                found[f"{name} {tuple(tile)}"] = tune.event_clock(call) * 1e6
    return result(OK, ", ".join(f"{name} {us:.1f} us" for name, us in found.items()), us=found)


def latency(n: int, seconds: float) -> Result:
    """A network in a CUDA graph, one call at a time: the device's time of a replay, the caller's of a call.

    Before it is timed a replay has to equal the model without a graph, also after a write that no counter shows.
    """
    reason = not_hopper() or cuda.missing()
    if reason:
        return result(NOT_RUN, reason)
    torch.manual_seed(0)
    model = wrn_fast.classic(28, 10, 10).to("cuda", torch.bfloat16).eval()
    x = torch.randn(n, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    found: dict[str, float] = {}
    for name in ("cuda", "triton"):
        with torch.no_grad(), wrn_fast.backend(name):
            fast = wrn_fast.graphed(model, x)
            for _ in range(2):
                if not torch.equal(fast(x), model(x)):
                    return result(FAILED, f"{name}: a replay differs from the model")
                for p in model.parameters():
                    p.data.mul_(0.99)
            found[f"{name} device"] = tune.event_clock(partial(fast, x)) * 1e6
            begin = time.perf_counter()
            for _ in range(CALLS):
                fast(x)
                torch.cuda.synchronize()
            found[f"{name} call"] = (time.perf_counter() - begin) / CALLS * 1e6
    return result(OK, ", ".join(f"{name} {us:.1f} us" for name, us in found.items()), us=found)


def clocks(seconds: float) -> Result:
    """Clock and power under the library's product and under our kernel, from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return result(NOT_RUN, "nvidia-smi is not on PATH")
    problem = problem_of(SHAPES[0], 512, "cuda")
    reason = cuda.unsupported("fprop", problem)
    loads = {"product": square(problem)[0]}
    if reason is None:
        loads["cuda"] = partial(cuda.launch, "fprop", problem, None, *arguments(problem))
    found = {name: _sampled(call) for name, call in loads.items()}
    text = "; ".join(f"{name} {mhz:.0f} MHz, {watts:.0f} W" for name, (mhz, watts) in found.items())
    return result(OK, text if reason is None else f"{text}; not cuda: {reason}", samples=found)


def _sampled(call: Callable[[], Any]) -> tuple[float, float]:
    """(MHz, W) in the middle of a run of SAMPLE_S seconds."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]
    seen: list[str] = []

    def ask() -> None:
        time.sleep(SAMPLE_S / 2)
        seen.append(subprocess.run(query, capture_output=True, text=True, timeout=60).stdout)

    asker = threading.Thread(target=ask)
    asker.start()
    end = time.monotonic() + SAMPLE_S
    while time.monotonic() < end or asker.is_alive():
        for _ in range(50):
            call()
        torch.cuda.synchronize()
    asker.join()
    mhz, watts = seen[0].split(",")
    return float(mhz), float(watts)
