"""The operator in plain PyTorch calls: its executable specification, and what serves a case that nothing faster does.

Accumulation and the prologue are in float32 (float64 for float64); the convolution is the library's in the compute
dtype, so in float16 and bfloat16 its result is rounded once more before residual and shortcut are added, as eager does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wrn_fast import masks, random
from wrn_fast.problem import NORM_EPS, ConvProblem

NAME = "aten"


def unsupported(op: str, problem: ConvProblem) -> str | None:
    """Nothing: ATen serves every dtype and device that PyTorch has."""
    return None


def activate(v: Tensor, act: str, slope: float) -> Tensor:
    """act(v). NaN stays NaN."""
    if act == "relu":
        return torch.relu(v)
    if act == "silu":
        return F.silu(v)
    if act == "leaky_relu":
        return F.leaky_relu(v, slope)
    return v


def act_backward(g: Tensor, v: Tensor, act: str, slope: float) -> Tensor:
    """g * act'(v) as PyTorch's own backward has it: a selection, 0 at 0 for relu, `slope` at 0 for leaky_relu."""
    if act == "relu":
        return torch.ops.aten.threshold_backward(g, v, 0)
    if act == "silu":
        return torch.ops.aten.silu_backward(g, v)
    if act == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(g, v, slope, False)
    return g


def channel(v: Tensor) -> Tensor:
    """[C] as [C,1,1]."""
    return v[:, None, None]


def normalize(v: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """BatchNorm with given statistics, in v's dtype; v itself where there are none."""
    if stats is None:
        return v
    gamma = None if gamma is None else gamma.to(v.dtype)
    beta = None if beta is None else beta.to(v.dtype)
    return torch.batch_norm(v, gamma, beta, stats[0], stats[1], False, 0.0, eps, False)


def standardize(v: Tensor, stats: Tensor, eps: float) -> Tensor:
    """xhat: the mean goes first, so a large one costs no digits of the sums over it."""
    return (v - channel(stats[0])) * channel((stats[1] + eps).rsqrt())


def moments(v: Tensor) -> Tensor:
    """[2, C]: mean and biased variance over N, H, W; zeros for an empty batch."""
    if v.shape[0] == 0:
        return v.new_zeros(2, v.shape[1])
    var, mean = torch.var_mean(v, (0, 2, 3), correction=0)
    return torch.stack([mean, var])


def _nhwc(v: Tensor, dtype: torch.dtype) -> Tensor:
    """`v` in `dtype` with the dense channels_last strides that the fake kernels promise."""
    out = torch.empty(v.shape, dtype=dtype, device=v.device, memory_format=torch.channels_last)
    return v if v.dtype == dtype and v.stride() == out.stride() else out.copy_(v)


