"""The primitives as `torch.library` operators: schema, checks, fake kernel, autograd. Written once for all backends.

Schemas are functional, tensors first; every activation and filter leaves an operator in channels_last. `fprop` alone
has a gradient: its backward is made of the other primitives, each an operator of its own, so that a compiler can drop
the ones whose result nobody wants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrn_fast import dispatch
from wrn_fast.backends import aten
from wrn_fast.checks import (
    bn_bwd_apply_problem,
    channel_stats_problem,
    dgrad_problem,
    dropout_problem,
    fprop_problem,
    wgrad_problem,
)
from wrn_fast.precision import current as current_precision
from wrn_fast.precision import take_over as take_over_precision
from wrn_fast.problem import ConvProblem, FpropArgs

LIB = torch.library.Library("wrn_fast", "DEF")
TENSORS = FpropArgs._fields[:15]
# Statistics have no gradient of their own: `batch_stats` says that they move with x, and bn_bwd_apply has that term.
DIFFERENTIABLE = tuple(name for name in TENSORS[:12] if not name.startswith("stats"))

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
LIB.define("channel_stats(Tensor x) -> Tensor")
LIB.define("dropout(Tensor x, Tensor rng, float p) -> Tensor")

fprop = torch.ops.wrn_fast.fprop.default
dgrad = torch.ops.wrn_fast.dgrad.default
wgrad = torch.ops.wrn_fast.wgrad.default
bn_bwd_apply = torch.ops.wrn_fast.bn_bwd_apply.default
channel_stats = torch.ops.wrn_fast.channel_stats.default
dropout = torch.ops.wrn_fast.dropout.default


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


def _fprop(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = FpropArgs(*args)
    return _run(
        "fprop", fprop_problem(a), _nhwc(a.x), _dense(a.w), a.stats, a.gamma, a.beta, a.bias, _nhwc(a.residual),
        _nhwc(a.x_short), _dense(a.w_short), *args[9:15],
    )  # fmt: skip


def _dgrad(dy: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _run("dgrad", dgrad_problem(dy, x, w, *rest), _nhwc(dy), _nhwc(x), _dense(w), *rest[:4])


def _wgrad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _run("wgrad", wgrad_problem(dy, x, *rest), _nhwc(dy), _nhwc(x), *rest[:4])


def _bn_bwd_apply(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _run("bn_bwd_apply", bn_bwd_apply_problem(g, x, *rest), _nhwc(g), _nhwc(x), *rest[:3])


def _channel_stats(x: Tensor) -> Tensor:
    return _run("channel_stats", channel_stats_problem(x), _nhwc(x))


def _dropout(x: Tensor, rng: Tensor, p: float) -> Tensor:
    return _run("dropout", dropout_problem(x, rng, p), _nhwc(x), rng)


for _implementation in (_fprop, _dgrad, _wgrad, _bn_bwd_apply, _channel_stats, _dropout):
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


@torch.library.register_fake("wrn_fast::channel_stats", lib=LIB)
def _fake_channel_stats(x: Tensor) -> Tensor:
    return _new_stats(channel_stats_problem(x), x, x.shape[1])


@torch.library.register_fake("wrn_fast::dropout", lib=LIB)
def _fake_dropout(x: Tensor, rng: Tensor, p: float) -> Tensor:
    dropout_problem(x, rng, p)
    return _new(x, *x.shape)


# Autograd of fprop.


def composite(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """fprop in differentiable ATen calls, for what a kernel cannot serve: functorch, forward AD, second derivatives.

    Batch statistics are taken from x again, so that their derivatives exist too.
    """
    a = FpropArgs(*args)
    problem = fprop_problem(a)
    wide = problem.stats_dtype

    def normal(
        v: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, batch_stats: bool
    ) -> Tensor:
        if stats is None or not batch_stats:
            return aten.normalize(v.to(wide), stats, gamma, beta, eps)
        gamma, beta = (None if t is None else t.to(wide) for t in (gamma, beta))
        return torch.batch_norm(v.to(wide), gamma, beta, None, None, True, 0.0, eps, False)

    with torch.autocast(problem.device, enabled=False):
        x = normal(a.x, a.stats, a.gamma, a.beta, a.eps, a.batch_stats)
        x_short = a.x_short
        if x_short is not None:
            x_short = normal(
                x_short, a.stats_short, a.gamma_short, a.beta_short, a.short_eps, a.short_batch_stats
            )  # fmt: skip
        y, y_act = aten.forward(
            problem, x, a.w, None, None, None, a.bias, a.residual, x_short, a.w_short, None, None, None, *args[12:15]
        )
        y = y.to(problem.dtype)
        stats_y = aten.moments(y.detach().to(wide)) if a.want_stats else a.x.new_empty(0, dtype=wide)
    return y, stats_y, a.x.new_empty(0) if y_act is None else y_act.to(problem.dtype)


class _Fprop(torch.autograd.Function):
    """fprop with its gradient.

    Not `torch.library.register_autograd`: that fills in the defaults of a schema at each call, in time quadratic in
    the number of arguments, which is 0.2 ms for these 30.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        a = FpropArgs(*args)
        output = _below_autograd(keyset, *args)
        ctx.present = [t is not None for t in args[: len(TENSORS)]]
        ctx.scalars = args[len(TENSORS) :]
        ctx.bias_dtype = None if a.bias is None else a.bias.dtype
        compiling = torch.compiler.is_compiling()
        ctx.selection = None if compiling else dispatch.selection()
        ctx.precision = None if compiling else current_precision()
        ctx.save_for_backward(*a._replace(bias=None, residual=None, out_scale=None, out_shift=None)[: len(TENSORS)])
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads: dict[str, Tensor | None] = {}
        if dy is not None:
            wanted = {name for i, name in enumerate(TENSORS) if name in DIFFERENTIABLE and _is_wanted(ctx, i)}
            if torch.is_grad_enabled():
                grads = _second_order(ctx, dy, wanted)
            else:
                with dispatch.take_over(ctx.selection), take_over_precision(ctx.precision):
                    grads = _first_order(ctx, dy, wanted)
        return (None, *(grads.get(name) for name in FpropArgs._fields))


