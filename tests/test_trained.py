"""A network that has been trained: its statistics and weights belong together, and errors with a direction show."""

import copy

import pytest
import torch

from wrn_fast import classic, parity, reference
from wrn_fast.verify.training import train_briefly


@pytest.mark.native
def test_outputs_of_a_trained_network(seeded):
    """Constants of F(4x4) that were rounded took them to 2.6 times eager's error, while every layer was well."""
    fast = classic(16, 10, 4)
    train_briefly(fast)
    fast.eval()
    plain = reference.classic(16, 10, 4).eval()
    plain.load_state_dict(fast.state_dict())
    eager = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(plain).double()
    pool = parity.Pool("outputs", torch.float32)
    with torch.no_grad():
        for _ in range(parity.SEEDS):
            x = torch.randn(4, 3, 32, 32)
            pool.add(fast(x), eager(x.contiguous(memory_format=torch.channels_last)), exact(x.double()))
    cell = pool.judge()
    assert cell.ok, cell
