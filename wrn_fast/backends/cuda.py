"""Adapter to the CUDA extension `_cuda`: convolutions for Hopper (compute capability 9.0), the passes that are bound by
memory for 7.5 and later.

Every call queues its kernels on torch's current stream of x's device, takes scratch from torch's allocator, reads
nothing back, and so may be captured on its first call. A float32 filter is cast while it is packed;
`kernels/cuda_weights.py` says how long a pack is kept.

Numerics: products of 16-bit operands, sums in float32, one rounding at the store; bn(x) = x * scale + shift in float32,
rounded once where it enters the product. Dropout before a convolution is in the pass that makes act(bn(x)); dropout of
an output is in the convolution's epilogue.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wrn_fast import scales, tuned
from wrn_fast._build import missing_extension_reason
from wrn_fast.kernels import cuda_check, cuda_launch, cuda_passes
from wrn_fast.kernels.cuda_launch import STEP, Tile
from wrn_fast.kernels.cuda_passes import CODES
from wrn_fast.problem import ConvProblem

NAME = "cuda"

_TENSORS = {"fprop": 15, "fprop_fp8": 15, "dgrad": 7, "wgrad": 6}  # arguments of the convolutions
_KERNEL_OF = {"input_grad": "dgrad"}
_HALVES = (torch.bfloat16, torch.float16)
_HOPPER, _OLDEST = (9, 0), (7, 5)
_ROWS = {128: 0, 256: 1}  # pixels of a tile, by which tuned rows name its kind


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(the extension, None), or (None, the reason why it cannot be used)."""
    try:
        from wrn_fast import _cuda  # type: ignore[attr-defined]
    except ImportError as error:
        if "cannot import name" in str(error):
            return None, missing_extension_reason("_cuda")
        return None, f"extension _cuda cannot be loaded: {error}"
    return _cuda, None


def missing() -> str | None:
    """Why the extension cannot be used, or None (`wrn-fast info`)."""
    return _load()[1]


def extension() -> Any:
    """The extension.

    Raises:
        RuntimeError: it is not there; the message says why.
    """
    found, reason = _load()
    if found is None:
        raise RuntimeError(reason)
    return found


@functools.cache
def _refused_gpu(convolution: bool) -> str | None:
    """The problem does not say which of several GPUs it is on, so all visible ones must do."""
    if torch.version.hip:
        return "is for NVIDIA's GPUs"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        where = f"cuda:{index} ({torch.cuda.get_device_name(index)}) has {capability[0]}.{capability[1]}"
        if convolution and capability != _HOPPER:
            return f"has convolutions for compute capability 9.0 (Hopper), {where}"
        if capability < _OLDEST:
            return f"needs compute capability 7.5, {where}"
    return None


def unsupported(op: str, problem: ConvProblem) -> str | None:
    """A sentence that says why the problem cannot run here, or None."""
    reason = refused(op, problem)
    return reason if reason or op not in (*_TENSORS, *_KERNEL_OF) else _failed_check(_KERNEL_OF.get(op, op), problem)


def refused(op: str, problem: ConvProblem) -> str | None:
    """The same without asking the GPU for a proof."""
    found, reason = _load()
    if found is None:
        return reason
    if problem.device != found.DEVICE:
        return f"needs a {found.DEVICE} tensor, got one on {problem.device}"
    op = _KERNEL_OF.get(op, op)
    convolution = op in _TENSORS
    refused = _refused_gpu(convolution) if problem.device == "cuda" else None
    if refused:
        return refused
    if not convolution:
        if problem.dtype not in CODES:
            return f"serves float16, bfloat16, float32, float64, got {problem.dtype}"
        return _refused_head(op, problem)
    return _refused_convolution(op, problem)


def _refused_head(op: str, problem: ConvProblem) -> str | None:
    if op == "head" and problem.C > extension().MOST_FEATURES:
        return f"has a head of up to {extension().MOST_FEATURES} features, got {problem.C}"
    if op == "head_bwd" and problem.N * problem.H * problem.W >= 2**32:
        return f"has the gradient of a head of fewer than 2^32 pixels, got {problem.N * problem.H * problem.W}"
    return None


