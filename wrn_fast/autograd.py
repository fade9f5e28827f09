"""The gradient of fprop, made of the other primitives, and what stands in for it where a kernel cannot serve.

Between forward and backward it keeps x, not the activation. Where of a source nothing but x wants a gradient and
BatchNorm is in eval (attacks, saliency), it keeps one bit an element instead of x, and a factor a channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrn_fast import dispatch, masks, ops
from wrn_fast.backends import aten
from wrn_fast.checks import fprop_problem
from wrn_fast.errors import WrnFastError
from wrn_fast.precision import FP8
from wrn_fast.precision import current as current_precision
from wrn_fast.precision import take_over as take_over_precision
from wrn_fast.problem import TENSORS, FpropArgs

# Statistics have no gradient of their own: `batch_stats` says that they move with x, and bn_bwd_apply has that term.
DIFFERENTIABLE = tuple(name for name in TENSORS[:12] if not name.startswith("stats"))


def composite(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """fprop in differentiable ATen calls, for what a kernel cannot serve: functorch, forward AD, second derivatives.

    Batch statistics are taken from x again, so that their derivatives exist too.
    """
    a = FpropArgs(*args)
    problem = fprop_problem(a)
    wide = problem.stats_dtype
    with torch.autocast(problem.device, enabled=False):
        x = normalize(a.x.to(wide), a.stats, a.gamma, a.beta, a.eps, a.batch_stats)
        x_short = a.x_short
        if x_short is not None:
            x_short = normalize(
                x_short.to(wide), a.stats_short, a.gamma_short, a.beta_short, a.short_eps, a.short_batch_stats
            )  # fmt: skip
        y, y_act = aten.forward(
            problem, x, a.w, None, None, None, a.bias, a.residual, x_short, a.w_short, None, None, None, *args[12:15]
        )
        y = y.to(problem.dtype)
        stats_y = aten.moments(y.detach().to(wide)) if a.want_stats else a.x.new_empty(0, dtype=wide)
    return y, stats_y, a.x.new_empty(0) if y_act is None else y_act.to(problem.dtype)


def normalize(
    v: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, batch_stats: bool
) -> Tensor:
    """BatchNorm of v in its dtype; differentiable by v also through batch statistics, which are taken from v again."""
    if stats is None or not batch_stats:
        return aten.normalize(v, stats, gamma, beta, eps)
    gamma, beta = (None if t is None else t.to(v.dtype) for t in (gamma, beta))
    return torch.batch_norm(v, gamma, beta, None, None, True, 0.0, eps, False)


class _Source(NamedTuple):
    """What fprop convolves: x itself, or the shortcut's source (suffix "_short")."""

    suffix: str
    x: Any
    w: Any
    stats: Any
    gamma: Any
    beta: Any
    rng: Any
    stride: int
    pad: Any
    act: str
    slope: float
    eps: float
    p: float
    batch_stats: bool

    def names(self) -> tuple[str, ...]:
        """The arguments of fprop that its x, w, gamma and beta are."""
        return tuple(name + self.suffix for name in ("x", "w", "gamma", "beta"))


def _sources(a: FpropArgs) -> list[_Source]:
    p = a.p if a.drop_at == "prologue" else 0.0
    found = [
        _Source("", a.x, a.w, a.stats, a.gamma, a.beta, a.rng, a.stride, a.pad, a.act, a.slope, a.eps, p, a.batch_stats)
    ]
    if a.w_short is not None:
        found.append(
            _Source(
                "_short", a.x_short, a.w_short, a.stats_short, a.gamma_short, a.beta_short, None, a.short_stride,
                [0] * 4, a.short_act, a.slope, a.short_eps, 0.0, a.short_batch_stats,
            )
        )  # fmt: skip
    return found


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
        ctx.masked = {}
        for source in _sources(a):
            kept = _kept_for_x_alone(ctx, source)
            if kept is not None:
                ctx.masked[source.suffix] = source.x.shape
                fields = (name + source.suffix for name in ("x", "stats", "gamma", "beta"))
                a = FpropArgs(**a._asdict() | dict(zip(fields, (*kept, None, None), strict=True)))
        ctx.save_for_backward(*a._replace(bias=None, residual=None, out_scale=None, out_shift=None)[: len(TENSORS)])
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads: dict[str, Tensor | None] = {}
        if dy is not None:
            wanted = {name for i, name in enumerate(TENSORS) if name in DIFFERENTIABLE and is_wanted(ctx, i)}
            if wanted and (torch.is_grad_enabled() or is_many(dy)):
                grads = _in_aten(ctx, dy, wanted)
            else:
                with dispatch.take_over(ctx.selection), take_over_precision(ctx.precision):
                    grads = _first_order(ctx, dy, wanted)
        return (None, *(grads.get(name) for name in FpropArgs._fields))


def _kept_for_x_alone(ctx: Any, source: _Source) -> tuple[Tensor | None, Tensor | None] | None:
    """(mask of act', factor a channel) in place of (x, statistics); None where more than x wants a gradient."""
    wants = [ctx.needs_input_grad[1 + TENSORS.index(name)] for name in source.names()]
    if not any(wants):
        return None, None
    return None if any(wants[1:]) or not _one_bit_is_enough(source) else _mask_and_scale(source)


def _one_bit_is_enough(source: _Source) -> bool:
    """For the gradient by x: no statistics that move with x, and a derivative of two values."""
    return not (source.stats is not None and source.batch_stats) and source.act in (*masks.ACTS, "identity")


