"""Two models trained side by side on the same batches, epoch by epoch, each epoch timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wrn_fast.demo.data import Split


@dataclass
class Epoch:
    """One pass over the training images."""

    loss: float  # mean cross-entropy of the training batches
    accuracy: float  # on the test images, afterwards
    seconds: float  # of the training steps


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next includes its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, batch: int = 128) -> Tensor:
    """The model's outputs [N, classes] in eval mode, for all of x [N, 3, 32, 32]."""
    training = model.training
    model.eval()
    out = torch.cat([model(piece) for piece in x.split(batch)])
    model.train(training)
    return out


def accuracy(out: Tensor, y: Tensor) -> float:
    """The share of rows of `out` [N, classes] whose largest entry is the label."""
    return (out.argmax(1) == y).double().mean().item()


class Trainer:
    """SGD with Nesterov momentum and a cosine schedule for one model."""

    def __init__(self, model: nn.Module, steps: int, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step; returns the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def epoch(self, split: Split, order: list[Tensor], tick: Callable[[], None]) -> Epoch:
        """One epoch over the batches whose rows `order` lists; `tick` is called after each."""
        self.model.train()
        device = split.train_x.device
        total = torch.zeros((), device=device)
        synchronize(device)
        start = time.perf_counter()
        for rows in order:
            total += self.step(split.train_x[rows], split.train_y[rows]) * len(rows)
            tick()
        synchronize(device)
        seconds = time.perf_counter() - start
        mean_loss = total.item() / sum(len(rows) for rows in order)
        return Epoch(mean_loss, accuracy(logits(self.model, split.test_x), split.test_y), seconds)


def train(
    models: dict[str, nn.Module],
    split: Split,
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    tick: Callable[[], None],
) -> Iterator[tuple[str, Epoch]]:
    """Train the models in turn, one epoch each, on the same batches; yields (name, what the epoch gave).

    Args:
        models: name -> model, changed in place.
        split: the images, on the models' device.
        epochs, batch, lr: passes, images a step (a last smaller batch is left out), first learning rate.
        seed: of the order of the images.
        tick: called after each step of each model.
    """
    count = len(split.train_x) // batch
    trainers = {name: Trainer(model, epochs * count, lr) for name, model in models.items()}
    generator = torch.Generator().manual_seed(seed)
    for number in range(epochs):
        rows = torch.randperm(len(split.train_x), generator=generator)[: count * batch]
        order = list(rows.to(split.train_x.device).split(batch))
        # Whoever goes second finds warm caches and a hot CPU: they take turns.
        names = list(trainers) if number % 2 == 0 else list(trainers)[::-1]
        for name in names:
            yield name, trainers[name].epoch(split, order, tick)
