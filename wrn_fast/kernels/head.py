"""The head: BatchNorm, activation, mean over the image and classes in one launch; its gradient in one or two passes.

    f = mean over the image of act((y - mean) * rstd * gamma + beta)
    out = f w' + bias,   or |f / max(|f|, 1e-12) w' + bias|

Backward, from dfeat = dL/df, with g = dfeat / (H*W) * act'(bn(y)), which is nowhere stored:

    dy = gamma * rstd * (g - sum(g)/m - xhat * sum(g*xhat)/m),  m = N*H*W     batch statistics: sums first, then dy
    dy = gamma * rstd * g                                                     running ones: both in one pass over y
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.dropout import BLOCK_ELEMENTS
from wrn_fast.kernels.stats import add, channel_block
from wrn_fast.kernels.tile import ACTS, act_bwd, act_fwd, round_to, rsqrt, sum_rows, wide
from wrn_fast.problem import NORM_EPS, ConvProblem

_FEATURE_ELEMENTS = 8192  # of a tile of pixels by all channels
_CLASS_ELEMENTS = 16384  # of a tile of classes by all channels
_CLASSES = 128  # of a program; what has more reads its image once for each so many


@triton.jit
def _vectors(stats, gamma, beta, c, m, CHANNELS: tl.constexpr, EPS: tl.constexpr, GAMMA: tl.constexpr,
             BETA: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """mean, rstd, scale and shift of channels c: bn(y) = (y - mean) * scale + shift."""
    mean = tl.load(stats + c, mask=m, other=0.0)
    rstd = rsqrt(tl.load(stats + CHANNELS + c, mask=m, other=1.0) + EPS, WIDE)
    scale = rstd
    if GAMMA:
        scale = rstd * tl.load(gamma + c, mask=m, other=0.0).to(WIDE)
    shift = tl.zeros(c.shape, WIDE)
    if BETA:
        shift = tl.load(beta + c, mask=m, other=0.0).to(WIDE)
    return mean, rstd, scale, shift


@triton.jit
def _quotient(a, b, WIDE: tl.constexpr):
    """a / b, rounded as the host does it: in float32 `/` is an approximation."""
    if WIDE == tl.float64:
        q = a / b
    else:
        q = tl.div_rn(a, b)
    return q


@triton.jit
def _direction(f, EPS: tl.constexpr, WIDE: tl.constexpr):
    """f / max(|f|, EPS)."""
    squares = tl.sum(f * f, 0)
    if WIDE == tl.float64:
        length = tl.sqrt(squares)
    else:
        length = tl.sqrt_rn(squares)
    length = tl.maximum(length, EPS, propagate_nan=tl.PropagateNan.ALL)
    return _quotient(f, f * 0.0 + length, WIDE)


@Bound
@triton.jit
def _head_kernel(y, stats, gamma, beta, w, bias, out, feat, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
                 CLASSES: tl.constexpr, EPS: tl.constexpr, NORM_EPS: tl.constexpr, BN: tl.constexpr,
                 GAMMA: tl.constexpr, BETA: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
                 COSINE: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
                 PER_PROGRAM: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Program (image, share of the classes). Reads the image and its share of w once; writes them, the first feat."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    m = c < CHANNELS
    if BN:
        mean, _, scale, shift = _vectors(stats, gamma, beta, c, m, CHANNELS, EPS, GAMMA, BETA, WIDE)
    total = tl.zeros((BLOCK_PIXELS, BLOCK_C), WIDE)
    for start in range(0, PIXELS, BLOCK_PIXELS):
        r = start + tl.arange(0, BLOCK_PIXELS)
        valid = (r < PIXELS)[:, None] & m[None, :]
        at = (n * PIXELS + r)[:, None] * CHANNELS + c[None, :]
        v = tl.load(y + at, mask=valid, other=0.0).to(WIDE)
        if BN:
            v = (v - mean[None, :]) * scale[None, :] + shift[None, :]
        v = act_fwd(v, ACT, SLOPE)
        total += tl.where(valid, v, 0.0)
    f = tl.sum(total, 0)
    f = _quotient(f, tl.zeros_like(f) + PIXELS, WIDE)
    if tl.program_id(1) == 0:
        tl.store(feat + n * CHANNELS + c, round_to(f, feat.dtype.element_ty), mask=m)
    if COSINE:
        f = _direction(f, NORM_EPS, WIDE)
    for start in range(0, PER_PROGRAM, BLOCK_K):
        k = tl.program_id(1) * PER_PROGRAM + start + tl.arange(0, BLOCK_K)
        km = k < CLASSES
        weights = tl.load(w + k.to(tl.int64)[:, None] * CHANNELS + c[None, :], mask=km[:, None] & m[None, :], other=0.0)
        z = tl.sum(weights.to(WIDE) * f[None, :], 1)
        if BIAS:
            z = z + tl.load(bias + k, mask=km, other=0.0).to(WIDE)
        if COSINE:
            z = tl.abs(z)
        tl.store(out + n * CLASSES + k, round_to(z, out.dtype.element_ty), mask=km)


def head(
    problem: ConvProblem,
    y: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [N,K], feat [N,C]) of y [N,C,H,W] and w [K,C]."""
    n, c, k = problem.N, problem.C, problem.K
    out = torch.empty((n, k), dtype=y.dtype, device=y.device)
    feat = torch.empty((n, c), dtype=y.dtype, device=y.device)
    pixels = problem.H * problem.W
    block_c = triton.next_power_of_2(c)
    block_pixels = max(1, min(triton.next_power_of_2(pixels), _FEATURE_ELEMENTS // block_c))
    block_k = max(1, min(triton.next_power_of_2(k), _CLASS_ELEMENTS // block_c, _CLASSES))
    per_program = min(_CLASSES, triton.next_power_of_2(k))
    vectors = [None if v is None else v.contiguous() for v in (stats, gamma, beta)]
    _head_kernel(
        (n, -(-k // per_program), 1),
        (y, *vectors, w, None if bias is None else bias.contiguous(), out, feat),
        (),
        (
            pixels, c, k, problem.eps, NORM_EPS, stats is not None, gamma is not None, beta is not None,
            bias is not None, ACTS[problem.act], problem.slope, problem.cosine, block_pixels, block_c, block_k,
            per_program, wide(y.dtype),
        ),
        warps=8 if block_c >= 512 else 4,
    )  # fmt: skip
    return out, feat


@Bound
@triton.jit(do_not_specialize=["rows"])
def _head_bwd_kernel(dfeat, y, stats, gamma, beta, sums, partial, dy, rows, PIXELS: tl.constexpr,
                     CHANNELS: tl.constexpr, EPS: tl.constexpr, BN: tl.constexpr, GAMMA: tl.constexpr,
                     BETA: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, BATCH: tl.constexpr,
                     SUMS: tl.constexpr, WRITE: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
                     WIDE: tl.constexpr):  # fmt: skip
    """Program (image, channels). Reads y once; writes dy (WRITE), and the image's sums of g and g*xhat (SUMS).

    BATCH: `sums` are those of all `rows` pixels.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = c < CHANNELS
    d = tl.load(dfeat + n * CHANNELS + c, mask=m, other=0.0)
    d = _quotient(d, tl.zeros_like(d) + PIXELS, WIDE)
    if BN:
        mean, rstd, scale, shift = _vectors(stats, gamma, beta, c, m, CHANNELS, EPS, GAMMA, BETA, WIDE)
    if BATCH:
        count = tl.zeros((1,), WIDE) + rows
        mean_g = tl.load(sums + c, mask=m, other=0.0) / count
        mean_gx = tl.load(sums + CHANNELS + c, mask=m, other=0.0) / count
    if SUMS:
        sum_g = tl.zeros((BLOCK_C,), WIDE)
        sum_gx = tl.zeros((BLOCK_C,), WIDE)
    for start in range(0, PIXELS, BLOCK_PIXELS):
        r = start + tl.arange(0, BLOCK_PIXELS)
        valid = (r < PIXELS)[:, None] & m[None, :]
        at = (n * PIXELS + r)[:, None] * CHANNELS + c[None, :]
        v = tl.load(y + at, mask=valid, other=0.0).to(WIDE)
        u = v
        if BN:
            v = v - mean[None, :]
            u = v * scale[None, :] + shift[None, :]
        g = act_bwd(tl.broadcast_to(d[None, :], (BLOCK_PIXELS, BLOCK_C)), u, ACT, SLOPE)
        if SUMS:
            inside = tl.where(valid, g, 0.0)
            sum_g += sum_rows(inside)
            sum_gx += sum_rows(inside * (v * rstd[None, :]))
        if WRITE:
            if BATCH:
                g = g - mean_g[None, :] - v * rstd[None, :] * mean_gx[None, :]
            if BN:
                g = g * scale[None, :]
            tl.store(dy + at, round_to(g, dy.dtype.element_ty), mask=valid)
    if SUMS:
        part = partial + n * (2 * CHANNELS) + c
        tl.store(part, sum_g, mask=m)
        tl.store(part + CHANNELS, sum_gx, mask=m)


def head_bwd(
    problem: ConvProblem, dfeat: Tensor, y: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dy [N,C,H,W], sums_g [2,C]) from dfeat [N,C]; without `want_stats` the sums have 0 elements."""
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    pixels, c = problem.H * problem.W, problem.C
    block_c = channel_block(c)
    block_pixels = max(16, min(triton.next_power_of_2(pixels), BLOCK_ELEMENTS // block_c))
    vectors = [None if v is None else v.contiguous() for v in (stats, gamma, beta)]
    batch, wanted = problem.batch_stats, problem.want_stats
    absent = torch.empty(0, dtype=problem.stats_dtype, device=y.device)

    def run(sums: Tensor | None, partial: Tensor | None, out: Tensor | None) -> None:
        _head_bwd_kernel(
            (problem.N, -(-c // block_c), 1),
            (dfeat, y, *vectors, sums, partial, out),
            (problem.N * pixels,),
            (
                pixels, c, problem.eps, stats is not None, gamma is not None, beta is not None, ACTS[problem.act],
                problem.slope, sums is not None, partial is not None, out is not None, block_pixels, block_c,
                wide(y.dtype),
            ),
        )  # fmt: skip

    if not batch and not wanted:
        run(None, None, dy)
        return dy, absent
    partial = torch.empty((problem.N, 2, c), dtype=problem.stats_dtype, device=y.device)
    run(None, partial, None if batch else dy)
    sums = add(partial)
    if batch:
        run(sums, None, dy)
    return dy, sums if wanted else absent
