"""The reference WideResNet in plain PyTorch: the weights' home, the documentation and, in float64, the oracle.

Pre-activation wide residual network WRN-d-k: n = (d - 4) / 3l blocks of l convolutions in each of three groups of width
16k, 32k, 64k at 32x32, 16x16 and 8x8 (Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, table 1). Nothing
here calls a backend.

`block` names the kernel sizes of a block as the paper does: "B(3,3)" nearly always; "B(3,1)", "B(1,3)", "B(3,1,1)",
"B(3,1,3)" and "B(1,3,1)" of its table 2, all at the full width; "B(3)", "B(3,3,3)" and "B(3,3,3,3)" of table 3, whose
deepening factors l are 1, 3 and 4. The depth counts every 3x3 and 1x1 convolution of the blocks, as the equal sizes of
table 3 need. (The sizes in table 2 are those of (d - 4) / 6 blocks whatever l is: its B(1,3,1) of depth 40 has depth 58
here, its B(3,1,3) of depth 22 has depth 31.)

Two heads exist. `cosine` is that of zaeemzadeh/OOD (Out-of-Distribution Detection Using Union of 1-Dimensional
Subspaces, CVPR 2021), whose model this one equals weight for weight and output for output; its quirks, all kept:

- `forward` returns (out, out_feat): the pooled feature, and abs(fc(out_feat / |out_feat|)).
- `fc` has orthogonal rows, no bias, and is frozen. The last `bn1` and `relu` are built and saved, but never run.
- Dropout inside a block is on in eval too: Monte-Carlo dropout, many forwards an image.
- Pooling is a window of 8 and a view: an image larger than 32x32 gives more rows than the batch has images.
- `dropout` (p = 0.3) and `ID_mat` are attributes that `forward` does not use; neither is in the state_dict.

`classic` is the head of nearly everyone else: bn1, relu, pool, a linear layer with bias; logits out.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wrn_fast.errors import WrnFastError

HEADS = ("cosine", "classic")
POOLS = ("window", "global")
BLOCKS = ("B(3,3)", "B(3,1)", "B(1,3)", "B(3,1,1)", "B(3,1,3)", "B(1,3,1)", "B(3)", "B(3,3,3)", "B(3,3,3,3)")
ACTS = {"relu": lambda: nn.ReLU(inplace=True), "silu": lambda: nn.SiLU(inplace=True),
        "leaky_relu": lambda: nn.LeakyReLU(0.1, inplace=True)}  # fmt: skip


def kernel_sizes(block: str) -> tuple[int, ...]:
    """(3, 1, 3) for "B(3,1,3)"."""
    return tuple(int(size) for size in block[2:-1].split(","))


class BasicBlock(nn.Module):
    """One block: convolutions, each after BatchNorm and activation, and a shortcut. Two of 3x3 in B(3,3):

        a = act(bn1(x));  h = conv1(a);  b = drop(act(bn2(h)));  y = conv2(b) + shortcut

    The shortcut is x itself, untouched, where the width stays; else `convShortcut(a)`, a 1x1 convolution of the
    activated tensor with the block's stride.

    Args:
        in_planes, out_planes: channels of x and of y.
        stride: of the first 3x3 convolution and of convShortcut.
        dropRate: dropout probability before the last convolution.
        dropout_in_eval: drop in eval mode as well, as the reference does.
        act: "relu", "silu" or "leaky_relu" (slope 0.1).
        kernels: sizes of the convolutions, (3, 1, 3) for B(3,1,3). The third one is bn3, relu3, conv3.
    """

    bn1: nn.BatchNorm2d
    relu1: nn.Module
    conv1: nn.Conv2d

    def __init__(
        self, in_planes: int, out_planes: int, stride: int, dropRate: float = 0.0, *, dropout_in_eval: bool = True,
        act: str = "relu", kernels: tuple[int, ...] = (3, 3),
    ) -> None:  # fmt: skip
        super().__init__()
        for i, size in enumerate(kernels):
            planes = out_planes if i else in_planes
            step = stride if i == kernels.index(3) else 1
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(planes))
            self.add_module(f"relu{i + 1}", ACTS[act]())
            conv = nn.Conv2d(planes, out_planes, size, stride=step, padding=size // 2, bias=False)
            self.add_module(f"conv{i + 1}", conv)
        self.deepening = len(kernels)
        self.droprate = dropRate
        self.dropout_in_eval = dropout_in_eval
        self.equalInOut = in_planes == out_planes
        self.convShortcut = None if self.equalInOut else nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_planes, H, W] -> [N, out_planes, H / stride, W / stride]."""
        a = b = self.relu1(self.bn1(x))
        for i in range(1, self.deepening):
            h = getattr(self, f"conv{i}")(b)
            b = getattr(self, f"relu{i + 1}")(getattr(self, f"bn{i + 1}")(h))
        if self.droprate > 0:
            b = F.dropout(b, self.droprate, training=self.training or self.dropout_in_eval)
        shortcut = x if self.convShortcut is None else self.convShortcut(a)
        return torch.add(shortcut, getattr(self, f"conv{self.deepening}")(b))


