"""What is measured: networks, blocks and single layers, and what is done with them.

A case is a subject (WRN-d-k, one of its blocks, one of its layers), a task, a batch size and a dtype. Its reference is
a plain PyTorch module; `fast` is the same module with the same weights through the fused operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wrn_fast
from wrn_fast import reference

CLASSES = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Task(NamedTuple):
    """What is run, what of it is timed, and which leaves require a gradient."""

    train: bool  # train() or eval()
    timed: str  # forward, backward or both
    leaves: (
        str  # none, all, x (weights frozen), x+weights (all require a gradient, that of x is asked for), w (filters)
    )
    words: str


TASKS = {
    "inference": Task(False, "forward", "none", "forward, eval, no_grad"),
    "training_step": Task(True, "both", "all", "forward and backward, train; the optimizer apart"),
    "input_grad": Task(False, "both", "x+weights", "forward and autograd.grad(loss, [x]), eval, weights require grad"),
    "input_grad_frozen": Task(False, "both", "x", "the same with frozen weights"),
    "mc_dropout": Task(False, "forward", "none", "stochastic forwards of one image, dropout on, no_grad"),
    "fprop_eval": Task(False, "forward", "none", "forward, eval, no_grad"),
    "fprop_train": Task(True, "forward", "all", "forward, train, recording for backward"),
    "dgrad": Task(True, "backward", "x", "gradient of x alone, through BatchNorm's batch statistics"),
    "wgrad": Task(True, "backward", "w", "gradient of the filters alone"),
    "backward": Task(True, "backward", "all", "every gradient"),
}
NETWORK_TASKS = ("inference", "training_step", "input_grad", "input_grad_frozen", "mc_dropout")
BLOCK_TASKS = ("fprop_eval", "fprop_train", "backward")
LAYER_TASKS = ("fprop_eval", "fprop_train", "dgrad", "wgrad")
# As the reference is evaluated: 50 stochastic forwards an image.
MC_SAMPLES = 50
MC_DROP_RATE = 0.3


@dataclass(frozen=True)
class Network:
    """WRN-depth-width on 32x32 images, classic head; with dropout the cosine head, whose dropout is on in eval."""

    depth: int
    width: int
    drop_rate: float = 0.0

    def __str__(self) -> str:
        return f"WRN-{self.depth}-{self.width}"

    def _make(self, library: ModuleType) -> nn.Module:
        head: dict[str, Any] = {"head": "cosine"} if self.drop_rate else {"head": "classic", "dropout_in_eval": False}
        return library.WideResNet(self.depth, CLASSES, self.width, self.drop_rate, **head)

    def reference(self) -> nn.Module:
        return self._make(reference)

    def fast(self) -> nn.Module:
        return self._make(wrn_fast)

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, 3, 32, 32


@dataclass(frozen=True)
class Block:
    """A block of width C -> K on HxH inputs."""

    C: int
    K: int
    H: int
    stride: int

    def __str__(self) -> str:
        return f"block {self.C}->{self.K} @{self.H}" + (f" /{self.stride}" if self.stride > 1 else "")

    def reference(self) -> nn.Module:
        return reference.BasicBlock(self.C, self.K, self.stride)

    def fast(self) -> nn.Module:
        return wrn_fast.WideResNet.block_type(self.C, self.K, self.stride)

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.C, self.H, self.H


class PlainLayer(nn.Module):
    """conv3x3(relu(bn(x))), or conv3x3(x) for the first layer of a network."""

    def __init__(self, C: int, K: int, stride: int, prologue: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C) if prologue else None
        self.conv = nn.Conv2d(C, K, 3, stride=stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.bn is None else F.relu(self.bn(x)))


class FusedLayer(PlainLayer):
    """The same through `bn_act_conv`. In training the statistics of x are measured here, as BatchNorm does."""

    def forward(self, x: Tensor) -> Tensor:
        stride = self.conv.stride[0]
        if self.bn is None:
            return wrn_fast.bn_act_conv(x, self.conv.weight, act="identity", stride=stride).y
        bn: Any = self.bn
        stats = wrn_fast.channel_stats(x) if self.training else torch.stack([bn.running_mean, bn.running_var])
        return wrn_fast.bn_act_conv(
            x, self.conv.weight, stats, bn.weight, bn.bias, eps=bn.eps, batch_stats=self.training, stride=stride
        ).y


@dataclass(frozen=True)
class Layer:
    """One 3x3 convolution with its BatchNorm and ReLU before it."""

    C: int
    K: int
    H: int
    stride: int

    def __str__(self) -> str:
        return f"layer {self.C}->{self.K} @{self.H}" + (f" /{self.stride}" if self.stride > 1 else "")

    def reference(self) -> nn.Module:
        return PlainLayer(self.C, self.K, self.stride, self.C != 3)

    def fast(self) -> nn.Module:
        return FusedLayer(self.C, self.K, self.stride, self.C != 3)

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.C, self.H, self.H


Subject = Network | Block | Layer


def blocks(width: int) -> list[Block]:
    """The distinct blocks of any WRN-d-width with d >= 16."""
    return [
        Block(16, 16 * width, 32, 1),
        Block(16 * width, 16 * width, 32, 1),
        Block(16 * width, 32 * width, 32, 2),
        Block(32 * width, 32 * width, 16, 1),
        Block(32 * width, 64 * width, 16, 2),
        Block(64 * width, 64 * width, 8, 1),
    ]


def layers(width: int) -> list[Layer]:
    """The distinct 3x3 convolutions of any WRN-d-width; depth only repeats them."""
    return [Layer(3, 16, 32, 1), *(Layer(b.C, b.K, b.H, b.stride) for b in blocks(width))]


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    subject: Subject
    task: str
    batch: int
    dtype: str = "fp32"
    samples: int = field(default=MC_SAMPLES, compare=False)  # of mc_dropout

    @property
    def name(self) -> str:
        amount = f"{self.samples} samples" if self.task == "mc_dropout" else f"batch {self.batch}"
        return f"{self.subject} {self.task} {amount} {self.dtype}"

    @property
    def images(self) -> int:
        """Images a run, by which its time is divided; a stochastic forward counts as one."""
        return self.samples if self.task == "mc_dropout" else self.batch

    @property
    def is_network(self) -> bool:
        return isinstance(self.subject, Network)

    @property
    def amp(self) -> torch.dtype | None:
        """Autocast's dtype, None in float32."""
        return None if self.dtype == "fp32" else DTYPES[self.dtype]


