"""act_mask: one bit an element, set where act'(bn(x)) is 1, for a backward pass that needs nothing else of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrn_fast import masks
from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.dropout import BLOCK_ELEMENTS
from wrn_fast.kernels.stats import affine, centered, channel_block
from wrn_fast.kernels.tile import ACTS, affine_tile, wide
from wrn_fast.problem import ConvProblem


@Bound
@triton.jit(do_not_specialize=["rows"])
def _act_mask_kernel(x, affine, mask, rows, CHANNELS: tl.constexpr, BN: tl.constexpr, CENTER: tl.constexpr,
                     ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
                     WIDE: tl.constexpr):  # fmt: skip
    """mask [rows, ceil(CHANNELS / 8)] of x [rows, CHANNELS]. Reads x once, writes a bit for each element."""
    BYTES: tl.constexpr = (CHANNELS + 7) // 8
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (r < rows)[:, None] & (c < CHANNELS)[None, :]
    v = tl.load(x + r[:, None] * CHANNELS + c[None, :], mask=valid, other=0.0).to(WIDE)
    if BN:
        v = affine_tile(v, affine, c, CHANNELS, CENTER)
    if ACT == 1:
        passes = (v > 0) | (v != v)  # as PyTorch's own backward: a NaN lets the gradient through
    else:
        passes = v > 0
    bits = (valid & passes).to(tl.int32) << (c % 8)[None, :]
    packed = tl.sum(tl.reshape(bits, (BLOCK_ROWS, BLOCK_C // 8, 8)), 2)
    b = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    tl.store(
        mask + r[:, None] * BYTES + b[None, :], packed.to(tl.uint8), mask=(r < rows)[:, None] & (b < BYTES)[None, :]
    )


def act_mask(
    problem: ConvProblem, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """uint8 [N,H,W,ceil(C/8)]: one bit an element, set where act'(bn(x)) is 1."""
    table = affine(stats, gamma, beta, problem.eps, x.dtype)
    mask = torch.empty(masks.shape(x.shape), dtype=torch.uint8, device=x.device)
    rows = problem.N * problem.H * problem.W
    block_c = channel_block(problem.C)
    block_rows = BLOCK_ELEMENTS // block_c
    _act_mask_kernel(
        (-(-rows // block_rows), -(-problem.C // block_c), 1),
        (x, table, mask),
        (rows,),
        (problem.C, table is not None, centered(x.dtype), ACTS[problem.act], block_rows, block_c, wide(x.dtype)),
    )
    return mask
