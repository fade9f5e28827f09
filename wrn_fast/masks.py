"""One bit an element: act'(v) of relu and leaky relu, kept in place of x where only x wants a gradient.

A mask of x [N, C, H, W] is uint8 [N, H, W, ceil(C / 8)]: bit c % 8 of byte c // 8, bits behind C are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Activations whose derivative has two values.
ACTS = ("relu", "leaky_relu")


def shape(x_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The shape of the mask of x [N, C, H, W]."""
    n, c, h, w = x_shape
    return n, h, w, (c + 7) // 8


def pack(passes: Tensor) -> Tensor:
    """A bool tensor [N, C, H, W] as a mask."""
    bits = F.pad(passes.permute(0, 2, 3, 1).to(torch.uint8), (0, -passes.shape[1] % 8))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=passes.device)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor, c: int) -> Tensor:
    """A mask as a bool tensor [N, C, H, W]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :c].permute(0, 3, 1, 2).bool()


def signs(mask: Tensor, c: int, like: Tensor) -> Tensor:
    """[N, C, H, W] in the dtype of `like`: 1 where the mask is set, -1 elsewhere. Its own mask is `mask`."""
    one = like.new_ones(())
    return torch.where(unpack(mask, c), one, -one)