def _absent(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _source(
    problem: ConvProblem,
    x: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
) -> Tensor:
    """act(bn(x)), dropped, in the compute dtype: what the convolution reads inside its padding."""
    v = normalize(x.to(problem.stats_dtype), stats, gamma, beta, problem.eps)
    a = activate(v, problem.act, problem.slope)
    if problem.drop_at == "prologue" and problem.p > 0:
        a = random.dropout(a, rng, problem.p)  # type: ignore[arg-type]
    return a.to(problem.compute_dtype)


def _padding(problem: ConvProblem, a: Tensor) -> tuple[Tensor, list[int]]:
    """The library pads both sides alike; four different numbers are padded before it."""
    left, right, top, bottom = problem.pad
    if left == right and top == bottom:
        return a, [top, left]
    return F.pad(a, problem.pad), [0, 0]


def forward(
    problem: ConvProblem,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    x_short: Tensor | None,
    w_short: Tensor | None,
    stats_short: Tensor | None,
    gamma_short: Tensor | None,
    beta_short: Tensor | None,
    rng: Tensor | None,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """y and y_act in the accumulation dtype, any layout: differentiable, so functorch and second derivatives use it."""
    wide = problem.stats_dtype
    a, padding = _padding(problem, _source(problem, x, stats, gamma, beta, rng))
    y = torch.conv2d(a, w.to(problem.compute_dtype), None, problem.stride, padding).to(wide)
    if bias is not None:
        y = y + channel(bias.to(wide))
    if x_short is not None:
        assert w_short is not None
        v = normalize(x_short.to(wide), stats_short, gamma_short, beta_short, problem.short_eps)
        s = activate(v, problem.short_act, problem.slope).to(problem.compute_dtype)
        y = y + torch.conv2d(s, w_short.to(problem.compute_dtype), None, problem.short_stride).to(wide)
    if residual is not None:
        y = y + residual.to(wide)
    if problem.drop_at == "output" and problem.p > 0:
        y = random.dropout(y, rng, problem.p)  # type: ignore[arg-type]
    if problem.act_out == "none":
        return y, None
    z = y if out_scale is None else y * channel(out_scale.to(wide))
    z = activate(z if out_shift is None else z + channel(out_shift.to(wide)), problem.act_out, problem.slope)
    if problem.drop_at == "output_act" and problem.p > 0:
        z = random.dropout(z, rng, problem.p)  # type: ignore[arg-type]
    return y, z


def fprop(
    problem: ConvProblem,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    x_short: Tensor | None,
    w_short: Tensor | None,
    stats_short: Tensor | None,
    gamma_short: Tensor | None,
    beta_short: Tensor | None,
    rng: Tensor | None,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N,K,P,Q], stats_y [2,K], y_act [N,K,P,Q]); an absent output has 0 elements."""
    y, z = forward(
        problem, x, w, stats, gamma, beta, bias, residual, x_short, w_short, stats_short, gamma_short, beta_short, rng,
        out_scale, out_shift,
    )  # fmt: skip
    absent = x.new_empty(0)
    out = _nhwc(y, problem.dtype) if problem.want_y else absent
    stats_y = moments(out.to(problem.stats_dtype)) if problem.want_stats else _absent(x, problem.stats_dtype)
    return out, stats_y, absent.clone() if z is None else _nhwc(z, problem.dtype)


def _backward(problem: ConvProblem, dy: Tensor, a: Tensor, w: Tensor, which: list[bool]) -> tuple[Tensor, Tensor]:
    # oneDNN's bfloat16 weight gradient reads memory that nobody wrote where a strided output is one column wide.
    narrow = problem.dtype == torch.bfloat16 and problem.stride > 1 and problem.Q == 1
    dtype = torch.float32 if narrow else problem.compute_dtype
    stride = problem.stride
    if which == [False, True, False] and problem.R == problem.S == 1 and stride > 1:
        # oneDNN's weight gradient of a strided 1x1 filter writes past its memory below 16 channels, with several
        # threads: the pixels that it meets are picked here.
        a = F.pad(a, problem.pad) if any(problem.pad) else a
        a, padding = a[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last), [0, 0]
        stride = 1
    else:
        a, padding = _padding(problem, a)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy.to(dtype), a.to(dtype), w.to(dtype), None, [stride] * 2, padding, [1, 1], False, [0, 0], 1, which
    )
    return dx, dw


def _da(problem: ConvProblem, dy: Tensor, x: Tensor, w: Tensor, rng: Tensor | None) -> Tensor:
    """The gradient of the activation, in the accumulation dtype; of x only the shape is read."""
    da, _ = _backward(problem, dy, x, w, [True, False, False])
    left, _, top, _ = problem.pad
    if da.shape[2:] != x.shape[2:]:
        da = da[:, :, top : top + problem.H, left : left + problem.W]
    da = da.to(problem.stats_dtype)
    if problem.drop_at == "prologue" and problem.p > 0:
        da = random.dropout(da, rng, problem.p)  # type: ignore[arg-type]
    return da


def dgrad(
    problem: ConvProblem,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(g [N,C,H,W], sums_g [2,C]): the gradient before the activation, and the sums of g and g*xhat."""
    wide = problem.stats_dtype
    g = _da(problem, dy, x.to(problem.compute_dtype), w, rng)
    if problem.act != "identity":
        v = normalize(x.to(wide), stats, gamma, beta, problem.eps)
        g = act_backward(g, v, problem.act, problem.slope)
    out = _nhwc(g, problem.dtype)
    if not problem.want_stats:
        return out, _absent(x, wide)
    assert stats is not None
    g, xhat = out.to(wide), standardize(x.to(wide), stats, problem.eps)
    return out, torch.stack([g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))])


def wgrad(
    problem: ConvProblem,
    dy: Tensor,
    x: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
) -> Tensor:
    """dw [K,C,R,S]: the activation is made again from x."""
    a = _source(problem, x, stats, gamma, beta, rng)
    w = a.new_empty((problem.K, problem.C, problem.R, problem.S))
    return _nhwc(_backward(problem, dy, a, w, [False, True, False])[1], problem.w_dtype)


