"""Does a tile compute right on this GPU? Asked once per (kernel, tile, GPU, versions), remembered in a file.

Two dots that share an operand, each into an accumulator of its own inside a pipelined loop, were miscompiled on some
pairs of GPU and Triton version, without an error and the same way each time (triton-lang/triton issues 10821, 11366).
128 + 32 columns is such a pattern, so a tile proves itself before it serves anyone: small integers, whose exact result
has one rounding at most, compared bit for bit.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wrn_fast.kernels import passed
from wrn_fast.kernels.configs import TileConfig
from wrn_fast.problem import ConvProblem

_FORMAT = 1
_seen: dict[str, str | None] = {}


def reason(op: str, problem: ConvProblem, config: TileConfig, precision: str, device: torch.device) -> str | None:
    """Why the kernel of `op` with this tile must not be used on `device`, or None."""
    source = problem.prologue or problem.act != "identity"
    name = (
        f"{op} {str(problem.dtype).removeprefix('torch.')} {precision} {problem.R}x{problem.S}/{problem.stride} "
        f"{'act' if source else 'plain'} {config.rows}x{config.cols[0]}+{config.cols[1]}x{config.red} "
        f"warps={config.warps} stages={config.stages} apply={config.apply} box={config.box}"
    )
    check_it = functools.partial(check, op, problem, config, precision, device)
    return passed.once(_seen, f"{device} {name}", _file_name(device), name, check_it)


def check(op: str, problem: ConvProblem, config: TileConfig, precision: str, device: torch.device) -> str | None:
    """Compile the kernel and run it on integers. A sentence that says what was wrong, or None."""
    import triton

    small, tensors = integers(op, problem, config)
    want = exact(op, small, tensors)
    tensors = {n: v if v is None else v.to(device) for n, v in tensors.items()}
    tile = f"{op} with tile {config.rows}x{config.cols[0]}+{config.cols[1]}x{config.red}"
    try:
        got = _run(op, small, config, precision, tensors).cpu()
    except triton.runtime.errors.TritonError as e:
        return f"{tile} does not compile for this GPU: {e}"
    wrong = int((got != want.to(got.dtype)).sum())
    if not wrong:
        return None
    return (
        f"{tile} is miscompiled on this GPU by Triton {triton.__version__}: {wrong} of {got.numel()} integers are wrong"
    )


def integers(op: str, problem: ConvProblem, config: TileConfig) -> tuple[ConvProblem, dict[str, Tensor | None]]:
    """A small problem that fills the tile's columns and loops over it, and its tensors: integers on the CPU.

    Variance 1, eps 0 and integer gamma, beta and mean keep act(bn(x)) integer.
    """
    columns, red = config.width, 2 * config.red
    c, k = {"fprop": (red, columns), "dgrad": (columns, red), "wgrad": (config.rows, columns)}[op]
    source = problem.prologue or problem.act != "identity"
    h, w = (8, 4) if config.box else (9, 7)
    small = ConvProblem(
        problem.device, problem.dtype, problem.dtype, 3, h, w, c, k, problem.R, problem.S, problem.stride, problem.pad,
        act="relu" if source else "identity", prologue=source, affine=source,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)

    def draw(least: int, most: int, *shape: int) -> Tensor:
        return torch.randint(least, most + 1, shape, generator=g).float()

    def nhwc(v: Tensor) -> Tensor:
        return v.to(problem.dtype).contiguous(memory_format=torch.channels_last)

    vectors = dict.fromkeys(("stats", "gamma", "beta"))
    if source:
        vectors = {
            "stats": torch.stack([draw(-1, 1, c), torch.ones(c)]),
            "gamma": draw(0, 1, c) * 2 - 1,
            "beta": draw(-1, 1, c),
        }  # type: ignore[assignment]
    tensors = {
        "x": nhwc(draw(-2, 2, small.N, c, small.H, small.W)),
        "w": nhwc(draw(-2, 2, k, c, small.R, small.S)),
        "dy": nhwc(draw(-2, 2, small.N, k, small.P, small.Q)),
    }
    return small, {**tensors, **vectors}


def exact(op: str, problem: ConvProblem, tensors: dict[str, Tensor | None]) -> Tensor:
    """What the kernel must give, in float64, where these integers have no rounding."""
    x, w, dy, stats, gamma, beta = (
        None if tensors[n] is None else tensors[n].double()  # type: ignore[union-attr]
        for n in ("x", "w", "dy", "stats", "gamma", "beta")
    )
    assert x is not None and w is not None and dy is not None
    if stats is not None and gamma is not None and beta is not None:
        x = (x - stats[0][:, None, None]) * gamma[:, None, None] + beta[:, None, None]
    v = x.requires_grad_()
    a = F.relu(v) if problem.act == "relu" else v
    y = F.conv2d(F.pad(a, problem.pad), w.requires_grad_(), stride=problem.stride)
    if op == "fprop":
        return y.detach()
    return torch.autograd.grad(y, v if op == "dgrad" else w, dy)[0]


def _run(op: str, problem: ConvProblem, config: TileConfig, precision: str, tensors: dict) -> Tensor:
    from wrn_fast.kernels import dgrad, fp8, fprop, wgrad
    from wrn_fast.kernels.fp8 import e4m3

    x, w, dy = tensors["x"], tensors["w"], tensors["dy"]
    vectors = {name: tensors[name] for name in ("stats", "gamma", "beta")}
    if op == "fprop":
        ranges = None
        if precision == "fp8":
            # Scale 1 for the activations; the filters' is what rounding to the output's dtype takes off again.
            amax = torch.full((1,), fp8.largest(e4m3()), device=x.device)
            ranges = fp8.Ranges(amax, None, e4m3())
        return fprop.fprop(problem, config, precision, x, w, **vectors, ranges=ranges)[0]
    if op == "dgrad":
        return dgrad.dgrad(problem, config, precision, dy, x, w, **vectors)[0]
    return wgrad.wgrad(problem, config, precision, dy, x, **vectors)


@functools.cache
def _file_name(device: torch.device) -> str:
    """Of the GPU, the versions and the kernels' own source, so that a change of any asks again."""
    import triton

    sources = sorted(Path(__file__).parent.glob("*.py"))
    kernels = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    on_cuda = device.type == "cuda" and torch.version.cuda
    driver = torch._C._cuda_getDriverVersion() if on_cuda else 0  # type: ignore[attr-defined]
    versions = (str(_FORMAT), gpu, str(driver), torch.__version__, str(torch.version.hip), triton.__version__)
    return hashlib.sha256("\n".join((*versions, kernels)).encode()).hexdigest()[:32] + ".json"
