"""The checks of every operator: one place, before any kernel runs and before any fake shape is given.

Each raises WrnFastError naming the argument, what was expected and what came; what passes becomes a ConvProblem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from wrn_fast import masks
from wrn_fast.errors import WrnFastError
from wrn_fast.problem import DROP_AT, ConvProblem, FpropArgs

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REQUIRED = ("x", "y", "w")
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("stride", "short_stride"), (Integral, "an integer")),
    **dict.fromkeys(("slope", "eps", "p", "short_eps"), (Real, "a number")),
    **dict.fromkeys(("act", "drop_at", "short_act", "act_out"), (str, "a string")),
    **dict.fromkeys(("batch_stats", "short_batch_stats", "want_y", "want_stats", "cosine"), (bool, "a bool")),
}


def check_model(model: object, name: str = "model") -> None:
    """A module: what every function that takes a network begins with."""
    if not isinstance(model, nn.Module):
        raise WrnFastError(f"`{name}`: expected a torch.nn.Module, got {type(model).__name__}")


def check_types(named: Mapping[str, Any]) -> None:
    """Python types of arguments, by name: asked only after something went wrong, to say what it was."""
    for name, v in named.items():
        if name == "pad":
            if not isinstance(v, Integral) and not (
                isinstance(v, (list, tuple)) and len(v) == 4 and all(isinstance(side, Integral) for side in v)
            ):
                raise WrnFastError(f"`pad`: expected an integer or four (left, right, top, bottom), got {v!r}")
        elif name in _KINDS:
            kind, said = _KINDS[name]
            if not isinstance(v, kind):
                raise WrnFastError(f"`{name}`: expected {said}, got {type(v).__name__}")
        elif not isinstance(v, Tensor) and (v is not None or name in _REQUIRED):
            raise WrnFastError(f"`{name}`: expected a tensor, got {type(v).__name__}")


def check_place(name: str, v: Tensor, x: Tensor) -> None:
    """Dense memory on the device of x."""
    if v.device != x.device:
        raise WrnFastError(f"`{name}`: expected device {x.device} as x has, got {v.device}")
    if v.layout != torch.strided:
        raise WrnFastError(f"`{name}`: expected a dense tensor, got layout {v.layout}")


def check_activation(name: str, v: Tensor, x: Tensor, shape: tuple | None = None) -> None:
    """A [N, C, H, W] beside x: dtype and device are x's."""
    if v.dim() != 4:
        raise WrnFastError(f"`{name}`: expected 4 dimensions [N, C, H, W], got shape {list(v.shape)}")
    if shape is not None and tuple(v.shape) != shape:
        raise WrnFastError(f"`{name}`: expected shape {list(shape)}, got {list(v.shape)}")
    if v.dtype != x.dtype:
        raise WrnFastError(f"`{name}`: expected {x.dtype} as x has, got {v.dtype}")
    check_place(name, v, x)


def check_vector(name: str, v: Tensor | None, x: Tensor, shape: tuple, dtype: torch.dtype | None = None) -> None:
    """A tensor with an entry a channel; any of the four dtypes unless one is asked for."""
    if v is None:
        return
    if tuple(v.shape) != shape:
        raise WrnFastError(f"`{name}`: expected shape {list(shape)}, got {list(v.shape)}")
    if v.dtype != dtype if dtype is not None else v.dtype not in DTYPES:
        raise WrnFastError(f"`{name}`: expected {dtype or 'a floating dtype'}, got {v.dtype}")
    check_place(name, v, x)


