"""Per-channel statistics: partial results of tiles merged in a fixed order, and BatchNorm's vectors made from them.

A tile leaves (pivot, offset, M2) of its rows, with mean = pivot + offset, or two plain sums; its count follows from its
index, so it is not stored. Merging takes 64 tiles at a time, in index order, until one is left: no atomics, so two runs
are bit-equal, and only differences of pivots, which are exact, so a channel with mean 1000 and variance 1 keeps its
digits (Chan, Golub, LeVeque 1983).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.tile import sum_rows, tile_stats, wide
from wrn_fast.kernels.triton_weights import folded, scale_shift
from wrn_fast.problem import ConvProblem

GROUP = 64  # tiles that one program merges
_AFFINE_C = 128  # channels of a program of `_affine_kernel`


@Bound
@triton.jit(do_not_specialize=["tiles"])
def _add_kernel(partial, out, tiles, CHANNELS: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[group] = sum of partial[group*GROUP ...], both [tiles, 2, CHANNELS]. Program 2: which of the two."""
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = group * GROUP + tl.arange(0, GROUP)
    at = t.to(tl.int64)[:, None] * (2 * CHANNELS) + tl.program_id(2) * CHANNELS + c[None, :]
    v = tl.load(partial + at, mask=(t < tiles)[:, None] & (c < CHANNELS)[None, :], other=0.0)
    o = out + group.to(tl.int64) * (2 * CHANNELS) + tl.program_id(2) * CHANNELS + c
    tl.store(o, sum_rows(v), mask=c < CHANNELS)


