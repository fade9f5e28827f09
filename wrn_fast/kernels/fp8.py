"""e4m3 operands of fprop: what is multiplied in eight bits, and the factors that make it real numbers again.

    w8[k] = e4m3(w[k] / sw[k])   sw[k] = max |w[k]| / M         a8 = e4m3(act(bn(x)) / sx)   sx = largest / M
    y = sx * sw[k] * sum a8*w8

M is the largest e4m3 number: 448, or 240 where the hardware has the form without infinities and negative zero (fnuz, on
gfx942). Activations beyond `largest` become M; NaN stays NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.tile import round_to

BLOCK = 1024


class Ranges(NamedTuple):
    """The largest |act(bn(.))| of both sources, one float32 element each, and the format of this GPU."""

    x: Tensor
    short: Tensor | None
    dtype: torch.dtype


def e4m3() -> torch.dtype:
    """The format of the GPUs that this PyTorch is for."""
    return torch.float8_e4m3fnuz if torch.version.hip else torch.float8_e4m3fn


def largest(dtype: torch.dtype) -> float:
    """M of a format."""
    return torch.finfo(dtype).max


@Bound
@triton.jit
def _pack_fp8_kernel(w, amax, packed, factor, LENGTH: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """packed [K, LENGTH] and factor [K] = sx * sw of w [K, LENGTH]. One program a row, which it reads twice."""
    k = tl.program_id(0)
    row = w + k.to(tl.int64) * LENGTH
    at = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, LENGTH, BLOCK):
        i = first + at
        v = tl.load(row + i, mask=i < LENGTH, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(v))
    most = tl.max(top, 0)
    # A row of zeros, or of numbers that would make the factor 0, is divided by 1.
    scale = tl.where(most * (1.0 / MOST) > 0, most / MOST, 1.0)
    for first in tl.range(0, LENGTH, BLOCK):
        i = first + at
        v = tl.load(row + i, mask=i < LENGTH, other=0.0).to(tl.float32) / scale
        v = tl.clamp(v, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(packed + k.to(tl.int64) * LENGTH + i, round_to(v, packed.dtype.element_ty), mask=i < LENGTH)
    tl.store(factor + k, scale * (tl.load(amax) / MOST))


def pack(w: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w8 in memory order [K,R,S,C], factor [K]) of w [K,R,S,C] in memory order."""
    rows, length = w.shape[0], w.numel() // w.shape[0]
    packed = torch.empty(w.shape, dtype=dtype, device=w.device)
    factor = torch.empty(rows, dtype=torch.float32, device=w.device)
    _pack_fp8_kernel((rows, 1, 1), (w, amax, packed, factor), (), (length, largest(dtype), BLOCK))
    return packed, factor
