"""Launches of the extension `_cuda`, given as `e`: convolutions, their packed filters, what goes around."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrn_fast.kernels.cuda_passes import (
    CODES,
    FLOAT32,
    absent,
    aligned,
    bn_act,
    current_stream,
    new,
    ptr,
    quantize,
    queue,
    rows_of,
    scratch,
    vector,
)  # fmt: skip
from wrn_fast.kernels.cuda_weights import affine, packed, packed_e4m3, zeros
from wrn_fast.kernels.device import on_device
from wrn_fast.problem import ACTS, ConvProblem

STEP = 16  # channels of a tensor instruction


class Tile(NamedTuple):
    """How a convolution is cut."""

    kind: int = 0  # Sm90Tile of csrc/cuda/sm90.h: 0 fetches x for each tap, 1 once a filter column
    apply: bool = False  # act(bn(x)) in a pass of its own, not in the kernel's shared memory


def _padded(channels: int) -> int:
    return -(-channels // STEP) * STEP


def _widened(x: Tensor) -> Tensor:
    """x with zero channels up to a multiple of 16."""
    n, c, h, w = x.shape
    if c % STEP == 0:
        return x
    wide = torch.zeros((n, _padded(c), h, w), dtype=x.dtype, device=x.device).contiguous(
        memory_format=torch.channels_last
    )
    wide[:, :c] = x
    return wide


def _narrowed(v: Tensor, channels: int) -> Tensor:
    return v if v.shape[1] == channels else v[:, :channels].contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=1024)
def shape_of(e: Any, problem: ConvProblem) -> Any:
    """The problem's sizes on the C++ side, with the zero channels that `_widened` adds."""
    left, right, top, bottom = problem.pad
    return e.Shape(
        N=problem.N, H=problem.H, W=problem.W, C=_padded(problem.C), K=problem.K, R=problem.R, S=problem.S,
        stride=problem.stride, pad_left=left, pad_right=right, pad_top=top, pad_bottom=bottom,
    )  # fmt: skip


class _Source(NamedTuple):
    """What a convolution reads: x itself with the vectors of its prologue, or what a pass made of it.

    `passed`: did this call queue a kernel for it?
    """

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "identity"
    passed: bool = False


def _source(
    e: Any, apply: bool, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: str, slope: float, rng: Tensor | None, p: float, stream: int, amax: Tensor | None = None,
) -> _Source:  # fmt: skip
    if amax is not None:
        return _Source(quantize(e, x, stats, gamma, beta, eps, act, slope, rng, p, amax, stream), passed=True)
    if stats is None and act == "identity" and p == 0:
        return _Source(aligned(_widened(x)))
    if apply or p > 0 or stats is None:
        return _Source(bn_act(e, x, stats, gamma, beta, eps, act, slope, rng, p, stream), passed=True)
    table = affine(e, x, stats, gamma, beta, eps, stream)
    return _Source(aligned(x), table.tensor[0], table.tensor[1], act, not table.before)


class _Filters(NamedTuple):
    """A packed filter, and in e4m3 what makes its sums numbers; `before` as in `cuda_weights.Made`."""

    image: Tensor
    before: bool
    factor: Tensor | None = None


def _filters(e: Any, problem: ConvProblem, w: Tensor, amax: Tensor | None, stream: int) -> _Filters:
    if amax is None:
        return _Filters(*packed(e, problem, w, False, stream))
    image, factor = packed_e4m3(e, w, amax, stream)
    return _Filters(image, False, factor)


def splits_of(e: Any, problem: ConvProblem, dgrad: bool, index: int | None, e4m3: bool = False) -> int:
    """Pieces of the reduction with which a small call fills GPU `index` (None: no GPU, one piece)."""
    if index is None:
        return 1
    return e.splits(shape_of(e, problem), 0 if dgrad else problem.short_C, dgrad, _multiprocessors(index), e4m3)


def _pieces(
    e: Any, problem: ConvProblem, tile: Tile, dgrad: bool, x: Tensor, early: bool, stream: int, e4m3: bool = False
) -> dict[str, Any]:
    """How a call is launched. `early`: may it fetch filters before the kernel in front of it has ended?"""
    index = x.device.index if x.device.type == "cuda" else None
    splits = 1 if tile.kind else splits_of(e, problem, dgrad, index, e4m3)
    if splits == 1:
        return {"splits": 1, "partials": 0, "counters": 0, "early": early}
    shape = shape_of(e, problem)
    partials = scratch(x, e.partial_bytes(shape, dgrad, splits))
    counters = zeros(x, e.counters(shape, dgrad), stream)
    return {"splits": splits, "partials": ptr(partials), "counters": ptr(counters), "early": early}


