"""BatchNorm's backward, the part that is elementwise.

dx = gamma * rstd * (g - sum(g)/m - xhat * sum(g*xhat)/m),  xhat = (x - mean) * rstd,  m = N*H*W     batch statistics
dx = gamma * rstd * g                                                                                 running ones
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.dropout import BLOCK_ELEMENTS
from wrn_fast.kernels.stats import channel_block
from wrn_fast.kernels.tile import round_to, rsqrt, wide
from wrn_fast.problem import ConvProblem


@Bound
@triton.jit(do_not_specialize=["rows"])
def _bn_bwd_apply_kernel(g, x, stats, gamma, sums, dx, rows, CHANNELS: tl.constexpr, EPS: tl.constexpr,
                         GAMMA: tl.constexpr, BATCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
                         WIDE: tl.constexpr):  # fmt: skip
    """Reads g and x once, writes dx once; a program makes its channels' vectors itself."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = c < CHANNELS
    valid = (r < rows)[:, None] & m[None, :]
    at = r[:, None] * CHANNELS + c[None, :]
    v = tl.load(g + at, mask=valid, other=0.0).to(WIDE)
    rstd = rsqrt(tl.load(stats + CHANNELS + c, mask=m, other=1.0) + EPS, WIDE)
    scale = rstd
    if GAMMA:
        scale = rstd * tl.load(gamma + c, mask=m, other=0.0).to(WIDE)
    if BATCH:
        count = tl.zeros((1,), WIDE) + rows
        mean = tl.load(stats + c, mask=m, other=0.0)
        mean_g = tl.load(sums + c, mask=m, other=0.0) / count
        mean_gx = tl.load(sums + CHANNELS + c, mask=m, other=0.0) / count
        xhat = (tl.load(x + at, mask=valid, other=0.0).to(WIDE) - mean[None, :]) * rstd[None, :]
        v = v - mean_g[None, :] - xhat * mean_gx[None, :]
    tl.store(dx + at, round_to(v * scale[None, :], dx.dtype.element_ty), mask=valid)


def bn_bwd_apply(
    problem: ConvProblem, g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor | None, sums_g: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] from g = dL/d(bn(x)) of the same shape. `sums_g` [2, C] only for batch statistics."""
    dx = torch.empty_like(g, memory_format=torch.channels_last)
    rows = problem.N * problem.H * problem.W
    block_c = channel_block(problem.C)
    block_rows = BLOCK_ELEMENTS // block_c
    vectors = (None if v is None else v.contiguous() for v in (gamma, sums_g if problem.batch_stats else None))
    _bn_bwd_apply_kernel(
        (-(-rows // block_rows), -(-problem.C // block_c), 1),
        (g, x, stats.contiguous(), *vectors, dx),
        (rows,),
        (problem.C, problem.eps, gamma is not None, problem.batch_stats, block_rows, block_c, wide(x.dtype)),
    )
    return dx
