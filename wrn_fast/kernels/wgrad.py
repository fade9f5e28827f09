"""wgrad: dw[k, r, s, c] = sum over pixels p of y of dy[p, k] * act(bn(x))[p moved by tap (r, s), c].

The pixels are cut into splits; a program adds one split of one tap for a block of C and a block of K and writes it to
its split's slab. A second pass adds the slabs in index order and turns [C, K] into the filter's [K, C]: no atomics, so
two runs are bit-equal. Reads x once a (tap, K block), dy once a (tap, C block), from L2 mostly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.configs import TileConfig, box_shape
from wrn_fast.kernels.dropout import apply
from wrn_fast.kernels.stats import affine, centered
from wrn_fast.kernels.tile import ACTS, dot, prologue, round_to, wide
from wrn_fast.problem import ConvProblem


@dataclass(frozen=True)
class WgradSpec:
    """Everything compiled into the kernel but the tile."""

    C: int
    K: int
    H: int
    W: int
    P: int
    Q: int
    R: int
    S: int
    stride: int
    top: int
    left: int
    select: bool
    slope: float
    center: bool
    index64: bool
    linear: bool  # a step moves every pixel of a tile by the same whole rows, from image to image too
    source: bool
    bn: bool
    act: int
    box: tuple[int, int, int] = (0, 0, 0)  # images, rows, columns that a step reads at once; 0: by pointers


@triton.jit
def _load_gradient(dy, offsets, rows, k, K: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        mask = rows[:, None] & (k >= 0)[None, :]
    else:
        mask = rows[:, None] & (k < K)[None, :]
    return tl.load(dy + offsets, mask=mask, other=0.0)


@Bound
@triton.jit(do_not_specialize=["pixels", "split_steps"])
def _wgrad_kernel(x, dy, dy1, slab, affine, pixels, split_steps, spec: tl.constexpr, BLOCK_C: tl.constexpr,
                  BLOCK_PIXELS: tl.constexpr, COLS0: tl.constexpr, COLS1: tl.constexpr, PREC: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    """slab[split, r, s, c, k]. Program 0: taps x C blocks x K blocks; program 1: splits.

    By boxes x, dy and dy1 are descriptors, dy1 that of dy for COLS1; what lies outside the tensors comes as 0.
    """
    C: tl.constexpr = spec.C
    K: tl.constexpr = spec.K
    TAPS: tl.constexpr = spec.R * spec.S
    IMAGE: tl.constexpr = spec.P * spec.Q
    BOX: tl.constexpr = spec.box[0] > 0
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    EVEN_K: tl.constexpr = K % (COLS0 + COLS1) == 0
    k_tiles: tl.constexpr = (K + COLS0 + COLS1 - 1) // (COLS0 + COLS1)
    tap = tl.program_id(0) % TAPS
    block = tl.program_id(0) // TAPS
    split = tl.program_id(1)
    c = (block // k_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    col = (block % k_tiles) * (COLS0 + COLS1)
    k0 = col + tl.arange(0, COLS0)
    r = tap // spec.S - spec.top
    s = tap % spec.S - spec.left
    acc0 = tl.zeros((BLOCK_C, COLS0), WIDE)
    if COLS1 > 0:
        k1 = col + COLS0 + tl.arange(0, COLS1)
        acc1 = tl.zeros((BLOCK_C, COLS1), WIDE)
    start = split * (split_steps * BLOCK_PIXELS)
    p = start + tl.arange(0, BLOCK_PIXELS)
    q = p
    if spec.index64:
        q = p.to(tl.int64)
    if spec.linear:
        row = q // spec.Q
        j = p % spec.Q * spec.stride + s
        column = (j >= 0) & (j < spec.W)
        i = p // spec.Q % spec.P * spec.stride + r
    if spec.linear and not BOX:
        a_offset = ((row * spec.stride + r) * spec.W + j)[:, None] * C + c[None, :]
    if not BOX:
        d0_offset = q[:, None] * K + k0[None, :]
        if COLS1 > 0:
            d1_offset = q[:, None] * K + k1[None, :]
    for _ in tl.range(0, split_steps):
        rows = p < pixels
        if spec.linear:
            inside = rows & column & (i >= 0) & (i < spec.H)
        else:
            n = p // IMAGE
            h = (p % IMAGE) // spec.Q * spec.stride + r
            v = p % spec.Q * spec.stride + s
            inside = rows & (h >= 0) & (h < spec.H) & (v >= 0) & (v < spec.W)
        if BOX:
            a = x.load([start // IMAGE, start % IMAGE // spec.Q + r, s, (block // k_tiles) * BLOCK_C])
            a = tl.reshape(a, (BLOCK_PIXELS, BLOCK_C))
        else:
            if not spec.linear:
                if spec.index64:
                    n = n.to(tl.int64)
                a_offset = ((n * spec.H + h) * spec.W + v)[:, None] * C + c[None, :]
            if EVEN_C:
                am = inside[:, None] & (c >= 0)[None, :]
            else:
                am = inside[:, None] & (c < C)[None, :]
            a = tl.load(x + a_offset, mask=am, other=0.0)
        if spec.source:
            a = prologue(a, inside, c, affine, C, spec.bn, spec.center, spec.act, spec.slope, EVEN_C, True, spec.select,
                         a.dtype, WIDE)  # fmt: skip
        a = tl.trans(a)
        if BOX:
            d0 = dy.load([start, col])
        else:
            d0 = _load_gradient(dy, d0_offset, rows, k0, K, EVEN_K)
        acc0 = dot(a, d0, acc0, PREC, WIDE)
        if COLS1 > 0:
            if BOX:
                d1 = dy1.load([start, col + COLS0])
            else:
                d1 = _load_gradient(dy, d1_offset, rows, k1, K, EVEN_K)
            acc1 = dot(a, d1, acc1, PREC, WIDE)
        if spec.linear:
            if not BOX:
                x += BLOCK_PIXELS // spec.Q * spec.stride * spec.W * C
            i = (i - r + BLOCK_PIXELS // spec.Q * spec.stride) % (spec.P * spec.stride) + r
        if not BOX:
            dy += BLOCK_PIXELS * K
        p += BLOCK_PIXELS
        start += BLOCK_PIXELS
    o = slab + (split.to(tl.int64) * TAPS + tap) * (C * K)
    tl.store(o + c[:, None] * K + k0[None, :], acc0, mask=(c < C)[:, None] & (k0 < K)[None, :])
    if COLS1 > 0:
        tl.store(o + c[:, None] * K + k1[None, :], acc1, mask=(c < C)[:, None] & (k1 < K)[None, :])


@Bound
@triton.jit(do_not_specialize=["splits"])
def _add_slabs_kernel(slab, dw, splits, C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr,
                      BLOCK_K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """dw [K, taps, C] = sum over splits, in index order, of slab [splits, taps, C, K]."""
    tap = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (c < C)[:, None] & (k < K)[None, :]
    at = slab + tap.to(tl.int64) * (C * K) + c[:, None] * K + k[None, :]
    v = tl.zeros((BLOCK_C, BLOCK_K), WIDE)
    for _ in tl.range(0, splits):
        v += tl.load(at, mask=mask, other=0.0)
        at += TAPS * C * K
    out = dw + k[:, None] * (TAPS * C) + tap * C + c[None, :]
    tl.store(out, round_to(tl.trans(v), dw.dtype.element_ty), mask=(k < K)[:, None] & (c < C)[None, :])


_SLAB_C, _SLAB_K = 32, 64  # tile of `_add_slabs_kernel`


@lru_cache(maxsize=4096)
def wgrad_spec(problem: ConvProblem, config: TileConfig) -> WgradSpec:
    """The compiled part of a call."""
    left, right, top, bottom = problem.pad
    separate = config.apply or (problem.drop_at == "prologue" and problem.p > 0)
    source = not separate and (problem.prologue or problem.act != "identity")
    box = box_shape(config.red, problem.P, problem.Q) if config.box else None
    return WgradSpec(
        C=problem.C,
        K=problem.K,
        H=problem.H,
        W=problem.W,
        P=problem.P,
        Q=problem.Q,
        R=problem.R,
        S=problem.S,
        stride=problem.stride,
        top=top,
        left=left,
        select=max(top, bottom) >= problem.R or max(left, right) >= problem.S,
        slope=problem.slope,
        center=centered(problem.dtype),
        index64=problem.index64,
        linear=(problem.H, problem.W) == (problem.P * problem.stride, problem.Q * problem.stride)
        and config.red % problem.Q == 0,
        source=source,
        bn=source and problem.prologue,
        act=ACTS[problem.act],
        box=box or (0, 0, 0),
    )


def wgrad(
    problem: ConvProblem,
    config: TileConfig,
    precision: str,
    dy: Tensor,
    x: Tensor,
    stats: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    """dw [K,C,R,S] of dtype problem.w_dtype, channels_last."""
    spec = wgrad_spec(problem, config)
    taps = problem.R * problem.S
    pixels = problem.N * problem.P * problem.Q
    steps = -(-pixels // config.red)
    split_steps = -(-steps // config.splits)
    splits = -(-steps // split_steps)
    table = affine(stats, gamma, beta, problem.eps, x.dtype)
    source = x
    if not spec.source and (problem.prologue or problem.act != "identity" or problem.drop_at == "prologue"):
        mask = rng if problem.drop_at == "prologue" and problem.p > 0 else None
        source = apply(x, table, mask, problem.act, problem.slope, problem.p)
    operands = source, dy, None
    if spec.box[0]:
        h, w, c, k = problem.H, problem.W, problem.C, problem.K
        x_boxes = TensorDescriptor(source, [problem.N, h, w, c], [h * w * c, w * c, c, 1], [*spec.box, config.rows])
        dy_boxes = [TensorDescriptor(dy, [pixels, k], [k, 1], [config.red, n]) if n else None for n in config.cols]
        operands = x_boxes, *dy_boxes
    slab = torch.empty((splits, taps, problem.C, problem.K), dtype=problem.stats_dtype, device=x.device)
    c_tiles, k_tiles = -(-problem.C // config.rows), -(-problem.K // config.width)
    _wgrad_kernel(
        (taps * c_tiles * k_tiles, splits, 1),
        (*operands, slab, table if spec.bn else None),
        (pixels, split_steps),
        (spec, config.rows, config.red, *config.cols, precision, wide(x.dtype)),
        config.warps,
        config.stages,
    )
    dw = torch.empty(
        (problem.K, problem.C, problem.R, problem.S),
        dtype=problem.w_dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    _add_slabs_kernel(
        (taps, -(-problem.C // _SLAB_C), -(-problem.K // _SLAB_K)),
        (slab, dw),
        (splits,),
        (problem.C, problem.K, taps, _SLAB_C, _SLAB_K, wide(x.dtype)),
    )
    return dw
