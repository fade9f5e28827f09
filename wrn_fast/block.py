"""Residual blocks through the fused operator: what a block is made of, and one way to run it.

One operator call a convolution. Statistics of a block's output are taken where it is written and handed to the next
block's BatchNorm inside a chain; a block that someone listens to (hooks, parametrizations, a replaced forward) is
called as the module that it is, and then nothing is handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from wrn_fast import held
from wrn_fast.chain import run_blocks
from wrn_fast.functional import bn_act_conv, channel_stats


class Stage(NamedTuple):
    """BatchNorm, activation and convolution: one operator call."""

    bn: nn.BatchNorm2d
    conv: nn.Conv2d
    act: tuple[str, float] = ("relu", 0.0)  # name, slope
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom


class BlockParts(NamedTuple):
    """A pre-activation block as data. Modules are read at each call: flags, statistics and weights may change."""

    stages: tuple[Stage, ...]
    shortcut: nn.Conv2d | None  # 1x1; None: x itself, raw
    p: float = 0.0
    drop_at: str = "prologue"  # of the last convolution; "output": of the one before it, before the last BatchNorm
    conv1_reads_x: bool = False  # raw x; the first BatchNorm then only moves its running statistics
    shortcut_reads_x: bool = False  # raw x instead of act(bn(x)) of the first stage

    @property
    def slope(self) -> float:
        """Of the last call: the operator has one for the last activation and the shortcut's, that of the leaky one."""
        last = self.stages[-1].act
        return last[1] if last[0] == "leaky_relu" else self.stages[0].act[1]


class FastBlock:
    """Mixin of the block classes that `run_chain` may open. First among the bases."""

    def parts(self) -> BlockParts | None:
        """The block as data, or None where only its own plain forward is right."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The block alone: it takes the statistics of x itself."""
        parts = self.parts()
        if parts is None:
            return super().forward(x)  # type: ignore[misc]
        return run_block(parts, x, None)[0]


class Prologue(NamedTuple):
    """A BatchNorm as the operator's arguments."""

    stats: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    batch_stats: bool


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Does someone listen to this module, or has its forward or a parameter been replaced?"""
    d = module.__dict__
    return any(d[name] for name in _HOOKS) or "forward" in d or "parametrizations" in d["_modules"]


def listened(module: nn.Module) -> bool:
    """Is a module inside this one hooked? Its owner expects it to be called."""
    return any(m is not None and (hooked(m) or (m._modules and listened(m))) for m in module._modules.values())


def activation(module: Any) -> tuple[str, float] | None:
    """(name, slope) of an activation module that the operator has; None for any other."""
    kind = type(module)
    if kind is nn.ReLU:
        return "relu", 0.0
    if kind is nn.SiLU:
        return "silu", 0.0
    if kind is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    return ("identity", 0.0) if kind is nn.Identity else None


def padding(conv: Any) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of a convolution with numeric padding."""
    top, left = conv.padding
    return left, left, top, top