def _refused_convolution(op: str, problem: ConvProblem) -> str | None:
    if problem.dtype not in _HALVES:
        return f"has convolutions in bfloat16 and float16, got {problem.dtype}"
    if problem.w_dtype not in (problem.dtype, torch.float32):
        return f"needs filters in float32 or {problem.dtype}, got {problem.w_dtype}"
    if problem.K % STEP:
        return f"needs K to be a multiple of {STEP}, got {problem.K}"
    source = problem.prologue or problem.act != "identity" or (problem.p > 0 and problem.drop_at == "prologue")
    if problem.C % STEP and source:
        return f"needs C to be a multiple of {STEP} where BatchNorm, activation or dropout precede, got {problem.C}"
    if op == "fprop_fp8" and problem.C % STEP:
        return f"needs C to be a multiple of {STEP} in e4m3, got {problem.C}"
    if op in ("fprop", "fprop_fp8"):
        if problem.short_C % STEP:
            return f"needs a multiple of {STEP} channels in the shortcut, got {problem.short_C}"
        if problem.short_C and problem.short_stride > 2:
            return f"needs a shortcut of stride 1 or 2, got {problem.short_stride}"
    refused = extension().refuses(op, cuda_launch.shape_of(extension(), problem), CODES[problem.dtype], 0)
    return None if refused is None else str(refused)


def _failed_check(op: str, problem: ConvProblem) -> str | None:
    """Integers through the kernel that would serve `problem`. Not inside a capture, where nothing may be read back."""
    if problem.device != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return refused_tile(op, problem, config(op, problem, device.index), device)


def refused_tile(op: str, problem: ConvProblem, tile: Tile, device: torch.device) -> str | None:
    """What the self-check says against `tile`, run once and remembered in a file, or None."""
    return cuda_check.reason(op, problem, tuple(tile), extension().__file__, device, _runner(op, tile))


def wrong(op: str, problem: ConvProblem, tile: Tile, device: torch.device) -> str | None:
    """What the self-check says against `tile` now, or None."""
    return cuda_check.check(op, problem, device, _runner(op, tile))


def _runner(op: str, tile: Tile) -> cuda_check.Run:
    def run(small: ConvProblem, *tensors: Any) -> Tensor:
        given = [*tensors, *[None] * (_TENSORS[op] - len(tensors))]
        if op == "fprop_fp8":
            # Scale 1 for the activations; what the filters' scale adds goes in the rounding of the output.
            largest = torch.finfo(torch.float8_e4m3fn).max
            given.append((torch.full((1,), largest, dtype=torch.float32, device=tensors[0].device), None))
        out = launch(op, small, tile, *given)
        return out if op == "wgrad" else out[0]

    return run


# Choice of a tile.


@functools.lru_cache(maxsize=1024)
def config(op: str, problem: ConvProblem, index: int | None) -> Tile:
    """The tile for `problem` on GPU `index` (None: none): the tuned row, else by size.

    A call that is too small to fill the GPU has its reduction split, which kind 0 can; else a filter column is fetched
    at once where the kernel can.

    Raises:
        RuntimeError: the extension is not there.
    """
    row = None if index is None else _row(op, problem, index)
    e4m3 = op == "fprop_fp8"
    small = op != "wgrad" and cuda_launch.splits_of(extension(), problem, op == "dgrad", index, e4m3) > 1
    tiles = [*([Tile(_ROWS[row["rows"]], row["apply"])] if row else []), *([] if small else [Tile(1)]), Tile(0)]
    return next(tile for tile in tiles if legal(op, problem, tile))


def legal(op: str, problem: ConvProblem, tile: Tile) -> bool:
    """Does the kernel of this tile serve the problem?"""
    if op == "wgrad":
        return tile == Tile(0)
    if op == "fprop_fp8" and tile.apply:  # what precedes the convolution is in the pass that rounds to e4m3
        return False
    return extension().refuses(op, cuda_launch.shape_of(extension(), problem), CODES[problem.dtype], tile.kind) is None


