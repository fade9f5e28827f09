"""dgrad: g = conv_transpose(dy, w) * mask * act'(bn(x)) and the sums of g and g*xhat, by parity classes.

At stride t the input pixels fall into t*t classes; a class meets a fixed subset of the taps and is a plain convolution
of dy with it. Class (a, b) holds the pixels (t*i + a, t*j + b), reads dy at (i + first - u) for its taps u = 0, 1, ...
and writes each of its pixels once. Stride 1 is the single class with all taps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from wrn_fast.kernels import conv
from wrn_fast.kernels.configs import TileConfig
from wrn_fast.kernels.conv import ConvSpec
from wrn_fast.kernels.fprop import box, contiguous, image64, pack
from wrn_fast.kernels.stats import add, affine, centered
from wrn_fast.kernels.tile import ACTS
from wrn_fast.problem import ConvProblem


def axis_class(a: int, pad: int, taps: int, stride: int) -> tuple[int, int, int]:
    """(first tap, number of taps, first row of dy) of the rows a, a + stride, ... of x."""
    met = [r for r in range(taps) if (a + pad - r) % stride == 0]
    return (met[0], len(met), (a + pad - met[0]) // stride) if met else (0, 0, 0)


@lru_cache(maxsize=4096)
def dgrad_specs(problem: ConvProblem, config: TileConfig) -> tuple[ConvSpec, ...]:
    """One compiled part a class that has pixels."""
    left, _, top, _ = problem.pad
    t = problem.stride
    p, q = problem.P, problem.Q
    specs = []
    for a in range(min(t, problem.H)):
        r0, taps_h, first_h = axis_class(a, top, problem.R, t)
        for b in range(min(t, problem.W)):
            s0, taps_w, first_w = axis_class(b, left, problem.S, t)
            rows_h, rows_w = -(-(problem.H - a) // t), -(-(problem.W - b) // t)
            inside = (
                first_h - taps_h + 1 >= 0
                and first_h + rows_h <= p
                and first_w - taps_w + 1 >= 0
                and first_w + rows_w <= q
            )
            specs.append(
                ConvSpec(
                    red=problem.K,
                    cols=problem.C,
                    H=p,
                    W=q,
                    rows_h=rows_h,
                    rows_w=rows_w,
                    out_h=problem.H,
                    out_w=problem.W,
                    in_step=1,
                    in_sign=-1,
                    in_first_h=first_h,
                    in_first_w=first_w,
                    out_step=t,
                    out_first_h=a,
                    out_first_w=b,
                    taps_h=taps_h,
                    taps_w=taps_w,
                    tap_first_h=r0,
                    tap_first_w=s0,
                    tap_step=t,
                    filter_r=problem.R,
                    filter_s=problem.S,
                    red_contiguous=problem.dtype.itemsize > 2,  # tf32 wgmma reads its operands no other way
                    halo=not inside,
                    select=False,
                    image64=image64(config, rows_h * rows_w, problem.H * problem.W * problem.C, p * q * problem.K),
                    slope=problem.slope,
                    center=centered(problem.dtype),
                    backward=True,
                    drop_y=problem.drop_at == "prologue" and problem.p > 0,
                    stats=problem.want_stats and problem.prologue,
                    in_bn=problem.prologue,
                    in_act=ACTS[problem.act],
                    box=box(config, rows_h, rows_w),
                )
            )
    return tuple(specs)


def dgrad(
    problem: ConvProblem,
    config: TileConfig,
    precision: str,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(g [N,C,H,W], sums_g [2,C])."""
    specs = dgrad_specs(problem, config)
    sums = torch.empty(0, dtype=problem.stats_dtype, device=x.device)
    partial = None
    if specs[0].stats:
        tiles = sum(conv.row_tiles(problem.N, spec, config) for spec in specs)
        partial = torch.empty((tiles, 2, problem.C), dtype=problem.stats_dtype, device=x.device)
    table = affine(stats, gamma, beta, problem.eps, x.dtype)
    source = x if specs[0].in_act > 0 or specs[0].stats else None
    g = _classes(problem, config, precision, specs, dy, w, rng, partial, x_in=source, affine_in=table)
    if partial is not None:
        sums = add(partial)
    return g, sums


def input_grad(
    problem: ConvProblem,
    config: TileConfig,
    precision: str,
    dy: Tensor,
    w: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    rng: Tensor | None = None,
) -> Tensor:
    """dx [N,C,H,W] = scale * act' * dropout'(dgrad(dy, w)), act' in bits: `mask` is uint8 [N,H,W,ceil(C/8)]."""
    specs = tuple(
        replace(spec, stats=False, in_bn=False, in_mask=mask is not None, out_scale=scale is not None)
        for spec in dgrad_specs(problem, config)
    )
    return _classes(problem, config, precision, specs, dy, w, rng, None, mask_in=mask, out_scale=scale)


def _classes(
    problem: ConvProblem,
    config: TileConfig,
    precision: str,
    specs: tuple[ConvSpec, ...],
    dy: Tensor,
    w: Tensor,
    rng: Tensor | None,
    partial: Tensor | None,
    **tensors: Tensor | None,
) -> Tensor:
    """One launch a class into one tensor [N,C,H,W]; each class has its own tiles of `partial`."""
    shape = (problem.N, problem.C, problem.H, problem.W)
    g = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    packed = contiguous(w.permute(1, 2, 3, 0), dy.dtype) if specs[0].red_contiguous else pack(w, dy.dtype)
    first = 0
    for spec in specs:
        count = conv.row_tiles(problem.N, spec, config)
        conv.launch(
            problem.N, spec, config, precision, problem.p, dy, packed, g, rng=rng if spec.drops else None,
            partial=None if partial is None else partial[first : first + count], **tensors,
        )  # fmt: skip
        first += count
    return g