def _below_autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return fprop.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _Fprop.apply(keyset, *args)
    return _below_autograd(keyset, *args)


LIB.impl("fprop", _autograd, "Autograd", with_keyset=True)


def _is_wanted(ctx: Any, i: int) -> bool:
    """Will the engine use the gradient of tensor i in this backward call? Unsure means yes.

    `needs_input_grad` says what requires a gradient, not what this call wants: `autograd.grad(loss, [x])` would pay
    for every wgrad (pytorch issue 174017).
    """
    if not ctx.needs_input_grad[1 + i]:
        return False
    if torch.compiler.is_compiling():  # compiled autograd cannot trace next_functions; its graph drops what is unused
        return True
    position = sum(ctx.present[:i])  # next_functions counts the tensors that were given
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[position][0])
    except (AttributeError, RuntimeError, IndexError):
        # RuntimeError: the node is a leaf that this call captures, which means wanted
        return True


def _first_order(ctx: Any, dy: Tensor, wanted: set[str]) -> dict[str, Tensor | None]:
    a = FpropArgs(*ctx.saved_tensors, *ctx.scalars)
    if a.drop_at == "output" and a.p > 0:
        dy = dropout(dy, a.rng, a.p)
    else:
        # Once here instead of once in each primitive: a loss may hand over any strides, often an expanded scalar.
        dy = dy.contiguous(memory_format=torch.channels_last)
    grads: dict[str, Tensor | None] = {}
    if "residual" in wanted:
        grads["residual"] = dy
    if "bias" in wanted:
        grads["bias"] = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    p = a.p if a.drop_at == "prologue" else 0.0
    _source(
        grads, wanted, "", dy, a.x, a.w, a.stats, a.gamma, a.beta, a.rng, a.stride, a.pad, a.act, a.slope, a.eps, p,
        a.batch_stats,
    )  # fmt: skip
    if a.x_short is not None:
        _source(
            grads, wanted, "_short", dy, a.x_short, a.w_short, a.stats_short, a.gamma_short, a.beta_short, None,
            a.short_stride, [0] * 4, a.short_act, a.slope, a.short_eps, 0.0, a.short_batch_stats,
        )  # fmt: skip
    return grads


def _source(
    grads: dict[str, Tensor | None], wanted: set[str], suffix: str, dy: Tensor, x: Tensor, w: Any, stats: Tensor | None,
    gamma: Any, beta: Any, rng: Tensor | None, stride: int, pad: Any, act: str, slope: float, eps: float, p: float,
    batch_stats: bool,
) -> None:  # fmt: skip
    """Adds the wanted ones of dx, dw, dgamma and dbeta of one source to `grads`."""
    x_name, w_name, gamma_name, beta_name = (name + suffix for name in ("x", "w", "gamma", "beta"))
    want_affine = gamma_name in wanted or beta_name in wanted
    if x_name in wanted or want_affine:
        want_sums = stats is not None and (want_affine or batch_stats)
        g, sums_g = dgrad(dy, x, w, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, want_sums)
        if gamma_name in wanted:
            grads[gamma_name] = sums_g[1].to(gamma.dtype)
        if beta_name in wanted:
            grads[beta_name] = sums_g[0].to(beta.dtype)
        if x_name in wanted:
            if stats is not None:
                g = bn_bwd_apply(g, x, stats, gamma, sums_g if want_sums else None, eps, batch_stats)
            grads[x_name] = g
    if w_name in wanted:
        grads[w_name] = wgrad(dy, x, stats, gamma, beta, rng, w.shape, w.dtype, stride, pad, act, slope, eps, p)


def _second_order(ctx: Any, dy: Tensor, wanted: set[str]) -> dict[str, Tensor | None]:
    """create_graph=True: made again in ATen, so that the gradient has a gradient. Slow and right."""
    # Views, because one tensor may come as two arguments, and each has a gradient of its own.
    saved = {
        name: v if v is None or name not in wanted else v.view_as(v)
        for name, v in zip(TENSORS, ctx.saved_tensors, strict=True)
    }
    if "bias" in wanted:
        saved["bias"] = dy.new_zeros(dy.shape[1], dtype=ctx.bias_dtype).requires_grad_()
    if "residual" in wanted:
        saved["residual"] = torch.zeros_like(dy).requires_grad_()
    y = composite(*saved.values(), *ctx.scalars)[0]
    names = sorted(wanted)
    return dict(zip(names, torch.autograd.grad(y, [saved[name] for name in names], dy, create_graph=True), strict=True))
