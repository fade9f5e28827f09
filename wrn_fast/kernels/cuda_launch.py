"""Launches of the extension `_cuda`, given as `e`: pointers, scratch, the stream, and what an operator is made of."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrn_fast import masks, packing
from wrn_fast.problem import ACTS, ConvProblem

# DType of csrc/problem.h
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
FLOAT32 = CODES[torch.float32]
STEP = 16  # channels of a tensor instruction


class Tile(NamedTuple):
    """How a convolution is cut."""

    kind: int = 0  # Sm90Tile of csrc/cuda/sm90.h: 0 fetches x for each tap, 1 once a filter column
    apply: bool = False  # act(bn(x)) in a pass of its own, not in the kernel's shared memory


@contextmanager
def _queue(op: str, problem: ConvProblem, x: Tensor) -> Iterator[int]:
    """The current stream of x's device as a number, on that device; an error names operator and shapes."""
    index = x.device.index if x.device.type == "cuda" else None
    other = index is not None and index != torch.cuda.current_device()
    with torch.cuda.device(index) if other else nullcontext():
        stream = 0 if index is None else torch.cuda.current_stream(index).cuda_stream
        try:
            yield stream
        except (RuntimeError, ValueError) as error:
            if type(error) not in (RuntimeError, ValueError):  # torch.OutOfMemoryError stays what it is
                raise
            p = problem
            raise RuntimeError(
                f"{op} of x [{p.N},{p.C},{p.H},{p.W}] and w [{p.K},{p.C},{p.R},{p.S}] ({p.dtype}, stride {p.stride}) "
                f"on {x.device}: {error}"
            ) from error


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _vector(t: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A per-channel array as the extension reads it: dense, in the dtype of statistics."""
    return None if t is None else t.to(dtype).contiguous()


def _new(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def _scratch(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _absent(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=x.device)


def _aligned(t: Any) -> Any:
    """`t`, or its copy where it does not begin at a multiple of 16 bytes, as a slice of a larger tensor may not."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


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


def _rows(x: Tensor) -> dict[str, int]:
    n, c, h, w = x.shape
    return {"dtype": CODES[x.dtype], "rows": n * h * w, "C": c}


def _pack(e: Any, problem: ConvProblem, w: Tensor, transpose: bool, stream: int) -> Tensor:
    """The packed image of `w` for fprop, or for dgrad: kept from an earlier call, or made by this one."""
    K, C, R, S = w.shape
    sizes = {"K": K, "C": C, "R": R, "S": S}
    packed = e.packed_bytes(**sizes, transpose=transpose)
    samples = e.samples_bytes(w_dtype=CODES[w.dtype], **sizes)
    k, c, r, s = w.stride()

    def into(buffer: Tensor, everything: bool) -> Tensor:
        e.pack(
            w=w.data_ptr(), w_dtype=CODES[w.dtype], stride_k=k, stride_c=c, stride_r=r, stride_s=s, **sizes,
            transpose=transpose, dtype=CODES[problem.dtype], packed=buffer.data_ptr(),
            samples=buffer.data_ptr() + packed, all=everything, stream=stream,
        )  # fmt: skip
        return buffer

    def make(w: Tensor) -> Tensor:
        return into(_scratch(w, packed + samples), True)

    if w.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make(w)
    key = ("cuda", "dgrad" if transpose else "fprop", problem.dtype, stream)
    kept = packing.lookup(w, key, _compared_on_the_device, make)
    return make(w) if kept is None else into(kept, False)


def _compared_on_the_device(w: Tensor) -> int:
    """The host's share of a fingerprint: nothing, it would have to wait for the device."""
    return 0


def _table(
    e: Any, x: Tensor, stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, stream: int
) -> tuple[Tensor, ...]:
    """scale, shift, mean, rstd: float32 [C] each."""
    table = torch.empty((4, x.shape[1]), device=x.device)
    stats, gamma, beta = _vector(stats), _vector(gamma), _vector(beta)  # type: ignore[assignment]
    e.affine_table(
        wide=FLOAT32, C=x.shape[1], stats=_ptr(stats), gamma=_ptr(gamma), beta=_ptr(beta), eps=eps,
        table=_ptr(table), stream=stream,
    )  # fmt: skip
    return table.unbind()


def _apply(
    e: Any, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: str,
    slope: float, rng: Tensor | None, p: float, stream: int, into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(bn(x)) * mask / (1 - p)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats, gamma, beta = (_vector(v, wide) for v in (stats, gamma, beta))
    y = torch.empty_like(x, memory_format=torch.channels_last) if into is None else into
    e.apply(
        **_rows(x), x=_ptr(x), stats=_ptr(stats), gamma=_ptr(gamma), beta=_ptr(beta), eps=eps, act=ACTS.index(act),
        slope=slope, rng=_ptr(rng) if p > 0 else 0, p=p, y=_ptr(y), stream=stream,
    )  # fmt: skip
    return y


def _stats(e: Any, x: Tensor, stream: int) -> Tensor:
    out = torch.empty((2, x.shape[1]), dtype=torch.float64 if x.dtype == torch.float64 else None, device=x.device)
    scratch = _scratch(x, e.channel_stats_workspace(**_rows(x)))
    e.channel_stats(**_rows(x), x=_ptr(x), stats=_ptr(out), workspace=_ptr(scratch), stream=stream)
    return out


class _Source(NamedTuple):
    """What a convolution reads: x itself with the vectors of its prologue, or what a pass made of it."""

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "identity"


def _source(
    e: Any, apply: bool, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
    act: str, slope: float, rng: Tensor | None, p: float, stream: int,
) -> _Source:  # fmt: skip
    if stats is None and act == "identity" and p == 0:
        return _Source(_aligned(_widened(x)))
    if apply or p > 0 or stats is None:
        return _Source(_apply(e, x, stats, gamma, beta, eps, act, slope, rng, p, stream))
    scale, shift, _, _ = _table(e, x, stats, gamma, beta, eps, stream)
    return _Source(_aligned(x), scale, shift, act)


def fprop(
    e: Any, problem: ConvProblem, tile: Tile, x: Tensor, w: Tensor, stats: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, bias: Tensor | None, residual: Tensor | None, x_short: Tensor | None, w_short: Tensor | None,
    stats_short: Tensor | None, gamma_short: Tensor | None, beta_short: Tensor | None, rng: Tensor | None,
    out_scale: Tensor | None, out_shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, stats_y, y_act); an absent output has 0 elements."""
    with _queue("fprop", problem, x) as stream:
        p, shape = problem, shape_of(e, problem)
        dropping = {where: p.p if p.drop_at == where else 0.0 for where in ("prologue", "output", "output_act")}
        source = _source(
            e, tile.apply, x, stats, gamma, beta, p.eps, p.act, p.slope, rng, dropping["prologue"], stream
        )  # fmt: skip
        short = packed_short = None
        if x_short is not None:
            assert w_short is not None
            short = _source(
                e, tile.apply, x_short, stats_short, gamma_short, beta_short, p.short_eps, p.short_act, p.slope, None,
                0.0, stream,
            )  # fmt: skip
            packed_short = _pack(e, p, w_short, False, stream)
        packed = _pack(e, p, w, False, stream)
        size = p.N, p.K, p.P, p.Q
        y = _new(x, *size) if p.want_y or p.want_stats else None
        y_act = _new(x, *size) if p.act_out != "none" else None
        counts = moments = None
        if p.want_stats and dropping["output"] == 0:
            parts = e.parts(shape, False, tile.kind)
            counts = torch.empty(parts, device=x.device)
            moments = torch.empty((parts, 2, p.K), device=x.device)
        bias, out_scale, out_shift = _vector(bias), _vector(out_scale), _vector(out_shift)
        residual = _aligned(residual)
        e.fprop(
            shape, dtype=CODES[p.dtype], tile=tile.kind, x=_ptr(source.x), scale=_ptr(source.scale),
            shift=_ptr(source.shift), act=ACTS.index(source.act), slope=p.slope, w=_ptr(packed),
            x_short=0 if short is None else _ptr(short.x), short_H=0 if short is None else short.x.shape[2],
            short_W=0 if short is None else short.x.shape[3], short_C=p.short_C, short_stride=p.short_stride,
            short_scale=0 if short is None else _ptr(short.scale),
            short_shift=0 if short is None else _ptr(short.shift),
            short_act=0 if short is None else ACTS.index(short.act), w_short=_ptr(packed_short), bias=_ptr(bias),
            residual=_ptr(residual), y=_ptr(y), y_act=_ptr(y_act),
            act_out=0 if p.act_out == "none" else ACTS.index(p.act_out), out_scale=_ptr(out_scale),
            out_shift=_ptr(out_shift), counts=_ptr(counts), moments=_ptr(moments), stream=stream,
        )  # fmt: skip
        if y is not None and dropping["output"] > 0:
            _apply(e, y, None, None, None, 0.0, "identity", 0.0, rng, p.p, stream, into=y)
        if y_act is not None and dropping["output_act"] > 0:
            _apply(e, y_act, None, None, None, 0.0, "identity", 0.0, rng, p.p, stream, into=y_act)
        stats_y = _absent(x, torch.float32)
        if counts is not None and moments is not None:
            stats_y = torch.empty((2, p.K), device=x.device)
            scratch = _scratch(x, e.merge_moments_workspace(wide=FLOAT32, parts=len(counts), C=p.K))
            e.merge_moments(
                wide=FLOAT32, C=p.K, counts=_ptr(counts), moments=_ptr(moments), parts=len(counts),
                stats=_ptr(stats_y), workspace=_ptr(scratch), stream=stream,
            )  # fmt: skip
        elif p.want_stats:
            assert y is not None
            stats_y = _stats(e, y, stream)
        return (
            y if y is not None and p.want_y else _absent(x, p.dtype),
            stats_y,
            _absent(x, p.dtype) if y_act is None else y_act,
        )


def dgrad(
    e: Any, problem: ConvProblem, tile: Tile, dy: Tensor, x: Tensor, w: Tensor, stats: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, rng: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(g [N,C,H,W], sums_g [2,C])."""
    with _queue("dgrad", problem, dy) as stream:
        p, shape = problem, shape_of(e, problem)
        dy, x = _aligned(dy), _aligned(x)
        dropping = p.drop_at == "prologue" and p.p > 0
        bare = dropping or (stats is None and p.act == "identity")
        table: tuple[Tensor | None, ...] = (None,) * 4
        if stats is not None and not bare:
            table = _table(e, x, stats, gamma, beta, p.eps, stream)
        sums = torch.empty((2, p.C), device=x.device) if p.want_stats else None
        partial = None
        if sums is not None and not bare:
            partial = torch.empty((e.parts(shape, True, tile.kind), 2, p.C), device=x.device)
        g = _new(x, p.N, _padded(p.C), p.H, p.W)
        packed = _pack(e, p, w, True, stream)
        scale, shift, mean, rstd = table
        e.dgrad(
            shape, dtype=CODES[p.dtype], tile=tile.kind, dy=_ptr(dy), w=_ptr(packed), x=0 if bare else _ptr(x),
            scale=_ptr(scale), shift=_ptr(shift), act=0 if bare else ACTS.index(p.act), slope=p.slope, mean=_ptr(mean),
            rstd=_ptr(rstd), g=_ptr(g), sums=_ptr(partial), stream=stream,
        )  # fmt: skip
        if dropping:
            scratch = _scratch(x, e.act_backward_workspace(**_rows(x)))
            stats, gamma, beta = _vector(stats), _vector(gamma), _vector(beta)
            e.act_backward(
                **_rows(x), da=_ptr(g), x=_ptr(x), stats=_ptr(stats), gamma=_ptr(gamma), beta=_ptr(beta), eps=p.eps,
                act=ACTS.index(p.act), slope=p.slope, rng=_ptr(rng), p=p.p, g=_ptr(g), sums=_ptr(sums),
                workspace=_ptr(scratch), stream=stream,
            )  # fmt: skip
        elif partial is not None:
            count = {"wide": FLOAT32, "slabs": len(partial), "count": 2 * p.C}
            scratch = _scratch(x, e.add_slabs_workspace(**count))
            e.add_slabs(
                **count, from_=_ptr(partial), dtype=FLOAT32, out=_ptr(sums), workspace=_ptr(scratch),
                stream=stream,
            )  # fmt: skip
        return _narrowed(g, p.C), _absent(x, torch.float32) if sums is None else sums


def wgrad(
    e: Any, problem: ConvProblem, dy: Tensor, x: Tensor, stats: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, rng: Tensor | None,
) -> Tensor:  # fmt: skip
    """dw [K,C,R,S]."""
    with _queue("wgrad", problem, dy) as stream:
        p, shape = problem, shape_of(e, problem)
        dropping = p.p if p.drop_at == "prologue" else 0.0
        source = _source(e, True, x, stats, gamma, beta, p.eps, p.act, p.slope, rng, dropping, stream)
        dy = _aligned(dy)
        units = _multiprocessors(x.device.index) if x.device.type == "cuda" else 1
        scratch = _scratch(x, e.wgrad_workspace(shape, units))
        dw = _new(x, p.K, _padded(p.C), p.R, p.S, dtype=torch.float32)
        e.wgrad(
            shape, dtype=CODES[p.dtype], dy=_ptr(dy), x=_ptr(source.x), workspace=_ptr(scratch), dw=_ptr(dw),
            stream=stream,
        )  # fmt: skip
        dw = _narrowed(dw, p.C)
        return dw if p.w_dtype == dw.dtype else dw.to(p.w_dtype)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def act_mask(
    e: Any, problem: ConvProblem, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """uint8 [N,H,W,ceil(C/8)]."""
    with _queue("act_mask", problem, x) as stream:
        vectors = [_vector(v, problem.stats_dtype) for v in (stats, gamma, beta)]
        bits = torch.empty(masks.shape(x.shape), dtype=torch.uint8, device=x.device)
        e.act_mask(
            **_rows(x), x=_ptr(x), stats=_ptr(vectors[0]), gamma=_ptr(vectors[1]), beta=_ptr(vectors[2]),
            eps=problem.eps, act=ACTS.index(problem.act), bits=_ptr(bits), stream=stream,
        )  # fmt: skip
        return bits


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
    with _queue("input_grad", problem, dy) as stream:
        scale, mask = _vector(scale, problem.stats_dtype), None if mask is None else mask.contiguous()
        e.mask_backward(
            **_rows(g), da=_ptr(g), bits=_ptr(mask), scale=_ptr(scale),
            slope=problem.slope if problem.act == "leaky_relu" else 0.0, rng=_ptr(rng) if p > 0 else 0, p=p, g=_ptr(g),
            stream=stream,
        )  # fmt: skip
    return g


def bn_bwd_apply(
    e: Any, problem: ConvProblem, g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor | None, sums_g: Tensor | None
) -> Tensor:
    """dx [N,C,H,W]."""
    with _queue("bn_bwd_apply", problem, g) as stream:
        wide = problem.stats_dtype
        dx = torch.empty_like(g, memory_format=torch.channels_last)
        vectors = [_vector(v, wide) for v in (stats, gamma, sums_g if problem.batch_stats else None)]
        e.bn_bwd_apply(
            **_rows(g), g=_ptr(g), x=_ptr(x), stats=_ptr(vectors[0]), gamma=_ptr(vectors[1]), eps=problem.eps,
            sums=_ptr(vectors[2]), dx=_ptr(dx), stream=stream,
        )  # fmt: skip
        return dx


def channel_stats(e: Any, problem: ConvProblem, x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance of x."""
    with _queue("channel_stats", problem, x) as stream:
        return _stats(e, x, stream)


def dropout(e: Any, problem: ConvProblem, x: Tensor, rng: Tensor) -> Tensor:
    """x * mask / (1 - p)."""
    with _queue("dropout", problem, x) as stream:
        return _apply(e, x, None, None, None, 0.0, "identity", 0.0, rng, problem.p, stream)