def check_x(x: Tensor, name: str = "x") -> None:
    """The tensor that everything else is measured against; an empty batch is fine, an empty image is not."""
    if x.dtype not in DTYPES:
        raise WrnFastError(f"`{name}`: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 4:
        raise WrnFastError(f"`{name}`: expected 4 dimensions [N, C, H, W], got shape {list(x.shape)}")
    if 0 in x.shape[1:]:
        raise WrnFastError(f"`{name}`: expected at least one channel and one pixel, got shape {list(x.shape)}")
    if x.layout != torch.strided:
        raise WrnFastError(f"`{name}`: expected a dense tensor, got layout {x.layout}")


def check_filter(name: str, w: Tensor, x: Tensor, c: int, taps: tuple[int, int] | None = None) -> None:
    """[K, C, R, S] for a source of C channels."""
    check_filter_shape(name, w.shape, c, taps)
    check_filter_dtype(name, w.dtype, x)
    check_place(name, w, x)


def check_filter_shape(name: str, shape: Sequence[int], c: int, taps: tuple[int, int] | None = None) -> None:
    if len(shape) != 4 or shape[1] != c or 0 in shape or (taps is not None and tuple(shape[2:]) != taps):
        r, s = taps or ("R", "S")
        raise WrnFastError(f"`{name}`: expected shape [K, {c}, {r}, {s}] to match its input's C={c}, got {list(shape)}")


def check_filter_dtype(name: str, dtype: torch.dtype, x: Tensor) -> None:
    if dtype != x.dtype and not (dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
        raise WrnFastError(f"`{name}`: expected {x.dtype} as x has (or float32 beside a 16-bit x), got {dtype}")


def check_prologue(suffix: str, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> None:
    """stats, gamma and beta of the source x."""
    c = x.shape[1]
    if stats is None and (gamma is not None or beta is not None):
        raise WrnFastError(f"`stats{suffix}`: expected [2, {c}] beside gamma{suffix} and beta{suffix}, got None")
    check_vector(f"stats{suffix}", stats, x, (2, c), torch.float64 if x.dtype == torch.float64 else torch.float32)
    check_vector(f"gamma{suffix}", gamma, x, (c,))
    check_vector(f"beta{suffix}", beta, x, (c,))


def check_rng(rng: Tensor | None, x: Tensor, p: float, drop_at: str) -> None:
    if p == 0.0 or drop_at == "none":
        return
    wanted = (torch.int64, (2,), (1,), x.device)
    if rng is None or (rng.dtype, tuple(rng.shape), rng.stride(), rng.device) != wanted:
        got = "None" if rng is None else f"{rng.dtype} {list(rng.shape)} of stride {list(rng.stride())} on {rng.device}"
        raise WrnFastError(f"`rng`: expected dense int64 [2] (seed, offset) on {x.device} for dropout p={p}, got {got}")


def _pad(pad: Sequence[int]) -> tuple[int, int, int, int]:
    if len(pad) != 4:
        raise WrnFastError(f"`pad`: expected four numbers (left, right, top, bottom), got {list(pad)}")
    return tuple(pad)  # type: ignore[return-value]


def fprop_problem(a: FpropArgs) -> ConvProblem:
    """The problem of fprop, checked."""
    x, w = a.x, a.w
    check_x(x)
    n, c, h, wd = x.shape
    check_filter("w", w, x, c)
    k, _, r, s = w.shape
    check_prologue("", x, a.stats, a.gamma, a.beta)
    # No dropout has one spelling from here on.
    p, drop_at = a.p, a.drop_at
    if p == 0.0 and drop_at in DROP_AT:
        drop_at = "none"
    elif drop_at == "none" and 0.0 <= p <= 1.0:
        p = 0.0
    short_c = 0 if a.x_short is None else a.x_short.shape[1] if a.x_short.dim() == 4 else -1
    problem = ConvProblem(
        x.device.type, x.dtype, w.dtype, n, h, wd, c, k, r, s, a.stride, _pad(a.pad), a.act, a.slope, a.eps,
        a.stats is not None, a.gamma is not None or a.beta is not None, a.batch_stats, p, drop_at,
        a.bias is not None, a.residual is not None, short_c, a.short_stride, a.stats_short is not None,
        a.gamma_short is not None or a.beta_short is not None, a.short_act, a.short_eps, a.short_batch_stats,
        a.act_out, a.want_y, a.want_stats,
    )  # fmt: skip
    problem.check()
    check_rng(a.rng, x, p, drop_at)
    check_vector("bias", a.bias, x, (k,))
    if a.residual is not None:
        check_activation("residual", a.residual, x, (n, k, problem.P, problem.Q))
    if a.x_short is not None:
        _check_short(problem, x, a.x_short, a.w_short)
        check_prologue("_short", a.x_short, a.stats_short, a.gamma_short, a.beta_short)
    else:
        for name in ("w_short", "stats_short", "gamma_short", "beta_short"):
            if getattr(a, name) is not None:
                raise WrnFastError(f"`{name}`: expected None without `x_short`, got a tensor")
    check_vector("out_scale", a.out_scale, x, (k,))
    check_vector("out_shift", a.out_shift, x, (k,))
    if not a.want_y and (a.act_out == "none" or a.want_stats):
        raise WrnFastError(
            "`want_y`: expected True without a second output (`act_out`) or with statistics of y, got False"
        )
    return problem


def _check_short(problem: ConvProblem, x: Tensor, x_short: Tensor, w_short: Tensor | None) -> None:
    check_x(x_short, "x_short")
    check_activation("x_short", x_short, x)
    if w_short is None:
        raise WrnFastError(f"`w_short`: expected [{problem.K}, {x_short.shape[1]}, 1, 1] beside `x_short`, got None")
    check_filter("w_short", w_short, x, x_short.shape[1], (1, 1))
    if w_short.shape[0] != problem.K:
        raise WrnFastError(f"`w_short`: expected K={problem.K} as w has, got {list(w_short.shape)}")
    if w_short.dtype != problem.w_dtype:
        raise WrnFastError(f"`w_short`: expected {problem.w_dtype} as w has, got {w_short.dtype}")
    n, _, h, wd = x_short.shape
    st = problem.short_stride
    got = (n, (h - 1) // st + 1, (wd - 1) // st + 1)
    want = (problem.N, problem.P, problem.Q)
    if got != want:
        raise WrnFastError(f"`x_short`: expected N, P, Q of its 1x1 convolution to be {list(want)}, got {list(got)}")


def wgrad_problem(
    dy: Tensor,
    x: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
    w_shape: Sequence[int],
    w_dtype: torch.dtype,
    stride: int,
    pad: Sequence[int],
    act: str,
    slope: float,
    eps: float,
    p: float,
    want_sums: bool = False,
) -> ConvProblem:
    """The problem of wgrad, checked; with `want_sums` that of dgrad."""
    check_x(x)
    n, c, h, wd = x.shape
    check_filter_shape("w_shape", w_shape, c)
    check_filter_dtype("w_dtype", w_dtype, x)
    check_prologue("", x, stats, gamma, beta)
    k, _, r, s = w_shape
    problem = ConvProblem(
        x.device.type, x.dtype, w_dtype, n, h, wd, c, k, r, s, stride, _pad(pad), act, slope, eps, stats is not None,
        gamma is not None or beta is not None, False, p, "prologue" if p > 0 else "none", want_stats=want_sums,
    )  # fmt: skip
    problem.check()
    check_rng(rng, x, p, "prologue")
    check_activation("dy", dy, x, (n, k, problem.P, problem.Q))
    return problem


def dgrad_problem(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
    stride: int,
    pad: Sequence[int],
    act: str,
    slope: float,
    eps: float,
    p: float,
    want_sums: bool,
) -> ConvProblem:
    """The problem of dgrad, checked."""
    check_x(x)
    check_filter("w", w, x, x.shape[1])
    if want_sums and stats is None:
        raise WrnFastError("`want_sums`: expected False without `stats`, got True")
    return wgrad_problem(
        dy, x, stats, gamma, beta, rng, w.shape, w.dtype, stride, pad, act, slope, eps, p, want_sums
    )  # fmt: skip


def act_mask_problem(
    x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, act: str, slope: float, eps: float
) -> ConvProblem:
    """The problem of act_mask, checked."""
    problem = _plain_problem(
        x, act=act, slope=slope, eps=eps, prologue=stats is not None, affine=gamma is not None or beta is not None
    )
    if act not in masks.ACTS:
        raise WrnFastError(f"`act`: expected {' or '.join(masks.ACTS)}, whose derivative is one bit, got {act!r}")
    check_prologue("", x, stats, gamma, beta)
    return problem


def input_grad_problem(
    dy: Tensor,
    w: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    rng: Tensor | None,
    x_shape: Sequence[int],
    stride: int,
    pad: Sequence[int],
    act: str,
    slope: float,
    p: float,
) -> ConvProblem:
    """The problem of input_grad, checked."""
    check_x(dy, "dy")
    if len(x_shape) != 4 or x_shape[0] != dy.shape[0] or min(x_shape[1:]) < 1:
        raise WrnFastError(f"`x_shape`: expected [{dy.shape[0]}, C, H, W] for dy's batch, got {list(x_shape)}")
    n, c, h, wd = x_shape
    check_filter("w", w, dy, c)
    k, _, r, s = w.shape
    problem = ConvProblem(
        dy.device.type, dy.dtype, w.dtype, n, h, wd, c, k, r, s, stride, _pad(pad), act, slope,
        prologue=scale is not None, p=p, drop_at="prologue" if p > 0 else "none",
    )  # fmt: skip
    problem.check()
    check_rng(rng, dy, p, "prologue")
    check_activation("dy", dy, dy, (n, k, problem.P, problem.Q))
    check_vector("scale", scale, dy, (c,), problem.stats_dtype)
    if act not in (*masks.ACTS, "identity"):
        raise WrnFastError(f"`act`: expected identity, {' or '.join(masks.ACTS)}, got {act!r}")
    if (mask is None) != (act == "identity"):
        want, got = ("None", "a mask") if act == "identity" else ("a mask", "None")
        raise WrnFastError(f"`mask`: expected {want} for {act!r}, got {got}")
    if mask is not None:
        shape = masks.shape(x_shape)
        if mask.dtype != torch.uint8 or tuple(mask.shape) != shape or not mask.is_contiguous():
            raise WrnFastError(
                f"`mask`: expected contiguous uint8 {list(shape)}, got {mask.dtype} {list(mask.shape)} "
                f"with strides {mask.stride()}"
            )
        check_place("mask", mask, dy)
    return problem


def bn_bwd_apply_problem(
    g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor | None, sums_g: Tensor | None, eps: float, batch_stats: bool
) -> ConvProblem:
    """The problem of bn_bwd_apply, checked."""
    problem = _plain_problem(
        x, eps=eps, prologue=True, affine=gamma is not None, batch_stats=batch_stats, want_stats=sums_g is not None
    )
    check_activation("g", g, x, tuple(x.shape))
    check_prologue("", x, stats, gamma, None)
    check_vector("sums_g", sums_g, x, (2, problem.C), problem.stats_dtype)
    if batch_stats and sums_g is None:
        raise WrnFastError(f"`sums_g`: expected [2, {problem.C}] for batch statistics, got None")
    return problem


def channel_stats_problem(x: Tensor) -> ConvProblem:
    """The problem of channel_stats, checked."""
    return _plain_problem(x, want_stats=True)


def head_problem(
    y: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
    act: str,
    slope: float,
    eps: float,
    batch_stats: bool,
    cosine: bool,
) -> ConvProblem:
    """The problem of head, checked."""
    check_x(y, "y")
    n, c, h, wd = y.shape
    if w.dim() != 2 or w.shape[1] != c or w.shape[0] == 0:
        raise WrnFastError(f"`w`: expected shape [K, {c}] to match y's C={c}, got {list(w.shape)}")
    if w.dtype != y.dtype and not (w.dtype == torch.float32 and y.dtype in (torch.float16, torch.bfloat16)):
        raise WrnFastError(f"`w`: expected {y.dtype} as y has (or float32 beside a 16-bit y), got {w.dtype}")
    check_place("w", w, y)
    problem = ConvProblem(
        y.device.type, y.dtype, w.dtype, n, h, wd, c, w.shape[0], 1, 1, act=act, slope=slope, eps=eps,
        prologue=stats is not None, affine=gamma is not None or beta is not None, batch_stats=batch_stats,
        bias=bias is not None, cosine=cosine,
    )  # fmt: skip
    problem.check()
    check_prologue("", y, stats, gamma, beta)
    check_vector("bias", bias, y, (problem.K,))
    return problem


def head_bwd_problem(
    dfeat: Tensor, y: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, act: str, slope: float,
    eps: float, batch_stats: bool, want_sums: bool,
) -> ConvProblem:  # fmt: skip
    """The problem of head_bwd, checked."""
    problem = _plain_problem(
        y, act=act, slope=slope, eps=eps, prologue=stats is not None, affine=gamma is not None or beta is not None,
        batch_stats=stats is not None and batch_stats, want_stats=want_sums,
    )  # fmt: skip
    check_prologue("", y, stats, gamma, beta)
    check_vector("dfeat", dfeat, y, (problem.N, problem.C), problem.stats_dtype)
    if want_sums and stats is None:
        raise WrnFastError("`want_sums`: expected False without `stats`, got True")
    return problem


def dropout_problem(x: Tensor, rng: Tensor, p: float) -> ConvProblem:
    """The problem of dropout, checked."""
    problem = _plain_problem(x, p=p, drop_at="output")
    check_rng(rng, x, p, "output")
    return problem


def _plain_problem(x: Tensor, **scalars: Any) -> ConvProblem:
    """A problem without a convolution."""
    check_x(x)
    n, c, h, wd = x.shape
    problem = ConvProblem(x.device.type, x.dtype, x.dtype, n, h, wd, c, c, 1, 1, **scalars)
    problem.check()
    return problem
