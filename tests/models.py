"""A reference and a drop-in with equal weights, and how far their outputs are apart."""

import torch
from torch import nn

import wrn_fast
from wrn_fast import reference
from wrn_fast.block import run_chain
from wrn_fast.parity import error


def shake(model):
    """Random BatchNorm parameters and statistics: the initial 1, 0, 0, 1 hide faults."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.0, 0.3)
            m.running_mean.normal_(0.0, 0.3)
            m.running_var.uniform_(0.5, 2.0)
    return model


class Blocks(nn.Module):
    """The shaken blocks of a WideResNet, a strided one with its shortcut among them."""

    def __init__(self):
        super().__init__()
        model = shake(wrn_fast.classic(10, 10, 1))
        self.blocks = nn.ModuleList([*model.block1.layer, *model.block2.layer])

    def forward(self, x):
        return run_chain(list(self.blocks), x)


def pair(depth=10, classes=4, width=1, dropRate=0.0, dtype=torch.float32, **options):
    """A shaken reference and a drop-in with its weights."""
    ref = shake(reference.WideResNet(depth, classes, width, dropRate, **options)).to(dtype)
    fast = wrn_fast.WideResNet(depth, classes, width, dropRate, **options).to(dtype)
    fast.load_state_dict(ref.state_dict(), strict=True)
    return ref, fast


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def worst(got, want):
    return max(error(a, b) for a, b in zip(outputs(got), outputs(want), strict=True))
