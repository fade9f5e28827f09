"""The same seed gives the same bits: from process to process, for any number of threads, and where PyTorch insists."""

from __future__ import annotations

import pytest
import torch
from injection.process import run

import wrn_fast
from wrn_fast import dispatch

BITS = """
import hashlib, sys, torch, wrn_fast
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(5)
digest = hashlib.sha256()
for c, k, stride, dtype in ((40, 48, 1, torch.float32), (33, 16, 2, torch.float32), (24, 72, 1, torch.bfloat16)):
    x = torch.randn(3, c, 17, 14).to(dtype).requires_grad_()
    w = torch.randn(k, c, 3, 3).to(dtype).requires_grad_()
    gamma, beta = (torch.randn(c, requires_grad=True) for _ in range(2))
    out = wrn_fast.bn_act_conv(x, w, wrn_fast.channel_stats(x), gamma, beta, batch_stats=True, stride=stride, p=0.3,
                               want_stats=True)
    for v in (out.y, out.stats, *torch.autograd.grad(out.y, [x, w, gamma, beta], torch.randn_like(out.y))):
        digest.update(v.detach().float().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.native
def test_processes_and_thread_counts_agree_to_the_bit():
    found = {run(BITS, threads, WRN_FAST_BACKEND="cpu").strip() for threads in ("1", "1", "2", "3")}
    assert len(found) == 1


@pytest.fixture
def insisting():
    """PyTorch raises where an operation has no deterministic form."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("backend", ["aten", "cpu,aten"])
def test_deterministic_algorithms_are_honoured(insisting, backend, seed):
    """No call raises, and two training runs from one seed end in the same weights."""

    def weights():
        torch.manual_seed(seed)
        model = wrn_fast.classic(10, 10, 1, 0.3).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
            optimizer.step()
        return model.state_dict()

    with dispatch.backend(backend):
        first, second = weights(), weights()
    assert all(torch.equal(v, second[name]) for name, v in first.items())
