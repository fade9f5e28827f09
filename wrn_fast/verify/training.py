"""A few steps of training, so that a network's statistics are those of its activations."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

STEPS, BATCH, CLASSES = 20, 8, 3


def train_briefly(model: nn.Module) -> None:
    """20 steps of SGD on noise whose channel means say the class: enough for weights and statistics to fit together.

    Where they are drawn apart, the errors of the layers meet at random. In a trained network an error that has a
    direction, as an inexact constant gives it, adds up from layer to layer.

    Args:
        model: classifies [N, 3, 32, 32] into at least 3 classes, logits alone or first; left in training mode.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), device=device)
        images = torch.randn(BATCH, 3, 32, 32, device=device)
        images += 0.5 * nn.functional.one_hot(labels, 3)[:, :, None, None]
        optimizer.zero_grad(set_to_none=True)
        out = model(images)
        cross_entropy(out[0] if isinstance(out, tuple) else out, labels).backward()
        optimizer.step()
