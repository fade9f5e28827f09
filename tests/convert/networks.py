"""Every family as a small network, what makes BatchNorm faults visible, and dropout with masks that can be compared."""

import copy
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from families import family_dm, family_m, family_ssl, family_x
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wrn_fast import parity, reference
from wrn_fast import random as counter
from wrn_fast.convert import accelerate

FAMILIES = {
    "x": lambda rate=0.0: family_x.WideResNet(16, 10, 1, rate),
    "x spare": lambda rate=0.0: family_x.WideResNet(10, 10, 2, rate, spare=True, name="conv_shortcut"),
    "x widths": lambda rate=0.0: family_x.TwoArguments(rate=rate, counts=[2, 1, 3], widths=[8, 24, 32, 40]),
    "x dict": lambda rate=0.0: family_x.ReturnsDict(10, 10, 2, rate),
    "x normalised": lambda rate=0.0: family_x.Normalised(family_x.WideResNet(10, 10, 2, rate)),
    "dm": lambda rate=0.0: family_dm.WideResNet(depth=16),
    "dm custom": lambda rate=0.0: family_dm.WideResNet(width=2, act=family_dm.Swish),
    "dm relu": lambda rate=0.0: family_dm.WideResNet(act=nn.ReLU, momentum=0.1),
    "ssl": lambda rate=0.0: family_ssl.WideResNet(depth=16, rate=rate),
    "ssl bias": lambda rate=0.0: family_ssl.WideResNet(rate=rate, bias=True, eps=1e-3),
    "m": lambda rate=0.0: family_m.WideResNet(16, 1, rate),
    "reference": lambda rate=0.0: reference.WideResNet(10, 10, 2, rate),
}


def observe(model, x, training):
    """Outputs, the gradients of x and of every parameter, and every buffer afterwards."""
    model.train(training)
    x = x.detach().clone().requires_grad_()
    out = model(x)
    leaves = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else [out]
    weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v) for v in leaves]
    named = {"x": x, **{k: p for k, p in model.named_parameters() if p.requires_grad}}
    loss = sum((v * w).sum() for v, w in zip(leaves, weights))
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    seen = {f"output {i}": v.detach() for i, v in enumerate(leaves)}
    seen |= {f"gradient {k}": g for k, g in zip(named, grads)}
    return seen | {f"buffer {k}": b.clone() for k, b in model.named_buffers()}


def vanishing(seen):
    """Keys of gradients that are zero but for rounding: of a bias before a BatchNorm in training."""
    norms = {k: v.norm() for k, v in seen.items() if k.startswith("gradient") and v is not None}
    total = sum(v * v for v in norms.values()) ** 0.5
    return {k for k, v in norms.items() if v <= parity.FLOAT64 * total}


def assert_equal(got, want):
    """Everything that `observe` saw, in float64."""
    assert got.keys() == want.keys()
    zero = vanishing(want)
    for key, value in want.items():
        if key in zero:
            assert key in vanishing(got), key
        elif value is None or not value.dtype.is_floating_point:
            assert got[key] is None if value is None else torch.equal(got[key], value), key
        else:
            assert parity.error(got[key], value) <= parity.FLOAT64, key


def twins(model):
    """(plain, accelerated) copies of a model."""
    return copy.deepcopy(model), accelerate(copy.deepcopy(model))


@contextmanager
def masks_of(draws, monkeypatch):
    """F.dropout takes its mask from the counter-based generator: with `draws` empty none is known yet, so fail."""
    rest = list(draws)

    def dropout(v, p=0.5, training=True, inplace=False):
        return counter.dropout(v, rest.pop(0), p) if training and p > 0 else v

    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", dropout)
        yield rest


@contextmanager
def noted_draws(monkeypatch):
    """Notes the (seed, offset) of each dropout of the fused operator."""
    draws, draw = [], counter.draw

    def noting(device):
        draws.append(draw(device))
        return draws[-1]

    with monkeypatch.context() as patch:
        patch.setattr(counter, "draw", noting)
        yield draws


class Calls(TorchDispatchMode):
    """How often each operator of this package ran inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "wrn_fast":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls(function):
    """Operator calls of `function()`, by name."""
    with Calls() as mode:
        function()
    return mode.counts
