"""The checks of every operator: one place, before any kernel runs and before any fake shape is given.

Each raises WrnFastError naming the argument, what was expected and what came; what passes becomes a ConvProblem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrn_fast.errors import WrnFastError
from wrn_fast.problem import ConvProblem


def check_activation(name: str, v: Tensor, x: Tensor, shape: tuple | None = None) -> None:
    if v.dim() != 4:
        raise WrnFastError(f"`{name}`: expected 4 dimensions [N, C, H, W], got shape {list(v.shape)}")
    if shape is not None and tuple(v.shape) != shape:
        raise WrnFastError(f"`{name}`: expected shape {list(shape)}, got {list(v.shape)}")
    if v.dtype != x.dtype:
        raise WrnFastError(f"`{name}`: expected {x.dtype} as x has, got {v.dtype}")
    if v.device != x.device:
        raise WrnFastError(f"`{name}`: expected device {x.device} as x has, got {v.device}")


def check_vector(name: str, v: Tensor | None, x: Tensor, shape: tuple, dtype: torch.dtype | None = None) -> None:
    """A tensor with an entry a channel; any floating dtype unless one is asked for."""
    if v is None:
        return
    if tuple(v.shape) != shape:
        raise WrnFastError(f"`{name}`: expected shape {list(shape)}, got {list(v.shape)}")
    if v.dtype != dtype if dtype is not None else not v.dtype.is_floating_point:
        raise WrnFastError(f"`{name}`: expected {dtype or 'a floating dtype'}, got {v.dtype}")
    if v.device != x.device:
        raise WrnFastError(f"`{name}`: expected device {x.device} as x has, got {v.device}")


def check_x(x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise WrnFastError(f"`x`: expected a floating dtype, got {x.dtype}")
    if x.dim() != 4:
        raise WrnFastError(f"`x`: expected 4 dimensions [N, C, H, W], got shape {list(x.shape)}")


def check_filter(name: str, w: Tensor, x: Tensor, c: int, taps: tuple[int, int] | None = None) -> None:
    if w.dim() != 4 or w.shape[1] != c or (taps is not None and tuple(w.shape[2:]) != taps):
        r, s = taps or ("R", "S")
        raise WrnFastError(f"`{name}`: expected shape [K, {c}, {r}, {s}] to match C={c} of x, got {list(w.shape)}")
    if w.dtype != x.dtype and not (w.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
        raise WrnFastError(f"`{name}`: expected {x.dtype} as x has (or float32 beside a 16-bit x), got {w.dtype}")
    if w.device != x.device:
        raise WrnFastError(f"`{name}`: expected device {x.device} as x has, got {w.device}")


def check_prologue(suffix: str, x: Tensor, stats, gamma, beta) -> None:
    c = x.shape[1]
    if stats is None and (gamma is not None or beta is not None):
        raise WrnFastError(f"`stats{suffix}`: expected [2, {c}] beside gamma{suffix} and beta{suffix}, got None")
    check_vector(f"stats{suffix}", stats, x, (2, c), torch.float64 if x.dtype == torch.float64 else torch.float32)
    check_vector(f"gamma{suffix}", gamma, x, (c,))
    check_vector(f"beta{suffix}", beta, x, (c,))


def check_rng(rng: Tensor | None, x: Tensor, p: float, drop_at: str) -> None:
    if p == 0.0 or drop_at == "none":
        return
    if rng is None or rng.dtype != torch.int64 or tuple(rng.shape) != (2,) or rng.device != x.device:
        got = "None" if rng is None else f"{rng.dtype} {list(rng.shape)} on {rng.device}"
        raise WrnFastError(f"`rng`: expected int64 [2] (seed, offset) on {x.device} for dropout p={p}, got {got}")


def _pad(pad) -> tuple[int, int, int, int]:
    if len(pad) != 4:
        raise WrnFastError(f"`pad`: expected four numbers (left, right, top, bottom), got {list(pad)}")
    return tuple(pad)


def source_problem(
    dy, x, w_shape, w_dtype, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, want
) -> ConvProblem:
    """The problem of dgrad and wgrad, checked."""
    check_x(x)
    check_prologue("", x, stats, gamma, beta)
    check_rng(rng, x, p, "prologue")
    n, c, h, wd = x.shape
    k, _, r, s = w_shape
    problem = ConvProblem(
        x.device.type, x.dtype, w_dtype, n, h, wd, c, k, r, s, stride, _pad(pad), act, slope, eps, stats is not None,
        gamma is not None or beta is not None, False, p, "prologue" if p > 0 else "none", want_stats=want,
    )  # fmt: skip
    problem.check()
    check_activation("dy", dy, x, (n, k, problem.P, problem.Q))
    return problem


def fprop_problem(
    x, w, stats, gamma, beta, bias, residual, x_short, w_short, stats_short, gamma_short, beta_short, rng, out_scale,
    out_shift, stride, pad, act, slope, eps, batch_stats, p, drop_at, short_stride, short_act, short_eps,
    short_batch_stats, act_out, want_y, want_stats,
) -> ConvProblem:  # fmt: skip
    """The problem of fprop, checked: raises WrnFastError that names the argument."""
    check_x(x)
    n, c, h, wd = x.shape
    check_filter("w", w, x, c)
    k, _, r, s = w.shape
    check_prologue("", x, stats, gamma, beta)
    check_rng(rng, x, p, drop_at)
    problem = ConvProblem(
        x.device.type, x.dtype, w.dtype, n, h, wd, c, k, r, s, stride, _pad(pad), act, slope, eps, stats is not None,
        gamma is not None or beta is not None, batch_stats, p, drop_at, bias is not None, residual is not None,
        0 if x_short is None else x_short.shape[1], short_stride, stats_short is not None,
        gamma_short is not None or beta_short is not None, short_act, short_eps, short_batch_stats, act_out, want_y,
        want_stats,
    )  # fmt: skip
    problem.check()
    check_vector("bias", bias, x, (k,))
    if residual is not None:
        check_activation("residual", residual, x, (n, k, problem.P, problem.Q))
    if (x_short is None) != (w_short is None):
        raise WrnFastError("`w_short`: expected together with `x_short`, got one of them alone")
    if x_short is not None:
        _check_short(problem, x, x_short, w_short)
        check_prologue("_short", x_short, stats_short, gamma_short, beta_short)
    elif stats_short is not None:
        raise WrnFastError("`stats_short`: expected None without `x_short`")
    check_vector("out_scale", out_scale, x, (k,))
    check_vector("out_shift", out_shift, x, (k,))
    if not want_y and (act_out == "none" or want_stats):
        raise WrnFastError("`want_y`: False needs a second output (`act_out`) and no statistics of y")
    return problem


def _check_short(problem: ConvProblem, x: Tensor, x_short: Tensor, w_short: Tensor) -> None:
    check_activation("x_short", x_short, x)
    check_filter("w_short", w_short, x, x_short.shape[1], (1, 1))
    n, _, h, wd = x_short.shape
    st = problem.short_stride
    got = (n, w_short.shape[0], (h - 1) // st + 1, (wd - 1) // st + 1)
    want = (problem.N, problem.K, problem.P, problem.Q)
    if got != want:
        raise WrnFastError(f"`x_short`: expected its 1x1 convolution to give {list(want)}, got {list(got)}")


def plain_problem(x: Tensor, **scalars) -> ConvProblem:
    """A problem without a convolution."""
    check_x(x)
    n, c, h, wd = x.shape
    return ConvProblem(x.device.type, x.dtype, x.dtype, n, h, wd, c, c, 1, 1, **scalars)
