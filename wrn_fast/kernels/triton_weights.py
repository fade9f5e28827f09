"""What the kernels read of weights, held for a captured graph: packed filters and folded BatchNorms.

A graph that makes them makes them at every replay: a copy a filter, a fold a BatchNorm, half of all its launches. Held
(`wrn_fast.held`), they are made again before a replay: BatchNorms by one launch, in any case, and filters by one or two
that compare samples of each tile first, because fused optimizers change a filter without its version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrn_fast import held
from wrn_fast.kernels.bound import Bound
from wrn_fast.kernels.device import on_device
from wrn_fast.kernels.tile import round_to, rsqrt

# A program's tile of a filter, and the samples that stand for it.
_TILE_K, _TILE_C, _SAMPLES = 4, 64, 32
_FOLD_C = 128
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
_BITS = {2: torch.int16, 4: torch.int32}


@triton.jit
def scale_shift(mean, var, gamma, beta, c, m, EPS: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
                CENTER: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(scale, shift, rstd) of channels c, so that bn(x) = x*scale + shift, or (x - mean)*scale + shift."""
    rstd = rsqrt(var + EPS, WIDE)
    scale = rstd
    if GAMMA:
        scale = rstd * tl.load(gamma + c, mask=m, other=0.0).to(WIDE)
    shift = mean * 0.0
    if BETA:
        shift = tl.load(beta + c, mask=m, other=0.0).to(WIDE)
    if not CENTER:
        shift = shift - mean * scale
    return scale, shift, rstd