def tiles(op: str, problem: ConvProblem) -> list[Tile]:
    """Every tile that could serve `op` on `problem`."""
    source = op == "fprop" and (problem.prologue or problem.act != "identity")
    found = [Tile(kind, apply) for kind in _ROWS.values() for apply in ((False, True) if source else (False,))]
    return [tile for tile in found if legal(op, problem, tile)]


def rows(tile: Tile) -> int:
    """The pixels of a tile: the field of a tuned row that names its kind."""
    return next(count for count, kind in _ROWS.items() if kind == tile.kind)


def _row(op: str, problem: ConvProblem, index: int) -> dict[str, Any] | None:
    row = tuned.lookup(NAME, op, problem, torch.cuda.get_device_name(index), "sm_90")
    return row if row and row["rows"] in _ROWS else None


def faster(op: str, problem: ConvProblem) -> bool:
    """Did `wrn-fast tune` find these kernels faster than every other's on this GPU? Only then is a row written."""
    op = _KERNEL_OF.get(op, op)
    if problem.device != "cuda" or op not in _TENSORS or _load()[0] is None:
        return False
    return _row(op, problem, torch.cuda.current_device()) is not None


def measured_us(op: str, problem: ConvProblem) -> float | None:
    """What `wrn-fast tune` measured for the problem's class on this GPU, or None."""
    if problem.device != "cuda":
        return None
    return tuned.us(NAME, op, problem, torch.cuda.get_device_name(), "sm_90")


def forget() -> None:
    """Read tuned rows again at the next call."""
    tuned.table.cache_clear()
    config.cache_clear()


# The primitives.


def scale_shift(
    stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """[C] float32 each, for a second output: bn(y) = y * scale + shift; `like` is of the dtype and device of y."""
    return cuda_launch.scale_shift(extension(), stats, gamma, beta, eps, like)


def launch(op: str, problem: ConvProblem, tile: Tile | None, *tensors: Any) -> Any:
    """Runs a convolution with the given tile (None: the chosen one); `fprop_fp8` with the ranges after the tensors."""
    if op == "wgrad":
        return cuda_launch.wgrad(extension(), problem, *tensors)
    device = tensors[0].device
    tile = tile or config(_KERNEL_OF.get(op, op), problem, device.index if device.type == "cuda" else None)
    return getattr(cuda_launch, op.removesuffix("_fp8"))(extension(), problem, tile, *tensors)


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

    Numerics: products of e4m3 summed as the tensor cores do, which keep fewer digits of a sum than float32 has.
    """
    return launch("fprop_fp8", problem, None, x, w, *rest, scales.needed(w, rest[6]))


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
    return cuda_passes.act_mask(extension(), problem, x, stats, gamma, beta)


def input_grad(
    problem: ConvProblem, dy: Tensor, w: Tensor, mask: Tensor | None, scale: Tensor | None, rng: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] = scale * act' * dropout'(dgrad(dy, w)), where only x wants a gradient and BatchNorm is in eval."""
    return launch("input_grad", problem, None, dy, w, mask, scale, rng)


def bn_bwd_apply(
    problem: ConvProblem, g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor | None, sums_g: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] from the gradient before the activation: BatchNorm's own backward, in one pass."""
    return cuda_passes.bn_bwd_apply(extension(), problem, g, x, stats, gamma, sums_g)


def channel_stats(problem: ConvProblem, x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance of x, read once."""
    return cuda_passes.channel_stats(extension(), problem, x)


def dropout(problem: ConvProblem, x: Tensor, rng: Tensor) -> Tensor:
    """x * mask / (1 - p)."""
    return cuda_passes.dropout(extension(), problem, x, rng)


def head(
    problem: ConvProblem,
    y: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [N,K], feat [N,C]): the mean of act(bn(y)) over the image, and the classes' values of it; one launch."""
    return cuda_passes.head(extension(), problem, y, stats, gamma, beta, w, bias)


def head_bwd(
    problem: ConvProblem, dfeat: Tensor, y: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dy [N,C,H,W], sums_g [2,C]) from the feature's gradient: one pass over y, two with the batch's statistics."""
    return cuda_passes.head_bwd(extension(), problem, dfeat, y, stats, gamma, beta)