def fprop(
    e: Any, problem: ConvProblem, tile: Tile, x: Tensor, w: Tensor, stats: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, bias: Tensor | None, residual: Tensor | None, x_short: Tensor | None, w_short: Tensor | None,
    stats_short: Tensor | None, gamma_short: Tensor | None, beta_short: Tensor | None, rng: Tensor | None,
    out_scale: Tensor | None, out_shift: Tensor | None, ranges: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, stats_y, y_act); an absent output has 0 elements. `ranges`, of both sources: operands in e4m3."""
    with queue("fprop", problem, x) as stream:
        p, shape = problem, shape_of(e, problem)
        in_prologue = p.p if p.drop_at == "prologue" else 0.0
        in_kernel = p.p if p.drop_at in ("output", "output_act") else 0.0
        filters = _filters(e, p, w, ranges[0], stream)
        short = filters_short = None
        if x_short is not None:
            assert w_short is not None
            filters_short = _filters(e, p, w_short, ranges[1], stream)
            short = _source(
                e, tile.apply, x_short, stats_short, gamma_short, beta_short, p.short_eps, p.short_act, p.slope, None,
                0.0, stream, ranges[1],
            )  # fmt: skip
        source = _source(
            e, tile.apply, x, stats, gamma, beta, p.eps, p.act, p.slope, rng, in_prologue, stream, ranges[0]
        )  # fmt: skip
        packed_short, factor_short = (
            (None, None) if filters_short is None else (filters_short.image, filters_short.factor)
        )
        # The kernel in front must not be one that packs: filters made before this call, or a pass after them.
        early = filters.before if filters_short is None else filters.before and filters_short.before
        early = early or source.passed
        size = p.N, p.K, p.P, p.Q
        y = new(x, *size) if p.want_y else None
        y_act = new(x, *size) if p.act_out != "none" else None
        counts = moments = None
        if p.want_stats:
            parts = e.parts(shape, False, tile.kind)
            counts = torch.empty(parts, dtype=torch.float32, device=x.device)
            moments = torch.empty((parts, 2, p.K), dtype=torch.float32, device=x.device)
        bias, out_scale, out_shift = vector(bias), vector(out_scale), vector(out_shift)
        residual = aligned(residual)
        e.fprop(
            shape, dtype=CODES[p.dtype], tile=tile.kind, x=ptr(source.x), scale=ptr(source.scale),
            shift=ptr(source.shift), act=ACTS.index(source.act), slope=p.slope, w=ptr(filters.image),
            x_short=0 if short is None else ptr(short.x), short_H=0 if short is None else short.x.shape[2],
            short_W=0 if short is None else short.x.shape[3], short_C=p.short_C, short_stride=p.short_stride,
            short_scale=0 if short is None else ptr(short.scale),
            short_shift=0 if short is None else ptr(short.shift),
            short_act=0 if short is None else ACTS.index(short.act), w_short=ptr(packed_short), bias=ptr(bias),
            residual=ptr(residual), y=ptr(y), y_act=ptr(y_act),
            act_out=0 if p.act_out == "none" else ACTS.index(p.act_out), out_scale=ptr(out_scale),
            out_shift=ptr(out_shift), counts=ptr(counts), moments=ptr(moments),
            **_pieces(e, p, tile, False, x, early, stream, filters.factor is not None), stream=stream,
            factor=ptr(filters.factor), factor_short=ptr(factor_short), rng=ptr(rng) if in_kernel > 0 else 0,
            p=in_kernel, drop_act=p.drop_at == "output_act",
        )  # fmt: skip
        stats_y = absent(x, torch.float32)
        if counts is not None and moments is not None:
            stats_y = torch.empty((2, p.K), dtype=torch.float32, device=x.device)
            workspace = scratch(x, e.merge_moments_workspace(wide=FLOAT32, parts=len(counts), C=p.K))
            e.merge_moments(
                wide=FLOAT32, C=p.K, counts=ptr(counts), moments=ptr(moments), parts=len(counts),
                stats=ptr(stats_y), workspace=ptr(workspace), stream=stream,
            )  # fmt: skip
        return (
            absent(x, p.dtype) if y is None else y,
            stats_y,
            absent(x, p.dtype) if y_act is None else y_act,
        )


def scale_shift(
    e: Any, stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """bn(y) = y * scale + shift, [C] float32 each."""
    with on_device(like.device):
        table = affine(e, like, stats, gamma, beta, eps, current_stream(like.device)).tensor
    return table[0], table[1]


def dgrad(
    e: Any, problem: ConvProblem, tile: Tile, dy: Tensor, x: Tensor, w: Tensor, stats: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, rng: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(g [N,C,H,W], sums_g [2,C])."""
    with queue("dgrad", problem, dy) as stream:
        p, shape = problem, shape_of(e, problem)
        dy, x = aligned(dy), aligned(x)
        dropping = p.drop_at == "prologue" and p.p > 0
        bare = dropping or (stats is None and p.act == "identity")
        filters = packed(e, p, w, True, stream)
        table = None
        if stats is not None and not bare:
            table = affine(e, x, stats, gamma, beta, p.eps, stream)
        sums = torch.empty((2, p.C), dtype=torch.float32, device=x.device) if p.want_stats else None
        partial = None
        if sums is not None and not bare:
            partial = torch.empty((e.parts(shape, True, tile.kind), 2, p.C), dtype=torch.float32, device=x.device)
        g = new(x, p.N, _padded(p.C), p.H, p.W)
        scale, shift, mean, rstd = (None,) * 4 if table is None else table.tensor
        early = filters.before or (table is not None and not table.before)
        e.dgrad(
            shape, dtype=CODES[p.dtype], tile=tile.kind, dy=ptr(dy), w=ptr(filters.tensor), x=0 if bare else ptr(x),
            scale=ptr(scale), shift=ptr(shift), act=0 if bare else ACTS.index(p.act), slope=p.slope, mean=ptr(mean),
            rstd=ptr(rstd), g=ptr(g), sums=ptr(partial),
            **_pieces(e, p, tile, True, dy, early, stream), stream=stream,
        )  # fmt: skip
        if dropping:
            workspace = scratch(x, e.act_backward_workspace(**rows_of(x)))
            stats, gamma, beta = vector(stats), vector(gamma), vector(beta)
            e.act_backward(
                **rows_of(x), da=ptr(g), x=ptr(x), stats=ptr(stats), gamma=ptr(gamma), beta=ptr(beta), eps=p.eps,
                act=ACTS.index(p.act), slope=p.slope, rng=ptr(rng), p=p.p, g=ptr(g), sums=ptr(sums),
                workspace=ptr(workspace), stream=stream,
            )  # fmt: skip
        elif partial is not None:
            count = {"wide": FLOAT32, "slabs": len(partial), "count": 2 * p.C}
            workspace = scratch(x, e.add_slabs_workspace(**count))
            e.add_slabs(
                **count, from_=ptr(partial), dtype=FLOAT32, out=ptr(sums), workspace=ptr(workspace),
                stream=stream,
            )  # fmt: skip
        return _narrowed(g, p.C), absent(x, torch.float32) if sums is None else sums


