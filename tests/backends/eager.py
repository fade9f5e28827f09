"""The peer that parity is judged against: the primitives in plain PyTorch, in the tested dtype and channels_last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels.oracle import Case, act
from torch import Tensor

from wrn_fast.random import keep_mask


def _wide(case: Case) -> torch.dtype:
    return torch.float64 if case.problem.dtype == torch.float64 else torch.float32


def _bn(x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    return x if stats is None else F.batch_norm(x, stats[0], stats[1], gamma, beta, False, 0.0, eps)


def _drop(case: Case, v: Tensor, where: str) -> Tensor:
    problem = case.problem
    if problem.p == 0 or problem.drop_at != where:
        return v
    return v * (keep_mask(v.shape, case.rng, problem.p).to(v.dtype) / (1 - problem.p))


def _convolution(case: Case, v: Tensor, w: Tensor) -> Tensor:
    problem = case.problem
    a = _drop(case, act(v, problem.act, problem.slope), "prologue")
    left, right, top, bottom = problem.pad
    if left == right and top == bottom:
        return F.conv2d(a, w, None, problem.stride, (top, left))
    return F.conv2d(F.pad(a, problem.pad), w, None, problem.stride)


def _normal(case: Case) -> Tensor:
    return _bn(case.x, case.stats, case.gamma, case.beta, case.problem.eps)


def fprop(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, stats of y, y_act)."""
    problem, dtype, wide = case.problem, case.problem.dtype, _wide(case)
    y = _convolution(case, _normal(case), case.w.to(dtype))
    if case.bias is not None:
        y = y + case.bias.to(dtype)[:, None, None]
    if case.x_short is not None:
        v = _bn(case.x_short, case.stats_short, case.gamma_short, case.beta_short, problem.short_eps)
        v = act(v, problem.short_act, problem.slope)
        y = y + F.conv2d(v, case.w_short.to(dtype), stride=problem.short_stride)
    if case.residual is not None:
        y = y + case.residual
    y = _drop(case, y, "output")
    if problem.act_out == "none":
        return y, moments(y, wide), None
    z = y.to(wide)
    z = z if case.out_scale is None else z * case.out_scale[:, None, None]
    z = z if case.out_shift is None else z + case.out_shift[:, None, None]
    return y, moments(y, wide), _drop(case, act(z.to(dtype), problem.act_out, problem.slope), "output_act")


def moments(y: Tensor, wide: torch.dtype) -> Tensor:
    var, mean = torch.var_mean(y.to(wide), (0, 2, 3), correction=0)
    return torch.stack([mean, var])


def gradients(case: Case) -> tuple[Tensor, Tensor]:
    """(g = dL/d(bn(x)), dw) by autograd for dL/dy = dy."""
    v = _normal(case).detach().requires_grad_()
    w = case.w.detach().clone().requires_grad_()
    return torch.autograd.grad(_convolution(case, v, w.to(case.problem.dtype)), [v, w], case.dy)


def sums(case: Case, g: Tensor) -> Tensor:
    """The sums of g and g*xhat as BatchNorm's backward takes them for dbeta and dgamma."""
    wide = _wide(case)
    xhat = _bn(case.x.to(wide), case.stats, None, None, case.problem.eps)
    return torch.stack([g.to(wide).sum((0, 2, 3)), (g.to(wide) * xhat).sum((0, 2, 3))])


def bn_bwd_apply(case: Case, g: Tensor) -> Tensor:
    """BatchNorm's own backward."""
    mean, var = case.stats[0], case.stats[1]
    batch = case.problem.batch_stats
    return torch.ops.aten.native_batch_norm_backward(
        g, case.x, case.gamma, None if batch else mean, None if batch else var, mean,
        (var + case.problem.eps).rsqrt(), batch, case.problem.eps, [True, False, False],
    )[0]  # fmt: skip
