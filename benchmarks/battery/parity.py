"""Parity on the device: exact integers of every shipped tile, then every primitive, then whole models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch

import wrn_fast
from benchmarks.battery import FAILED, NOT_RUN, OK, Result, python, result
from wrn_fast import dispatch, parity, tune
from wrn_fast.backends import cuda, triton
from wrn_fast.verify import verify

PRIMITIVES = ("tests/backends/test_primitives.py", "tests/backends/test_masks.py", "tests/backends/test_head.py")
# NaN, infinities, denormals, the same bits in every run, inputs that stay.
EXACT = ("tests/backends/test_exact.py",)
SPECIAL = "{} and (nan or denormals or bits or inputs_stay)"
# (depth, width, batch) of the networks whose tiles are proved, and (depth, width) of those that run whole.
NETWORKS = ((28, 10, 128), (28, 10, 1), (28, 2, 512), (16, 4, 512), (40, 2, 512))
MODELS = ((16, 4), (28, 10))


def steps(dry: bool) -> dict[str, Callable[[float], Result]]:
    """By name."""
    if dry:
        return {
            "integers WRN-10-1 fp32": partial(integers, (10, 1, 1), "fp32", "cpu"),
            "primitives float64": partial(primitives, "aten and channel_stats and float64"),
            "integers of boxes": partial(special, "cpu"),
            "model WRN-10-1": partial(model, (10, 1), (torch.float64,), "cpu"),
        }
    found: dict[str, Callable[[float], Result]] = {"extensions": build}
    for dtype in tune.DTYPES:
        for depth, width, batch in NETWORKS:
            found[f"integers WRN-{depth}-{width} batch {batch} {dtype}"] = partial(
                integers, (depth, width, batch), dtype, "cuda"
            )
    for dtype in ("float32", "float16", "bfloat16"):
        found[f"primitives {dtype}"] = partial(primitives, f"triton and {dtype}")
    found["special values"] = partial(primitives, SPECIAL.format("triton"), tests=EXACT)
    found["integers of boxes"] = partial(special, "cuda")
    found["e4m3 WRN-28-10"] = partial(eight_bits, (28, 10), "cuda")
    for network in MODELS:
        for name in (torch.float32, torch.bfloat16, torch.float16):
            label = str(name).removeprefix("torch.")
            found[f"model WRN-{network[0]}-{network[1]} {label}"] = partial(model, network, (name,), "cuda")
    return found | hand_written()


def build(seconds: float) -> Result:
    """Compiles `_cpu` and `_cuda` for this Python and GPU's toolkit; without nvcc the cuda backend is left out."""
    done = python(["setup.py", "-q", "build_ext", "--inplace"], seconds)
    importlib.invalidate_caches()
    cuda._load.cache_clear()
    dispatch.forget()
    reason = cuda.missing()
    return done if done["status"] == FAILED else result(NOT_RUN if reason else OK, reason or "_cuda is built")


