"""The drop-in: the reference's modules, weights and outputs, computed through the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from wrn_fast import dispatch, reference
from wrn_fast.block import (
    BlockParts,
    FastBlock,
    Stage,
    activation,
    batch_norm,
    hooked,
    listened,
    padding,
    plain_conv,
    run_chain,
    uses_batch_stats,
)
from wrn_fast.errors import WrnFastError
from wrn_fast.functional import bn_act_conv, head

_STAGES = tuple((f"bn{i}", f"relu{i}", f"conv{i}") for i in (1, 2, 3, 4))


class BasicBlock(FastBlock, reference.BasicBlock):
    """The reference's block, an operator call a convolution. Its plain forward serves who hooks an inner module."""

    def parts(self) -> BlockParts | None:
        """The block as data; None if an inner module is hooked, parametrized or of another kind than was built."""
        m: dict[str, Any] = self._modules
        shortcut = m.get("convShortcut")
        if (shortcut is not None and not plain_conv(shortcut)) or listened(self):
            return None
        stages, slope = [], None
        for bn_name, relu_name, conv_name in _STAGES[: self.deepening]:
            bn, conv, act = m[bn_name], m[conv_name], activation(m[relu_name])
            if type(bn) is not nn.BatchNorm2d or act is None or not plain_conv(conv):
                return None
            # the operator has one slope for an activation and the shortcut's
            if act[1] != (act[1] if slope is None else slope):
                return None
            slope = act[1]
            stages.append(Stage(bn, conv, act, padding(conv)))
        dropping = self.droprate > 0 and (self.training or self.dropout_in_eval)
        return BlockParts(tuple(stages), shortcut, self.droprate if dropping else 0.0)


class NetworkBlock(reference.NetworkBlock):
    """A group of blocks; statistics pass from block to block."""

    def units(self) -> list[nn.Module]:
        """What a chain may run one by one: the blocks, or the group itself if someone listens to it."""
        if hooked(self) or hooked(self.layer) or type(self.layer) is not nn.Sequential:
            return [self]
        return list(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_planes, H, W] -> [N, out_planes, H / stride, W / stride]."""
        if hooked(self.layer) or type(self.layer) is not nn.Sequential:
            return self.layer(x)
        return run_chain(list(self.layer), x)


class WideResNet(reference.WideResNet):
    """A fast WideResNet with the reference's weights and outputs. See `wrn_fast.reference.WideResNet` for arguments.

    Parameter names, their order, initial weights for a seed, running statistics, hooks, `state_dict` and flags are the
    reference's; `load_state_dict(strict=True)` works in both directions.

    Returns (forward):
        Cosine head: (out [N, num_classes], out_feat [N, 64k]). Classic head: logits [N, num_classes].

    Raises:
        WrnFastError: x is not floating [N, 3, H, W] in the weights' dtype, or not 32x32 with `pool="window"`.

    Numerics: see `docs/parity.md`; the error against float64 is at most 1.25 times that of eager PyTorch. Dropout
    masks come from a counter-based generator, so they differ from `F.dropout`'s for the same seed.
    """

    block_type = BasicBlock
    group_type = NetworkBlock

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise WrnFastError(f"`x`: expected a tensor, got {type(x).__name__}")
        # A stem of the user's own takes what it takes; to read a parametrized weight would compute it once more.
        if hooked(self.conv1) or not plain_conv(self.conv1):
            return
        channels = self.conv1.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise WrnFastError(f"`x`: expected shape [N, {channels}, H, W], got {list(x.shape)}")
        weight = self.conv1.weight
        kind = x.device.type
        casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if not x.dtype.is_floating_point or (x.dtype != weight.dtype and not casting):
            raise WrnFastError(f"`x`: expected {weight.dtype} as the weights have, got {x.dtype}")
        if x.device != weight.device:
            raise WrnFastError(f"`x`: expected device {weight.device} as the weights have, got {x.device}")
        if self.pool == "window" and tuple(x.shape[2:]) != (32, 32):
            raise WrnFastError(
                f'`x`: expected 32x32 images, got {x.shape[2]}x{x.shape[3]} (pool="global" takes any size)'
            )
        if min(x.shape[2:]) < 1:
            raise WrnFastError(f"`x`: expected images of at least 1x1, got {x.shape[2]}x{x.shape[3]}")

    def features(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 64k, H / 4, W / 4]: everything before the head."""
        self._check(x)
        units: list[nn.Module] = []
        for group in (self.block1, self.block2, self.block3):
            units += group.units() if isinstance(group, NetworkBlock) else [group]
        if hooked(self.conv1) or not plain_conv(self.conv1) or _has_any_global_hook():
            return run_chain(units, self.conv1(x))
        bn = units[0].bn1 if isinstance(units[0], BasicBlock) else None
        y, stats, _ = bn_act_conv(
            x, self.conv1.weight, bias=self.conv1.bias, act="identity", stride=self.conv1.stride[0],
            pad=padding(self.conv1), want_stats=type(bn) is nn.BatchNorm2d and uses_batch_stats(bn),
        )  # fmt: skip
        return run_chain(units, y, stats if stats.numel() else None)

    def finish(self, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The head on the last group's output: one operator call where a kernel serves it and nobody listens."""
        prologue = self._prologue(y)
        if prologue is None:
            return super().finish(y)
        found = head(y, self.fc.weight, self.fc.bias, cosine=self.head == "cosine", **prologue)
        return (found.out, found.feature) if self.head == "cosine" else found.out

    def _prologue(self, y: Tensor) -> dict[str, Any] | None:
        """What stands before the mean over the image, as arguments of `head`; None where the modules have to run."""
        if not dispatch.beyond_aten("head", y.device.type, y.dtype):
            return None
        m: dict[str, Any] = self._modules
        bn, fc, act = m["bn1"], m["fc"], activation(m["relu"])
        window = self.pool == "window" and tuple(y.shape[2:]) != (8, 8)
        if window or type(fc) is not nn.Linear or hooked(fc) or _has_any_global_hook() or self._pools_differently():
            return None
        if self.head == "cosine":
            return {"act": "identity"}
        if type(bn) is not nn.BatchNorm2d or act is None or hooked(bn) or hooked(m["relu"]):
            return None
        return batch_norm(bn, y, None)._asdict() | {"act": act[0], "slope": act[1]}

    def _pools_differently(self) -> bool:
        """Has a subclass or the user replaced `pooled`?"""
        return type(self).pooled is not reference.WideResNet.pooled or "pooled" in self.__dict__


def classic(depth: int, num_classes: int, widen_factor: int = 1, dropRate: float = 0.0) -> WideResNet:
    """A fast WideResNet as most repositories have it: logits out, last bn1 used, dropout in training only.

    Args:
        depth: 6n + 4: 10, 16, 22, 28, 34, 40, 70...
        num_classes: logits.
        widen_factor: k; groups have 16k, 32k and 64k channels.
        dropRate: dropout probability inside each block.

    Raises:
        WrnFastError: an argument is outside what is listed here.
    """
    return WideResNet(depth, num_classes, widen_factor, dropRate, head="classic", dropout_in_eval=False)
