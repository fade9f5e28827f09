"""Device functions that the kernels share: activation, rounding, dropout mask, prologue, tile statistics."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

# Decided when this module is imported, as triton decides for the kernels: the interpreter cuts float32 to bfloat16
# instead of rounding it, and multiplies bfloat16 wrongly, so both are written out there.
INTERPRETED = bool(triton.knobs.runtime.interpret)
EMULATED = tl.constexpr(INTERPRETED)

# Codes of ConvProblem.act and act_out.
ACTS = {"none": -1, "identity": 0, "relu": 1, "silu": 2, "leaky_relu": 3}


@triton.jit
def act_fwd(v, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """act(v); NaN stays NaN, which tl.maximum by default does not do on a GPU."""
    if ACT == 1:
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == 2:
        v = v / (1.0 + tl.exp(-v))
    elif ACT == 3:
        v = tl.where(v > 0, v, v * SLOPE)
    return v


@triton.jit
def act_bwd(g, v, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """g * act'(v), 0 at 0 for relu. A literal inside tl.where is float32, so g is multiplied, no factor is built."""
    if ACT == 1:
        g = tl.where(v <= 0, 0.0, g)
    elif ACT == 2:
        s = 1.0 / (1.0 + tl.exp(-v))
        g = g * (s * (1.0 + v * (1.0 - s)))
    elif ACT == 3:
        g = tl.where(v > 0, g, g * SLOPE)
    return g


@triton.jit
def rsqrt(v, WIDE: tl.constexpr):
    """1 / sqrt(v), each step rounded as the host does it: tl.rsqrt and tl.sqrt are approximations in float32."""
    if WIDE == tl.float64:
        r = 1.0 / tl.sqrt(v)
    else:
        r = tl.div_rn(v * 0.0 + 1.0, tl.sqrt_rn(v))
    return r


