"""A wide residual network of any known family, for checkpoints whose family the drop-in's own model does not compute.

Plain PyTorch; `accelerate` makes it fast as it does any user's model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plan(NamedTuple):
    """Everything that a checkpoint's tensors, its family and the caller say about the network."""

    counts: tuple[int, ...]  # blocks in each group
    widths: tuple[int, ...]  # of the stem and of each group
    num_classes: int
    family: str
    act: str = "relu"
    head: str = "classic"  # or "cosine"
    head_bias: bool = True
    stem_bias: bool = False
    conv_bias: bool = False
    short_bias: bool = False
    shortcuts: frozenset[tuple[int, int]] = frozenset()  # (group from 0, block) with a 1x1 convolution
    shortcut_reads_x: bool = False
    conv1_reads_x: bool = False  # in the first block of groups 2 and 3, which then have a raw shortcut
    stride_on_conv2: bool = False
    pad_right: bool = False
    drop_at: str = "prologue"
    dropRate: float = 0.0
    dropout_in_eval: bool = False
    eps: float = 1e-5
    momentum: float = 0.1
    normalised: bool = False
    block: str = "B(3,3)"  # the paper's name: only `wrn_fast.WideResNet` has the others

    @property
    def depth(self) -> int | None:
        """3ln + 4 of blocks of l convolutions, or None where the groups have different numbers of blocks."""
        convolutions = 3 * (self.block.count(",") + 1)
        return convolutions * self.counts[0] + 4 if len(set(self.counts)) == 1 and len(self.counts) == 3 else None

    @property
    def widen_factor(self) -> int | None:
        """k, where the groups have 16k, 32k and 64k channels."""
        k = self.widths[1] // 16
        return k if k and self.widths == (16, 16 * k, 32 * k, 64 * k) else None

    def __str__(self) -> str:
        size = (
            f"{self.depth}-{self.widen_factor}" if self.depth and self.widen_factor else f"{self.counts}, {self.widths}"
        )
        block = f", {self.block}" if self.block != "B(3,3)" else ""
        return f"WRN-{size}, family {self.family}, {self.num_classes} classes, {self.act}, {self.head} head{block}"


ACTS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "leaky_relu": lambda: nn.LeakyReLU(0.1)}


class FamilyBlock(nn.Module):
    """A pre-activation block of any known family."""

    def __init__(self, plan: Plan, group: int, index: int) -> None:
        super().__init__()
        fan_in = plan.widths[group + 1] if index else plan.widths[group]
        fan_out = plan.widths[group + 1]
        stride = 2 if group and not index else 1
        first, second = (1, stride) if plan.stride_on_conv2 else (stride, 1)
        self.raw = plan.conv1_reads_x and group > 0 and index == 0
        self.shortcut_raw = plan.shortcut_reads_x or self.raw
        self.pad_right = plan.pad_right and stride == 2
        self.dropRate, self.drop_at, self.dropout_in_eval = plan.dropRate, plan.drop_at, plan.dropout_in_eval
        self.bn1 = nn.BatchNorm2d(fan_in, plan.eps, plan.momentum)
        self.relu1 = ACTS[plan.act]()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, first, 0 if self.pad_right else 1, bias=plan.conv_bias)
        self.bn2 = nn.BatchNorm2d(fan_out, plan.eps, plan.momentum)
        self.relu2 = ACTS[plan.act]()
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, second, 1, bias=plan.conv_bias)
        self.convShortcut = None
        if (group, index) in plan.shortcuts:
            self.convShortcut = nn.Conv2d(fan_in, fan_out, 1, stride, bias=plan.short_bias)

    def _drop(self, v: Tensor, at: str) -> Tensor:
        if self.drop_at != at or self.dropRate == 0:
            return v
        return F.dropout(v, self.dropRate, self.training or self.dropout_in_eval)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        a = self.relu1(self.bn1(x))
        source = x if self.raw else a
        h = self.conv1(F.pad(source, (0, 1, 0, 1)) if self.pad_right else source)
        b = self.relu2(self.bn2(self._drop(h, "output")))
        y = self.conv2(self._drop(b, "prologue"))
        return y + (x if self.convShortcut is None else self.convShortcut(x if self.shortcut_raw else a))


class FamilyGroup(nn.Module):
    """A group of blocks in a row."""

    def __init__(self, plan: Plan, group: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(FamilyBlock(plan, group, i) for i in range(plan.counts[group])))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        return self.layer(x)


class FamilyNet(nn.Module):
    """The network of a plan. Keys are those of the reference: conv1, block{g}.layer.{i}, bn1, fc.

    Returns (forward):
        Logits [N, num_classes]; with the cosine head (out, out_feat).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        if plan.normalised:
            self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
            self.register_buffer("std", torch.ones(1, 3, 1, 1))
        self.conv1 = nn.Conv2d(3, plan.widths[0], 3, padding=1, bias=plan.stem_bias)
        for group in range(len(plan.counts)):
            self.add_module(f"block{group + 1}", FamilyGroup(plan, group))
        self.bn1 = nn.BatchNorm2d(plan.widths[-1], plan.eps, plan.momentum)
        self.relu = ACTS[plan.act]()
        self.fc = nn.Linear(plan.widths[-1], plan.num_classes, bias=plan.head_bias)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> the head's outputs."""
        y = self.conv1((x - self.mean) / self.std if self.plan.normalised else x)
        for group in range(len(self.plan.counts)):
            y = self.get_submodule(f"block{group + 1}")(y)
        if self.plan.head == "cosine":
            feature = y.mean((2, 3))
            return torch.abs(self.fc(F.normalize(feature, dim=1, p=2))), feature
        return self.fc(self.relu(self.bn1(y)).mean((2, 3)))