def wgrad(
    e: Any, problem: ConvProblem, dy: Tensor, x: Tensor, stats: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, rng: Tensor | None,
) -> Tensor:  # fmt: skip
    """dw [K,C,R,S]."""
    with queue("wgrad", problem, dy) as stream:
        p, shape = problem, shape_of(e, problem)
        dropping = p.p if p.drop_at == "prologue" else 0.0
        source = _source(e, True, x, stats, gamma, beta, p.eps, p.act, p.slope, rng, dropping, stream)
        dy = aligned(dy)
        units = _multiprocessors(x.device.index) if x.device.type == "cuda" else 1
        workspace = scratch(x, e.wgrad_workspace(shape, units))
        dw = new(x, p.K, _padded(p.C), p.R, p.S, dtype=torch.float32)
        e.wgrad(
            shape, dtype=CODES[p.dtype], dy=ptr(dy), x=ptr(source.x), workspace=ptr(workspace), dw=ptr(dw),
            stream=stream,
        )  # fmt: skip
        dw = _narrowed(dw, p.C)
        return dw if p.w_dtype == dw.dtype else dw.to(p.w_dtype)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def input_grad(
    e: Any, problem: ConvProblem, tile: Tile, dy: Tensor, w: Tensor, mask: Tensor | None, scale: Tensor | None,
    rng: Tensor | None,
) -> Tensor:  # fmt: skip
    """dx [N,C,H,W]: dgrad without an epilogue, then one pass in place."""
    bare = problem._replace(act="identity", prologue=False, affine=False, p=0.0, drop_at="none", want_stats=False)
    g, _ = dgrad(e, bare, tile, dy, dy, w, None, None, None, None)
    p = problem.p if problem.drop_at == "prologue" else 0.0
    if mask is None and scale is None and p == 0:
        return g
    with queue("input_grad", problem, dy) as stream:
        scale, mask = vector(scale, problem.stats_dtype), None if mask is None else mask.contiguous()
        e.mask_backward(
            **rows_of(g), da=ptr(g), bits=ptr(mask), scale=ptr(scale),
            slope=problem.slope if problem.act == "leaky_relu" else 0.0, rng=ptr(rng) if p > 0 else 0, p=p, g=ptr(g),
            stream=stream,
        )  # fmt: skip
    return g
