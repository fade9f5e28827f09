"""The drop-in after its owner has changed it: other parts, reparametrized weights, shared modules."""

import pytest
import torch
from models import pair, worst
from torch import nn
from torch.nn.utils import parametrizations, prune

from wrn_fast.parity import FLOAT64


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "prune"])
def test_reparametrized_convolutions(wrap, seed):
    ref, fast = pair(10, 4, 1, dtype=torch.float64)
    for model in (ref.eval(), fast.eval()):
        torch.manual_seed(seed)
        conv = model.block2.layer[0].conv1
        if wrap == "prune":
            prune.l1_unstructured(conv, "weight", 0.5)
        else:
            getattr(parametrizations, wrap)(conv)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert worst(fast(x), ref(x)) <= FLOAT64


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", ["stem", "spectral stem", "norms"])
def test_parts_that_users_exchange(change, training, seed):
    """A stem round conv1, a reparametrized one (a read is a step of the power iteration), other normalisation."""
    ref, fast = pair(10, 4, 1, dtype=torch.float64)
    for model in (ref, fast):
        torch.manual_seed(seed)
        if change == "stem":
            model.conv1 = nn.Sequential(nn.InstanceNorm2d(3), model.conv1)
        elif change == "spectral stem":
            parametrizations.spectral_norm(model.conv1)
        else:
            for block in (group.layer[0] for group in (model.block1, model.block2, model.block3)):
                block.bn1 = nn.GroupNorm(4, block.bn1.num_features).double()
        model.train(training)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        assert worst(fast(x), ref(x)) <= FLOAT64
