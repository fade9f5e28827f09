"""Adapter to the Triton kernels: any GPU from compute capability 8.0 on, ROCm's gfx942, and the interpreter for tests.

float32 stays float32: `tf32x3` on NVIDIA, `bf16x6` on AMD, plain FMA under `precision("direct")`; TF32 itself only
where both `torch.backends.cuda.matmul` and `torch.backends.cudnn` allow it. An infinite operand, or one above 2^127, is
NaN in the parts that it is split into, so where eager gives an infinity the split gives NaN.

With TRITON_INTERPRET=1 in the environment the same code runs tensors of the CPU, in float64 too: slow, and exact enough
to show a wrong index.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wrn_fast import scales, tuned
from wrn_fast.kernels import configs
from wrn_fast.kernels.device import on_device
from wrn_fast.precision import current
from wrn_fast.problem import ConvProblem

NAME = "triton"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_AMD = ("gfx942",)
_PIXELS = 2**31 - 2**20  # pixel numbers of the last tile, too, are 32-bit
_FP8 = (8, 9)  # compute capability from which e4m3 is multiplied; of AMD's GPUs the ones in `_AMD` do
_WITHOUT_TILE = ("act_mask", "bn_bwd_apply", "channel_stats", "dropout", "head", "head_bwd")
_FEATURE = 8192  # channels that one program of the head holds
# What a tile is chosen and proved for, where an operator runs another one's kernel.
_KERNEL_OF = {"input_grad": "dgrad"}


def interpreting() -> bool:
    """Does triton, once imported, interpret its kernels on the CPU?"""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"


@functools.cache
def _refused_gpu() -> str | None:
    """The problem does not say which of several GPUs it is on, so all visible ones must do."""
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        if torch.version.hip:
            arch = _gcn_arch(index)
            if arch not in _AMD:
                return f"is proved on {', '.join(_AMD)} of AMD's GPUs only, cuda:{index} ({name}) is {arch}"
        elif torch.cuda.get_device_capability(index) < (8, 0):
            major, minor = torch.cuda.get_device_capability(index)
            return f"needs compute capability 8.0, cuda:{index} ({name}) has {major}.{minor}"
    return None


def _gcn_arch(index: int) -> str:
    return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]


@functools.cache
def arch(index: int | None) -> configs.Arch:
    """What the tile rule needs to know of GPU `index`; None is the interpreter."""
    if index is None:
        return configs.ARCHS["interpreter"]
    sms = torch.cuda.get_device_properties(index).multi_processor_count
    if torch.version.hip:
        return replace(configs.ARCHS[_gcn_arch(index)], sms=sms)
    return configs.arch_of(torch.cuda.get_device_capability(index), sms)


@functools.cache
def gpu(index: int | None) -> str:
    """The name that tuned rows go by."""
    return "interpreter" if index is None else torch.cuda.get_device_name(index)


def driver(index: int | None) -> str:
    """The version of CUDA that the driver speaks, or of ROCm."""
    if index is None:
        return "none"
    return str(torch.version.hip or torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


def forget() -> None:
    """Read tuned rows again at the next call."""
    tuned.table.cache_clear()
    config.cache_clear()


def unsupported(op: str, problem: ConvProblem) -> str | None:
    """A sentence that says why the problem cannot run here, or None."""
    if problem.device == "cpu" and not interpreting():
        return "needs a CUDA or ROCm GPU; on the CPU there is only Triton's interpreter (TRITON_INTERPRET=1), for tests"
    if problem.device not in ("cpu", "cuda"):
        return f"needs a CUDA or ROCm GPU, got a {problem.device} tensor"
    if _missing():
        return _missing()
    if problem.dtype not in (*_DTYPES, torch.float64) or (problem.dtype == torch.float64 and not interpreting()):
        return f"serves {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, got {problem.dtype}"
    pixels = problem.N * max(problem.H * problem.W, problem.P * problem.Q)
    if pixels >= _PIXELS:
        return f"serves up to {_PIXELS} pixels a call, got {pixels}"
    if problem.R * problem.S > 25:
        return f"serves filters of up to 25 taps, got {problem.R}x{problem.S}"
    if op == "head" and problem.C > _FEATURE:
        return f"serves a head of up to {_FEATURE} channels, got {problem.C}"
    if problem.device == "cuda":
        return _refused_gpu() or (_without_fp8() if op == "fprop_fp8" else None) or _failed_proof(op, problem)
    return None


@functools.cache
def _without_fp8() -> str | None:
    for index in range(0 if torch.version.hip else torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) < _FP8:
            name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            return f"multiplies e4m3 from compute capability 8.9 on, cuda:{index} ({name}) has {major}.{minor}"
    return None


def _failed_proof(op: str, problem: ConvProblem) -> str | None:
    """The self-check of the tile that would serve `problem`. Not inside a capture, where nothing may be read back."""
    if op in _WITHOUT_TILE or torch.cuda.is_current_stream_capturing():
        return None
    index = torch.cuda.current_device()
    op = _KERNEL_OF.get(op, op)
    return refused_tile(op, problem, config(op, problem, index), torch.device("cuda", index))


def refused_tile(op: str, problem: ConvProblem, tile: configs.TileConfig, device: torch.device) -> str | None:
    """Why a tile must not be used on a device: it does not compile there, or computes wrongly."""
    from wrn_fast.kernels import selfcheck

    if op == "fprop_fp8":
        return selfcheck.reason("fprop", problem, tile, "fp8", device)
    return selfcheck.reason(op, problem, tile, dot_precision(problem, device.index), device)


@functools.lru_cache(maxsize=4096)
def config(op: str, problem: ConvProblem, index: int | None) -> configs.TileConfig:
    """The tuned row of this GPU where there is a legal one, else the written rule."""
    here = arch(index)
    if op == "fprop_fp8":
        return configs.in_fp8(config("fprop", problem, index), problem, here)
    row = tuned.lookup(NAME, op, problem, gpu(index), here.name)
    if row is not None:
        found = configs.from_row(row)
        reason = configs.illegal(found, op, problem, here)
        if reason is None:
            return found
        warnings.warn(f"wrn_fast: the tuned row of {tuned.key(NAME, op, problem)} is left out: {reason}", stacklevel=2)
    return configs.heuristic(op, problem, here)


def dot_precision(problem: ConvProblem, index: int | None) -> str:
    """Triton's `input_precision`."""
    if problem.dtype != torch.float32 or index is None or current() == "direct":
        return "ieee"
    both = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
    if both == ("tf32", "tf32"):
        return "tf32"
    return "bf16x6" if torch.version.hip else "tf32x3"


