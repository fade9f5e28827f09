"""Dropout's random numbers: counter-based, so that a mask is made again instead of stored.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). One rule for all
backends: element i (64-bit index in NHWC order of the dropped tensor) takes word i & 3 of the block with
key = (seed lo, seed hi) and counter = (i >> 2 lo, i >> 2 hi, offset lo, offset hi), and is kept when
word >= floor(p * 2^32). Kept values are multiplied by 1 / (1 - p).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)


def draw(device: torch.device) -> Tensor:
    """A fresh (seed, offset), int64 [2], from the default generator of `device`.

    `torch.manual_seed`, `fork_rng`, activation checkpointing and CUDA graphs replay it as they replay any other draw.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Words below it are dropped. p = 1 gives 2^32: every word is."""
    return int(p * 2**32)


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product; int64 cannot hold it unsigned, so b is split in halves."""
    lo, hi = a * (b & 0xFFFF), a * (b >> 16)
    s = lo + ((hi & 0xFFFF) << 16)
    return ((hi >> 16) + (s >> 32)) & _MASK32, s & _MASK32


def philox4x32(
    counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int], rounds: int = 10
) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32-bit words from a counter of four such and a key of two."""
    k0, k1 = key
    for _ in range(rounds):
        h0, l0 = _mulhilo(counter[0], _MULTIPLIER[0])
        h1, l1 = _mulhilo(counter[2], _MULTIPLIER[1])
        counter = (h1 ^ counter[1] ^ k0, l1, h0 ^ counter[3] ^ k1, l0)
        k0, k1 = (k0 + _KEY_STEP[0]) & _MASK32, (k1 + _KEY_STEP[1]) & _MASK32
    return counter


def keep_mask(shape: torch.Size | tuple[int, ...], rng: Tensor, p: float) -> Tensor:
    """True where an element of an [N,C,H,W] tensor is kept. Bool [N,C,H,W], channels_last."""
    n, c, h, w = shape
    size = n * c * h * w
    block = torch.arange((size + 3) // 4, dtype=torch.int64, device=rng.device)
    seed, offset = rng[0], rng[1]
    zero = torch.zeros_like(block)
    words = philox4x32(
        (block & _MASK32, (block >> 32) & _MASK32, zero + (offset & _MASK32), zero + ((offset >> 32) & _MASK32)),
        (seed & _MASK32, (seed >> 32) & _MASK32),
    )
    flat = torch.stack(words, dim=1).flatten()[:size]
    return (flat >= threshold(p)).view(n, h, w, c).permute(0, 3, 1, 2)


def dropout(v: Tensor, rng: Tensor, p: float) -> Tensor:
    """v * mask / (1 - p) in plain PyTorch: differentiable, and the definition of every backend's mask."""
    if p >= 1.0:
        return v * 0.0
    return v * (keep_mask(v.shape, rng, p).to(v.dtype) * (1.0 / (1.0 - p)))
