"""The same weights in two models: moved by `state_dict`, judged against float64; and the speed of the two."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wrn_fast import parity
from wrn_fast.demo.train import Trainer, accuracy, logits, synchronize

# The outputs are judged in so many pieces: a bound needs that many samples.
PIECES = parity.SEEDS


@dataclass
class Agreement:
    """Outputs of two models that hold the same weights, on the same images, beside the float64 outputs."""

    moved: str  # which model, and whose weights went to the other
    tensors: int  # of the state_dict, bit-equal after the move
    images: int
    err_eager: float  # relative L2
    err_fast: float
    bound: float  # of err_fast, by the rule in wrn_fast/parity.py
    verdict: str
    max_difference: float  # |fast - float64|
    max_logit: float  # |float64|
    same_predictions: int
    accuracy_eager: float
    accuracy_fast: float


@dataclass
class Speed:
    """Seconds a call of both models, run in turn."""

    task: str
    model: str
    batch: int
    eager: list[float] = field(default_factory=list)
    fast: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Eager's time over the drop-in's, run by run."""
        return [e / f for e, f in zip(self.eager, self.fast)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def move(source: nn.Module, target: nn.Module) -> int:
    """Load `source`'s state_dict into `target`, strictly; returns the number of tensors, which are then bit-equal."""
    state = source.state_dict()
    target.load_state_dict(state, strict=True)
    arrived = target.state_dict()
    if list(state) != list(arrived) or not all(torch.equal(state[key], arrived[key]) for key in state):
        raise RuntimeError("a state_dict changed on its way between the reference and the drop-in")
    return len(state)


def agree(moved: str, eager: nn.Module, fast: nn.Module, tensors: int, x: Tensor, y: Tensor) -> Agreement:
    """Compare two models' outputs on x fp32 [N, 3, 32, 32], N >= 8, with those of `eager` in float64."""
    want = logits(copy.deepcopy(eager).double(), x.double())
    got_eager, got_fast = logits(eager, x), logits(fast, x)
    pool = parity.Pool(moved, torch.float32)
    for pieces in zip(got_fast.tensor_split(PIECES), got_eager.tensor_split(PIECES), want.tensor_split(PIECES)):
        pool.add(*pieces)
    cell = pool.judge()
    return Agreement(
        moved,
        tensors,
        len(x),
        cell.err_eager,
        cell.err_fast,
        cell.bound,
        cell.verdict,
        (got_fast.double() - want).abs().max().item(),
        want.abs().max().item(),
        int((got_eager.argmax(1) == got_fast.argmax(1)).sum()),
        accuracy(got_eager, y),
        accuracy(got_fast, y),
    )


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call of the model in eval mode without gradients."""

    def call() -> None:
        with torch.inference_mode():
            model(x)

    model.eval()
    return call


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Forward, backward and SGD on one batch."""
    model.train()
    # A rate of zero does the same work and keeps the weights, so every run times the same numbers.
    trainer = Trainer(model, steps=1, lr=0.0)
    return lambda: trainer.step(x, y)


def race(
    speed: Speed, eager: Callable[[], object], fast: Callable[[], object], *, runs: int, device: torch.device,
    tick: Callable[[], None],
) -> None:  # fmt: skip
    """Time the two in turn, `runs` times each after one unmeasured call, into `speed`."""
    for number in range(-1, runs):
        pair = [(eager, speed.eager), (fast, speed.fast)]
        for call, seconds in pair if number % 2 == 0 else pair[::-1]:
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if number >= 0:
                seconds.append(time.perf_counter() - start)
            tick()
