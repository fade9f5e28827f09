"""CUDA graphs: refusals with no GPU, the wrapper around a recorder in their place, and the real thing on a GPU."""

import copy

import pytest
import torch
from torch import nn

import wrn_fast
from wrn_fast import graphs
from wrn_fast.errors import WrnFastError
from wrn_fast.graphs import graphed


class Net(nn.Module):
    """A BatchNorm to move, and an output of every kind of container."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return {"y": y, "both": (y.mean(), [y.sum()])}


@pytest.fixture
def recorder(monkeypatch):
    """A capture that calls, and a replay that calls again and writes where the first output was."""

    def capture(function):
        for _ in range(3):
            function()
        output = function()

        def replay():
            again = function()
            torch.utils._pytree.tree_map(lambda old, new: old.copy_(new), output, again)

        return replay, output

    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    monkeypatch.setattr(graphs, "_capture", capture)


@pytest.mark.parametrize("example, word", [(torch.zeros(1, 3, 8, 8), "CUDA"), ("x", "tensor")])
def test_what_is_not_on_a_gpu_is_refused(example, word):
    with pytest.raises(WrnFastError, match=f"`example`.*{word}"):
        graphed(Net(), example)


@torch.no_grad()
def test_replays_follow_inputs_and_weights_and_hand_out_tensors_of_their_own(recorder):
    model = Net().eval()
    fast = graphed(model, torch.randn(2, 3, 8, 8))
    first = fast(x := torch.randn(2, 3, 8, 8))
    kept = copy.deepcopy(first)
    assert torch.equal(first["y"], model(x)["y"]) and torch.equal(first["both"][1][0], model(x)["both"][1][0])
    model.conv.weight.mul_(2)
    assert torch.equal(fast(z := torch.randn(2, 3, 8, 8))["y"], model(z)["y"])
    assert torch.equal(first["y"], kept["y"])


@torch.no_grad()
def test_another_input_or_mode_is_named(recorder):
    model = Net().eval()
    fast = graphed(model, torch.randn(2, 3, 8, 8))
    for x in (torch.randn(1, 3, 8, 8), torch.randn(2, 3, 8, 8).double(), torch.empty(2, 3, 8, 8, device="meta")):
        with pytest.raises(WrnFastError, match=r"`x`: expected torch.float32 \[2, 3, 8, 8\] on cpu"):
            fast(x)
    model.train()
    with pytest.raises(WrnFastError, match=r"`model`: expected eval\(\)"):
        fast(torch.randn(2, 3, 8, 8))


@torch.no_grad()
def test_warming_up_is_no_training(recorder):
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    fast = graphed(model, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    fast(x)
    plain(x)
    assert all(torch.equal(v, plain.state_dict()[name]) for name, v in model.state_dict().items())


def test_where_gradients_are_wanted_forward_and_backward_are_captured(recorder, monkeypatch):
    seen = []

    def callables(module, samples, warmup):
        seen.append((module, samples))
        for _ in range(warmup):
            module(*samples)
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", callables)
    model = Net()
    forward = model.forward
    before = copy.deepcopy(model.state_dict())
    fast = graphed(model, torch.randn(2, 3, 8, 8).requires_grad_())
    ((module, (sample,)),) = seen
    assert module is not model and module.model is model and sample.requires_grad and model.forward == forward
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    fast(torch.randn(2, 3, 8, 8))["y"].sum().backward()
    assert model.conv.weight.grad is not None
    model.requires_grad_(False)
    graphed(model, torch.randn(2, 3, 8, 8))
    assert len(seen) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_on_a_gpu_a_replay_is_bit_equal_to_the_model(training):
    model = wrn_fast.classic(10, 10, 1).cuda().train(training)
    plain = copy.deepcopy(model)
    x = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.set_grad_enabled(training):
        fast = graphed(model, torch.randn_like(x))
        got, want = fast(x), plain(x)
        assert torch.equal(got, want)
        if training:
            got.square().sum().backward()
            want.square().sum().backward()
            for p, q in zip(model.parameters(), plain.parameters()):
                assert torch.equal(p.grad, q.grad)
