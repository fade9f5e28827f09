"""Sanitizers on small shapes: the GPU vendor's, and Triton's own."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from benchmarks.battery import NOT_RUN, Result, Step, Steps, python, result, tests_on_path
from benchmarks.battery.parity import extensions

SMALL = ["-m", "benchmarks.battery.small"]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A process imports torch under the tool, which patches each kernel that it meets.
SECONDS = 50


def cuda_steps(dry: bool) -> Steps:
    """Of the hand-written kernels: every one by itself, then a network's graph with all of them in a row."""
    runs = ("hand-written", "graph")
    if dry:
        return {what: Step(partial(plain, what, "cpu"), 15) for what in runs}
    found = {"extensions": extensions()}
    found |= {f"{what}, no sanitizer": Step(partial(plain, what, "cuda"), 15) for what in runs}
    return found | {
        f"{what}, {tool}": Step(partial(vendor, tool, what), SECONDS, compiles=True) for what in runs for tool in TOOLS
    }


def triton_steps(dry: bool) -> Steps:
    """Of the Triton kernels."""
    if dry:
        return {"no sanitizer, interpreted": Step(partial(plain, "all", "cpu"), 15)}
    found = {"no sanitizer": Step(partial(plain, "all", "cuda"), 60, compiles=True)}
    found |= {tool: Step(partial(vendor, tool, "all"), SECONDS + 20, compiles=True) for tool in TOOLS}
    found["ConSan"] = Step(partial(instrumented, "consan", "all"), 80, compiles=True)
    return found | {"FpSan": Step(fpsan, 60, compiles=True)}


def plain(what: str, device: str, seconds: float) -> Result:
    """The run itself."""
    return python([*SMALL, device, what], seconds)


def vendor(tool: str, what: str, seconds: float) -> Result:
    """compute-sanitizer with one of its tools; any error is a failure."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    program = shutil.which("compute-sanitizer") or (str(beside) if beside.is_file() else None)
    if program is None:
        return result(NOT_RUN, "compute-sanitizer is neither on PATH nor under CUDA_HOME")
    before = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    # torch's caching allocator would hide a write past the end of a tensor, but a graph cannot be captured without it.
    caching = {} if what == "graph" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return python([*SMALL, "cuda", what], seconds, before, **caching)


def instrumented(mode: str, what: str, seconds: float) -> Result:
    """Triton's instrumentation, which it reads when it is imported."""
    return python([*SMALL, "cuda", what], seconds, TRITON_INSTRUMENTATION_MODE=mode, TRITON_ALWAYS_COMPILE="1")


def fpsan(seconds: float) -> Result:
    """Only where it takes effect: Triton 3.6 ignores the mode without a word."""
    import torch

    tests_on_path()
    from kernels import aot

    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return result(
            NOT_RUN, f"only looked into on compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
        )
    case = aot.cases()["sm_90 bf16 n128 160 eval"]
    kernel = aot.compile_launch(aot.launches(case)[-1], case.target, instrumentation_mode="fpsan")
    if "wgmma" in kernel.asm["ptx"]:
        return result(NOT_RUN, "this Triton ignores the mode: the tensor instructions are still there")
    return instrumented("fpsan", "reorder", seconds)