@Bound
@triton.jit
def _fold_kernel(table, EPS: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, CENTER: tl.constexpr,
                 STATS: tl.constexpr, AFFINE: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Program (BatchNorm, channels) of `table` [norms, 7]: channels; mean, var, gamma, beta; their fold, their pair."""
    row = table + tl.program_id(0) * 7
    channels = tl.load(row).to(tl.int32)
    gamma = tl.load(row + 3).to(tl.pointer_type(AFFINE))
    beta = tl.load(row + 4).to(tl.pointer_type(AFFINE))
    out = tl.load(row + 5).to(tl.pointer_type(WIDE))
    pair = tl.load(row + 6).to(tl.pointer_type(WIDE))
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = c < channels
    mean = tl.load(tl.load(row + 1).to(tl.pointer_type(STATS)) + c, mask=m, other=0.0).to(WIDE)
    var = tl.load(tl.load(row + 2).to(tl.pointer_type(STATS)) + c, mask=m, other=1.0).to(WIDE)
    scale, shift, rstd = scale_shift(mean, var, gamma, beta, c, m, EPS, GAMMA, BETA, CENTER, WIDE)
    tl.store(out + c, scale, mask=m)
    tl.store(out + channels + c, shift, mask=m)
    tl.store(out + 2 * channels + c, mean, mask=m)
    tl.store(out + 3 * channels + c, rstd, mask=m)
    tl.store(pair + c, mean, mask=m)
    tl.store(pair + channels + c, var, mask=m)


@Bound
@triton.jit(do_not_specialize=["everything"])
def _pack_kernel(table, programs, everything, R: tl.constexpr, S: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
                 BITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr,
                 SAMPLES: tl.constexpr):  # fmt: skip
    """A tile of a filter from its own strides to [K,R,S,C], unless its samples are what they were.

    `table` [filters, 9]: the filter, its pack, its samples; K, C; strides of k, c, r, s. `programs` [programs, 2]: the
    filter and its tile.
    """
    pid = tl.program_id(0)
    row = table + tl.load(programs + 2 * pid) * 9
    tile = tl.load(programs + 2 * pid + 1)
    w = tl.load(row).to(tl.pointer_type(FROM))
    out = tl.load(row + 1).to(tl.pointer_type(TO))
    k_all, c_all = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    stride_k, stride_c, stride_r, stride_s = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    tiles_c = tl.cdiv(c_all, BLOCK_C)
    k0, c0 = tile // tiles_c * BLOCK_K, tile % tiles_c * BLOCK_C
    # One of each row in turn, columns and taps spread by steps that are coprime to them.
    q = tl.arange(0, SAMPLES)
    kq = k0 + q % tl.minimum(BLOCK_K, k_all - k0)
    cq = c0 + (q * 23 + 5) % tl.minimum(BLOCK_C, c_all - c0)
    tq = (q * 5 + 4) % (R * S)
    now = tl.load(w + kq * stride_k + cq * stride_c + tq // S * stride_r + tq % S * stride_s).to(BITS, bitcast=True)
    samples = tl.load(row + 2).to(tl.pointer_type(BITS)) + tile * SAMPLES + q
    changed = tl.sum((now != tl.load(samples)).to(tl.int32), 0)
    if changed + everything > 0:
        tl.store(samples, now)
        k = k0 + tl.arange(0, BLOCK_K)[:, None, None]
        c = c0 + tl.arange(0, BLOCK_C)[None, :, None]
        tap = tl.arange(0, TAPS)[None, None, :]
        m = (k < k_all) & (c < c_all) & (tap < R * S)
        v = tl.load(w + k * stride_k + c * stride_c + tap // S * stride_r + tap % S * stride_s, mask=m, other=0.0)
        tl.store(out + (k * (R * S) + tap) * c_all + c, round_to(v, TO), mask=m)


class _Filter(NamedTuple):
    """Filters that one launch packs."""

    R: int
    S: int
    dtype: torch.dtype
    to: torch.dtype


class Norm(NamedTuple):
    """BatchNorms that one launch folds."""

    eps: float
    gamma: bool
    beta: bool
    center: bool
    stats: torch.dtype
    affine: torch.dtype
    to: torch.dtype


class Renewer:
    """Makes everything of one graph again, on the stream of the replay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: dict[_Filter | Norm, list[tuple[int, ...]]] = {}
        self._programs: dict[_Filter, list[tuple[int, int]]] = {}
        self._launches: list[tuple[Any, ...]] | None = None
        self._samples: list[Tensor] = []

    def add_filter(self, w: Tensor, packed: Tensor) -> None:
        """`packed` is [K,R,S,C] of w."""
        K, C, R, S = w.shape
        key = _Filter(R, S, w.dtype, packed.dtype)
        tiles = -(-K // _TILE_K) * -(-C // _TILE_C)
        samples = torch.zeros(tiles * _SAMPLES, dtype=_BITS[w.element_size()], device=w.device)
        self._samples.append(samples)
        rows, programs = self._rows.setdefault(key, []), self._programs.setdefault(key, [])
        programs += [(len(rows), tile) for tile in range(tiles)]
        rows.append((w.data_ptr(), packed.data_ptr(), samples.data_ptr(), K, C, *w.stride()))
        self._launches = None

    def add_norm(self, key: Norm, *row: int) -> None:
        """One row of `_fold_kernel`'s table."""
        self._rows.setdefault(key, []).append(row)
        self._launches = None

    def renew(self, everything: bool) -> None:
        with on_device(self._device):
            if self._launches is None:
                self._launches = [self._launch(key) for key in self._rows]
            for kernel, grid, tensors, constants in self._launches:
                kernel(grid, tensors, (int(everything),) if len(tensors) > 1 else (), constants)

    def _launch(self, key: _Filter | Norm) -> tuple[Any, ...]:
        rows = self._rows[key]
        table = torch.tensor(rows, dtype=torch.int64).to(self._device)
        if isinstance(key, Norm):
            channels = max(row[0] for row in rows)
            dtypes = (_TYPES[key.stats], _TYPES[key.affine], _FOLD_C, _TYPES[key.to])
            return _fold_kernel, (len(rows), -(-channels // _FOLD_C), 1), (table,), (*key[:4], *dtypes)
        programs = torch.tensor(self._programs[key], dtype=torch.int32).to(self._device)
        bits = tl.int16 if key.dtype.itemsize == 2 else tl.int32
        constants = (
            key.R, key.S, _TYPES[key.dtype], _TYPES[key.to], bits, _TILE_K, _TILE_C,
            triton.next_power_of_2(key.R * key.S), _SAMPLES,
        )  # fmt: skip
        return _pack_kernel, (len(programs), 1, 1), (table, programs), constants


def _renewer(device: torch.device) -> Renewer | None:
    return held.renewer(("triton", device), lambda: Renewer(device))  # type: ignore[return-value]


def packed(w: Tensor, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor | None:
    """`make()`, the filter as [K,R,S,C] in `dtype`, held; None outside of a capture and where w is it already.

    Args:
        w: [K,C,R,S], of any strides.
        dtype: of the pack.
        make: packs w into a new tensor.
    """
    renewer = _renewer(w.device)
    if renewer is None or w.dtype not in _TYPES or w.element_size() not in _BITS or w.numel() >= 2**31:
        return None

    def hold() -> Tensor:
        made = make()
        renewer.add_filter(w, made)
        return made

    return held.get(("triton", dtype), [w], hold, None)


def folded(
    stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, center: bool, make: Callable[[], Tensor]
) -> Tensor | None:
    """`make()`, the fold [4, C] of a BatchNorm, held where its running statistics are at hand; else None."""
    renewer, found = _renewer(stats.device), held.norm_of(stats, gamma, beta)
    if renewer is None or found is None:
        return None
    mean, var, dtype = found

    def hold() -> Tensor:
        made = make()
        key = Norm(eps, gamma is not None, beta is not None, center, mean.dtype, dtype, made.dtype)
        pointers = [0 if v is None else v.data_ptr() for v in (mean, var, gamma, beta, made, stats)]
        renewer.add_norm(key, len(mean), *pointers)
        held.cover(stats)
        return made

    return held.get(("triton", eps, center), [stats, gamma, beta], hold, None)