def _mask_and_scale(source: _Source) -> tuple[Tensor | None, Tensor | None]:
    _, x, _, stats, gamma, beta, _, _, _, act, slope, eps, _, _ = source
    mask = None if act == "identity" else ops.act_mask(x, stats, gamma, beta, act, slope, eps)
    if stats is None:
        return mask, None
    rstd = (stats[1].double() + eps).rsqrt()
    return mask, (rstd if gamma is None else rstd * gamma).to(stats.dtype)


def _below_autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return ops.fprop.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        if current_precision() == FP8:
            raise WrnFastError("`x`: expected no gradients under precision 'fp8' (torch.no_grad()), got grad mode on")
        return _Fprop.apply(keyset, *args)
    return _below_autograd(keyset, *args)


ops.LIB.impl("fprop", _autograd, "Autograd", with_keyset=True)


def is_many(dy: Tensor | None) -> bool:
    """is_grads_batched (a Jacobian with vectorize=True) hands over many gradients as one, which no kernel serves."""
    return dy is not None and not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy)


def is_wanted(ctx: Any, i: int) -> bool:
    """Will the engine use the gradient of tensor argument i in this backward call? Unsure means yes.

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
        dy = ops.dropout(dy, a.rng, a.p)
    else:
        # Once here instead of once in each primitive: a loss may hand over any strides, often an expanded scalar.
        dy = dy.contiguous(memory_format=torch.channels_last)
    grads: dict[str, Tensor | None] = {}
    if "residual" in wanted:
        grads["residual"] = dy
    if "bias" in wanted:
        grads["bias"] = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    for source in _sources(a):
        x_name, *others = source.names()
        if source.suffix in ctx.masked:
            if x_name in wanted:
                grads[x_name] = _by_x_alone(dy, source, source.x, source.stats, ctx.masked[source.suffix])
        elif x_name in wanted and wanted.isdisjoint(others) and _one_bit_is_enough(source):
            grads[x_name] = _by_x_alone(dy, source, *_mask_and_scale(source), source.x.shape)
        else:
            _of_source(grads, wanted, dy, source)
    return grads


def _by_x_alone(dy: Tensor, source: _Source, mask: Tensor | None, scale: Tensor | None, shape: torch.Size) -> Tensor:
    """dx where nothing else is wanted: no pass over x beside the convolution's own."""
    _, _, w, _, _, _, rng, stride, pad, act, slope, _, p, _ = source
    return ops.input_grad(dy, w, mask, scale, rng, shape, stride, pad, act, slope, p)


def _of_source(grads: dict[str, Tensor | None], wanted: set[str], dy: Tensor, source: _Source) -> None:
    """Adds the wanted ones of dx, dw, dgamma and dbeta of one source to `grads`."""
    _, x, w, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, batch_stats = source
    x_name, w_name, gamma_name, beta_name = source.names()
    want_affine = gamma_name in wanted or beta_name in wanted
    if x_name in wanted or want_affine:
        want_sums = stats is not None and (want_affine or batch_stats)
        g, sums_g = ops.dgrad(dy, x, w, stats, gamma, beta, rng, stride, pad, act, slope, eps, p, want_sums)
        if gamma_name in wanted:
            grads[gamma_name] = sums_g[1].to(gamma.dtype)
        if beta_name in wanted:
            grads[beta_name] = sums_g[0].to(beta.dtype)
        if x_name in wanted:
            if stats is not None:
                g = ops.bn_bwd_apply(g, x, stats, gamma, sums_g if want_sums else None, eps, batch_stats)
            grads[x_name] = g
    if w_name in wanted:
        dw = ops.wgrad(dy, x, stats, gamma, beta, rng, w.shape, w.dtype, stride, pad, act, slope, eps, p)
        # A 1x1 filter's memory is the same in either format, but DistributedDataParallel compares strides.
        if w.shape[2:] == (1, 1) and w.stride()[:2] == (w.shape[1], 1):
            dw = dw.reshape(w.shape[:2]).as_strided(w.shape, w.stride())
        grads[w_name] = dw


@torch.enable_grad()
def _in_aten(ctx: Any, dy: Tensor, wanted: set[str]) -> dict[str, Tensor | None]:
    """create_graph=True or many dy as one: made again in ATen, where gradients have gradients and batches. Slow, right.

    Only dy may be many: what stands in for arguments that were not saved is made from w.
    """
    # Views, because one tensor may come as two arguments, and each has a gradient of its own.
    saved = {
        name: v if v is None or name not in wanted else v.view_as(v)
        for name, v in zip(TENSORS, ctx.saved_tensors, strict=True)
    }
    like: Any = saved["w"].detach().to(dy.dtype)  # type: ignore[union-attr]
    if "bias" in wanted:
        saved["bias"] = like.new_zeros(dy.shape[1], dtype=ctx.bias_dtype).requires_grad_()
    if "residual" in wanted:
        saved["residual"] = like.new_zeros(dy.shape).requires_grad_()
    scales: dict[str, Tensor | None] = {}
    for suffix, shape in ctx.masked.items():
        name = f"x{suffix}"
        scales[name], saved[f"stats{suffix}"] = saved[f"stats{suffix}"], None
        # Behind relu and leaky_relu only the sign of bn(x) has a part in the gradient by x.
        mask = saved[name]
        saved[name] = like.new_zeros(shape) if mask is None else masks.signs(mask, shape[1], like)
        saved[name].requires_grad_(name in wanted)
    y = composite(*saved.values(), *ctx.scalars)[0]
    names = sorted(wanted)
    found = torch.autograd.grad(y, [saved[name] for name in names], dy, create_graph=True)
    grads: dict[str, Tensor | None] = {}
    for name, v in zip(names, found, strict=True):
        scale = scales.get(name)
        grads[name] = v if scale is None else (v * aten.channel(scale)).to(dy.dtype)
    return grads