def act_mask(
    problem: ConvProblem, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """uint8 [N,H,W,ceil(C/8)]: one bit an element, set where act'(bn(x)) is 1."""
    v = normalize(x.to(problem.stats_dtype), stats, gamma, beta, problem.eps)
    return masks.pack(~(v <= 0) if problem.act == "relu" else v > 0)


def input_grad(
    problem: ConvProblem, dy: Tensor, w: Tensor, mask: Tensor | None, scale: Tensor | None, rng: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] = scale * act' * dropout'(dgrad(dy, w)), where only x wants a gradient and BatchNorm is in eval."""
    shape = problem.N, problem.C, problem.H, problem.W
    dx = _da(problem, dy, dy.new_empty(shape, dtype=problem.compute_dtype), w, rng)
    if mask is not None:
        # A selection, not a product: an infinite gradient behind a closed relu is 0.
        closed = torch.zeros_like(dx) if problem.act == "relu" else dx * problem.slope
        dx = torch.where(masks.unpack(mask, problem.C), dx, closed)
    return _nhwc(dx if scale is None else dx * channel(scale), problem.dtype)


def bn_bwd_apply(
    problem: ConvProblem, g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor | None, sums_g: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] from the gradient before the activation: BatchNorm's own backward."""
    wide = problem.stats_dtype
    rstd = (stats[1] + problem.eps).rsqrt()
    scale = rstd if gamma is None else rstd * gamma.to(wide)
    v = g.to(wide)
    if problem.batch_stats:
        assert sums_g is not None
        m = max(1, problem.N * problem.H * problem.W)
        xhat = standardize(x.to(wide), stats, problem.eps)
        v = v - channel(sums_g[0] / m) - xhat * channel(sums_g[1] / m)
    return _nhwc(v * channel(scale), problem.dtype)


def channel_stats(problem: ConvProblem, x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance of x."""
    return moments(x.to(problem.stats_dtype))


def dropout(problem: ConvProblem, x: Tensor, rng: Tensor) -> Tensor:
    """x * mask / (1 - p)."""
    return _nhwc(random.dropout(x.to(problem.stats_dtype), rng, problem.p), problem.dtype)


def pool(problem: ConvProblem, v: Tensor) -> Tensor:
    """[N,C]: the mean of act(v) over the image, v after BatchNorm; differentiable."""
    return F.avg_pool2d(activate(v, problem.act, problem.slope), (problem.H, problem.W)).flatten(1)


def unit(feature: Tensor) -> Tensor:
    """feature / |feature| along C; differentiable."""
    return F.normalize(feature, dim=1, eps=NORM_EPS)


def classify(problem: ConvProblem, feature: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """[N,K]: the classes' values, in the feature's dtype; differentiable."""
    bias = None if bias is None else bias.to(feature.dtype)
    if not problem.cosine:
        return F.linear(feature, w.to(feature.dtype), bias)
    return F.linear(unit(feature), w.to(feature.dtype), bias).abs()


def head(
    problem: ConvProblem,
    y: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [N,K], feat [N,C]): the mean of act(bn(y)) over the image, and the classes' values of it."""
    feature = pool(problem, normalize(y.to(problem.stats_dtype), stats, gamma, beta, problem.eps))
    return classify(problem, feature, w, bias).to(problem.dtype), feature.to(problem.dtype)


def head_bwd(
    problem: ConvProblem, dfeat: Tensor, y: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dy [N,C,H,W], sums_g [2,C]) from the feature's gradient, with g = dfeat / (H*W) * act'(bn(y)):

    dy = gamma * rstd * (g - sum(g)/m - xhat * sum(g*xhat)/m)    batch statistics, m = N*H*W
    dy = gamma * rstd * g                                        running ones;   dy = g without BatchNorm
    """
    wide = problem.stats_dtype
    g = (dfeat / (problem.H * problem.W))[:, :, None, None].expand(y.shape)
    v = y.to(wide)
    g = act_backward(g, normalize(v, stats, gamma, beta, problem.eps), problem.act, problem.slope)
    sums = _absent(y, wide)
    if stats is not None:
        xhat = standardize(v, stats, problem.eps)
        if problem.batch_stats or problem.want_stats:
            sums = torch.stack([g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))])
        if problem.batch_stats:
            m = max(1, problem.N * problem.H * problem.W)
            g = g - channel(sums[0] / m) - xhat * channel(sums[1] / m)
        rstd = (stats[1] + problem.eps).rsqrt()
        g = g * channel(rstd if gamma is None else rstd * gamma.to(wide))
    return _nhwc(g, problem.dtype), sums if problem.want_stats else _absent(y, wide)
