"""Does a kernel of the extension `_cuda` compute right on this GPU? Asked once per kernel, GPU and build.

The kernels were proved on the CPU, in a model of the hardware. Before they serve anyone on a GPU they give small
integers, whose exact result has one rounding at most, bit for bit. `selfcheck` has the integers and the exact result.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wrn_fast import random
from wrn_fast.kernels import passed, selfcheck
from wrn_fast.kernels.configs import TileConfig
from wrn_fast.problem import ConvProblem

_seen: dict[str, str | None] = {}

# Runs the operator on (the small problem, its tensors in the backend's order).
Run = Callable[..., Tensor]


def reason(op: str, problem: ConvProblem, tile: tuple, library: str, device: torch.device, run: Run) -> str | None:
    """Why the kernel of `op` with this tile must not be used on `device`, or None.

    Args:
        op: fprop, fprop_fp8, dgrad or wgrad.
        problem: what is to be served; the check is made once for all problems with its dtype, filter, prologue and
            dropout of an output.
        tile: what else distinguishes the kernel.
        library: the file of the extension.
        device: a GPU.
        run: the operator.
    """
    source = problem.prologue or problem.act != "identity"
    dtype = str(problem.dtype).removeprefix("torch.")
    filters = f"{problem.C}-{problem.K} {problem.R}x{problem.S}/{problem.stride}"
    drop = " drop" if _drops(problem) else ""
    name = f"{op} {dtype} {filters} {'act' if source else 'plain'}{drop} {tile}"
    check_it = functools.partial(check, op, problem, device, run)
    return passed.once(_seen, f"{device} {name}", _file_name(library, device), name, check_it)


def _drops(problem: ConvProblem) -> bool:
    return problem.p > 0 and problem.drop_at in ("output", "output_act")


def check(op: str, problem: ConvProblem, device: torch.device, run: Run) -> str | None:
    """Run `op` on integers. A sentence that says what was wrong, or None."""
    # The columns of the kernel that would serve, two chunks of the reduction of fprop.
    chunk = 128 if op == "fprop_fp8" else 64
    channels = -(-problem.C // 16) * 16
    columns = channels if op == "dgrad" else problem.K
    pass_ = op.removesuffix("_fp8")
    small, tensors = selfcheck.integers(pass_, problem, TileConfig(channels, chunk, (columns, 0), 8, 1))
    want = selfcheck.exact(pass_, small, tensors)
    names = {"fprop": ("x", "w"), "dgrad": ("dy", "x", "w"), "wgrad": ("dy", "x")}[pass_]
    given = [tensors[name] for name in (*names, "stats", "gamma", "beta")]
    if pass_ == "fprop" and _drops(problem):
        rng = torch.tensor([2**40 + 7, 2**33 + 5])
        small, want = small._replace(p=0.5, drop_at="output"), random.dropout(want, rng, 0.5)
        given += [None] * 7 + [rng]
    try:
        got = run(small, *(None if v is None else v.to(device) for v in given)).cpu()
    except RuntimeError as error:
        return f"its kernel fails on this GPU: {error}"
    wrong = int((got != want.to(got.dtype)).sum())
    return f"{op} gives {wrong} of {got.numel()} integers wrong on this GPU" if wrong else None


@functools.cache
def _file_name(library: str, device: torch.device) -> str:
    """Of the GPU, the versions and the library itself, so that a change of any asks again."""
    binary = hashlib.sha256(Path(library).read_bytes()).hexdigest()
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    versions = (torch.cuda.get_device_name(device), str(driver), torch.__version__, binary)
    return "cuda-" + hashlib.sha256("\n".join(versions).encode()).hexdigest()[:32] + ".json"
