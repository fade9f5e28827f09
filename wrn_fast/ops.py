"""The primitives as `torch.library` operators: schema, checks, fake kernel. Written once for all backends.

Schemas are functional, tensors first; every activation and filter leaves an operator in channels_last. `fprop` alone
has a gradient (`wrn_fast.autograd`): its backward is made of the other primitives, each an operator of its own, so that
a compiler can drop the ones whose result nobody wants. So has `head` (`wrn_fast.autograd_head`), whose is `head_bwd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrn_fast import dispatch, masks
from wrn_fast.backends import aten
from wrn_fast.checks import (
    act_mask_problem,
    bn_bwd_apply_problem,
    channel_stats_problem,
    dgrad_problem,
    dropout_problem,
    fprop_problem,
    head_bwd_problem,
    head_problem,
    input_grad_problem,
    wgrad_problem,
)
from wrn_fast.errors import WrnFastError
from wrn_fast.precision import FP8, current
from wrn_fast.problem import ConvProblem, FpropArgs

LIB = torch.library.Library("wrn_fast", "DEF")
FP8_CHANNELS = 16  # from so many input channels on: the first convolution of a network has 3

LIB.define(
    "fprop(Tensor x, Tensor w, Tensor? stats, Tensor? gamma, Tensor? beta, Tensor? bias, Tensor? residual, "
    "Tensor? x_short, Tensor? w_short, Tensor? stats_short, Tensor? gamma_short, Tensor? beta_short, Tensor? rng, "
    "Tensor? out_scale, Tensor? out_shift, SymInt stride, SymInt[] pad, str act, float slope, float eps, "
    "bool batch_stats, float p, str drop_at, SymInt short_stride, str short_act, float short_eps, "
    "bool short_batch_stats, str act_out, bool want_y, bool want_stats) -> (Tensor, Tensor, Tensor)"
)
LIB.define(
    "dgrad(Tensor dy, Tensor x, Tensor w, Tensor? stats, Tensor? gamma, Tensor? beta, Tensor? rng, SymInt stride, "
    "SymInt[] pad, str act, float slope, float eps, float p, bool want_sums) -> (Tensor, Tensor)"
)
LIB.define(
    "wgrad(Tensor dy, Tensor x, Tensor? stats, Tensor? gamma, Tensor? beta, Tensor? rng, SymInt[] w_shape, "
    "ScalarType w_dtype, SymInt stride, SymInt[] pad, str act, float slope, float eps, float p) -> Tensor"
)
LIB.define(
    "bn_bwd_apply(Tensor g, Tensor x, Tensor stats, Tensor? gamma, Tensor? sums_g, float eps, bool batch_stats) "
    "-> Tensor"
)
LIB.define("act_mask(Tensor x, Tensor? stats, Tensor? gamma, Tensor? beta, str act, float slope, float eps) -> Tensor")
LIB.define(
    "input_grad(Tensor dy, Tensor w, Tensor? mask, Tensor? scale, Tensor? rng, SymInt[] x_shape, SymInt stride, "
    "SymInt[] pad, str act, float slope, float p) -> Tensor"
)
LIB.define("channel_stats(Tensor x) -> Tensor")
LIB.define("dropout(Tensor x, Tensor rng, float p) -> Tensor")
LIB.define(
    "head(Tensor y, Tensor? stats, Tensor? gamma, Tensor? beta, Tensor w, Tensor? bias, str act, float slope, "
    "float eps, bool batch_stats, bool cosine) -> (Tensor, Tensor)"
)
LIB.define(
    "head_bwd(Tensor dfeat, Tensor y, Tensor? stats, Tensor? gamma, Tensor? beta, str act, float slope, float eps, "
    "bool batch_stats, bool want_sums) -> (Tensor, Tensor)"
)

fprop = torch.ops.wrn_fast.fprop.default
dgrad = torch.ops.wrn_fast.dgrad.default
wgrad = torch.ops.wrn_fast.wgrad.default
bn_bwd_apply = torch.ops.wrn_fast.bn_bwd_apply.default
act_mask = torch.ops.wrn_fast.act_mask.default
input_grad = torch.ops.wrn_fast.input_grad.default
channel_stats = torch.ops.wrn_fast.channel_stats.default
dropout = torch.ops.wrn_fast.dropout.default
head = torch.ops.wrn_fast.head.default
head_bwd = torch.ops.wrn_fast.head_bwd.default


# Implementations: a problem, a layout, a choice.


def _nhwc(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous(memory_format=torch.channels_last)


def _dense(w: Tensor | None) -> Tensor | None:
    """Filters may come in any dense layout; views with holes are copied."""
    if w is None or w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last):
        return w
    return w.contiguous(memory_format=torch.channels_last)


def _run(op: str, problem: ConvProblem, *tensors: Tensor | None) -> Any:
    """Calls the chosen backend without autograd and autocast: what to cast was settled before the operator."""
    module = aten if problem.N == 0 else dispatch.choose(op, problem)
    function = getattr(module, op)
    # A primitive without a gradient comes here with autograd still on when it is called by hand or by a traced graph.
    with torch._C._AutoDispatchBelowAutograd():
        if torch.is_autocast_enabled(problem.device):
            with torch.autocast(problem.device, enabled=False):
                return function(problem, *tensors)
        return function(problem, *tensors)


def _in_fp8(a: FpropArgs, problem: ConvProblem) -> bool:
    """Does the call run in e4m3? What has fewer channels than a tensor instruction reduces over stays as it is."""
    if current() != FP8 or problem.N == 0 or problem.C < FP8_CHANNELS:
        return False
    if a.batch_stats or a.short_batch_stats:
        raise WrnFastError("`batch_stats`: expected running statistics under precision 'fp8' (model.eval()), got True")
    return True


def _fprop(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = FpropArgs(*args)
    problem = fprop_problem(a)
    return _run(
        "fprop_fp8" if _in_fp8(a, problem) else "fprop", problem, _nhwc(a.x), _dense(a.w), a.stats, a.gamma, a.beta,
        a.bias, _nhwc(a.residual), _nhwc(a.x_short), _dense(a.w_short), *args[9:15],
    )  # fmt: skip


def _dgrad(dy: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _run("dgrad", dgrad_problem(dy, x, w, *rest), _nhwc(dy), _nhwc(x), _dense(w), *rest[:4])


def _wgrad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _run("wgrad", wgrad_problem(dy, x, *rest), _nhwc(dy), _nhwc(x), *rest[:4])


def _bn_bwd_apply(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _run("bn_bwd_apply", bn_bwd_apply_problem(g, x, *rest), _nhwc(g), _nhwc(x), *rest[:3])


def _act_mask(x: Tensor, *rest: Any) -> Tensor:
    return _run("act_mask", act_mask_problem(x, *rest), _nhwc(x), *rest[:3])


def _input_grad(dy: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return _run("input_grad", input_grad_problem(dy, w, *rest), _nhwc(dy), _dense(w), *rest[:3])


def _channel_stats(x: Tensor) -> Tensor:
    return _run("channel_stats", channel_stats_problem(x), _nhwc(x))


def _dropout(x: Tensor, rng: Tensor, p: float) -> Tensor:
    return _run("dropout", dropout_problem(x, rng, p), _nhwc(x), rng)


def _head(y: Tensor, stats: Any, gamma: Any, beta: Any, w: Tensor, bias: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    problem = head_problem(y, stats, gamma, beta, w, bias, *rest)
    return _run("head", problem, _nhwc(y), stats, gamma, beta, w.contiguous(), bias)


def _head_bwd(dfeat: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _run("head_bwd", head_bwd_problem(dfeat, y, *rest), dfeat.contiguous(), _nhwc(y), *rest[:3])


for _implementation in (
    _fprop, _dgrad, _wgrad, _bn_bwd_apply, _act_mask, _input_grad, _channel_stats, _dropout, _head, _head_bwd,
):  # fmt: skip
    LIB.impl(_implementation.__name__[1:], _implementation, "CompositeExplicitAutograd")


# Fake kernels: the same checks, the promised layouts.


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def _new_stats(problem: ConvProblem, x: Tensor, c: int) -> Tensor:
    return x.new_empty((2, c) if problem.want_stats else (0,), dtype=problem.stats_dtype)


@torch.library.register_fake("wrn_fast::fprop", lib=LIB)
def _fake_fprop(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = FpropArgs(*args)
    problem = fprop_problem(a)
    shape = (problem.N, problem.K, problem.P, problem.Q)
    y = _new(a.x, *shape) if a.want_y else a.x.new_empty(0)
    y_act = _new(a.x, *shape) if a.act_out != "none" else a.x.new_empty(0)
    return y, _new_stats(problem, a.x, problem.K), y_act


@torch.library.register_fake("wrn_fast::dgrad", lib=LIB)
def _fake_dgrad(dy: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    problem = dgrad_problem(dy, x, w, *rest)
    return _new(x, *x.shape), _new_stats(problem, x, problem.C)


@torch.library.register_fake("wrn_fast::wgrad", lib=LIB)
def _fake_wgrad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    problem = wgrad_problem(dy, x, *rest)
    return _new(x, problem.K, problem.C, problem.R, problem.S, dtype=problem.w_dtype)


@torch.library.register_fake("wrn_fast::bn_bwd_apply", lib=LIB)
def _fake_bn_bwd_apply(g: Tensor, *rest: Any) -> Tensor:
    bn_bwd_apply_problem(g, *rest)
    return _new(g, *g.shape)


@torch.library.register_fake("wrn_fast::act_mask", lib=LIB)
def _fake_act_mask(x: Tensor, *rest: Any) -> Tensor:
    act_mask_problem(x, *rest)
    return x.new_empty(masks.shape(x.shape), dtype=torch.uint8)


@torch.library.register_fake("wrn_fast::input_grad", lib=LIB)
def _fake_input_grad(dy: Tensor, w: Tensor, mask: Any, scale: Any, rng: Any, x_shape: Any, *rest: Any) -> Tensor:
    input_grad_problem(dy, w, mask, scale, rng, x_shape, *rest)
    return _new(dy, *x_shape)


@torch.library.register_fake("wrn_fast::channel_stats", lib=LIB)
def _fake_channel_stats(x: Tensor) -> Tensor:
    return _new_stats(channel_stats_problem(x), x, x.shape[1])


@torch.library.register_fake("wrn_fast::dropout", lib=LIB)
def _fake_dropout(x: Tensor, rng: Tensor, p: float) -> Tensor:
    dropout_problem(x, rng, p)
    return _new(x, *x.shape)


@torch.library.register_fake("wrn_fast::head", lib=LIB)
def _fake_head(y: Tensor, stats: Any, gamma: Any, beta: Any, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    problem = head_problem(y, stats, gamma, beta, w, *rest)
    return y.new_empty((problem.N, problem.K)), y.new_empty((problem.N, problem.C))


@torch.library.register_fake("wrn_fast::head_bwd", lib=LIB)
def _fake_head_bwd(dfeat: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    problem = head_bwd_problem(dfeat, y, *rest)
    return _new(y, *y.shape), _new_stats(problem, y, problem.C)
