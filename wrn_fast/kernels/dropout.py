"""Elementwise passes: act(bn(x)), dropped or not, written once instead of made in a loop nine times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrn_fast.kernels.conv import RUNTIME, drop_args, wide
from wrn_fast.kernels.stats import centered, channel_block
from wrn_fast.kernels.tile import ACTS, act_fwd, affine_tile, drop, keep_tile, round_to
from wrn_fast.problem import ConvProblem

BLOCK_ELEMENTS = 4096


@triton.jit(do_not_specialize=["rows", *RUNTIME])
def _apply_kernel(x, affine, rng, y, rows, threshold, keep, keep_low, CHANNELS: tl.constexpr, BN: tl.constexpr,
                  CENTER: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, DROP: tl.constexpr,
                  BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """y = act(bn(x)) * mask / (1 - p) over [rows, CHANNELS]. Reads x once, writes y once."""
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
    tl.store(y + at, round_to(v, y.dtype.element_ty), mask=valid)


def apply(x: Tensor, affine: Tensor | None, rng: Tensor | None, act: str, slope: float, p: float) -> Tensor:
    """act(bn(x)) * mask / (1 - p) of x [N,C,H,W]: `affine` [4, C] of `stats.affine` or None, `rng` None for no mask."""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    channels = x.shape[1]
    rows = x.numel() // channels
    block_c = channel_block(channels)
    block_rows = BLOCK_ELEMENTS // block_c
    _apply_kernel[(-(-rows // block_rows), -(-channels // block_c))](
        x, x if affine is None else affine, x if rng is None else rng.contiguous(), y, rows, *drop_args(p),
        CHANNELS=channels, BN=affine is not None, CENTER=centered(x.dtype), ACT=ACTS[act], SLOPE=slope,
        DROP=rng is not None and p > 0, BLOCK_ROWS=block_rows, BLOCK_C=block_c, WIDE=wide(x.dtype), num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y


def dropout(problem: ConvProblem, x: Tensor, rng: Tensor) -> Tensor:
    """x * mask / (1 - p)."""
    return apply(x, None, rng, "identity", 0.0, problem.p)
