"""Launches of `_cuda`'s passes, given as `e`: pointers, scratch, the stream, an error that names the operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wrn_fast import masks
from wrn_fast.kernels.device import on_device
from wrn_fast.problem import ACTS, ConvProblem

# DType of csrc/problem.h
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
FLOAT32 = CODES[torch.float32]


def current_stream(device: torch.device) -> int:
    """The current stream of a device as a number."""
    return torch.cuda.current_stream(device.index).cuda_stream if device.type == "cuda" else 0


@contextmanager
def queue(op: str, problem: ConvProblem, x: Tensor) -> Iterator[int]:
    """The current stream of x's device as a number, on that device; an error names operator and shapes."""
    with on_device(x.device):
        try:
            yield current_stream(x.device)
        except (RuntimeError, ValueError) as error:
            if type(error) not in (RuntimeError, ValueError):  # torch.OutOfMemoryError stays what it is
                raise
            p = problem
            raise RuntimeError(
                f"{op} of x [{p.N},{p.C},{p.H},{p.W}] and w [{p.K},{p.C},{p.R},{p.S}] ({p.dtype}, stride {p.stride}) "
                f"on {x.device}: {error}"
            ) from error


def ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def vector(t: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A per-channel array as the extension reads it: dense, in the dtype of statistics."""
    return None if t is None else t.to(dtype).contiguous()


def new(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def scratch(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def absent(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=x.device)


def aligned(t: Any) -> Any:
    """`t`, or its copy where it does not begin at a multiple of 16 bytes, as a slice of a larger tensor may not."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


def rows_of(x: Tensor) -> dict[str, int]:
    n, c, h, w = x.shape
    return {"dtype": CODES[x.dtype], "rows": n * h * w, "C": c}


def bn_act(
    e: Any, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: str,
    slope: float, rng: Tensor | None, p: float, stream: int,
) -> Tensor:  # fmt: skip
    """act(bn(x)) * mask / (1 - p)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats, gamma, beta = (vector(v, wide) for v in (stats, gamma, beta))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    e.apply(
        **rows_of(x), x=ptr(x), stats=ptr(stats), gamma=ptr(gamma), beta=ptr(beta), eps=eps, act=ACTS.index(act),
        slope=slope, rng=ptr(rng) if p > 0 else 0, p=p, y=ptr(y), stream=stream,
    )  # fmt: skip
    return y


def quantize(
    e: Any, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: str,
    slope: float, rng: Tensor | None, p: float, amax: Tensor, stream: int,
) -> Tensor:  # fmt: skip
    """act(bn(x)) * mask / (1 - p) * 448 / amax in e4m3, x of 16 bits with a multiple of 16 channels."""
    x = aligned(x)
    stats, gamma, beta = (vector(v) for v in (stats, gamma, beta))
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.channels_last)
    e.quantize(
        **rows_of(x), x=ptr(x), stats=ptr(stats), gamma=ptr(gamma), beta=ptr(beta), eps=eps, act=ACTS.index(act),
        slope=slope, rng=ptr(rng) if p > 0 else 0, p=p, amax=ptr(amax), y=ptr(y), stream=stream,
    )  # fmt: skip
    return y


def stats_of(e: Any, x: Tensor, stream: int) -> Tensor:
    out = torch.empty(
        (2, x.shape[1]), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
    )
    workspace = scratch(x, e.channel_stats_workspace(**rows_of(x)))
    e.channel_stats(**rows_of(x), x=ptr(x), stats=ptr(out), workspace=ptr(workspace), stream=stream)
    return out


def act_mask(
    e: Any, problem: ConvProblem, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """uint8 [N,H,W,ceil(C/8)]."""
    with queue("act_mask", problem, x) as stream:
        vectors = [vector(v, problem.stats_dtype) for v in (stats, gamma, beta)]
        bits = torch.empty(masks.shape(x.shape), dtype=torch.uint8, device=x.device)
        e.act_mask(
            **rows_of(x), x=ptr(x), stats=ptr(vectors[0]), gamma=ptr(vectors[1]), beta=ptr(vectors[2]),
            eps=problem.eps, act=ACTS.index(problem.act), bits=ptr(bits), stream=stream,
        )  # fmt: skip
        return bits


def bn_bwd_apply(
    e: Any, problem: ConvProblem, g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor | None, sums_g: Tensor | None
) -> Tensor:
    """dx [N,C,H,W]."""
    with queue("bn_bwd_apply", problem, g) as stream:
        wide = problem.stats_dtype
        dx = torch.empty_like(g, memory_format=torch.channels_last)
        vectors = [vector(v, wide) for v in (stats, gamma, sums_g if problem.batch_stats else None)]
        e.bn_bwd_apply(
            **rows_of(g), g=ptr(g), x=ptr(x), stats=ptr(vectors[0]), gamma=ptr(vectors[1]), eps=problem.eps,
            sums=ptr(vectors[2]), dx=ptr(dx), stream=stream,
        )  # fmt: skip
        return dx


def channel_stats(e: Any, problem: ConvProblem, x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance of x."""
    with queue("channel_stats", problem, x) as stream:
        return stats_of(e, x, stream)


def dropout(e: Any, problem: ConvProblem, x: Tensor, rng: Tensor) -> Tensor:
    """x * mask / (1 - p)."""
    with queue("dropout", problem, x) as stream:
        return bn_act(e, x, None, None, None, 0.0, "identity", 0.0, rng, problem.p, stream)


def head(
    e: Any, problem: ConvProblem, y: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    w: Tensor, bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [N,K], feat [N,C])."""
    with queue("head", problem, y) as stream:
        p = problem
        vectors = [vector(v, p.stats_dtype) for v in (stats, gamma, beta, bias)]
        out, feat = (torch.empty(p.N, size, dtype=p.dtype, device=y.device) for size in (p.K, p.C))
        e.head(
            dtype=CODES[p.dtype], N=p.N, pixels=p.H * p.W, C=p.C, K=p.K, y=ptr(y), stats=ptr(vectors[0]),
            gamma=ptr(vectors[1]), beta=ptr(vectors[2]), eps=p.eps, act=ACTS.index(p.act), slope=p.slope, w=ptr(w),
            w_dtype=CODES[w.dtype], bias=ptr(vectors[3]), cosine=p.cosine, out=ptr(out), feat=ptr(feat), stream=stream,
        )  # fmt: skip
        return out, feat


def head_bwd(
    e: Any, problem: ConvProblem, dfeat: Tensor, y: Tensor, stats: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dy [N,C,H,W], sums_g [2,C])."""
    with queue("head_bwd", problem, y) as stream:
        p = problem
        sizes = {"dtype": CODES[p.dtype], "N": p.N, "pixels": p.H * p.W, "C": p.C}
        vectors = [vector(v, p.stats_dtype) for v in (stats, gamma, beta)]
        sums = workspace = None
        if stats is not None and (p.batch_stats or p.want_stats):
            sums = torch.empty((2, p.C), dtype=p.stats_dtype, device=y.device)
            workspace = scratch(y, e.head_bwd_workspace(**sizes))
        dy = torch.empty_like(y, memory_format=torch.channels_last)
        e.head_bwd(
            **sizes, dfeat=ptr(dfeat), y=ptr(y), stats=ptr(vectors[0]), gamma=ptr(vectors[1]), beta=ptr(vectors[2]),
            eps=p.eps, act=ACTS.index(p.act), slope=p.slope, batch=p.batch_stats, dy=ptr(dy), sums=ptr(sums),
            workspace=ptr(workspace), stream=stream,
        )  # fmt: skip
        return dy, sums if sums is not None and p.want_stats else absent(y, p.stats_dtype)
