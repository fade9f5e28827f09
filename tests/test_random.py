"""Philox by its published answers, the mask's statistics, and what replays it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from wrn_fast import parity
from wrn_fast import random as wrn_random
from wrn_fast.functional import bn_act_conv
from wrn_fast.random import draw, dropout, keep_mask, philox4x32, threshold

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")

# philox4x32-10 of Random123's kat_vectors: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_in_python(counter, key):
    """The definition, one word at a time in Python's integers."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(x)


@pytest.mark.parametrize("counter, key, want", KNOWN)
def test_known_answers(counter, key, want):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == want
    assert philox_in_python(counter, key) == want


def test_mask_is_the_rule_element_by_element():
    """Element i in NHWC order, word i & 3 of block i >> 2, compared as an unsigned integer."""
    n, c, h, w, p = 2, 5, 3, 7, 0.37
    seed, offset = -(2**62) + 12345, 2**63 - 77
    mask = keep_mask((n, c, h, w), torch.tensor([seed, offset]), p)
    assert mask.is_contiguous(memory_format=torch.channels_last)
    low, high = lambda v: v & 0xFFFFFFFF, lambda v: (v >> 32) & 0xFFFFFFFF
    for i in range(n * c * h * w):
        block = philox_in_python((low(i >> 2), high(i >> 2), low(offset), high(offset)), (low(seed), high(seed)))
        where = (i // (c * h * w), i % c, i // (c * w) % h, i // c % w)
        assert bool(mask[where]) == (block[i & 3] >= math.floor(p * 2**32)), i


@pytest.mark.parametrize("p, kept", [(0.0, 1.0), (1.0, 0.0), (2.0**-32, None), (0.999, None)])
def test_edges_of_the_threshold(p, kept):
    mask = keep_mask((4, 8, 16, 16), draw(torch.device("cpu")), p)
    assert threshold(p) == math.floor(p * 2**32)
    if kept is not None:
        assert mask.all() if kept else not mask.any()
        x = torch.randn(4, 8, 16, 16)
        assert torch.equal(dropout(x, draw(x.device), p), x * kept)


def z_of(observed, expected, deviation):
    """Standard deviations from what independent bits would give."""
    return abs(observed - expected) / deviation


# One in 10^9 for a normal variable: no false alarm in the life of a test, and a pattern is off by hundreds.
FAR = 6.2


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_share_neighbours_and_words_are_those_of_independent_bits(p):
    n = 2**20
    rng = draw(torch.device("cpu"))
    kept = keep_mask((1, 4, 512, 512), rng, p).permute(0, 2, 3, 1).flatten().double()
    centred = kept - (1 - p)
    assert z_of(kept.mean().item(), 1 - p, math.sqrt(p * (1 - p) / n)) < FAR
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 512, 2048):
        correlation = (centred[lag:] * centred[:-lag]).mean().item() / (p * (1 - p))
        assert abs(correlation) * math.sqrt(n) < FAR, lag
    # chi-square over the 16 patterns of the four words of a block
    patterns = (kept.view(-1, 4) @ torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)).long().bincount(minlength=16)
    ones = torch.tensor([i.bit_count() for i in range(16)], dtype=torch.float64)
    expected = n / 4 * (1 - p) ** ones * p ** (4 - ones)
    chi = ((patterns - expected) ** 2 / expected).sum().item()
    assert z_of(chi, 15, math.sqrt(30)) < 2 * FAR


def test_other_offset_or_seed_is_another_mask():
    shape, n = (1, 4, 256, 256), 2**18
    masks = [
        keep_mask(shape, torch.tensor(rng), 0.5).double() - 0.5 for rng in ((7, 1), (7, 2), (8, 1), (7, 1 + 2**32))
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a * b).mean().item()) * 4 * math.sqrt(n) < FAR


def test_draw_follows_the_default_generator():
    torch.manual_seed(3)
    first, second = draw(torch.device("cpu")), draw(torch.device("cpu"))
    assert first.dtype == torch.int64 and first.shape == (2,) and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(torch.device("cpu")), first)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        draw(torch.device("cpu"))
    assert torch.equal(draw(torch.device("cpu")), second)


def convolution(x, rng=None, at="prologue"):
    """A convolution that passes channels through: its output shows the mask."""
    w = torch.eye(x.shape[1], dtype=x.dtype)[:, :, None, None]
    return bn_act_conv(x, w, rng=rng, pad=0, act="identity", p=0.4, drop_at=at).y


@pytest.mark.parametrize("at", ["prologue", "output"])
def test_backward_drops_what_forward_dropped(at):
    x = (torch.rand(2, 8, 9, 9) + 0.5).requires_grad_()
    y = convolution(x, at=at)
    (dx,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    assert torch.equal(y == 0, dx == 0) and 0 < (y == 0).sum() < y.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", ["prologue", "output"])
def test_the_operator_drops_by_the_rule(at, dtype):
    x = torch.rand(3, 5, 7, 9, dtype=dtype) + 0.5
    rng = draw(x.device)
    y, kept = convolution(x, rng, at), keep_mask(x.shape, rng, 0.4)
    assert torch.equal(y != 0, kept)
    assert parity.error(y[kept], x[kept].double() / 0.6) <= 2 * parity.UNIT.get(dtype, parity.FLOAT64)


def test_manual_seed_and_fork_rng_replay_a_mask_and_checkpoint_its_own():
    x = (torch.rand(2, 8, 9, 9) + 0.5).requires_grad_()
    torch.manual_seed(11)
    first, second = convolution(x), convolution(x)
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    with torch.random.fork_rng():
        convolution(x)
    assert torch.equal(convolution(x), first)
    torch.manual_seed(11)
    y = checkpoint(convolution, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    assert torch.equal(y, first) and torch.equal(dx == 0, y == 0)


def test_no_number_is_drawn_where_nothing_is_dropped():
    x, w = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3)
    before = torch.random.get_rng_state()
    bn_act_conv(x, w)
    bn_act_conv(x, w, p=0.5, drop_at="none")
    assert torch.equal(torch.random.get_rng_state(), before)
    bn_act_conv(x, w, p=0.5)
    assert not torch.equal(torch.random.get_rng_state(), before)


def test_high_words_of_a_64_bit_index_count(monkeypatch):
    """Elements beyond 2^34 have a block index of more than 32 bits."""
    block = torch.tensor([2**32 + 5])
    monkeypatch.setattr(torch, "arange", lambda *_, **__: block)
    mask = keep_mask((1, 4, 1, 1), torch.tensor([3, 4]), 0.5).flatten()
    want = philox_in_python((5, 1, 4, 0), (3, 0))
    assert [bool(bit) for bit in mask] == [word >= 2**31 for word in want]
    assert wrn_random.threshold(0.5) == 2**31
