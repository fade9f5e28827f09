"""CUDA graphs of the cuda backend, played on the CPU: a graph packs and folds nothing, and nothing in it goes stale."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import tape
from models import Blocks
from torch import nn

import wrn_fast
from wrn_fast import graphs
from wrn_fast.kernels import cuda_weights

SHAPE = (1, 16, 8, 8)


class Note(nn.Module):
    """All of its kind are equal, as modules that are dataclasses may be."""

    __hash__ = nn.Module.__hash__

    def __eq__(self, other):
        return type(other) is Note


def net(seed):
    torch.manual_seed(seed)
    return Blocks().eval()


def image():
    return torch.randn(SHAPE).bfloat16().contiguous(memory_format=torch.channels_last)


@pytest.fixture
def tapes(recorder, monkeypatch):
    made = []
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    monkeypatch.setattr(graphs, "_capture", tape.capture(recorder, monkeypatch, made))
    return made


def check(fast, model):
    """The replay is bit-equal to the model without a graph, as the model is now."""
    x = image()
    assert torch.equal(fast(x), copy.deepcopy(model)(x))


@torch.no_grad()
def test_a_graph_has_a_kernel_a_convolution_and_no_other(tapes, seed):
    model = net(seed)
    check(wrn_fast.graphed(model, image()), model)
    assert set(tapes[0].names) == {"fprop"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_writes_the_next_ones_activation(recorder, seed, dtype):
    """Only the first convolution has a prologue; y is written where it is the result."""
    net(seed).to(dtype)(image())
    calls = [arguments for name, arguments in recorder.calls if name == "fprop"]
    given = {name: [bool(c[name]) for c in calls] for name in ("scale", "short_scale", "out_scale", "y_act", "y")}
    assert given["scale"] == [True, False, False, False] and not any(given["short_scale"])
    assert given["out_scale"] == given["y_act"] == [True, True, True, False]
    assert given["y"] == [False, False, False, True]


@torch.no_grad()
def test_a_graph_of_monte_carlo_dropout_draws_anew_without_a_pass(tapes, seed):
    """Each replay draws two numbers a mask, and the convolution before it does the rest."""
    model = net(seed)
    dropping = wrn_fast.WideResNet(10, 10, 1, dropRate=0.5).eval()
    model.blocks = nn.ModuleList([*dropping.block1.layer, *dropping.block2.layer])
    fast = wrn_fast.graphed(model, image())
    assert sorted(tapes[0].names) == ["fprop"] * 4 + ["randint"] * 2
    x = image()
    torch.manual_seed(seed)
    first = fast(x).clone()
    torch.manual_seed(seed)
    assert torch.equal(first, model(x)) and not torch.equal(first, fast(x))


@torch.no_grad()
def test_without_the_cache_the_graph_makes_everything_itself(tapes, seed, monkeypatch):
    monkeypatch.setenv("WRN_FAST_PACK_CACHE", "0")
    model = net(seed)
    fast = wrn_fast.graphed(model, image())
    assert set(tapes[0].names) >= {"fprop", "pack", "affine_table", "stack"}
    model.load_state_dict(net(seed + 1).state_dict())
    check(fast, model)


def every(model, kind):
    """All tensors of that name, of modules of that class if the name has one."""
    owner, _, name = kind.rpartition(".")
    modules = [m for m in model.modules() if owner in ("", type(m).__name__)]
    found = [getattr(m, name, None) for m in modules]
    return [v for v in found if v is not None]


@torch.no_grad()
@pytest.mark.parametrize("name", ["Conv2d.weight", "running_mean", "running_var", "BatchNorm2d.weight", "bias"])
@pytest.mark.parametrize("hidden", [False, True], ids=["counted", "hidden"])
@pytest.mark.parametrize("backend", ["cuda", "aten"])
def test_what_changes_in_place_is_followed(tapes, seed, name, hidden, backend):
    """Each kind of tensor by itself; hidden: as a fused optimizer or a broadcast writes, past the version counter."""
    model = net(seed)
    with wrn_fast.backend(backend):
        fast = wrn_fast.graphed(model, image())
        before = fast(x := image())
        for v in every(model, name):
            versions = v._version
            (v.data if hidden else v).mul_(1.5)
            assert (v._version == versions) == hidden
        assert not torch.equal(fast(x), before)
        check(fast, model)


@torch.no_grad()
def test_a_batch_norm_of_strided_vectors_is_followed(tapes, seed):
    model = net(seed)
    bn = model.blocks[0].bn2
    bn.weight = nn.Parameter((torch.rand(2 * len(bn.weight)) + 0.5)[::2])
    fast = wrn_fast.graphed(model, image())
    for _ in range(2):
        bn.weight.data.mul_(2)
        x = image()
        assert torch.equal(fast(x), model(x))  # not with a copy of the model, whose vectors are dense


@torch.no_grad()
def test_a_checkpoint_is_followed(tapes, seed):
    model = net(seed)
    fast = wrn_fast.graphed(model, image())
    model.load_state_dict(net(seed + 1).state_dict())
    check(fast, model)
    check(fast, model)


@torch.no_grad()
@pytest.mark.parametrize("name, everything", [("Conv2d.weight", True), ("BatchNorm2d.weight", False),
                                              ("running_mean", False), ("num_batches_tracked", False)])  # fmt: skip
def test_only_filters_that_were_counted_are_packed_again(tapes, seed, name, everything, monkeypatch):
    """Vectors are folded anew in any case, and a counter of batches is no reason to."""
    model = net(seed)
    fast = wrn_fast.graphed(model, image())
    fast(image())
    asked = []
    renew = cuda_weights._Renewer.renew
    monkeypatch.setattr(
        cuda_weights._Renewer, "renew", lambda self, everything: (asked.append(everything), renew(self, everything))
    )
    fast(image())
    for v in every(model, name):
        v.add_(1)
    check(fast, model)
    assert asked == [False, everything]


@torch.no_grad()
def test_refresh_finds_what_no_sample_shows(tapes, seed):
    model = net(seed)
    fast = wrn_fast.graphed(model, image())
    fast(image())
    w = model.blocks[0].conv1.weight
    w.data[1, 1, 1, 1] += 8
    wrn_fast.refresh(model)
    check(fast, model)


def replace(model):
    model.blocks[0].conv2.weight = nn.Parameter(model.blocks[0].conv2.weight.detach().clone())


def move(model):
    w = model.blocks[0].conv2.weight
    w.data = w.data.clone()


def swap(model):
    model.blocks[1] = copy.deepcopy(model.blocks[1])


def count_again(model):
    """By a tensor of equal value."""
    bn = model.blocks[0].bn1
    bn.num_batches_tracked = bn.num_batches_tracked.clone()


def exchange_alike(model):
    """By a module that its class calls equal."""
    model.blocks[0].note = Note()


def give_a_bias(model):
    model.blocks[0].conv2.bias = nn.Parameter(torch.zeros(16, dtype=torch.bfloat16))


def name_nothing(model):
    """As a buffer that is there only by its name."""
    model.blocks[0].bn1.register_buffer("mask", None)


CHANGES = {
    "weight has been": replace, "weight lies": move, "1 has been": swap, "num_batches_tracked has been": count_again,
    "note has been": exchange_alike, "bias has been": give_a_bias,
    "mask has been": name_nothing,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("word", CHANGES)
def test_what_the_graph_cannot_follow_raises(tapes, seed, word):
    model = net(seed)
    model.blocks[0].note = Note()
    fast = wrn_fast.graphed(model, image())
    fast(image())
    CHANGES[word](model)
    with pytest.raises(wrn_fast.WrnFastError, match=f"`model`.*{word}.*capture it again"):
        fast(image())
    check(wrn_fast.graphed(model, image()), model)


@torch.no_grad()
def test_statistics_of_the_batch_stay_in_the_graph(tapes, seed):
    model = net(seed).train()
    fast = wrn_fast.graphed(model, image())
    assert {"pack", "affine_table", "merge_moments"} <= set(tapes[0].names)
    check(fast, model)


@torch.no_grad()
def test_filters_may_be_fetched_before_the_kernel_in_front_has_ended(tapes, seed, recorder):
    """Nothing in the graph writes them: every call says so, whatever its prologue."""
    wrn_fast.graphed(net(seed), image())
    calls = [kwargs for name, kwargs in recorder.calls if name == "fprop"]
    assert all(kwargs["early"] for kwargs in calls[-5:])


class Loose(nn.Module):
    """A filter that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.w = torch.randn(16, 16, 3, 3)

    def forward(self, x):
        return wrn_fast.bn_act_conv(x, self.w, pad=(1, 1, 1, 1))[0]


@torch.no_grad()
def test_a_tensor_that_the_model_does_not_own_is_read_by_the_graph(tapes):
    model = Loose().eval()
    fast = wrn_fast.graphed(model, image())
    assert "pack" in tapes[0].names
    model.w.mul_(2)
    check(fast, model)
