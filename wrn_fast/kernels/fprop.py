"""fprop: y = conv(act(bn(x)), w) + bias + conv1x1(act(bn(x_short)), w_short) + residual, and what it leaves behind."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from wrn_fast.kernels import conv, fp8
from wrn_fast.kernels.configs import TileConfig, box_shape
from wrn_fast.kernels.conv import ConvSpec
from wrn_fast.kernels.dropout import apply
from wrn_fast.kernels.fp8 import Ranges
from wrn_fast.kernels.stats import affine, centered, merge
from wrn_fast.kernels.tile import ACTS
from wrn_fast.kernels.triton_weights import packed
from wrn_fast.problem import ConvProblem


def image64(config: TileConfig, image: int, *elements: int) -> bool:
    """Do the images that one tile touches, of `image` output pixels and `elements` in memory, pass 2^31 elements?"""
    return (config.rows // image + 2) * max(elements) >= 2**31


def box(config: TileConfig, rows_h: int, rows_w: int) -> tuple[int, int, int]:
    """`ConvSpec.box` of a launch over images of rows_h x rows_w."""
    return (box_shape(config.rows, rows_h, rows_w) if config.box else None) or (0, 0, 0)


@lru_cache(maxsize=4096)
def fprop_spec(
    problem: ConvProblem, config: TileConfig, short_hw: tuple[int, int], scale: bool, shift: bool, e4m3: bool = False
) -> ConvSpec:
    """The compiled part of a call. `short_hw`: image of the shortcut's source; scale, shift: are they given?"""
    left, right, top, bottom = problem.pad
    p, q = problem.P, problem.Q
    # Where the prologue is a pass of its own the loop reads plain values.
    separate = e4m3 or config.apply or (problem.drop_at == "prologue" and problem.p > 0)
    source = not separate and (problem.prologue or problem.act != "identity")
    short_source = not e4m3 and (problem.short_prologue or problem.short_act != "identity")
    dropping = problem.p > 0
    return ConvSpec(
        red=problem.C,
        cols=problem.K,
        H=problem.H,
        W=problem.W,
        rows_h=p,
        rows_w=q,
        out_h=p,
        out_w=q,
        in_step=problem.stride,
        in_sign=1,
        in_first_h=-top,
        in_first_w=-left,
        out_step=1,
        out_first_h=0,
        out_first_w=0,
        taps_h=problem.R,
        taps_w=problem.S,
        tap_first_h=0,
        tap_first_w=0,
        tap_step=1,
        filter_r=problem.R,
        filter_s=problem.S,
        red_contiguous=True,
        halo=max(problem.pad) > 0,
        select=max(top, bottom) >= problem.R or max(left, right) >= problem.S,
        image64=image64(
            config,
            p * q,
            problem.H * problem.W * problem.C,
            p * q * problem.K,
            short_hw[0] * short_hw[1] * problem.short_C,
        ),
        slope=problem.slope,
        center=centered(problem.dtype),
        source=source,
        bn=source and problem.prologue,
        act=ACTS[problem.act],
        short_red=problem.short_C,
        short_h=short_hw[0],
        short_w=short_hw[1],
        short_step=problem.short_stride,
        short_source=short_source,
        short_bn=short_source and problem.short_prologue,
        short_act=ACTS[problem.short_act],
        bias=problem.bias,
        residual=problem.residual,
        store_y=problem.want_y,
        act_out=ACTS[problem.act_out],
        out_scale=scale,
        out_shift=shift,
        drop_y=dropping and problem.drop_at == "output",
        drop_act=dropping and problem.drop_at == "output_act",
        stats=problem.want_stats,
        scaled=e4m3,
        box=box(config, p, q),
    )


def pack(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The filter in memory order [K,R,S,C] and `dtype`: no copy where it is that already, one kernel where not."""
    rows = w.permute(0, 2, 3, 1)
    if w.dtype == dtype and rows.is_contiguous():
        return rows
    ready = packed(w, dtype, lambda: contiguous(rows, dtype))
    return contiguous(rows, dtype) if ready is None else ready


def contiguous(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous in `dtype` by at most one copy."""
    return w.contiguous() if w.dtype == dtype else w.to(dtype, memory_format=torch.contiguous_format)


def fprop(
    problem: ConvProblem,
    config: TileConfig,
    precision: str,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    x_short: Tensor | None = None,
    w_short: Tensor | None = None,
    stats_short: Tensor | None = None,
    gamma_short: Tensor | None = None,
    beta_short: Tensor | None = None,
    rng: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
    ranges: Ranges | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N,K,P,Q], stats_y [2,K], y_act [N,K,P,Q]); an absent output has 0 elements. With `ranges` in e4m3."""
    short_hw = (1, 1) if x_short is None else (x_short.shape[2], x_short.shape[3])
    spec = fprop_spec(problem, config, short_hw, out_scale is not None, out_shift is not None, ranges is not None)
    shape = (problem.N, problem.K, problem.P, problem.Q)
    y = x.new_empty(0)
    y_act = x.new_empty(0)
    if problem.want_y:
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if spec.act_out >= 0:
        y_act = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    stats_y = torch.empty(0, dtype=problem.stats_dtype, device=x.device)
    partial = None
    if spec.stats:
        tiles = conv.row_tiles(problem.N, spec, config)
        partial = torch.empty((tiles, 3, problem.K), dtype=problem.stats_dtype, device=x.device)
    table = affine(stats, gamma, beta, problem.eps, x.dtype)
    short_vectors = (stats_short, gamma_short, beta_short, problem.short_eps, x.dtype)
    mask = rng if problem.drop_at == "prologue" and problem.p > 0 else None
    factor = factor_short = None
    if ranges is not None:
        act, slope, dtype = problem.act, problem.slope, ranges.dtype
        source = apply(x, table, mask, act, slope, problem.p, ranges.x, dtype)
        filters, factor = fp8.pack(pack(w, w.dtype), ranges.x, dtype)
        if x_short is not None and w_short is not None and ranges.short is not None:
            x_short = apply(x_short, affine(*short_vectors), None, problem.short_act, slope, 0.0, ranges.short, dtype)
            w_short, factor_short = fp8.pack(pack(w_short, w_short.dtype), ranges.short, dtype)
    else:
        source, filters = x, pack(w, x.dtype)
        if not spec.source and (problem.prologue or problem.act != "identity" or mask is not None):
            source = apply(x, table, mask, problem.act, problem.slope, problem.p)
        w_short = None if w_short is None else pack(w_short, x.dtype)
    conv.launch(
        problem.N, spec, config, precision, problem.p, source, filters, y, affine=table if spec.bn else None,
        x_short=x_short, w_short=w_short,
        affine_short=affine(*short_vectors) if spec.short_bn else None, y_act=y_act if spec.act_out >= 0 else None,
        residual=residual, bias=bias, out_scale=out_scale, out_shift=out_shift, rng=rng if spec.drops else None,
        partial=partial, factor=factor, factor_short=factor_short,
    )  # fmt: skip
    if partial is not None:
        stats_y = merge(partial, problem.N * problem.P * problem.Q, config.rows)
    return y, stats_y, y_act
