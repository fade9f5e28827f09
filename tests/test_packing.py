"""Packed filters: kept from the second call on that finds a filter unchanged, never stale, freed with their weight."""

import copy
import gc

import pytest
import torch
from torch import nn

from wrn_fast import native, packing
from wrn_fast.functional import bn_act_conv


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.delenv("WRN_FAST_PACK_CACHE", raising=False)
    packing.refresh()
    yield
    packing.refresh()


def fingerprint(w):
    step = packing.sample_step(w.numel())
    return hash(tuple(w.flatten()[i * step % w.numel()].item() for i in range(packing.SAMPLES)))


def ask(w, key="k"):
    return packing.lookup(w, key, fingerprint, lambda v: v.detach().flatten().clone())


def test_a_filter_is_kept_from_the_second_sight_on():
    w = torch.randn(4, 3, 3, 3)
    assert ask(w) is None
    pack = ask(w)
    assert pack is not None and ask(w) is pack
    assert ask(w, "other") is None, "each key has a first sight of its own: a training step sees fprop's and dgrad's"
    assert packing.report() == [packing.Row((4, 3, 3, 3), "k", 432)]
    assert packing.kept_bytes() == 432


def test_nothing_is_kept_of_a_filter_that_changes():
    w = torch.randn(4, 3, 3, 3)
    for _ in range(3):
        assert ask(w) is None
        w.data.mul_(1.01)
    assert packing.report() == []


def test_a_pack_dies_with_its_weight():
    w = torch.randn(4, 3, 3, 3)
    ask(w), ask(w)
    assert packing.kept_bytes() > 0
    del w
    gc.collect()
    assert packing.report() == [] and not packing._entries


def test_another_tensor_with_the_same_address_is_another_filter():
    w = torch.randn(4, 3, 3, 3)
    ask(w), ask(w)
    twin = w.detach()
    assert ask(twin) is None
    packing._entries[id(twin)] = packing._entries[id(w)]
    assert ask(twin) is None, "an id that was used before says nothing"


def test_the_unsampled_element():
    """Two of the changes below would prove nothing if the fingerprint read what they edit."""
    w = Net().first.weight
    before = fingerprint(w)
    w.data[UNSAMPLED] += 1.0
    assert fingerprint(w) == before


def test_the_switch(monkeypatch):
    w = torch.randn(4, 3, 3, 3)
    ask(w), ask(w)
    monkeypatch.setenv("WRN_FAST_PACK_CACHE", "0")
    assert ask(w) is None


def test_samples_of_a_filter_are_spread():
    for count in (1, 2, 64, 27, 16 * 3 * 9, 160 * 160 * 9, 640 * 640 * 9):
        step = packing.sample_step(count)
        places = {i * step % count for i in range(packing.SAMPLES)}
        assert len(places) == min(count, packing.SAMPLES)
        if count > 10_000:
            assert len({place % 9 for place in places}) > 4, "one tap of the filter is not enough"


class Net(nn.Module):
    """Three convolutions of the operator: F(4x4), direct, and a 1x1 shortcut."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, bias=False)
        self.second = nn.Conv2d(16, 24, 3, bias=False)
        self.short = nn.Conv2d(8, 24, 1, bias=False)

    def forward(self, x):
        h = bn_act_conv(x, self.first.weight, act="relu").y
        return bn_act_conv(
            h, self.second.weight, stride=2, x_short=x, w_short=self.short.weight, short_stride=2, short_act="relu"
        ).y


# The fingerprint does not read it.
UNSAMPLED = (0, 0, 0, 1)


def fresh(model):
    """The same values in tensors that nobody has seen."""
    twin = Net()
    twin.load_state_dict({name: v.clone() for name, v in model.state_dict().items()})
    return twin


def fused_step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    model(x).square().mean().backward()
    optimizer.step()


def plain_step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()


def load(model, x):
    model.load_state_dict(Net().state_dict())


def assign(model, x):
    model.load_state_dict(Net().state_dict(), assign=True)


def write_data(model, x):
    for w in model.parameters():
        w.data.mul_(1.5)


def swap_data(model, x):
    """An exponential moving average takes the parameters' place, as evaluation of averaged weights does."""
    for w in model.parameters():
        w.data = torch.randn_like(w)


def move_layout(model, x):
    write_data(model, x)
    model.to(memory_format=torch.channels_last)


def in_place(model, x):
    with torch.no_grad():
        model.first.weight[UNSAMPLED] += 1.0


def through_numpy(model, x):
    model.second.weight.detach().numpy()[:] *= -1.0


def hidden_element(model, x):
    model.first.weight.data[UNSAMPLED] += 1.0
    packing.refresh(model)


CHANGES = (
    fused_step, plain_step, load, assign, write_data, swap_data, move_layout, in_place, through_numpy, hidden_element,
)  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_is_stale(change):
    """Kept packs, then other weights by some road: outputs and gradients are a fresh model's, bit for bit."""
    model, x = Net(), torch.randn(2, 8, 11, 11)
    for _ in range(3):
        x1 = x.clone().requires_grad_()
        torch.autograd.grad(model(x1).sum(), x1)
    assert len(packing.report()) == 6, "three filters for fprop, three for dgrad"
    before = model(x).detach()
    change(model, x)
    for _ in range(3):
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = model(mine), fresh(model)(theirs)
        assert torch.equal(y, want)
        assert torch.equal(torch.autograd.grad(y.sum(), mine)[0], torch.autograd.grad(want.sum(), theirs)[0])
    assert not torch.equal(y, before), "the change changed nothing"


@pytest.mark.native
def test_a_training_step_keeps_nothing():
    model, x = Net(), torch.randn(2, 8, 11, 11)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    assert packing.report() == []


@pytest.mark.native
def test_copies_have_packs_of_their_own():
    model, x = Net().eval(), torch.randn(2, 8, 11, 11)
    with torch.no_grad():
        model(x), model(x)
        twin = copy.deepcopy(model)
        twin.first.weight.data.mul_(2.0)
        assert torch.equal(twin(x), fresh(twin)(x))
        assert torch.equal(model(x), fresh(model)(x))


@pytest.mark.native
def test_inference_tensors():
    """They have no version counter."""
    with torch.inference_mode():
        model, x = Net(), torch.randn(2, 8, 11, 11)
        model(x), model(x)
        write_data(model, x)
        assert torch.equal(model(x), fresh(model)(x))


@pytest.mark.native
def test_kept_bytes_are_those_of_the_algorithms(monkeypatch):
    """36 matrices for F(4x4), 9 taps and one tap for direct; panels are whole vectors wide."""
    monkeypatch.setenv("WRN_FAST_PIN_ALGO", "f4")
    model, x = Net(), torch.randn(2, 8, 11, 11)
    with torch.no_grad():
        model(x), model(x)
    floats = {row.shape: row.bytes // 4 for row in packing.report()}
    width = {"avx512": 16, "avx2": 8, "portable": 4}[native.isa()]
    up = lambda n: -(-n // width) * width
    assert floats == {(16, 8, 3, 3): 36 * 8 * up(16), (24, 16, 3, 3): 9 * 16 * up(24), (24, 8, 1, 1): 8 * up(24)}
