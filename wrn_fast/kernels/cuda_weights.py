"""What `_cuda` makes of weights, given as `e`: packed filters and folded BatchNorms, and when they are made again.

A filter's pack is kept per stream while the filter's object, pointer and version stay what they were; then its kernel
compares samples of each tile on the device, because fused optimizers change a filter without its version. For a graph
that is being captured everything is held (`wrn_fast.held`): the graph packs and folds nothing, and one launch before a
replay compares the samples of all filters.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrn_fast import held, packing
from wrn_fast.kernels.cuda_passes import CODES, FLOAT32, current_stream, ptr, scratch, vector
from wrn_fast.kernels.device import on_device
from wrn_fast.problem import ConvProblem


class Made(NamedTuple):
    """A tensor made of weights. `before`: not by a kernel of this call, so this call's kernels may read it early."""

    tensor: Tensor
    before: bool


class _Renewer:
    """Makes everything of one graph again, on the stream of the replay."""

    def __init__(self, e: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.weights, self._device = e.Weights(dtype=CODES[dtype]), device

    def renew(self, everything: bool) -> None:
        with on_device(self._device):
            self.weights.renew(all=everything, stream=current_stream(self._device))


def _renewer(e: Any, dtype: torch.dtype, device: torch.device) -> _Renewer | None:
    return held.renewer(("cuda", dtype, device), functools.partial(_Renewer, e, dtype, device))  # type: ignore[return-value]


def packed(e: Any, problem: ConvProblem, w: Tensor, transpose: bool, stream: int) -> Made:
    """The packed image of `w` for fprop, or for dgrad: kept from an earlier call, or made by this one."""
    K, C, R, S = w.shape
    k, c, r, s = w.stride()
    sizes = {"K": K, "C": C, "R": R, "S": S}
    of_w = {"w_dtype": CODES[w.dtype], **sizes}
    size, samples = e.packed_bytes(**sizes, transpose=transpose), e.samples_bytes(**of_w)

    def arguments(buffer: Tensor) -> dict[str, Any]:
        return {
            "w": w.data_ptr(), **of_w, "stride_k": k, "stride_c": c, "stride_r": r, "stride_s": s,
            "transpose": transpose, "packed": buffer.data_ptr(), "samples": buffer.data_ptr() + size,
        }  # fmt: skip

    def into(buffer: Tensor, everything: bool) -> Tensor:
        e.pack(**arguments(buffer), dtype=CODES[problem.dtype], all=everything, stream=stream)
        return buffer

    def make(w: Tensor) -> Tensor:
        return into(scratch(w, size + samples), True)

    renewer = _renewer(e, problem.dtype, w.device)
    if renewer is not None:

        def hold() -> Tensor:
            buffer = make(w)
            renewer.weights.add_filter(**arguments(buffer))
            return buffer

        ready = held.get(("cuda", transpose, problem.dtype), [w], hold, None)
        if ready is not None:
            return Made(ready, True)
    if w.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Made(make(w), False)
    key = ("cuda", "dgrad" if transpose else "fprop", problem.dtype, stream)
    kept = packing.lookup(w, key, _compared_on_the_device, make)
    return Made(make(w) if kept is None else into(kept, False), False)


def _compared_on_the_device(w: Tensor) -> int:
    """The host's share of a fingerprint: nothing, it would have to wait for the device."""
    return 0


def packed_e4m3(e: Any, w: Tensor, amax: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """(packed image of w[k] / scale[k] in e4m3, factor [K] = scale * amax / 448), made by this call."""
    K, C, R, S = w.shape
    k, c, r, s = w.stride()
    sizes = {"K": K, "C": C, "R": R, "S": S}
    image = scratch(w, e.packed_bytes(**sizes, transpose=False, e4m3=True))
    scale, factor = torch.empty((2, K), dtype=torch.float32, device=w.device)
    e.pack_e4m3(
        w=ptr(w), w_dtype=CODES[w.dtype], stride_k=k, stride_c=c, stride_r=r, stride_s=s, **sizes, amax=ptr(amax),
        packed=ptr(image), scale=ptr(scale), factor=ptr(factor), stream=stream,
    )  # fmt: skip
    return image, factor


def affine(
    e: Any, x: Tensor, stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, stream: int
) -> Made:
    """[4, C] float32: scale, shift, mean, rstd of bn(x) = x * scale + shift."""

    def make() -> Tensor:
        table = torch.empty((4, stats.shape[1]), dtype=torch.float32, device=x.device)
        vectors = [vector(v) for v in (stats, gamma, beta)]
        e.affine_table(
            wide=FLOAT32, C=stats.shape[1], stats=ptr(vectors[0]), gamma=ptr(vectors[1]), beta=ptr(vectors[2]), eps=eps,
            table=ptr(table), stream=stream,
        )  # fmt: skip
        return table

    renewer, row = _renewer(e, x.dtype, x.device), _row(stats, gamma, beta, eps)
    if renewer is None or row is None:
        return Made(make(), False)

    def hold() -> Tensor:
        table = make()
        renewer.weights.add_norm(**row, table=ptr(table))
        held.cover(stats)
        return table

    ready = held.get(("cuda", "affine", eps), [stats, gamma, beta], hold, None)
    return Made(make(), False) if ready is None else Made(ready, True)


def _row(stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> dict[str, Any] | None:
    """A fold straight from the running statistics, which writes `stats` too; None where they are not at hand."""
    found = held.norm_of(stats, gamma, beta)
    if found is None or stats.dtype != torch.float32:
        return None
    mean, var, dtype = found
    return {
        "C": len(mean), "mean": ptr(mean), "var": ptr(var), "stats_dtype": CODES[mean.dtype], "gamma": ptr(gamma),
        "beta": ptr(beta), "affine_dtype": CODES[dtype], "eps": eps, "stats": ptr(stats),
    }  # fmt: skip


_counters: dict[tuple[int | None, int], Tensor] = {}
_ROOM = 4096  # counters, many times what a call has that is small enough to be split


def zeros(x: Tensor, count: int, stream: int) -> Tensor:
    """Counters that are 0 and that a call leaves at 0: one array a stream, or a graph's own."""

    def make() -> Tensor:
        return torch.zeros(max(count, _ROOM), dtype=torch.int32, device=x.device)

    ready = held.get(("cuda", "counters", count > _ROOM and count, x.device), [], make, Tensor.zero_)
    if ready is not None:
        return ready
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    found = _counters.get((x.device.index, stream))
    if found is None or found.numel() < count:
        found = _counters[x.device.index, stream] = make()
    return found
