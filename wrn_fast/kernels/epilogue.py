"""What a convolution's program does with its sums: one function a direction, called once for each of its accumulators.

`pixel` numbers output pixels from the tile's first image, whose place in memory is `base` (in elements) and, in a bit
mask, `base_mask` (in bytes).
"""

import triton
import triton.language as tl

from wrn_fast.kernels.tile import act_bwd, act_fwd, affine_tile, drop, keep_tile, round_to, sum_rows, tile_stats


@triton.jit
def ratio(factor, factor_short, k, COLS: tl.constexpr):
    """What turns the first source's sums into units of the second's."""
    return tl.load(factor + k, mask=k < COLS, other=0.0) / tl.load(factor_short + k, mask=k < COLS, other=1.0)


@triton.jit
def fprop_columns(acc, tile, rows, pixel, base, col, y, y_act, residual, bias, out_scale, out_shift, rng, partial,
                   threshold, keep, keep_low, spec: tl.constexpr, BLOCK_COLS: tl.constexpr,
                   WIDE: tl.constexpr):  # fmt: skip
    """y = drop(acc + bias + residual), y_act = drop(act(y*scale + shift)), statistics of y as written."""
    COLS: tl.constexpr = spec.cols
    k = col + tl.arange(0, BLOCK_COLS)
    km = k < COLS
    valid = rows[:, None] & km[None, :]
    index = pixel[:, None] * COLS + k[None, :]
    v = acc
    if spec.bias:
        v += tl.load(bias + k, mask=km, other=0.0).to(WIDE)[None, :]
    if spec.residual:
        v += tl.load(residual + base + index, mask=valid, other=0.0).to(WIDE)
    if spec.drop_y:
        kept = keep_tile(base, pixel, col, rng, threshold, COLS, BLOCK_COLS)
        v = drop(v, kept, keep, keep_low, WIDE)
    v_out = round_to(v, y.dtype.element_ty)
    if spec.store_y:
        tl.store(y + base + index, v_out, mask=valid)
    v = v_out.to(WIDE)
    if spec.act_out >= 0:
        z = v
        if spec.out_scale:
            z = z * tl.load(out_scale + k, mask=km, other=0.0).to(WIDE)[None, :]
        if spec.out_shift:
            z = z + tl.load(out_shift + k, mask=km, other=0.0).to(WIDE)[None, :]
        z = act_fwd(z, spec.act_out, spec.slope)
        if spec.drop_act:
            kept = keep_tile(base, pixel, col, rng, threshold, COLS, BLOCK_COLS)
            z = drop(z, kept, keep, keep_low, WIDE)
        tl.store(y_act + base + index, round_to(z, y_act.dtype.element_ty), mask=valid)
    if spec.stats:
        pivot, offset, m2 = tile_stats(v, rows, valid, WIDE)
        part = partial + tile.to(tl.int64) * (3 * COLS)
        tl.store(part + k, pivot, mask=km)
        tl.store(part + COLS + k, offset, mask=km)
        tl.store(part + 2 * COLS + k, m2, mask=km)


@triton.jit
def _mask_tile(mask, rows, pixel, col, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """[rows, BLOCK_COLS] of 1 and -1 from the bits of bytes [pixels, ceil(COLS / 8)], each byte loaded once."""
    BYTES: tl.constexpr = (COLS + 7) // 8
    b = col // 8 + tl.arange(0, BLOCK_COLS // 8)
    inside = rows[:, None] & (b < BYTES)[None, :]
    byte = tl.load(mask + pixel[:, None] * BYTES + b[None, :], mask=inside, other=0).to(tl.int32)
    bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (rows.shape[0], BLOCK_COLS)) * 2 - 1


@triton.jit
def dgrad_columns(acc, tile, rows, pixel, base, base_mask, col, g, x_in, affine_in, mask_in, out_scale, rng, partial,
                  threshold, keep, keep_low, spec: tl.constexpr, BLOCK_COLS: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    """g = acc * mask * act'(bn(x)), sums of g as written and of g * xhat. Or acc * mask * act' * out_scale, no sums."""
    COLS: tl.constexpr = spec.cols
    k = col + tl.arange(0, BLOCK_COLS)
    km = k < COLS
    valid = rows[:, None] & km[None, :]
    index = pixel[:, None] * COLS + k[None, :]
    v = acc
    if (spec.in_act > 0 and not spec.in_mask) or spec.stats:
        xv = tl.load(x_in + base + index, mask=valid, other=0.0).to(WIDE)
    if spec.drop_y:
        kept = keep_tile(base, pixel, col, rng, threshold, COLS, BLOCK_COLS)
        v = drop(v, kept, keep, keep_low, WIDE)
    if spec.in_act > 0:
        if spec.in_mask:
            u = _mask_tile(mask_in + base_mask, rows, pixel, col, COLS, BLOCK_COLS)
        elif spec.in_bn:
            u = affine_tile(xv, affine_in, k, COLS, spec.center)
        else:
            u = xv
        v = act_bwd(v, u, spec.in_act, spec.slope)
    if spec.out_scale:
        v = v * tl.load(out_scale + k, mask=km, other=0.0).to(WIDE)[None, :]
    v_out = round_to(v, g.dtype.element_ty)
    tl.store(g + base + index, v_out, mask=valid)
    if spec.stats:
        v = tl.where(valid, v_out.to(WIDE), 0.0)
        mean = tl.load(affine_in + 2 * COLS + k, mask=km, other=0.0)
        rstd = tl.load(affine_in + 3 * COLS + k, mask=km, other=0.0)
        xhat = tl.where(valid, (xv - mean[None, :]) * rstd[None, :], 0.0)
        part = partial + tile.to(tl.int64) * (2 * COLS)
        tl.store(part + k, sum_rows(v), mask=km)
        tl.store(part + COLS + k, sum_rows(v * xhat), mask=km)