def plain_conv(conv: nn.Module | None) -> bool:
    """Is it a Conv2d that the operator computes: one group, no dilation, square stride, zeros outside?"""
    return (
        type(conv) is nn.Conv2d
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.stride[0] == conv.stride[1]
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def uses_batch_stats(bn: nn.BatchNorm2d) -> bool:
    """BatchNorm's own rule, per call."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def update_running(bn: nn.BatchNorm2d, stats: Tensor, x: Tensor) -> None:
    """Move the running statistics by the batch's, as BatchNorm2d does; x [N, C, H, W] gives the number of values."""
    if not (bn.training and bn.track_running_stats):
        return
    n = x.numel() // x.shape[1]
    with torch.no_grad():
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        # Such batches are counted, and move nothing.
        if n == 0 or bn.running_mean is None or bn.running_var is None:
            return
        dtype = bn.running_mean.dtype
        # momentum None averages all batches; 1 / count stays a tensor, so that nothing waits for the device
        count = bn.num_batches_tracked
        factor: Any = bn.momentum if bn.momentum is not None else 0.0 if count is None else 1.0 / count.to(dtype)
        mean, var = stats.unbind()
        # In one call, so that a KeyboardInterrupt finds both moved or neither.
        torch._foreach_lerp_(
            [bn.running_mean, bn.running_var],
            [mean.to(dtype), (var * (n / (n - 1))).to(dtype)],
            [factor, factor] if isinstance(factor, Tensor) else factor,  # type: ignore[arg-type]
        )


def running_stats(bn: nn.BatchNorm2d, dtype: torch.dtype) -> Tensor:
    """[2, C] of a BatchNorm that has running statistics; a graph that is being captured gets them ready-made."""
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None and var is not None
    return held.stacked(mean, var, dtype)


def batch_norm(bn: nn.BatchNorm2d, x: Tensor, stats: Tensor | None) -> Prologue:
    """The operator's arguments for bn(x); moves the running statistics where BatchNorm2d would.

    Args:
        bn: read now: training, track_running_stats, momentum, statistics, affine parameters.
        x: [N, C, H, W], the tensor to be normalised.
        stats: [2, C] of x where its producer took them; else they are taken here if needed.

    Raises:
        ValueError: BatchNorm2d's own, for one value a channel in training.
    """
    batch = uses_batch_stats(bn)
    if not batch:
        stats = running_stats(bn, torch.float64 if x.dtype == torch.float64 else torch.float32)
    else:
        if x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
        stats = channel_stats(x) if stats is None else stats
        update_running(bn, stats, x)
    return Prologue(stats, bn.weight, bn.bias, bn.eps, batch)


def run_block(
    parts: BlockParts, x: Tensor, stats: Tensor | None, want_stats: bool = False
) -> tuple[Tensor, Tensor | None]:
    """One block, an operator call a convolution.

        h_0 = x;  h_i = conv_i(act_i(bn_i(h_{i-1})));  y = h_l + (x, or shortcut(act_1(bn_1(x)) or x))

    Args:
        parts: the block.
        x: [N, C, H, W], floating.
        stats: [2, C] of x from its producer, or None.
        want_stats: are the statistics of y wanted?

    Returns:
        (y [N, K, P, Q] channels_last, stats_y [2, K] or None).
    """
    return leave_block(parts, x, *enter_block(parts, x, stats), want_stats)


def enter_block(parts: BlockParts, x: Tensor, stats: Tensor | None) -> tuple[Prologue, Tensor, Prologue]:
    """All but the last operator call: (the first BatchNorm's arguments, h, the last BatchNorm's arguments for h)."""
    stages = parts.stages
    first = norm = batch_norm(stages[0].bn, x, stats)
    h = x
    for i in range(1, len(stages)):
        stage, bn = stages[i - 1], stages[i].bn
        prologue: dict[str, Any] = {"act": "identity"}
        if i > 1 or not parts.conv1_reads_x:
            prologue = norm._asdict() | {"act": stage.act[0], "slope": stage.act[1]}
        dropping = parts.drop_at == "output" and i == len(stages) - 1
        h, h_stats, _ = bn_act_conv(
            h, stage.conv.weight, bias=stage.conv.bias, stride=stage.conv.stride[0], pad=stage.pad,
            p=parts.p if dropping else 0.0, drop_at=parts.drop_at, want_stats=uses_batch_stats(bn), **prologue,
        )  # fmt: skip
        norm = batch_norm(bn, h, h_stats if h_stats.numel() else None)
    return first, h, norm


def leave_block(
    parts: BlockParts, x: Tensor, first: Prologue, h: Tensor, norm: Prologue, want_stats: bool
) -> tuple[Tensor, Tensor | None]:
    """The last operator call of a block, after what `enter_block` gave: (y, statistics of y or None)."""
    stage = parts.stages[-1]
    bias = stage.conv.bias
    short: dict[str, Any] = {}
    if parts.shortcut is None:
        short["residual"] = x
    else:
        short |= {"x_short": x, "w_short": parts.shortcut.weight, "short_stride": parts.shortcut.stride[0]}
        if not parts.shortcut_reads_x:
            short |= {
                "stats_short": first.stats, "gamma_short": first.gamma, "beta_short": first.beta,
                "short_eps": first.eps, "short_batch_stats": first.batch_stats, "short_act": parts.stages[0].act[0],
            }  # fmt: skip
        if parts.shortcut.bias is not None:
            bias = parts.shortcut.bias if bias is None else bias + parts.shortcut.bias
    y, y_stats, _ = bn_act_conv(
        h, stage.conv.weight, norm.stats, norm.gamma, norm.beta, bias, eps=norm.eps, batch_stats=norm.batch_stats,
        stride=stage.conv.stride[0], pad=stage.pad, act=stage.act[0], slope=parts.slope,
        p=parts.p if parts.drop_at == "prologue" else 0.0, drop_at=parts.drop_at, want_stats=want_stats, **short,
    )  # fmt: skip
    return y, y_stats if want_stats else None


def run_parts(blocks: Sequence[BlockParts], x: Tensor, stats: Tensor | None = None) -> Tensor:
    """Blocks in a row to which nobody listens: [N, K, P, Q] of the last one, x itself where there is none."""
    y = run_blocks(blocks, x) if blocks else x
    if y is not None:
        return y
    for i, here in enumerate(blocks):
        x, stats = run_block(here, x, stats, i + 1 < len(blocks) and uses_batch_stats(blocks[i + 1].stages[0].bn))
    return x


def _parts(unit: nn.Module) -> BlockParts | None:
    """The unit's parts if a chain may open it: nobody listens to the unit itself, and it knows its parts."""
    return unit.parts() if isinstance(unit, FastBlock) and not hooked(unit) else None  # type: ignore[arg-type]


def run_chain(units: Sequence[nn.Module], x: Tensor, stats: Tensor | None = None) -> Tensor:
    """Blocks in a row, statistics handed from one to the next.

    Args:
        units: modules of one tensor argument; those that are FastBlocks without listeners are opened.
        x: [N, C, H, W].
        stats: [2, C] of x, or None.

    Returns:
        y [N, K, P, Q].
    """
    open_units = not _has_any_global_hook()
    parts = [_parts(unit) if open_units else None for unit in units]
    blocks = [part for part in parts if part is not None]
    if len(blocks) == len(units):
        return run_parts(blocks, x, stats)
    for i, unit in enumerate(units):
        here = parts[i]
        if here is None:
            x, stats = unit(x), None
            continue
        follower = parts[i + 1] if i + 1 < len(units) else None
        x, stats = run_block(here, x, stats, follower is not None and uses_batch_stats(follower.stages[0].bn))
    return x