@Bound
@triton.jit(do_not_specialize=["tiles", "total", "tile_rows"])
def _merge_kernel(partial, out, tiles, total, tile_rows, CHANNELS: tl.constexpr, FINAL: tl.constexpr,
                  GROUP: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """out[group] from partial[group*GROUP ...], both [tiles, 3, CHANNELS]. FINAL writes [2, CHANNELS]."""
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = c < CHANNELS
    t = group * GROUP + tl.arange(0, GROUP)
    valid = (t < tiles)[:, None] & m[None, :]
    at = t.to(tl.int64)[:, None] * (3 * CHANNELS) + c[None, :]
    pivot = tl.load(partial + at, mask=valid, other=0.0)
    offset = tl.load(partial + CHANNELS + at, mask=valid, other=0.0)
    m2 = tl.load(partial + 2 * CHANNELS + at, mask=valid, other=0.0)
    left = total - t.to(tl.int64) * tile_rows
    count = tl.where(left > tile_rows, tile_rows, tl.where(left > 0, left, 0)).to(WIDE)
    n = tl.sum(count, 0)
    start = tl.load(partial + group.to(tl.int64) * (GROUP * 3 * CHANNELS) + c, mask=m, other=0.0)
    d = tl.where(valid, pivot - start[None, :] + offset, 0.0)
    mean = sum_rows(d * count[:, None]) / n
    e = tl.where(valid, d - mean[None, :], 0.0)
    squares = sum_rows(m2 + e * e * count[:, None])
    if FINAL:
        tl.store(out + c, start + mean, mask=m)
        tl.store(out + CHANNELS + c, squares / n, mask=m)
    else:
        o = out + group.to(tl.int64) * (3 * CHANNELS) + c
        tl.store(o, start, mask=m)
        tl.store(o + CHANNELS, mean, mask=m)
        tl.store(o + 2 * CHANNELS, squares, mask=m)


def merge(partial: Tensor, total: int, tile_rows: int) -> Tensor:
    """[2, C]: mean and biased variance of `total` rows from `partial` [tiles, 3, C], `tile_rows` rows a tile."""
    channels = partial.shape[2]
    block_c = min(32, triton.next_power_of_2(channels))
    while True:
        tiles = partial.shape[0]
        groups = -(-tiles // GROUP)
        final = groups == 1
        shape = (2, channels) if final else (groups, 3, channels)
        out = torch.empty(shape, dtype=partial.dtype, device=partial.device)
        _merge_kernel(
            (groups, -(-channels // block_c), 1),
            (partial, out),
            (tiles, total, tile_rows),
            (channels, final, GROUP, block_c, wide(partial.dtype)),
        )
        if final:
            return out
        partial, tile_rows = out, tile_rows * GROUP


def add(partial: Tensor) -> Tensor:
    """[2, C]: the sums over tiles of `partial` [tiles, 2, C]."""
    channels = partial.shape[2]
    block_c = min(32, triton.next_power_of_2(channels))
    while partial.shape[0] > 1:
        tiles = partial.shape[0]
        groups = -(-tiles // GROUP)
        out = torch.empty((groups, 2, channels), dtype=partial.dtype, device=partial.device)
        _add_kernel((groups, -(-channels // block_c), 2), (partial, out), (tiles,), (channels, GROUP, block_c))
        partial = out
    return partial[0]


@Bound
@triton.jit(do_not_specialize=["rows"])
def _channel_stats_kernel(x, partial, rows, CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
                          WIDE: tl.constexpr):  # fmt: skip
    """(pivot, offset, M2) of BLOCK_ROWS pixels, a channel. Reads x once."""
    tile = tl.program_id(0)
    r = tile.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = c < CHANNELS
    inside = r < rows
    valid = inside[:, None] & m[None, :]
    v = tl.load(x + r[:, None] * CHANNELS + c[None, :], mask=valid, other=0.0).to(WIDE)
    pivot, offset, m2 = tile_stats(v, inside, valid, WIDE)
    part = partial + tile.to(tl.int64) * (3 * CHANNELS) + c
    tl.store(part, pivot, mask=m)
    tl.store(part + CHANNELS, offset, mask=m)
    tl.store(part + 2 * CHANNELS, m2, mask=m)


def channel_block(channels: int) -> int:
    """Channels of an elementwise tile: the power of two that covers them with the least left over."""
    return min((128, 64, 32, 16), key=lambda b: (-(-channels // b) * b, -b))


def channel_stats(problem: ConvProblem, x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance of x [N,C,H,W] over N, H, W."""
    rows = problem.N * problem.H * problem.W
    block_c = channel_block(problem.C)
    block_rows = 8192 // block_c
    tiles = -(-rows // block_rows)
    partial = torch.empty((tiles, 3, problem.C), dtype=problem.stats_dtype, device=x.device)
    _channel_stats_kernel(
        (tiles, -(-problem.C // block_c), 1),
        (x, partial),
        (rows,),
        (problem.C, block_rows, block_c, wide(x.dtype)),
    )
    return merge(partial, rows, block_rows)


@Bound
@triton.jit
def _affine_kernel(stats, gamma, beta, out, CHANNELS: tl.constexpr, EPS: tl.constexpr, GAMMA: tl.constexpr,
                   BETA: tl.constexpr, CENTER: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """out [4, CHANNELS] = scale, shift, mean, rstd, so that bn(x) = x*scale + shift, or (x - mean)*scale + shift."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = c < CHANNELS
    mean = tl.load(stats + c, mask=m, other=0.0)
    var = tl.load(stats + CHANNELS + c, mask=m, other=1.0)
    scale, shift, rstd = scale_shift(mean, var, gamma, beta, c, m, EPS, GAMMA, BETA, CENTER, WIDE)
    tl.store(out + c, scale, mask=m)
    tl.store(out + CHANNELS + c, shift, mask=m)
    tl.store(out + 2 * CHANNELS + c, mean, mask=m)
    tl.store(out + 3 * CHANNELS + c, rstd, mask=m)


def centered(dtype: torch.dtype) -> bool:
    """Does the prologue subtract the mean first? A 16-bit x has lost the digits that this would save."""
    return dtype.itemsize > 2


def affine(
    stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor | None:
    """[4, C] of `_affine_kernel` for an x of `dtype`; None without statistics."""
    if stats is None:
        return None
    given = stats, gamma, beta, eps, centered(dtype)
    ready = folded(*given, lambda: _fold(*given))
    return _fold(*given) if ready is None else ready


def _fold(stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, center: bool) -> Tensor:
    channels = stats.shape[1]
    stats = stats.contiguous()
    out = torch.empty((4, channels), dtype=stats.dtype, device=stats.device)
    gamma, beta = (None if v is None else v.contiguous() for v in (gamma, beta))
    _affine_kernel(
        (-(-channels // _AFFINE_C), 1, 1),
        (stats, gamma, beta, out),
        (),
        (channels, eps, gamma is not None, beta is not None, center, _AFFINE_C, wide(stats.dtype)),
    )
    return out
