"""`bn_act_conv`, the operator that a WideResNet is made of: checked, documented, differentiable, autocast by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrn_fast import autograd, autograd_head, ops, random
from wrn_fast.backends import aten
from wrn_fast.checks import check_types, check_x
from wrn_fast.errors import WrnFastError
from wrn_fast.problem import FpropArgs

# What autocast casts: not float64, as with PyTorch's own convolutions.
_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


class ConvOutput(NamedTuple):
    """What `bn_act_conv` gives; an output that was not asked for has 0 elements."""

    y: Tensor
    stats: Tensor
    y_act: Tensor


class HeadOutput(NamedTuple):
    """What `head` gives."""

    out: Tensor
    feature: Tensor


def _composite_wanted() -> bool:
    """Are transforms at work that a compiled kernel cannot serve (functorch, forward AD)?"""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    # PyTorch raises for meta; to ask whether it knows the device breaks the graph under torch 2.11's compiler.
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype in _AUTOCAST


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x has inside the operator: autocast's where that is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def channel_stats(x: Tensor) -> Tensor:
    """Mean and biased variance of x over N, H, W.

    Args:
        x: [N, C, H, W], floating, any strides (channels_last is read without a copy).

    Returns:
        [2, C], float32 (float64 for float64 x), without gradient: `bn_act_conv(batch_stats=True)` has that term.

    Raises:
        WrnFastError: x is not a floating [N, C, H, W] tensor.

    Numerics: tiles are merged as (count, mean, M2) in a fixed order (Chan, Golub, LeVeque 1983), so the result does
    not depend on the thread count and a large mean costs no digits.
    """
    if not isinstance(x, Tensor):
        raise WrnFastError(f"`x`: expected a tensor, got {type(x).__name__}")
    if _composite_wanted():
        check_x(x)
        return aten.moments(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
    return ops.channel_stats(x.detach())


def bn_act_conv(
    x: Tensor,
    w: Tensor,
    stats: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    x_short: Tensor | None = None,
    w_short: Tensor | None = None,
    stats_short: Tensor | None = None,
    gamma_short: Tensor | None = None,
    beta_short: Tensor | None = None,
    rng: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
    stride: int = 1,
    pad: int | tuple[int, int, int, int] = 1,
    act: str = "relu",
    slope: float = 0.01,
    eps: float = 1e-5,
    batch_stats: bool = False,
    p: float = 0.0,
    drop_at: str = "prologue",
    short_stride: int = 1,
    short_act: str = "identity",
    short_eps: float = 1e-5,
    short_batch_stats: bool = False,
    act_out: str = "none",
    want_y: bool = True,
    want_stats: bool = False,
) -> ConvOutput:
    """BatchNorm, activation, dropout, convolution, shortcut and residual in one operator.

        a = drop(act((x - mean) / sqrt(var + eps) * gamma + beta))            padded with zeros after that
        y = drop(conv(a, w) + bias + conv1x1(act_s(bn_s(x_short)), w_short) + residual)

    Args:
        x: [N, C, H, W], float16, bfloat16, float32 or float64; any strides, channels_last is read without a copy.
        w: [K, C, R, S], x's dtype, or float32 beside a 16-bit x (its gradient is then float32).
        stats: [2, C] mean and biased variance, float32 (float64 for float64 x). None: no BatchNorm.
        gamma, beta: [C], any floating dtype; None is 1 and 0.
        bias: [K], any floating dtype. residual: [N, K, P, Q], x's dtype, added to y.
        x_short, w_short: [N, Cs, Hs, Ws] and [K, Cs, 1, 1]: a second source, with a prologue of its own
            (stats_short, gamma_short, beta_short, short_eps, short_act; the slope is shared).
        rng: dense int64 [2], (seed, offset) of the dropout mask; drawn from the device's default generator when None.
        out_scale, out_shift: [K], for the second output y_act = act_out(y * out_scale + out_shift). Inference only.
        pad: one number, or (left, right, top, bottom).
        act, short_act: "identity", "relu", "silu", "leaky_relu"; act_out also "none" (no second output).
        batch_stats, short_batch_stats: the statistics are x's own (training), so they pass a gradient to x.
        p, drop_at: dropout probability, and where: "prologue" (after act), "output", "output_act".
        want_y, want_stats: is y needed beside y_act; are statistics of y wanted.

    Returns:
        ConvOutput: y [N, K, P, Q] in x's dtype (autocast's under autocast), channels_last; stats [2, K] of y without
        gradient; y_act [N, K, P, Q] without gradient.

    Raises:
        WrnFastError: a dtype, device, shape or value that does not fit; the message names the argument.

    Numerics: the prologue, the accumulation and the statistics are float32 (float64 for float64). Deterministic.
    Source: Zagoruyko and Komodakis, Wide Residual Networks (BMVC 2016), section 2, figure 1; He et al., Identity
    Mappings in Deep Residual Networks (ECCV 2016), figure 1b.
    """
    if isinstance(pad, int):
        pad = (pad,) * 4
    args = FpropArgs(
        x, w, stats, gamma, beta, bias, residual, x_short, w_short, stats_short, gamma_short, beta_short, rng,
        out_scale, out_shift, stride, pad, act, slope, eps, batch_stats, p, drop_at, short_stride, short_act,
        short_eps, short_batch_stats, act_out, want_y, want_stats,
    )  # fmt: skip
    try:
        if _autocasts(x):
            args = _cast(args, autocast_dtype(x))
        if rng is None and p != 0.0 and drop_at != "none":
            args = args._replace(rng=random.draw(x.device))
        if _composite_wanted():
            return ConvOutput(*autograd.composite(*args))
        if torch.is_grad_enabled():
            _check_gradient(args)
        return ConvOutput(*ops.fprop(*args))
    except (AttributeError, RuntimeError, TypeError):
        check_types(args._asdict())
        raise


def head(
    y: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stats: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    act: str = "relu",
    slope: float = 0.01,
    eps: float = 1e-5,
    batch_stats: bool = False,
    cosine: bool = False,
) -> HeadOutput:
    """BatchNorm, activation, mean over the image and the classes of a network in one operator.

        f = mean over H, W of act((y - mean) / sqrt(var + eps) * gamma + beta)
        out = f w' + bias                              or, `cosine`:    |f / max(|f|, 1e-12) w' + bias|

    Args:
        y: [N, C, H, W], float16, bfloat16, float32 or float64; any strides, channels_last is read without a copy.
        w: [K, C], y's dtype, or float32 beside a 16-bit y (its gradient is then float32).
        bias: [K], any floating dtype.
        stats: [2, C] mean and biased variance, float32 (float64 for float64 y). None: no BatchNorm.
        gamma, beta: [C], any floating dtype; None is 1 and 0.
        act: "identity", "relu", "silu", "leaky_relu".
        batch_stats: the statistics are y's own (training), so they pass a gradient to y.

    Returns:
        HeadOutput: out [N, K] and feature [N, C] in y's dtype (autocast's under autocast), contiguous.

    Raises:
        WrnFastError: a dtype, device, shape or value that does not fit; the message names the argument.

    Numerics: everything is float32 (float64 for float64) up to the one rounding of each output. Deterministic.
    Source: Zagoruyko and Komodakis, Wide Residual Networks (BMVC 2016), table 1; cosine: Zaeemzadeh et al.,
    Out-of-Distribution Detection Using Union of 1-Dimensional Subspaces (CVPR 2021), section 3.
    """
    try:
        if _autocasts(y):
            dtype = autocast_dtype(y)
            y, w = _autocast(y, dtype), _autocast(w, dtype, torch.float32)
        args = (y, stats, gamma, beta, w, bias, act, slope, eps, batch_stats, cosine)
        if _composite_wanted():
            return HeadOutput(*autograd_head.composite(*args))
        if torch.is_grad_enabled():
            _check_stats("stats", stats)
        return HeadOutput(*ops.head(*args))
    except (AttributeError, RuntimeError, TypeError):
        tensors = {"y": y, "w": w, "bias": bias, "stats": stats, "gamma": gamma, "beta": beta}
        scalars = {"act": act, "slope": slope, "eps": eps, "batch_stats": batch_stats, "cosine": cosine}
        check_types(tensors | scalars)
        raise


def _cast(a: FpropArgs, dtype: torch.dtype) -> FpropArgs:
    """Autocast by hand: activations only. A float32 filter stays the parameter that it is, and packing casts it."""
    return a._replace(
        x=_autocast(a.x, dtype), residual=_autocast(a.residual, dtype), x_short=_autocast(a.x_short, dtype),
        w=_autocast(a.w, dtype, torch.float32), w_short=_autocast(a.w_short, dtype, torch.float32),
    )  # fmt: skip


def _autocast(v: Any, dtype: torch.dtype, kept: torch.dtype | None = None) -> Any:
    return v if v is None or v.dtype not in _AUTOCAST or v.dtype is kept else v.to(dtype)


def _check_gradient(a: FpropArgs) -> None:
    """Gradients that are asked for and would be missing."""
    _check_stats("stats", a.stats)
    _check_stats("stats_short", a.stats_short)
    if a.act_out != "none" and any(isinstance(v, Tensor) and v.requires_grad for v in a):
        raise WrnFastError(
            "`act_out`: the second output has no gradient; expected torch.no_grad() or inputs without gradient"
        )


def _check_stats(name: str, stats: Tensor | None) -> None:
    if stats is not None and stats.requires_grad:
        raise WrnFastError(f"`{name}`: expected a tensor without gradient (channel_stats gives one), got one with")