def network_cases(
    nets: Iterable[tuple[int, int]], tasks: Iterable[str], batches: Iterable[int], dtypes: Iterable[str]
) -> list[Case]:
    """The product of the four; mc_dropout is at batch 1 whatever is asked for, so it comes once."""
    cases = [
        Case(
            Network(d, k, MC_DROP_RATE if task == "mc_dropout" else 0.0), task, 1 if task == "mc_dropout" else n, dtype
        )
        for d, k in nets
        for dtype in dtypes
        for task in tasks
        for n in batches
    ]
    return list(dict.fromkeys(cases))


def part_cases(
    widths: Iterable[int], tasks: Iterable[str], batches: Iterable[int], dtypes: Iterable[str], kind: str
) -> list[Case]:
    """Every layer (`kind="layers"`) or block (`kind="blocks"`) shape of the widths with every task it has."""
    parts: Callable[[int], Sequence[Block | Layer]] = layers if kind == "layers" else blocks
    known = LAYER_TASKS if kind == "layers" else BLOCK_TASKS
    tasks, batches, dtypes = list(tasks), list(batches), list(dtypes)
    cases = [
        Case(subject, task, n, dtype)
        for dtype in dtypes
        for k in widths
        for subject in parts(k)
        for task in known
        if task in tasks and not (task == "dgrad" and subject.C == 3)
        for n in batches
    ]
    return list(dict.fromkeys(cases))


def _readme() -> list[Case]:
    return [
        *network_cases([(28, 10)], ["inference"], [1, 8, 32], ["fp32"]),
        *network_cases([(28, 10)], ["training_step"], [32], ["fp32"]),
        *network_cases([(28, 10)], ["input_grad", "input_grad_frozen"], [8], ["fp32"]),
        *network_cases([(28, 10)], ["mc_dropout"], [1], ["fp32"]),
        *network_cases([(28, 10)], ["inference"], [8], ["bf16"]),
        *network_cases([(16, 4), (40, 2)], ["inference"], [32], ["fp32"]),
    ]


def _default() -> list[Case]:
    same_width = [Layer(160, 160, 32, 1), Layer(320, 320, 16, 1), Layer(640, 640, 8, 1)]
    return [
        *network_cases([(28, 10)], ["inference"], [1, 8], ["fp32"]),
        *network_cases([(28, 10)], ["training_step", "input_grad"], [8], ["fp32"]),
        *network_cases([(28, 10)], ["inference"], [8], ["bf16"]),
        *network_cases([(28, 10)], ["mc_dropout"], [1], ["fp32"]),
        *network_cases([(16, 4), (40, 2)], ["inference"], [32], ["fp32"]),
        *network_cases([(40, 2)], ["training_step"], [32], ["fp32"]),
        *(Case(layer, task, 8) for layer in same_width for task in ("fprop_eval", "dgrad", "wgrad")),
    ]


def _quick() -> list[Case]:
    return [
        *network_cases([(28, 10)], ["inference"], [1, 8], ["fp32"]),
        *network_cases([(16, 4)], ["inference", "training_step"], [32], ["fp32"]),
        *network_cases([(16, 4)], ["input_grad"], [8], ["fp32"]),
    ]


def _layers() -> list[Case]:
    # WRN-28-10 and 34-10, 70-16, 16-4, 40-2.
    return [
        *part_cases([10, 16, 4, 2], LAYER_TASKS, [8], ["fp32"], "layers"),
        *part_cases([10, 16, 4, 2], BLOCK_TASKS, [8], ["fp32"], "blocks"),
    ]


PRESETS = {"default": _default, "quick": _quick, "readme": _readme, "layers": _layers}


def settle(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorm the statistics of x and affine parameters off 1 and 0, as a trained network has."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    rates = [m.momentum for m in norms]
    with torch.no_grad():
        for m in norms:
            m.weight.uniform_(0.5, 1.5)
            m.bias.normal_(0.0, 0.1)
            m.momentum = 1.0
        model.train()(x[:8])
    for m, rate in zip(norms, rates):
        m.momentum = rate


def with_weights_of(model: nn.Module, source: nn.Module) -> nn.Module:
    """`model` with the parameters and buffers of `source`, key by key."""
    model.load_state_dict(source.state_dict(), strict=True)
    return model


def twin(model: nn.Module, **to: Any) -> nn.Module:
    """A copy of the model, moved as by `Module.to`."""
    return copy.deepcopy(model).to(**to)