def hand_written() -> dict[str, Callable[[float], Result]]:
    """The same of the cuda backend, which serves 16-bit convolutions and passes in every dtype."""
    found: dict[str, Callable[[float], Result]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        found[f"cuda integers {name}"] = partial(kernels, name)
        found[f"cuda primitives {name}"] = partial(primitives, f"cuda and {str(dtype).removeprefix('torch.')}")
        for network in MODELS:
            label = f"cuda model WRN-{network[0]}-{network[1]} {name}"
            found[label] = partial(model, network, (dtype,), "cuda", backend="cuda")
    found["cuda e4m3 WRN-28-10"] = partial(eight_bits, (28, 10), "cuda", backend="cuda", dtype=torch.bfloat16)
    found["cuda special values"] = partial(primitives, SPECIAL.format("cuda"), tests=EXACT)
    return found | {"cuda primitives float32": partial(primitives, "cuda and float32")}


def kernels(dtype: str, seconds: float) -> Result:
    """The self-check of every kernel of `_cuda` that serves a layer of the networks."""
    place = torch.device("cuda", torch.cuda.current_device())
    wrong, seen = [], set()
    for depth, width, batch in NETWORKS:
        for op, problem in tune.tasks(depth, width, batch, dtype):
            reason = cuda.refused(op, problem)
            if reason:
                return result(NOT_RUN, reason)
            eight = op == "fprop" and cuda.refused("fprop_fp8", problem) is None
            for kind in (op, "fprop_fp8") if eight else (op,):
                for tile in cuda.tiles(kind, problem):
                    key = kind, problem._replace(N=1), tile
                    sentence = None if key in seen else cuda.wrong(kind, problem, tile, place)
                    seen.add(key)
                    wrong += [sentence] if sentence else []
    if wrong:
        return result(FAILED, f"{len(wrong)} of {len(seen)} kernels: {wrong[0]}", wrong=wrong)
    return result(OK, f"{len(seen)} kernels exact")


def integers(network: tuple[int, int, int], dtype: str, device: str, seconds: float) -> Result:
    """The self-check of the tile of every layer, bit for bit."""
    depth, width, batch = network
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    tasks = tune.tasks(depth, width, batch, dtype, device)
    if device == "cpu":
        tasks = tasks[:2]
    wrong = []
    for op, problem in tasks:
        sentence = triton.refused_tile(op, problem, triton.config(op, problem, place.index), place)
        if sentence:
            wrong.append(sentence)
    if wrong:
        return result(FAILED, f"{len(wrong)} of {len(tasks)} tiles: {wrong[0]}", wrong=wrong)
    return result(OK, f"{len(tasks)} tiles exact")


def special(device: str, seconds: float) -> Result:
    """The self-check of tiles that the rule does not choose: boxes and e4m3."""
    from benchmarks.battery.small import special_tiles

    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    wrong = special_tiles(place)
    bad = [sentence for sentence in wrong if sentence]
    return result(FAILED, bad[0]) if bad else result(OK if wrong else NOT_RUN, f"{len(wrong)} tiles exact")


def eight_bits(
    network: tuple[int, int], device: str, seconds: float, backend: str = "triton", dtype: torch.dtype = torch.float32
) -> Result:
    """A network calibrated on normal images: how far its outputs in e4m3 are from those without."""
    from wrn_fast.fp8 import calibrate

    torch.manual_seed(0)
    model = wrn_fast.classic(network[0], 10, network[1]).to(device, dtype).eval()
    images = [torch.randn(64, 3, 32, 32, device=device, dtype=dtype) for _ in range(4)]
    with wrn_fast.backend(backend):
        found = calibrate(model, images)
    return result(OK if found.error < parity.MEANINGLESS else FAILED, str(found), ranges=found.ranges)


def primitives(expression: str, seconds: float, tests: tuple[str, ...] = PRIMITIVES) -> Result:
    """Every primitive against float64, through the operators: the tests of the repository on this device."""
    words = ["-m", "pytest", *tests, "-k", expression, "-q", "--benchmark-disable", "--all-cases", "-p",
             "no:cacheprovider"]  # fmt: skip
    return python(words, seconds, TRITON_INTERPRET="")


def model(
    network: tuple[int, int], dtypes: tuple[torch.dtype, ...], device: str, seconds: float, backend: str = "triton"
) -> Result:
    """Outputs, features, gradients, statistics and optimizer steps of a whole model."""
    small = device == "cpu"
    fast = wrn_fast.classic(network[0], 10, network[1])
    with wrn_fast.backend("aten" if small else backend):
        report = verify(
            fast, seeds=1 if small else parity.SEEDS, dtypes=dtypes, steps=1 if small else 3, batch=2 if small else 8,
            device=device,
        )  # fmt: skip
    worst = next(iter(report.failed()), None)
    return result(OK if report.ok else FAILED, str(worst or "every quantity within its bound"), report=report.as_dict())