@triton.jit
def round_to(v, DTYPE: tl.constexpr):
    """v in DTYPE, to nearest even; for an e4m3 format v must be within its range."""
    if EMULATED and DTYPE == tl.bfloat16:
        f = v.to(tl.float32)
        u = f.to(tl.uint32, bitcast=True)
        r = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
        v = tl.where(f == f, r, u).to(tl.uint32).to(tl.float32, bitcast=True)
    if EMULATED and DTYPE.is_fp8():
        # Three bits of mantissa; below the least normal number a fixed step, by adding 2^23 of it and taking it off.
        STEP: tl.constexpr = 1.953125e-3 if DTYPE == tl.float8e4nv else 9.765625e-4
        f = v.to(tl.float32)
        u = f.to(tl.uint32, bitcast=True)
        r = ((u + 0x7FFFF + ((u >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        little = (f + 12582912.0 * STEP) - 12582912.0 * STEP
        v = tl.where(f == f, tl.where(tl.abs(f) < 8 * STEP, little, r), 0.0).to(DTYPE).to(tl.uint8, bitcast=True)
        v = tl.where(f == f, v, _nan_of(DTYPE)).to(tl.uint8).to(DTYPE, bitcast=True)
    return v.to(DTYPE)


@triton.jit
def _nan_of(DTYPE: tl.constexpr):
    """The byte that is NaN in an e4m3 format: the interpreter converts it neither way."""
    return 0x7F if DTYPE == tl.float8e4nv else 0x80


@triton.jit
def _from_fp8(v):
    """v in float32, in the interpreter."""
    bits = v.to(tl.uint8, bitcast=True)
    if v.dtype == tl.float8e4nv:
        bits = bits & 0x7F
    return tl.where(bits == _nan_of(v.dtype), float("nan"), v.to(tl.float32))


@triton.jit
def dot(a, b, acc, PREC: tl.constexpr, WIDE: tl.constexpr):
    """acc + a @ b, accumulated in WIDE."""
    if EMULATED and PREC == "fp8":
        a = _from_fp8(a)
        b = _from_fp8(b)
    elif EMULATED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PREC == "fp8":
        # sm_90 keeps 14 bits of a sum of e4m3 products: after each step it goes into a float32 accumulator.
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=None if EMULATED else a.shape[1])
    else:
        acc = tl.dot(a, b, acc, input_precision=PREC, out_dtype=WIDE)
    return acc


@triton.jit
def _keep_words(group, rng, threshold):
    """Four keep flags of the four elements of `group` (int64), in order."""
    seed = tl.load(rng)
    offset = tl.load(rng + 1).to(tl.uint64)
    g = group.to(tl.uint64)
    c0 = g.to(tl.uint32)
    c1 = (g >> 32).to(tl.uint32)
    c2 = c0 * 0 + offset.to(tl.uint32)
    c3 = c0 * 0 + (offset >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3)
    least = threshold.to(tl.uint32)
    return (r0 >= least).to(tl.int8), (r1 >= least).to(tl.int8), (r2 >= least).to(tl.int8), (r3 >= least).to(tl.int8)


@triton.jit
def keep_tile(base, row, col, rng, threshold, CHANNELS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """[rows, BLOCK_COLS] bool: which elements base + row*CHANNELS + col + 0..BLOCK_COLS of an NHWC tensor are kept.

    Philox4x32-10 with counter (index >> 2, offset), word index & 3. Four channels share a draw where they share an
    index >> 2 for certain; else every element draws four words for itself, at four times the price.
    """
    if CHANNELS % 4 == 0:
        quarter = tl.arange(0, BLOCK_COLS // 4) + col // 4
        group = (base // 4 + row.to(tl.int64) * (CHANNELS // 4))[:, None] + quarter[None, :]
        k0, k1, k2, k3 = _keep_words(group, rng, threshold)
        keep = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (row.shape[0], BLOCK_COLS))
    else:
        index = (base + row.to(tl.int64) * CHANNELS)[:, None] + (col + tl.arange(0, BLOCK_COLS))[None, :]
        k0, k1, k2, k3 = _keep_words(index >> 2, rng, threshold)
        word = (index & 3).to(tl.int32)
        keep = tl.where(word < 2, tl.where(word == 0, k0, k1), tl.where(word == 2, k2, k3))
    return keep != 0


@triton.jit
def drop(v, keep, scale, scale_low, WIDE: tl.constexpr):
    """v * keep * scale as a product, so that a dropped NaN stays NaN. `scale_low` is what float32 cuts off `scale`."""
    if WIDE == tl.float64:
        s = tl.zeros((1, 1), tl.float64) + scale + scale_low
    else:
        s = scale
    return v * (keep.to(WIDE) * s)


@triton.jit
def affine_tile(v, affine, c, CHANNELS: tl.constexpr, CENTER: tl.constexpr):
    """BatchNorm of a [rows, channels] tile. `affine` is [4, CHANNELS]: scale, shift, mean, rstd (stats.py)."""
    m = c < CHANNELS
    s = tl.load(affine + c, mask=m, other=0.0)
    t = tl.load(affine + CHANNELS + c, mask=m, other=0.0)
    if CENTER:
        v = v - tl.load(affine + 2 * CHANNELS + c, mask=m, other=0.0)[None, :]
    return v * s[None, :] + t[None, :]


@triton.jit
def prologue(a, inside, c, affine, CHANNELS: tl.constexpr, BN: tl.constexpr, CENTER: tl.constexpr, ACT: tl.constexpr,
             SLOPE: tl.constexpr, EVEN: tl.constexpr, HALO: tl.constexpr, SELECT: tl.constexpr, DTYPE: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """act(bn(a)) of a [rows, channels] tile, rounded to DTYPE; zero where `inside` is not: padding comes after it.

    Outside, a was loaded as 0, so dropping mean and shift there leaves act(0) = 0: one select on float32. Channels past
    the end have scale 0. SELECT zeroes the result itself, for paddings so wide that an output may see nothing else:
    there 0 * inf would show.
    """
    v = a.to(WIDE)
    if BN:
        if EVEN:
            s = tl.load(affine + c)
            t = tl.load(affine + CHANNELS + c)
        else:
            s = tl.load(affine + c, mask=c < CHANNELS, other=0.0)
            t = tl.load(affine + CHANNELS + c, mask=c < CHANNELS, other=0.0)
        shift = t[None, :]
        if HALO:
            shift = tl.where(inside[:, None], shift, 0.0)
        if CENTER:
            mean = tl.load(affine + 2 * CHANNELS + c, mask=c < CHANNELS, other=0.0)[None, :]
            if HALO:
                mean = tl.where(inside[:, None], mean, 0.0)
            v = v - mean
        v = v * s[None, :] + shift
    v = act_fwd(v, ACT, SLOPE)
    if SELECT:
        v = tl.where(inside[:, None], v, 0.0)
    return round_to(v, DTYPE)


@triton.jit
def sum_rows(v):
    """The sums of a tile's columns. A GPU adds as a tree; the interpreter row after row, so there in two levels."""
    if EMULATED:
        v = tl.sum(tl.reshape(v, (v.shape[0] // 16, 16, v.shape[1])), 1)
    return tl.sum(v, 0)


@triton.jit
def tile_stats(v, rows, valid, WIDE: tl.constexpr):
    """(pivot, offset, M2) of the valid rows of a tile, a column: the rounded mean, what rounding cut off it, and the
    squared distances from the two together. At mean 1000 the pivot alone would cost the variance two digits.
    """
    count = tl.sum(rows.to(WIDE), 0)
    pivot = sum_rows(tl.where(valid, v, 0.0)) / count
    d = tl.where(valid, v - pivot[None, :], 0.0)
    offset = sum_rows(d) / count
    return pivot, offset, sum_rows(d * d) - count * offset * offset


def wide(dtype: torch.dtype):
    """Accumulation: float32, float64 for float64 (interpreter only)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@lru_cache(maxsize=1024)
def drop_args(p: float) -> tuple[int, float, float]:
    """(threshold, keep, keep_low) of the kernels: words below the threshold are dropped.

    The threshold travels as a signed 32-bit number, so that its type does not depend on p. p = 1 has none (2^32): there
    everything is multiplied by 0. keep + keep_low is 1 / (1 - p) to float64; keep alone is its float32.
    """
    if p >= 1.0:
        return -1, 0.0, 0.0
    threshold = int(p * 2**32)
    scale = 1.0 / (1.0 - p)
    keep = torch.tensor(scale, dtype=torch.float32).item()
    return threshold - (1 << 32 if threshold >= 1 << 31 else 0), keep, scale - keep