class NetworkBlock(nn.Module):
    """A group: `nb_layers` blocks in a row, the first of which changes width and stride."""

    def __init__(self, nb_layers: int, in_planes: int, out_planes: int, block: type[BasicBlock], stride: int,
                 dropRate: float = 0.0, **options: Any) -> None:  # fmt: skip
        super().__init__()
        self.layer = nn.Sequential(
            *(
                block(out_planes if i else in_planes, out_planes, 1 if i else stride, dropRate, **options)
                for i in range(nb_layers)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_planes, H, W] -> [N, out_planes, H / stride, W / stride]."""
        return self.layer(x)


class WideResNet(nn.Module):
    """The whole network.

    Args:
        depth: 3ln + 4 with n >= 1 blocks of l convolutions in a group; 6n + 4 for B(3,3): 10, 16, 22, 28, 34, 40...
        num_classes: rows of `fc`.
        widen_factor: k; groups have 16k, 32k and 64k channels.
        dropRate: dropout probability inside each block.
        head: "cosine" or "classic", see the module.
        dropout_in_eval: dropout stays on in eval mode.
        pool: "window": avg_pool2d(8) and a view, for 32x32 images; "global": the mean over any image.
        act: "relu", "silu" or "leaky_relu" (slope 0.1).
        block: one of `BLOCKS`, the paper's block types: kernel sizes of the l convolutions of a block.

    Initial weights: the constructors of PyTorch draw first; then, over `modules()`, convolutions are normal with
    deviation sqrt(2 / (kh * kw * out_channels)), BatchNorm is 1 and 0, and `fc` is orthogonal (cosine) or as PyTorch
    made it with a bias of 0 (classic). The same seed gives the reference's weights bit for bit.

    Raises:
        WrnFastError: an argument is outside what is listed here.
    """

    block_type: type[BasicBlock] = BasicBlock
    group_type: type[NetworkBlock] = NetworkBlock
    block1: NetworkBlock
    block2: NetworkBlock
    block3: NetworkBlock

    def __init__(
        self,
        depth: int,
        num_classes: int,
        widen_factor: int = 1,
        dropRate: float = 0.0,
        *,
        head: str = "cosine",
        dropout_in_eval: bool = True,
        pool: str = "window",
        act: str = "relu",
        block: str = "B(3,3)",
    ) -> None:
        check_arguments(depth, num_classes, widen_factor, dropRate, head, pool, act, block)
        super().__init__()
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        kernels = kernel_sizes(block)
        n = (depth - 4) // (3 * len(kernels))
        self.head = head
        self.pool = pool
        self.block = block
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.dropout = nn.Dropout(0.3)
        for g, stride in enumerate((1, 2, 2), 1):
            group = self.group_type(
                n, widths[g - 1], widths[g], self.block_type, stride, dropRate, dropout_in_eval=dropout_in_eval,
                act=act, kernels=kernels,
            )  # fmt: skip
            self.add_module(f"block{g}", group)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = ACTS[act]()
        self.register_buffer("ID_mat", torch.eye(num_classes), persistent=False)
        self.fc = nn.Linear(widths[3], num_classes, bias=head == "classic")
        if head == "cosine":
            self.fc.weight.requires_grad = False
        self.nChannels = widths[3]
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights anew from the default generator."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                m.weight.normal_(0, math.sqrt(2.0 / fan_out))
            elif isinstance(m, nn.BatchNorm2d):
                m.weight.fill_(1)
                m.bias.zero_()
            elif isinstance(m, nn.Linear):
                if self.head == "cosine":
                    nn.init.orthogonal_(m.weight)
                else:
                    m.bias.zero_()

    def features(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 64k, H / 4, W / 4]: everything before the head."""
        return self.block3(self.block2(self.block1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Cosine head: (out [N, num_classes], out_feat [N, 64k]). Classic head: logits [N, num_classes]."""
        return self.finish(self.features(x))

    def finish(self, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The head on the last group's output."""
        feature = self.pooled(y)
        if self.head == "classic":
            return self.fc(feature)
        return torch.abs(self.fc(F.normalize(feature, dim=1, p=2))), feature

    def pooled(self, y: Tensor) -> Tensor:
        """The feature [N, 64k] under the head, from the last group's output."""
        if self.head == "classic":
            y = self.relu(self.bn1(y))
        return F.avg_pool2d(y, 8).view(-1, self.nChannels) if self.pool == "window" else y.mean((2, 3))


def check_arguments(depth: int, num_classes: int, widen_factor: int, dropRate: float, head: str, pool: str,
                    act: str, block: str) -> None:  # fmt: skip
    """Raise WrnFastError where a network of these arguments does not exist."""
    words = (("head", head, HEADS), ("pool", pool, POOLS), ("act", act, tuple(ACTS)), ("block", block, BLOCKS))
    for name, word, known in words:
        if word not in known:
            raise WrnFastError(f"`{name}`: expected one of {', '.join(known)}, got {word!r}")
    step = 3 * len(kernel_sizes(block))
    if not isinstance(depth, int) or depth < step + 4 or (depth - 4) % step:
        several = ", ".join(str(step * n + 4) for n in range(1, 7))
        raise WrnFastError(f"`depth`: expected {step}n + 4 with n >= 1 for {block} ({several}...), got {depth!r}")
    for name, value in (("num_classes", num_classes), ("widen_factor", widen_factor)):
        if not isinstance(value, int) or value < 1:
            raise WrnFastError(f"`{name}`: expected an integer of at least 1, got {value!r}")
    if not isinstance(dropRate, Real) or not 0.0 <= dropRate <= 1.0:
        raise WrnFastError(f"`dropRate`: expected a probability in [0, 1], got {dropRate!r}")


def classic(depth: int, num_classes: int, widen_factor: int = 1, dropRate: float = 0.0) -> WideResNet:
    """The WideResNet of most repositories: logits out, last bn1 used, dropout in training only."""
    return WideResNet(depth, num_classes, widen_factor, dropRate, head="classic", dropout_in_eval=False)
