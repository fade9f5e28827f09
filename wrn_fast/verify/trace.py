"""What one model does with given weights and images: a flat dictionary of named tensors to be compared.

Names: mode/quantity/tensor: "eval/outputs/0", "train/gradients/block1.layer.0.conv1.weight", "steps/updates/fc.bias".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Trace = dict[str, Tensor | None]

# Of ||w||: how far the first step goes, so that any network moves and none leaves the range of its weights.
STEP = 0.01
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Task:
    """The work, equal for every model of a seed.

    Args:
        images: one batch a step, float64 [N, C, H, W] with values that float32 has.
        seed: of the cotangents, and of the default generator before each forward pass (dropout).
        lr: of SGD; None lets the first model that runs (the oracle) set it for all.
    """

    images: list[Tensor]
    seed: int
    lr: float | None = None


def tensors_in(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating tensors of a model's output, whatever pairs and dictionaries they are in, with a name each."""
    if isinstance(output, Tensor):
        if output.dtype.is_floating_point:
            yield name or "0", output
        return
    items: Any = ()
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    for key, value in items:
        yield from tensors_in(value, f"{name}.{key}" if name else str(key))


class Tracer:
    """Runs a task on a copy of a model that is given away to it.

    Args:
        model: in the dtype and layout to be run in; changed by the run.
        autocast: 16-bit dtype of autocast, or None.
        channels_last: layout of the images; plain models have their filters in it too.
        candidate: the model under test: its inference path and its input gradient with frozen weights are run as well.
            For plain PyTorch these are the same numbers, so they are copied.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None, channels_last: bool, candidate: bool) -> None:
        self.model = model
        self.autocast = autocast
        self.candidate = candidate
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        if not candidate:
            model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.weights = dict(model.named_parameters())
        self.dtype = next((w.dtype for w in self.weights.values() if w.dtype.is_floating_point), torch.float32)
        self.device = next((w.device for w in self.weights.values()), torch.device("cpu"))

    def run(self, task: Task) -> Trace:
        """Eval outputs and gradients, a training step, more of them, and eval outputs again from the same object."""
        found: Trace = {}
        self.model.eval()
        outputs, gradients = self.differentiate(task, 0)
        alone = gradients["input"]
        if self.candidate:
            outputs = self.infer(task)
            alone = self.frozen(task)
        found.update(_named("eval/outputs", outputs))
        found.update(_named("eval/gradients", gradients))
        found["eval/input gradient, weights frozen/input"] = alone

        self.model.train()
        before = {name: w.detach().clone() for name, w in self.weights.items()}
        optimizer = None
        for step in range(len(task.images)):
            outputs, gradients = self.differentiate(task, step)
            if step == 0:
                found.update(_named("train/outputs", outputs))
                found.update(_named("train/gradients", gradients))
                found.update(_named("train/statistics", self.buffers()))
                optimizer = self.optimizer(task)
            if optimizer is not None:
                optimizer.step()
        moved = {
            name: None if w.grad is None else w.detach().double() - before[name] for name, w in self.weights.items()
        }
        found.update(_named("steps/updates", moved))
        found.update(_named("steps/statistics", self.buffers()))
        self.model.eval()
        found.update(_named("steps/outputs afterwards", self.infer(task)))
        return found

    def images(self, task: Task, step: int) -> Tensor:
        # A copy: a model that writes into its input must not change the next one's.
        x = task.images[step].to(self.device, self.dtype, copy=True)
        return x.contiguous(memory_format=self.layout)

    def context(self) -> AbstractContextManager:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)

    def forward(self, task: Task, x: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(task.seed)
        with self.context():
            return dict(tensors_in(self.model(x)))

    def infer(self, task: Task) -> dict[str, Tensor]:
        with torch.inference_mode():
            return self.forward(task, self.images(task, 0))

    def loss(self, task: Task, outputs: dict[str, Tensor]) -> Tensor:
        """<output, cotangent>, summed: every output is listened to, and its gradient is exactly known."""
        generator = torch.Generator().manual_seed(task.seed)
        total = torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        for output in outputs.values():
            cotangent = torch.randn(output.shape, generator=generator).to(self.device, total.dtype)
            total = total + (output.to(total.dtype) * cotangent).sum()
        return total

    def differentiate(self, task: Task, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """(outputs, gradients of the images and of every parameter), left in .grad too."""
        x = self.images(task, step).requires_grad_()
        self.model.zero_grad(set_to_none=True)
        outputs = self.forward(task, x)
        self.loss(task, outputs).backward()
        gradients = {"input": x.grad} | {name: w.grad for name, w in self.weights.items()}
        return {name: output.detach() for name, output in outputs.items()}, gradients

    def frozen(self, task: Task) -> Tensor | None:
        """The gradient of the images alone, as an attack takes it."""
        wanted = {name: w.requires_grad for name, w in self.weights.items()}
        x = self.images(task, 0).requires_grad_()
        try:
            self.model.requires_grad_(False)
            return torch.autograd.grad(self.loss(task, self.forward(task, x)), [x], allow_unused=True)[0]
        finally:
            for name, w in self.weights.items():
                w.requires_grad_(wanted[name])

    def buffers(self) -> dict[str, Tensor]:
        named = self.model.named_buffers()
        return {name: b.detach().clone() for name, b in named if name.rpartition(".")[2] in _STATISTICS}

    def optimizer(self, task: Task) -> torch.optim.Optimizer | None:
        """SGD with momentum and decay. Fused: it moves no version counter, so a stale copy of a weight would show."""
        trained = [w for w in self.weights.values() if w.grad is not None]
        if not trained:
            return None
        if task.lr is None:
            size = math.hypot(*(w.detach().norm().item() for w in trained))
            slope = math.hypot(*(w.grad.norm().item() for w in trained))  # type: ignore[union-attr]
            task.lr = STEP * size / slope if slope > 0.0 and math.isfinite(slope) else STEP
        return torch.optim.SGD(trained, lr=task.lr, momentum=0.9, weight_decay=5e-4, fused=True)


def _named(prefix: str, tensors: dict[str, Any]) -> Trace:
    return {f"{prefix}/{name}": t for name, t in tensors.items()}
