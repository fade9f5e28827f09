"""Elementwise passes: act(bn(x)), dropped or not, written once instead of made in a loop nine times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.conv import RUNTIME
from wrn_fast.kernels.fp8 import largest
from wrn_fast.kernels.stats import centered, channel_block
from wrn_fast.kernels.tile import ACTS, act_fwd, affine_tile, drop, drop_args, keep_tile, round_to, wide
from wrn_fast.problem import ConvProblem

BLOCK_ELEMENTS = 4096


@Bound
@triton.jit(do_not_specialize=["rows", *RUNTIME])
def _apply_kernel(x, affine, rng, amax, y, rows, threshold, keep, keep_low, CHANNELS: tl.constexpr, BN: tl.constexpr,
                  CENTER: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, DROP: tl.constexpr,
                  MOST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """y = act(bn(x)) * mask / (1 - p) over [rows, CHANNELS], e4m3 of MOST / amax of it where there is an amax.

    Reads x once, writes y once.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_C
    c = col + tl.arange(0, BLOCK_C)
    valid = (r < rows)[:, None] & (c < CHANNELS)[None, :]
    at = r[:, None] * CHANNELS + c[None, :]
    v = tl.load(x + at, mask=valid, other=0.0).to(WIDE)
    if BN:
        v = affine_tile(v, affine, c, CHANNELS, CENTER)
    v = act_fwd(v, ACT, SLOPE)
    if DROP:
        v = drop(v, keep_tile(0, r, col, rng, threshold, CHANNELS, BLOCK_C), keep, keep_low, WIDE)
    if MOST > 0:
        v = tl.clamp(v * (MOST / tl.load(amax)), -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + at, round_to(v, y.dtype.element_ty), mask=valid)


def apply(
    x: Tensor,
    affine: Tensor | None,
    rng: Tensor | None,
    act: str,
    slope: float,
    p: float,
    amax: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act(bn(x)) * mask / (1 - p) of x [N,C,H,W]: `affine` [4, C] of `stats.affine` or None, `rng` None for no mask.

    With `amax` (one element) in the e4m3 format `dtype`, amax as its largest number.
    """
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    channels = x.shape[1]
    rows = x.numel() // channels
    block_c = channel_block(channels)
    block_rows = BLOCK_ELEMENTS // block_c
    drops = rng is not None and p > 0
    _apply_kernel(
        (-(-rows // block_rows), -(-channels // block_c), 1),
        (x, affine, rng.contiguous() if rng is not None and drops else None, amax, y),
        (rows, *(drop_args(p) if drops else (None, None, None))),
        (
            channels,
            affine is not None,
            centered(x.dtype),
            ACTS[act],
            slope,
            drops,
            0.0 if dtype is None else largest(dtype),
            block_rows,
            block_c,
            wide(x.dtype),
        ),
    )
    return y


def dropout(problem: ConvProblem, x: Tensor, rng: Tensor) -> Tensor:
    """x * mask / (1 - p)."""
    return apply(x, None, rng, "identity", 0.0, problem.p)
