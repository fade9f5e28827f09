"""The implicit GEMM behind fprop and dgrad: one tap loop over NHWC pixels, one or two sources, two epilogues.

    out[p, k] = sum over taps, c of source[pixel(p, tap), c] * w[tap, c, k]    p: output pixel, c: reduction, k: column

fprop reads x and writes y; dgrad reads dy and writes g, so there "reduction" is K and "columns" is C. Six numbers make
the difference (u: tap):

    source row = i*in_step + in_first + in_sign*u
    filter row = tap_first + tap_step*u
    output row = i*out_step + out_first

    fprop              in_step=stride  out_step=1       in_first=-pad  in_sign=+1  tap_first=0  tap_step=1
    dgrad, each class  in_step=1       out_step=stride  in_sign=-1     (dgrad.py)

A program makes BLOCK_ROWS pixels x (COLS0 + COLS1) columns; the column tiles of a pixel tile run side by side, so the
source comes from L2 for all but the first. All vector addresses are made before the loop: a 32-bit offset a row inside
the tile's own images, one bit a tap for "inside the image"; a step costs a row one addition and one bit test.
Reads the source taps times (from L2 mostly), the filter once a pixel tile; writes each output once.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.configs import TileConfig
from wrn_fast.kernels.epilogue import dgrad_columns, fprop_columns, ratio
from wrn_fast.kernels.tile import dot, drop_args, prologue, wide


@dataclass(frozen=True)
class ConvSpec:
    """Everything compiled into a kernel but the tile: shapes, taps, which parts exist. The batch size is not in it."""

    red: int  # reduction channels
    cols: int  # output columns
    H: int  # source
    W: int
    rows_h: int  # grid of output pixels of this launch
    rows_w: int
    out_h: int  # output tensor
    out_w: int
    in_step: int
    in_sign: int
    in_first_h: int
    in_first_w: int
    out_step: int
    out_first_h: int
    out_first_w: int
    taps_h: int
    taps_w: int
    tap_first_h: int
    tap_first_w: int
    tap_step: int
    filter_r: int
    filter_s: int
    red_contiguous: bool  # filter is [cols, R, S, red] (fprop), or [red, R, S, cols] (dgrad in 16 bits)
    halo: bool  # does a tap read outside the image?
    select: bool  # may an output see nothing else?
    image64: bool  # one tile's images pass 2^31 elements
    slope: float
    center: bool  # subtract the mean before the scale: float32 keeps its digits at mean >> std
    source: bool = False  # prologue: act(bn(.))
    bn: bool = False
    act: int = 0
    short_red: int = 0  # second source: a 1x1 of another tensor into the same accumulators
    short_h: int = 1
    short_w: int = 1
    short_step: int = 1
    short_source: bool = False
    short_bn: bool = False
    short_act: int = 0
    backward: bool = False  # which epilogue
    bias: bool = False
    residual: bool = False
    store_y: bool = True
    act_out: int = -1
    out_scale: bool = False
    out_shift: bool = False
    drop_y: bool = False  # fprop: y; dgrad: the prologue's mask
    drop_act: bool = False
    stats: bool = False  # fprop: (pivot, offset, M2) a tile; dgrad: sums of g and g*xhat
    in_bn: bool = False  # dgrad's epilogue: BatchNorm and activation of x
    in_act: int = 0
    in_mask: bool = False  # act' as one bit an element, in place of BatchNorm and activation of x
    scaled: bool = False  # operands in e4m3: sums times `factor`, those of the shortcut times `factor_short`
    box: tuple[int, int, int] = (0, 0, 0)  # images, rows, columns that a tile reads at once; 0: by pointers

    def __hash__(self) -> int:
        """Made once: a launch looks its kernel up by it."""
        found = self.__dict__.get("_hash")
        if found is None:
            found = hash(tuple(self.__dict__.values()))
            object.__setattr__(self, "_hash", found)
        return found

    @property
    def drops(self) -> bool:
        """Does the kernel draw a mask?"""
        return self.drop_y or self.drop_act


# A value of 1 or a multiple of 16 would otherwise compile a kernel of its own.
RUNTIME = ["N", "threshold", "keep", "keep_low"]


@triton.jit
def _load_filter(pointer, offsets, mask, EVEN: tl.constexpr):
    if EVEN:
        b = tl.load(pointer + offsets)
    else:
        b = tl.load(pointer + offsets, mask=mask, other=0.0)
    return b


@Bound
@triton.jit(do_not_specialize=RUNTIME)
def _conv_kernel(x, w, affine, x_short, w_short, affine_short, y, y_act, residual, bias, out_scale, out_shift, x_in,
                 affine_in, mask_in, rng, partial, factor, factor_short, N, threshold, keep, keep_low,
                 spec: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_RED: tl.constexpr, COLS0: tl.constexpr,
                 COLS1: tl.constexpr, PREC: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """See the head of the file. Absent tensors are None, which is no argument of the compiled kernel."""
    H: tl.constexpr = spec.H
    W: tl.constexpr = spec.W
    RED: tl.constexpr = spec.red
    COLS: tl.constexpr = spec.cols
    TAPS_H: tl.constexpr = spec.taps_h
    TAPS_W: tl.constexpr = spec.taps_w
    IMAGE: tl.constexpr = spec.rows_h * spec.rows_w
    SIGN: tl.constexpr = spec.in_sign
    EVEN: tl.constexpr = RED % BLOCK_RED == 0
    BOX: tl.constexpr = spec.box[0] > 0
    EVEN_B: tl.constexpr = EVEN and COLS % (COLS0 + COLS1) == 0
    column_tiles: tl.constexpr = (COLS + COLS0 + COLS1 - 1) // (COLS0 + COLS1)
    tile = tl.program_id(0) // column_tiles
    col = (tl.program_id(0) % column_tiles) * (COLS0 + COLS1)
    m = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = m < N * IMAGE
    first = (tile * BLOCK_ROWS) // IMAGE  # the tile's first image
    n = m // IMAGE - first
    i = (m % IMAGE) // spec.rows_w
    j = m % spec.rows_w
    h = i * spec.in_step + spec.in_first_h
    v = j * spec.in_step + spec.in_first_w
    if spec.image64:
        n = n.to(tl.int64)
    cr = tl.arange(0, BLOCK_RED)
    if BOX:
        top = (tile * BLOCK_ROWS % IMAGE) // spec.rows_w + spec.in_first_h
    else:
        a_offset = ((n * H + h) * W + v)[:, None] * RED + cr[None, :]
        x_tile = x + first.to(tl.int64) * (H * W * RED)
    bits = tl.zeros((BLOCK_ROWS,), tl.int32)
    if spec.halo and not (BOX and not spec.source):
        for r in tl.static_range(TAPS_H):
            for s in tl.static_range(TAPS_W):
                hr = h + SIGN * r
                vs = v + SIGN * s
                ok = rows & (hr >= 0) & (hr < H) & (vs >= 0) & (vs < W)
                bits |= tl.where(ok, 1 << (r * TAPS_W + s), 0)
    k0 = col + tl.arange(0, COLS0)
    acc0 = tl.zeros((BLOCK_ROWS, COLS0), WIDE)
    b_step: tl.constexpr = 1 if spec.red_contiguous else spec.filter_r * spec.filter_s * COLS
    tap_stride: tl.constexpr = RED if spec.red_contiguous else COLS
    if spec.red_contiguous:
        b0 = cr[:, None] + k0[None, :] * (spec.filter_r * spec.filter_s * RED)
    else:
        b0 = cr[:, None] * b_step + k0[None, :]
    b0_mask = (k0 < COLS)[None, :]
    if COLS1 > 0:
        k1 = col + COLS0 + tl.arange(0, COLS1)
        acc1 = tl.zeros((BLOCK_ROWS, COLS1), WIDE)
        if spec.red_contiguous:
            b1 = cr[:, None] + k1[None, :] * (spec.filter_r * spec.filter_s * RED)
        else:
            b1 = cr[:, None] * b_step + k1[None, :]
        b1_mask = (k1 < COLS)[None, :]
    r = 0
    s = 0
    c0 = 0
    STEPS: tl.constexpr = TAPS_H * TAPS_W * ((RED + BLOCK_RED - 1) // BLOCK_RED)
    for _ in tl.range(0, STEPS):
        if spec.halo and not (BOX and not spec.source):
            inside = ((bits >> (r * TAPS_W + s)) & 1) != 0
        else:
            inside = rows
        c = c0 + cr
        cm = (c < RED)[:, None]
        if BOX:
            a = x.load([first, top + SIGN * r, spec.in_first_w + SIGN * s, c0])
            a = tl.reshape(a, (BLOCK_ROWS, BLOCK_RED))
        else:
            if EVEN:
                am = inside[:, None] & (cr >= 0)[None, :]
            else:
                am = inside[:, None] & (c < RED)[None, :]
            a = tl.load(x_tile + (SIGN * (r * W + s) * RED + c0) + a_offset, mask=am, other=0.0)
        if spec.source:
            a = prologue(a, inside, c, affine, RED, spec.bn, spec.center, spec.act, spec.slope, EVEN, spec.halo,
                         spec.select, a.dtype, WIDE)  # fmt: skip
        tap = (spec.tap_first_h + spec.tap_step * r) * spec.filter_s + spec.tap_first_w + spec.tap_step * s
        w_step = w + tap * tap_stride + c0 * b_step
        acc0 = dot(a, _load_filter(w_step, b0, b0_mask & cm, EVEN_B), acc0, PREC, WIDE)
        if COLS1 > 0:
            acc1 = dot(a, _load_filter(w_step, b1, b1_mask & cm, EVEN_B), acc1, PREC, WIDE)
        c0 += BLOCK_RED  # the next step, without a division
        last = c0 >= RED
        c0 = tl.where(last, 0, c0)
        s = tl.where(last, s + 1, s)
        wrap = s >= TAPS_W
        s = tl.where(wrap, 0, s)
        r = tl.where(wrap, r + 1, r)
    if spec.short_red > 0:
        C2: tl.constexpr = spec.short_red
        EVEN2: tl.constexpr = C2 % BLOCK_RED == 0
        EVEN2_B: tl.constexpr = EVEN2 and COLS % (COLS0 + COLS1) == 0
        a2_offset = ((n * spec.short_h + i * spec.short_step) * spec.short_w + j * spec.short_step)[:, None] * C2 + cr[
            None, :
        ]
        short_tile = x_short + first.to(tl.int64) * (spec.short_h * spec.short_w * C2)
        d0 = cr[:, None] + k0[None, :] * C2
        if COLS1 > 0:
            d1 = cr[:, None] + k1[None, :] * C2
        if spec.scaled:
            acc0 *= ratio(factor, factor_short, k0, COLS)[None, :]
            if COLS1 > 0:
                acc1 *= ratio(factor, factor_short, k1, COLS)[None, :]
            factor = factor_short
        for e0 in tl.range(0, C2, BLOCK_RED):
            c = e0 + cr
            cm = (c < C2)[:, None]
            if EVEN2:
                am = rows[:, None] & (cr >= 0)[None, :]
            else:
                am = rows[:, None] & (c < C2)[None, :]
            a = tl.load(short_tile + e0 + a2_offset, mask=am, other=0.0)
            if spec.short_source:
                a = prologue(a, rows, c, affine_short, C2, spec.short_bn, spec.center, spec.short_act, spec.slope,
                             EVEN2, False, False, a.dtype, WIDE)  # fmt: skip
            acc0 = dot(a, _load_filter(w_short + e0, d0, b0_mask & cm, EVEN2_B), acc0, PREC, WIDE)
            if COLS1 > 0:
                acc1 = dot(a, _load_filter(w_short + e0, d1, b1_mask & cm, EVEN2_B), acc1, PREC, WIDE)
    if spec.scaled:
        acc0 *= tl.load(factor + k0, mask=k0 < COLS, other=0.0)[None, :]
        if COLS1 > 0:
            acc1 *= tl.load(factor + k1, mask=k1 < COLS, other=0.0)[None, :]
    pixel = (n * spec.out_h + i * spec.out_step + spec.out_first_h) * spec.out_w + j * spec.out_step + spec.out_first_w
    base = first.to(tl.int64) * (spec.out_h * spec.out_w * COLS)
    if spec.backward:
        base_mask = first.to(tl.int64) * (spec.out_h * spec.out_w * ((COLS + 7) // 8))
        dgrad_columns(acc0, tile, rows, pixel, base, base_mask, col, y, x_in, affine_in, mask_in, out_scale, rng,
                      partial, threshold, keep, keep_low, spec, COLS0, WIDE)  # fmt: skip
        if COLS1 > 0:
            dgrad_columns(acc1, tile, rows, pixel, base, base_mask, col + COLS0, y, x_in, affine_in, mask_in,
                          out_scale, rng, partial, threshold, keep, keep_low, spec, COLS1, WIDE)  # fmt: skip
    else:
        fprop_columns(acc0, tile, rows, pixel, base, col, y, y_act, residual, bias, out_scale, out_shift, rng, partial,
                      threshold, keep, keep_low, spec, COLS0, WIDE)  # fmt: skip
        if COLS1 > 0:
            fprop_columns(acc1, tile, rows, pixel, base, col + COLS0, y, y_act, residual, bias, out_scale, out_shift,
                          rng, partial, threshold, keep, keep_low, spec, COLS1, WIDE)  # fmt: skip


def row_tiles(problem_n: int, spec: ConvSpec, config: TileConfig) -> int:
    """Pixel tiles of a launch."""
    return -(-problem_n * spec.rows_h * spec.rows_w // config.rows)


def launch(
    n: int,
    spec: ConvSpec,
    config: TileConfig,
    precision: str,
    p: float,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    **tensors: Tensor | None,
) -> None:
    """Run `_conv_kernel` on the current stream. `tensors` by the kernel's names; what is absent is None or left out."""
    affine, x_short, w_short, affine_short, *rest = (
        t if t is None or t.dim() == 4 else t.contiguous() for t in map(tensors.get, _OPTIONAL)
    )
    source = x
    if spec.box[0]:
        h, w_, c = spec.H, spec.W, spec.red
        source = TensorDescriptor(x, [n, h, w_, c], [h * w_ * c, w_ * c, c, 1], [*spec.box, config.red])
    _conv_kernel(
        (row_tiles(n, spec, config) * -(-spec.cols // config.width), 1, 1),
        (source, w, affine, x_short, w_short, affine_short, y, *rest),
        (n, *(drop_args(p) if spec.drops else _NO_DROP)),
        (spec, config.rows, config.red, *config.cols, precision, wide(x.dtype)),
        config.warps,
        config.stages,
    )


_OPTIONAL = ("affine", "x_short", "w_short", "affine_short", "y_act", "residual", "bias", "out_scale", "out_shift",
             "x_in", "affine_in", "mask_in", "rng", "partial", "factor", "factor_short")  # fmt: skip
_NO_DROP = (None, None, None)