def measured_us(op: str, problem: ConvProblem) -> float | None:
    """What `wrn-fast tune` measured for the problem's class on this GPU, or None."""
    index = torch.cuda.current_device() if problem.device == "cuda" else None
    return tuned.us(NAME, op, problem, gpu(index), arch(index).name)


@functools.cache
def _launchers() -> dict[str, Callable]:
    """Imports triton."""
    from wrn_fast.kernels.bn_bwd_apply import bn_bwd_apply
    from wrn_fast.kernels.dgrad import dgrad, input_grad
    from wrn_fast.kernels.dropout import dropout
    from wrn_fast.kernels.fprop import fprop
    from wrn_fast.kernels.head import head, head_bwd
    from wrn_fast.kernels.masks import act_mask
    from wrn_fast.kernels.stats import channel_stats
    from wrn_fast.kernels.wgrad import wgrad

    functions = (act_mask, bn_bwd_apply, channel_stats, dgrad, dropout, fprop, head, head_bwd, input_grad, wgrad)
    return {f.__name__: f for f in functions} | {"fprop_fp8": fprop}


def scale_shift(
    stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """[C] each, for a second output: bn(y) = y * scale + shift; `like` is of the dtype and device of y, of 16 bits."""
    from wrn_fast.kernels.stats import affine

    with on_device(like.device):
        table = affine(stats, gamma, beta, eps, like.dtype)
    assert table is not None
    return table[0], table[1]


def launch(op: str, problem: ConvProblem, tile: configs.TileConfig | None, *tensors: Any) -> Any:
    """Runs `op` with the given tile (None: the chosen one) on the device of the first tensor."""
    assert tensors[0] is not None
    index = tensors[0].device.index
    if op in _WITHOUT_TILE:
        how: tuple = ()
    elif op == "fprop_fp8":
        how = (config(op, problem, index), "fp8")
    else:
        how = (tile or config(_KERNEL_OF.get(op, op), problem, index), dot_precision(problem, index))
    with on_device(tensors[0].device):
        return _launchers()[op](problem, *how, *tensors)


def fprop(
    problem: ConvProblem,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    x_short: Tensor | None,
    w_short: Tensor | None,
    stats_short: Tensor | None,
    gamma_short: Tensor | None,
    beta_short: Tensor | None,
    rng: Tensor | None,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N,K,P,Q], stats_y [2,K], y_act [N,K,P,Q]); an absent output has 0 elements."""
    return launch(
        "fprop", problem, None, x, w, stats, gamma, beta, bias, residual, x_short, w_short, stats_short, gamma_short,
        beta_short, rng, out_scale, out_shift,
    )  # fmt: skip


def fprop_fp8(problem: ConvProblem, x: Tensor, w: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """fprop with operands in e4m3, by the ranges that calibration kept for its filters.

    Raises:
        WrnFastError: a filter has none.
    """
    from wrn_fast.kernels.fp8 import Ranges, e4m3

    return launch("fprop_fp8", problem, None, x, w, *rest, Ranges(*scales.needed(w, rest[6]), e4m3()))


def dgrad(
    problem: ConvProblem,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(g [N,C,H,W], sums_g [2,C]): the gradient before the activation, and the sums of g and g*xhat."""
    return launch("dgrad", problem, None, dy, x, w, stats, gamma, beta, rng)


