"""Sanitizers on small shapes: the GPU vendor's, and Triton's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.battery import NOT_RUN, Result, python, result

SMALL = ["-m", "benchmarks.battery.small"]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def steps(dry: bool) -> dict[str, Callable[[float], Result]]:
    """By name."""
    if dry:
        return {"no sanitizer, interpreted": lambda seconds: python([*SMALL, "cpu", "all"], seconds)}
    found: dict[str, Callable[[float], Result]] = {
        "no sanitizer": lambda seconds: python([*SMALL, "cuda", "all"], seconds),
        "no sanitizer, cuda backend": lambda seconds: python([*SMALL, "cuda", "hand-written"], seconds),
    }
    found |= {f"compute-sanitizer {tool}": partial(vendor, tool, "all") for tool in TOOLS}
    found |= {f"compute-sanitizer {tool}, cuda backend": partial(vendor, tool, "hand-written") for tool in TOOLS}
    return found | {"ConSan": partial(instrumented, "consan", "all"), "FpSan": fpsan}


def vendor(tool: str, what: str, seconds: float) -> Result:
    """compute-sanitizer with one of its tools; any error is a failure."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    program = shutil.which("compute-sanitizer") or (str(beside) if beside.is_file() else None)
    if program is None:
        return result(NOT_RUN, "compute-sanitizer is neither on PATH nor under CUDA_HOME")
    before = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    # torch's caching allocator would hide a write past the end of a tensor.
    return python([*SMALL, "cuda", what], seconds, before, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def instrumented(mode: str, what: str, seconds: float) -> Result:
    """Triton's instrumentation, which it reads when it is imported."""
    return python([*SMALL, "cuda", what], seconds, TRITON_INSTRUMENTATION_MODE=mode, TRITON_ALWAYS_COMPILE="1")


def fpsan(seconds: float) -> Result:
    """Only where it takes effect: Triton 3.6 ignores the mode without a word."""
    import torch
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
