"""The primitives as `torch.library` operators: schema, checks, fake kernel, autograd. Written once for all backends.

Schemas are functional, tensors first; every activation and filter leaves an operator in channels_last. `fprop` alone
has a gradient: its backward is made of the other primitives, each an operator of its own, so that a compiler can drop
the ones whose result nobody wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrn_fast import dispatch
from wrn_fast.backends import aten
from wrn_fast.checks import (
    check_activation,
    check_filter,
    check_prologue,
    check_rng,
    check_vector,
    fprop_problem,
    plain_problem,
    source_problem,
)
from wrn_fast.errors import WrnFastError
from wrn_fast.problem import ConvProblem

LIB = torch.library.Library("wrn_fast", "DEF")

# fprop's tensors, in the order of its schema.
TENSORS = (
    "x",
    "w",
    "stats",
    "gamma",
    "beta",
    "bias",
    "residual",
    "x_short",
    "w_short",
    "stats_short",
    "gamma_short",
    "beta_short",
    "rng",
    "out_scale",
    "out_shift",
)
_SCALARS = 15
(_X, _W, _STATS, _GAMMA, _BETA, _BIAS, _RESIDUAL, _X_SHORT, _W_SHORT, _STATS_SHORT, _GAMMA_SHORT, _BETA_SHORT, _RNG) = (
    range(13)
)

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


# Implementations: a layout, a problem, a choice.


def _nhwc(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous(memory_format=torch.channels_last)


def _dense(w: Tensor | None) -> Tensor | None:
    """Filters may come in any dense layout; views with holes are copied."""
    if w is None or w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last):
        return w
    return w.contiguous(memory_format=torch.channels_last)


def _run(op: str, problem: ConvProblem, *tensors):
    """Calls the chosen backend with autocast off: what to cast was settled before the operator was called."""
    module = aten if problem.N == 0 else dispatch.choose(op, problem)
    function = getattr(module, op)
    if torch.is_autocast_enabled(problem.device):
        with torch.autocast(problem.device, enabled=False):
            return function(problem, *tensors)
    return function(problem, *tensors)


def _fprop(x, w, stats, gamma, beta, bias, residual, x_short, w_short, *rest):
    problem = fprop_problem(x, w, stats, gamma, beta, bias, residual, x_short, w_short, *rest)
    return _run(
        "fprop", problem, _nhwc(x), _dense(w), stats, gamma, beta, bias, _nhwc(residual), _nhwc(x_short),
        _dense(w_short), *rest[:6],
    )  # fmt: skip


def _dgrad(dy, x, w, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, want_sums):
    problem = source_problem(
        dy, x, w.shape, w.dtype, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, want_sums
    )
    check_filter("w", w, x, problem.C)
    return _run("dgrad", problem, _nhwc(dy), _nhwc(x), _dense(w), stats, gamma, beta, rng)


def _wgrad(dy, x, stats, gamma, beta, rng, w_shape, w_dtype, stride, pad, act, slope, eps, p):
    problem = source_problem(dy, x, w_shape, w_dtype, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, False)
    return _run("wgrad", problem, _nhwc(dy), _nhwc(x), stats, gamma, beta, rng)


def _bn_bwd_apply(g, x, stats, gamma, sums_g, eps, batch_stats):
    problem = plain_problem(
        x, eps=eps, prologue=True, affine=gamma is not None, batch_stats=batch_stats, want_stats=sums_g is not None
    )
    check_activation("g", g, x, tuple(x.shape))
    check_prologue("", x, stats, gamma, None)
    check_vector("sums_g", sums_g, x, (2, problem.C), problem.stats_dtype)
    if batch_stats and sums_g is None:
        raise WrnFastError(f"`sums_g`: expected [2, {problem.C}] for batch statistics, got None")
    return _run("bn_bwd_apply", problem, _nhwc(g), _nhwc(x), stats, gamma, sums_g)


def _channel_stats(x):
    return _run("channel_stats", plain_problem(x, want_stats=True), _nhwc(x))


def _dropout(x, rng, p):
    problem = plain_problem(x, p=p, drop_at="output")
    problem.check()
    check_rng(rng, x, p, "output")
    return _run("dropout", problem, _nhwc(x), rng)


for _name, _function in (
    ("fprop", _fprop),
    ("dgrad", _dgrad),
    ("wgrad", _wgrad),
    ("bn_bwd_apply", _bn_bwd_apply),
    ("channel_stats", _channel_stats),
    ("dropout", _dropout),
):
    LIB.impl(_name, _function, "CompositeExplicitAutograd")


# Fake kernels: the same checks, the promised layouts.


def _new(like: Tensor, *shape) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _stats_like(x: Tensor, wanted: bool, c: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((2, c) if wanted else (0,), dtype=dtype)


@torch.library.register_fake("wrn_fast::fprop", lib=LIB)
def _(x, w, *rest):
    problem = fprop_problem(x, w, *rest)
    shape = (problem.N, problem.K, problem.P, problem.Q)
    y = _new(x, *shape) if problem.want_y else x.new_empty(0)
    return (
        y,
        _stats_like(x, problem.want_stats, problem.K),
        _new(x, *shape) if problem.act_out != "none" else x.new_empty(0),
    )


@torch.library.register_fake("wrn_fast::dgrad", lib=LIB)
def _(dy, x, w, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, want_sums):
    source_problem(dy, x, w.shape, w.dtype, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, want_sums)
    return _new(x, *x.shape), _stats_like(x, want_sums, x.shape[1])


@torch.library.register_fake("wrn_fast::wgrad", lib=LIB)
def _(dy, x, stats, gamma, beta, rng, w_shape, w_dtype, stride, pad, act, slope, eps, p):
    source_problem(dy, x, w_shape, w_dtype, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, False)
    return torch.empty(w_shape, dtype=w_dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("wrn_fast::bn_bwd_apply", lib=LIB)
def _(g, x, stats, gamma, sums_g, eps, batch_stats):
    return _new(g, *g.shape)


@torch.library.register_fake("wrn_fast::channel_stats", lib=LIB)
def _(x):
    return _stats_like(x, True, x.shape[1])


@torch.library.register_fake("wrn_fast::dropout", lib=LIB)
def _(x, rng, p):
    return _new(x, *x.shape)


# Autograd of fprop.


def composite(*args) -> tuple[Tensor, Tensor, Tensor]:
    """fprop in differentiable ATen calls, for what a kernel cannot serve: functorch, forward AD, second derivatives.

    Batch statistics are taken from x again, so that their derivatives exist too.
    """
    problem = fprop_problem(*args)
    x, w, stats, gamma, beta, bias, residual, x_short, w_short, stats_short, gamma_short, beta_short = args[:12]
    wide = problem.stats_dtype

    def normal(v, stats, gamma, beta, eps, batch_stats):
        if stats is None or not batch_stats:
            return aten.normalize(v.to(wide), stats, gamma, beta, eps)
        gamma, beta = (None if t is None else t.to(wide) for t in (gamma, beta))
        return torch.batch_norm(v.to(wide), gamma, beta, None, None, True, 0.0, eps, False)

    with torch.autocast(problem.device, enabled=False):
        x = normal(x, stats, gamma, beta, problem.eps, problem.batch_stats)
        if x_short is not None:
            x_short = normal(
                x_short, stats_short, gamma_short, beta_short, problem.short_eps, problem.short_batch_stats
            )
        y, y_act = aten.forward(
            problem, x, w, None, None, None, bias, residual, x_short, w_short, None, None, None, *args[12:15]
        )
        stats_y = aten.moments(y.detach()) if problem.want_stats else args[0].new_empty(0, dtype=wide)
    y_act = args[0].new_empty(0) if y_act is None else y_act.to(problem.dtype)
    return y.to(problem.dtype), stats_y, y_act


def _wanted(ctx, i: int) -> bool:
    """Will the engine use the gradient of tensor i in this backward call? Unsure means yes.

    `needs_input_grad` says what requires a gradient, not what this call wants: `autograd.grad(loss, [x])` would pay
    for every wgrad (pytorch issue 174017).
    """
    if not ctx.needs_input_grad[i]:
        return False
    if torch.compiler.is_compiling():  # compiled autograd cannot trace next_functions; its graph drops what is unused
        return True
    position = sum(ctx.present[:i])  # next_functions counts the tensors that were given
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[position][0])
    except (AttributeError, RuntimeError, IndexError):
        # RuntimeError: the node is a leaf that this call captures, which means wanted
        return True


def _setup_context(ctx, inputs, output):
    tensors = inputs[: len(TENSORS)]
    ctx.present = [t is not None for t in tensors]
    ctx.scalars = inputs[len(TENSORS) :]
    ctx.bias_dtype = None if tensors[_BIAS] is None else tensors[_BIAS].dtype
    ctx.selection = None if torch.compiler.is_compiling() else dispatch.selection()
    saved = list(tensors)
    for i in (_BIAS, _RESIDUAL, len(TENSORS) - 2, len(TENSORS) - 1):
        saved[i] = None
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _source_backward(ctx, dy, x, w, stats, gamma, beta, rng, first, scalars):
    """dx, dgamma, dbeta, dw of one source; `first` is the index of its x among the inputs, its w is the next."""
    op = torch.ops.wrn_fast
    stride, pad, act, slope, eps, batch_stats, p = scalars
    i_gamma = _GAMMA if first == _X else _GAMMA_SHORT
    want_x, want_w = _wanted(ctx, first), _wanted(ctx, first + 1)
    want_gamma = gamma is not None and _wanted(ctx, i_gamma)
    want_beta = beta is not None and _wanted(ctx, i_gamma + 1)
    dx = dgamma = dbeta = dw = None
    if want_x or want_gamma or want_beta:
        want_sums = stats is not None and (want_gamma or want_beta or batch_stats)
        g, sums_g = op.dgrad(dy, x, w, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, want_sums)
        if want_gamma:
            dgamma = sums_g[1].to(gamma.dtype)
        if want_beta:
            dbeta = sums_g[0].to(beta.dtype)
        if want_x:
            dx = g
            if stats is not None:
                dx = op.bn_bwd_apply(g, x, stats, gamma, sums_g if want_sums else None, eps, batch_stats)
    if want_w:
        dw = op.wgrad(dy, x, stats, gamma, beta, rng, w.shape, w.dtype, stride, pad, act, slope, eps, p)
    return dx, dgamma, dbeta, dw


def _second_order(ctx, dy):
    """create_graph=True: made again in ATen, so that the gradient has a gradient. Slow and right."""
    saved = list(ctx.saved_tensors)
    if ctx.present[_BIAS]:
        saved[_BIAS] = dy.new_zeros(dy.shape[1], dtype=ctx.bias_dtype).requires_grad_()
    if ctx.present[_RESIDUAL]:
        saved[_RESIDUAL] = torch.zeros_like(dy).requires_grad_()
    y = composite(*saved, *ctx.scalars)[0]
    index = [i for i in range(_RNG) if ctx.present[i] and _wanted(ctx, i)]
    grads = torch.autograd.grad(y, [saved[i] for i in index], dy, create_graph=True)
    found = dict(zip(index, grads, strict=True))
    return tuple(found.get(i) for i in range(len(TENSORS))) + (None,) * _SCALARS


def _backward(ctx, dy, _dstats, _dact):
    if dy is None:
        return (None,) * (len(TENSORS) + _SCALARS)
    if torch.is_grad_enabled():
        return _second_order(ctx, dy)
    with dispatch.use(ctx.selection):
        return _first_order(ctx, dy)


def _first_order(ctx, dy):
    saved = ctx.saved_tensors
    (
        stride, pad, act, slope, eps, batch_stats, p, drop_at, short_stride, short_act, short_eps, short_batch_stats,
    ) = ctx.scalars[:12]  # fmt: skip
    if drop_at == "output" and p > 0:
        dy = torch.ops.wrn_fast.dropout(dy, saved[_RNG], p)
    grads: list[Tensor | None] = [None] * len(TENSORS)
    if ctx.present[_RESIDUAL] and _wanted(ctx, _RESIDUAL):
        grads[_RESIDUAL] = dy
    if ctx.present[_BIAS] and _wanted(ctx, _BIAS):
        grads[_BIAS] = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    grads[_X], grads[_GAMMA], grads[_BETA], grads[_W] = _source_backward(
        ctx, dy, *saved[_X : _BETA + 1], saved[_RNG], _X,
        (stride, pad, act, slope, eps, batch_stats, p if drop_at == "prologue" else 0.0),
    )  # fmt: skip
    if ctx.present[_X_SHORT]:
        grads[_X_SHORT], grads[_GAMMA_SHORT], grads[_BETA_SHORT], grads[_W_SHORT] = _source_backward(
            ctx, dy, *saved[_X_SHORT : _BETA_SHORT + 1], None, _X_SHORT,
            (short_stride, [0] * 4, short_act, slope, short_eps, short_batch_stats, 0.0),
        )  # fmt: skip
    return (*grads, *[None] * _SCALARS)


torch.library.register_autograd("wrn_fast::fprop", _backward, setup_context=_setup_context, lib=LIB)
