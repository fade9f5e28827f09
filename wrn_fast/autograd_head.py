"""The gradient of head: two small products for its classes, and `head_bwd` for what is as large as y.

Between forward and backward it keeps y, or nothing of it where neither BatchNorm nor activation precede; the feature,
which is an output anyway, and the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wrn_fast import dispatch, ops
from wrn_fast.autograd import is_many, is_wanted, normalize
from wrn_fast.backends import aten
from wrn_fast.checks import head_problem
from wrn_fast.problem import NORM_EPS, ConvProblem

# The arguments of head that are tensors. Statistics have no gradient of their own.
TENSORS = ("y", "stats", "gamma", "beta", "w", "bias")
_OF_POOL, _OF_CLASSES = ("y", "gamma", "beta"), ("w", "bias")


def composite(*args: Any) -> tuple[Tensor, Tensor]:
    """head in differentiable ATen calls, for what a kernel cannot serve: functorch, forward AD."""
    problem = head_problem(*args)
    w, bias = args[4:6]
    with torch.autocast(problem.device, enabled=False):
        feature = _pool(problem, *args[:4])
        return aten.classify(problem, feature, w, bias).to(problem.dtype), feature.to(problem.dtype)


def _pool(problem: ConvProblem, y: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """The feature [N,C] in the accumulation dtype; differentiable."""
    v = normalize(y.to(problem.stats_dtype), stats, gamma, beta, problem.eps, problem.batch_stats)
    return aten.pool(problem, v)


class _Head(torch.autograd.Function):
    """head with its gradient."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, feature = _below_autograd(keyset, *args)
        tensors, ctx.scalars = args[: len(TENSORS)], args[len(TENSORS) :]
        ctx.present = [t is not None for t in tensors]
        ctx.problem = problem = head_problem(*args)
        ctx.selection = None if torch.compiler.is_compiling() else dispatch.selection()
        ctx.plain = not problem.prologue and problem.act == "identity"
        ctx.save_for_backward(*tensors if not ctx.plain else (None, *tensors[1:]), feature)
        ctx.set_materialize_grads(False)
        return out, feature

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dfeat: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads: dict[str, Tensor | None] = {}
        if dout is not None or dfeat is not None:
            wanted = {name for i, name in enumerate(TENSORS) if name != "stats" and is_wanted(ctx, i)}
            if wanted and (torch.is_grad_enabled() or is_many(dout) or is_many(dfeat)):
                grads = _in_aten(ctx, dout, dfeat, wanted)
            else:
                with dispatch.take_over(ctx.selection):
                    grads = _first_order(ctx, dout, dfeat, wanted)
        return (None, *(grads.get(name) for name in TENSORS), *(None for _ in ctx.scalars))


def _below_autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return ops.head.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _Head.apply(keyset, *args)
    return _below_autograd(keyset, *args)


ops.LIB.impl("head", _autograd, "Autograd", with_keyset=True)


def _spread(problem: ConvProblem, d: Tensor) -> Tensor:
    """The gradient of a mean over the image: a view, which is written out once by whoever reads it next."""
    pixels = problem.H * problem.W
    return (d / pixels).to(problem.dtype)[:, :, None, None].expand(-1, -1, problem.H, problem.W)


def _first_order(ctx: Any, dout: Tensor | None, dfeat: Tensor | None, wanted: set[str]) -> dict[str, Tensor | None]:
    y, stats, gamma, beta, w, bias, feature = ctx.saved_tensors
    problem = ctx.problem
    wide = problem.stats_dtype
    d = None if dfeat is None else dfeat.to(wide)
    grads: dict[str, Tensor | None] = {}
    if dout is not None:
        grads = _of_classes(problem, dout.to(wide), feature.to(wide), w, bias, wanted)
        by_classes = grads.pop("feature")
        d = by_classes if d is None else d + by_classes  # type: ignore[operator]
    assert d is not None
    if wanted.isdisjoint(_OF_POOL):
        return grads
    if ctx.plain:
        return grads | {"y": _spread(problem, d)}
    affine = not wanted.isdisjoint(("gamma", "beta"))
    grads["y"], sums = ops.head_bwd(d, y, stats, gamma, beta, *ctx.scalars[:4], affine)
    if "gamma" in wanted:
        grads["gamma"] = sums[1].to(gamma.dtype)
    if "beta" in wanted:
        grads["beta"] = sums[0].to(beta.dtype)
    return grads


def _of_classes(
    problem: ConvProblem, d: Tensor, feature: Tensor, w: Tensor, bias: Tensor | None, wanted: set[str]
) -> dict[str, Tensor | None]:
    """Gradients of the feature, and of w and bias where they are wanted, from that of the classes' values."""
    grads: dict[str, Tensor | None] = {}
    wide_w = w.to(d.dtype)
    u = aten.unit(feature) if problem.cosine else feature
    if problem.cosine:
        d = d * F.linear(u, wide_w, None if bias is None else bias.to(d.dtype)).sgn()
    if "w" in wanted:
        grads["w"] = (d.t() @ u).to(w.dtype)
    if "bias" in wanted:
        grads["bias"] = d.sum(0).to(bias.dtype)  # type: ignore[union-attr]
    d = d @ wide_w
    if problem.cosine:
        # Along the feature nothing changes, unless it is so short that a constant divides it.
        length = feature.norm(dim=1, keepdim=True)
        along = u * (u * d).sum(1, keepdim=True)
        d = (d - along.masked_fill(length < NORM_EPS, 0.0)) / length.clamp_min(NORM_EPS)
    return grads | {"feature": d}


@torch.enable_grad()
def _in_aten(ctx: Any, dout: Tensor | None, dfeat: Tensor | None, wanted: set[str]) -> dict[str, Tensor | None]:
    """The gradient made again in ATen: it has a gradient (create_graph=True) and takes many at once. Slow and right.

    The feature is an output of this node, so what is made of it reaches y, gamma and beta by itself.
    """
    problem = ctx.problem
    # Views, because one tensor may come as two arguments, and each has a gradient of its own.
    tensors = {
        name: v if v is None or name not in wanted else v.view_as(v)
        for name, v in zip(TENSORS, ctx.saved_tensors[:-1], strict=True)
    }
    d = None if dfeat is None else dfeat.to(problem.stats_dtype)
    grads: dict[str, Tensor | None] = {}
    if dout is not None:
        feature = ctx.saved_tensors[-1].to(problem.stats_dtype)
        out = aten.classify(problem, feature, tensors["w"], tensors["bias"])  # type: ignore[arg-type]
        grads = _grad(
            out, {"feature": feature} | {n: tensors[n] for n in _OF_CLASSES if n in wanted}, dout.to(out.dtype)
        )
        by_classes = grads.pop("feature")
        d = by_classes if d is None else d + by_classes  # type: ignore[operator]
    assert d is not None
    sources = {name: tensors[name] for name in _OF_POOL if name in wanted}
    if sources and ctx.plain:
        grads["y"] = _spread(problem, d)
    elif sources:
        grads |= _grad(_pool(problem, *(tensors[name] for name in TENSORS[:4])), sources, d)  # type: ignore[arg-type]
    return grads


def _grad(value: Tensor, sources: dict[str, Any], d: Tensor) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(value, list(sources.values()), d, create_graph=True)
    return dict(zip(sources, found, strict=True))