def wgrad(
    problem: ConvProblem,
    dy: Tensor,
    x: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
) -> Tensor:
    """dw [K,C,R,S]: the activation is made again from x."""
    return launch("wgrad", problem, None, dy, x, stats, gamma, beta, rng)


def act_mask(
    problem: ConvProblem, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """uint8 [N,H,W,ceil(C/8)]: one bit an element, set where act'(bn(x)) is 1."""
    return launch("act_mask", problem, None, x, stats, gamma, beta)


def input_grad(
    problem: ConvProblem, dy: Tensor, w: Tensor, mask: Tensor | None, scale: Tensor | None, rng: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] = scale * act' * dropout'(dgrad(dy, w)), where only x wants a gradient and BatchNorm is in eval."""
    return launch("input_grad", problem, None, dy, w, mask, scale, rng)


def bn_bwd_apply(
    problem: ConvProblem, g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor | None, sums_g: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] from the gradient before the activation: BatchNorm's own backward, in one pass."""
    return launch("bn_bwd_apply", problem, None, g, x, stats, gamma, sums_g)


def channel_stats(problem: ConvProblem, x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance of x, read once."""
    return launch("channel_stats", problem, None, x)


def dropout(problem: ConvProblem, x: Tensor, rng: Tensor) -> Tensor:
    """x * mask / (1 - p)."""
    return launch("dropout", problem, None, x, rng)


def head(
    problem: ConvProblem,
    y: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [N,K], feat [N,C]): the mean of act(bn(y)) over the image, and the classes' values of it, in one launch."""
    return launch("head", problem, None, y, stats, gamma, beta, w, bias)


def head_bwd(
    problem: ConvProblem, dfeat: Tensor, y: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dy [N,C,H,W], sums_g [2,C]) from the feature's gradient; with batch statistics in two passes over y."""
    return launch("head_bwd", problem, None, dfeat, y, stats, gamma, beta)
