"""The passes around convolutions, each as a call with the bytes that it cannot do without."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch

from benchmarks.battery.rates import Call
from wrn_fast.problem import ConvProblem

CLASSES = 10


def passes(
    backend: ModuleType, device: torch.device, dtype: torch.dtype, n: int, c: int, image: int
) -> dict[str, tuple[Call, int, ConvProblem]]:
    """By operator: a call on x [n, c, image, image], bytes read and written, and the problem that it is."""
    x = torch.randn(n, c, image, image, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    plain = ConvProblem(device.type, dtype, dtype, n, image, image, c, c, 1, 1)
    batch = plain._replace(prologue=True, affine=True, batch_stats=True, act="relu")
    dropping, masked = plain._replace(p=0.3, drop_at="output"), plain._replace(act="relu")
    classes = batch._replace(K=CLASSES, bias=True)
    sums = batch._replace(want_stats=True)
    stats, rng = torch.rand(2, c, device=device) + 0.5, torch.tensor([1, 2], device=device)
    w, dfeat = torch.randn(CLASSES, c, device=device), torch.randn(n, c, device=device)
    size = x.numel() * x.element_size()
    # Passes over x: bn_bwd_apply reads two and writes one, the gradient of a head with the batch's statistics reads
    # twice.
    found: dict[str, tuple[Call, int, ConvProblem]] = {}

    def add(op: str, count: int, problem: ConvProblem, *arguments: torch.Tensor | None) -> None:
        found[op] = (partial(getattr(backend, op), problem, *arguments), count * size, problem)

    add("channel_stats", 1, plain, x)
    add("bn_bwd_apply", 3, batch, x, x, stats, stats[0], stats)
    add("dropout", 2, dropping, x, rng)
    add("act_mask", 1, masked, x, None, None, None)
    add("head", 1, classes, x, stats, *stats, w, w[:, 0])
    add("head_bwd", 3, sums, dfeat, x, stats, *stats)
    return found
