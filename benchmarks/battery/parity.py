"""Parity of the operators on the device: exact integers of every shipped tile, then every primitive against float64."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial

import torch

from benchmarks.battery import FAILED, NOT_RUN, OK, Result, Step, Steps, python, result
from benchmarks.battery.replaced import on_the_cpu
from benchmarks.battery.stress import far, split_reductions
from benchmarks.machine import ROOT
from wrn_fast import dispatch, tune
from wrn_fast.backends import cuda, triton

PRIMITIVES = ("tests/backends/test_primitives.py", "tests/backends/test_masks.py", "tests/backends/test_head.py")
# Whole numbers of every small image, NaN, infinities, denormals, the same bits in every run, inputs that stay, what a
# changed input must change: by a dtype of the backend's own.
PROPERTIES = (PRIMITIVES[0], "tests/backends/test_exact.py", "tests/backends/test_metamorphic.py")
NO_DTYPE = " and not float"
# What else has the dtype's name in its own.
NO_OTHER = {"float32": "", "bfloat16": "", "float16": " and not bfloat16"}
# (depth, width, batch) of the networks whose tiles are proved.
NETWORKS = ((28, 10, 128), (28, 10, 1), (28, 2, 512), (16, 4, 512), (40, 2, 512))
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROCESSES = 8


def cuda_steps(dry: bool) -> Steps:
    """Of the hand-written kernels, which serve 16-bit convolutions and passes in every dtype."""
    if dry:
        network = ((10, 1, 1),)
        return {
            "integers": Step(partial(on_the_cpu, partial(kernels, "fp16", "cpu", network)), 5),
            "split reductions": Step(partial(on_the_cpu, partial(split_reductions, torch.float16, "cpu")), 5),
            "beyond 2^31 elements": Step(partial(on_the_cpu, partial(far, "cuda", "cpu", n=3)), 5),
        }
    found = {"extensions": extensions()}
    found |= {f"integers {name}": Step(partial(kernels, name, "cuda", NETWORKS), 25) for name in HALVES}
    found |= {
        f"split reductions {name}": Step(partial(split_reductions, dtype, "cuda"), 20) for name, dtype in HALVES.items()
    }
    found["beyond 2^31 elements"] = Step(partial(far, "cuda", "cuda"), 15)
    for name in ("bfloat16", "float16"):
        found[f"primitives {name}"] = tested(f"cuda and {name}{NO_OTHER[name]}", 90)
    found["special values"] = tested(f"cuda{NO_DTYPE}", 60, PROPERTIES)
    return found | {"primitives float32": tested("cuda and float32", 60)}


def tile_steps(dry: bool) -> Steps:
    """Of every tile that the Triton kernels choose."""
    if dry:
        return {
            "integers WRN-10-1 fp32": Step(partial(integers, (10, 1, 1), "fp32", "cpu"), 5),
            "integers of boxes": Step(partial(special, "cpu"), 5),
        }
    found: Steps = {}
    for dtype in tune.DTYPES:
        for network in NETWORKS:
            depth, width, batch = network
            # Tiles are compiled for the first network of a dtype, the others bring few new ones.
            seconds = 40 if network is NETWORKS[0] else 18
            found[f"integers WRN-{depth}-{width} batch {batch} {dtype}"] = Step(
                partial(integers, network, dtype, "cuda"), seconds, compiles=True
            )
    return found | {"integers of boxes": Step(partial(special, "cuda"), 15)}


def triton_steps(dry: bool) -> Steps:
    """Of the Triton kernels through the operators."""
    if dry:
        return {"primitives float64": Step(partial(primitives, "aten and channel_stats and float64"), 5)}
    found = {"special values": tested(f"triton{NO_DTYPE}", 120, PROPERTIES)}
    for name in ("bfloat16", "float16", "float32"):
        found[f"primitives {name}"] = tested(f"triton and {name}{NO_OTHER[name]}", 90)
    return found | {"beyond 2^31 elements": Step(partial(far, "triton", "cuda"), 20, compiles=True)}


def extensions() -> Step:
    """`_cpu` and `_cuda`, wherever a stage needs them."""
    # Not by loading it: what was loaded before it was built anew would stay.
    return Step(build, 5 if importlib.util.find_spec("wrn_fast._cuda") else 75, always=True, compiles=True)


def build(seconds: float) -> Result:
    """Compiles what changed for this Python and GPU's toolkit; without nvcc the cuda backend is left out."""
    done = python(["setup.py", "-q", "build_ext", "--inplace"], seconds)
    if done["status"] == FAILED:
        # One of an earlier build is of other code than the report says.
        for old in (ROOT / "wrn_fast").glob("_cuda.*"):
            old.unlink()
    importlib.invalidate_caches()
    cuda._load.cache_clear()
    dispatch.forget()
    reason = cuda.missing()
    return done if done["status"] == FAILED else result(NOT_RUN if reason else OK, reason or "_cuda is built")


def kernels(dtype: str, device: str, networks: tuple[tuple[int, int, int], ...], seconds: float) -> Result:
    """The self-check of every kernel of `_cuda` that serves a layer of the networks."""
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    wrong, seen = [], set()
    for depth, width, batch in networks:
        for op, problem in tune.tasks(depth, width, batch, dtype, device):
            reason = cuda.refused(op, problem)
            if reason:
                return result(NOT_RUN, reason)
            forms = [(op, problem)]
            if op == "fprop":
                forms.append((op, problem._replace(p=0.3, drop_at="output")))
                forms += [("fprop_fp8", problem)] if cuda.refused("fprop_fp8", problem) is None else []
            for kind, form in forms:
                for tile in cuda.tiles(kind, form):
                    key = kind, form._replace(N=1), tile
                    sentence = None if key in seen else cuda.wrong(kind, form, tile, place)
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


def tested(expression: str, seconds: float, tests: tuple[str, ...] = PRIMITIVES) -> Step:
    """The step of `primitives`."""
    return Step(partial(primitives, expression, tests=tests), seconds, compiles=True)


def primitives(expression: str, seconds: float, tests: tuple[str, ...] = PRIMITIVES) -> Result:
    """Every primitive against float64, through the operators: the tests of the repository on this device."""
    words = ["-m", "pytest", *tests, "-k", expression, "-q", "--benchmark-disable", "--all-cases", "-p",
             "no:cacheprovider"]  # fmt: skip
    if importlib.util.find_spec("xdist") and torch.cuda.is_available():
        words += ["-n", str(PROCESSES)]
    return python(words, seconds, TRITON_INTERPRET="")
