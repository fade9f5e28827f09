"""One variant of one case as two functions, `prepare` (not timed) and `run` (timed), and its results for parity."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CLASSES, TASKS, Case, Task, twin


class Inputs(NamedTuple):
    """What every variant of a case gets: float32, in NCHW."""

    x: Tensor
    labels: Tensor  # networks: the classes of the loss
    dy: Tensor | None  # blocks and layers: the gradient that arrives

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Each tensor changed."""
        return Inputs(change(self.x), change(self.labels), None if self.dy is None else change(self.dy))


def make_inputs(case: Case, module: nn.Module, seed: int, device: str) -> Inputs:
    """Random images or activations, labels, and a gradient of y's shape."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.subject.input_shape(case.batch), generator=g)
    labels = torch.randint(CLASSES, (case.batch,), generator=g)
    dy = None
    if not case.is_network:
        with torch.no_grad():
            shape = twin(module, device="meta")(x.to("meta")).shape
        dy = torch.randn(shape, generator=g).to(device)
    inputs = Inputs(x.to(device), labels.to(device), dy)
    if case.is_network or case.amp is None:
        return inputs
    # Inside a network a part is fed the 16-bit output of another: values that the dtype has, the oracle's too.
    amp = case.amp
    return inputs.map(lambda t: t.to(amp).float() if t.is_floating_point() else t)


def set_leaves(module: nn.Module, leaves: str) -> None:
    """Let exactly those parameters require a gradient that the task says; frozen ones of the reference stay frozen."""
    for p in module.parameters():
        wanted = leaves in ("all", "x+weights") or (leaves == "w" and p.dim() == 4)
        p.requires_grad_(p.requires_grad and wanted)


class Variant:
    """A callable on x, made ready for one task.

    Args:
        case: what is measured.
        call: x -> y; what is timed.
        module: the module whose parameters get gradients; None where the callable only runs forward.
        inputs: float32 or float64, NCHW.
        channels_last: the layout that this variant is fed.
        task: another than the case's.
    """

    def __init__(
        self,
        case: Case,
        call: Callable[[Tensor], Any],
        module: nn.Module | None,
        inputs: Inputs,
        channels_last: bool = True,
        task: Task | None = None,
    ) -> None:
        self.case, self.task = case, task or TASKS[case.task]
        self.call, self.module = call, module
        layout = torch.channels_last if channels_last else torch.contiguous_format
        # None in float64, which is the oracle's.
        self.amp = case.amp if inputs.x.dtype == torch.float32 else None
        x = inputs.x if case.is_network or self.amp is None else inputs.x.to(self.amp)
        self.x = x.contiguous(memory_format=layout)
        self.labels = inputs.labels
        self.dy = None if inputs.dy is None else inputs.dy.contiguous(memory_format=layout)
        if module is not None:
            module.train(self.task.train)
            set_leaves(module, self.task.leaves)

    def _forward(self) -> tuple[Tensor, Tensor]:
        """(x, y); x is a leaf that requires a gradient where the task wants one."""
        x = self.x.detach()
        if self.task.leaves in ("x", "x+weights") or (self.task.leaves == "all" and not self.case.is_network):
            x.requires_grad_()
        casting = torch.autocast(x.device.type, dtype=self.amp) if self.amp else contextlib.nullcontext()
        with torch.set_grad_enabled(self.task.leaves != "none"), casting:
            y = self.call(x)
        return x, y[0] if isinstance(y, tuple) else y

    def _backward(self, x: Tensor, y: Tensor) -> None:
        """Only what the task asks for: autograd.grad for x, backward for all."""
        loss = F.cross_entropy(y.float() if y.dtype != torch.float64 else y, self.labels) if self.dy is None else y
        dy = None if self.dy is None else self.dy.to(y.dtype)
        if self.task.leaves == "x+weights":
            x.grad = torch.autograd.grad(loss, [x], dy)[0]
        else:
            torch.autograd.backward(loss, dy)

    def prepare(self) -> Any:
        """Before each timed run: no gradients, and the forward pass where only backward is timed."""
        if self.module is not None:
            self.module.zero_grad(set_to_none=True)
        return self._forward() if self.task.timed == "backward" else None

    def run(self, state: Any) -> Any:
        """The timed part."""
        if self.task.timed == "backward":
            self._backward(*state)
            return state
        state = self._forward()
        if self.task.timed == "both":
            self._backward(*state)
        return state

    def results(self) -> dict[str, Tensor]:
        """Everything that the task computes: y, and each gradient by its name."""
        x, y = self.run(self.prepare())
        found = {"y": y.detach()}
        if self.task.timed != "forward":
            if x.grad is not None:
                found["grad x"] = x.grad
            named = self.module.named_parameters() if self.module is not None else ()
            found |= {f"grad {name}": p.grad for name, p in named if p.grad is not None}
        return found


def flops(case: Case, module: nn.Module) -> int:
    """Multiplications and additions of the timed part as direct convolution counts them, on meta tensors."""
    # Autocast does not know the meta device, and changes no count.
    case = dataclasses.replace(case, dtype="fp32")
    module = twin(module, device="meta")
    empty = make_inputs(case, module, 0, "cpu").map(lambda t: t.to("meta"))
    task = TASKS[case.task]
    if task.leaves == "x+weights":
        # The counter cannot hook autograd.grad on a leaf; with frozen weights the work asked for is the same.
        task = task._replace(leaves="x")
    variant = Variant(case, module, module, empty, task=task)
    state = variant.prepare()
    with FlopCounterMode(display=False) as counter:
        variant.run(state)
    return counter.get_total_flops() * (case.samples if case.task == "mc_dropout" else 1)
