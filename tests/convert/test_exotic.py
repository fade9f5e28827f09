"""Blocks as they are found: parts that several share, configurations that change, classes that register."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from convert.networks import assert_equal, calls, observe, twins
from families import family_x
from models import shake
from torch import nn

from wrn_fast import WrnFastError, mc_predict
from wrn_fast.convert import accelerate, report, restore

DOUBLE = torch.float64
NO_DROPOUT = {"dropout": SimpleNamespace(p=0.0)}


class Configured(nn.Module):
    """Its dropout rate is in an object that it holds."""

    def __init__(self, config, planes=16):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.conv1, self.conv2 = (nn.Conv2d(planes, planes, 3, padding=1, bias=False) for _ in range(2))
        self.config = config

    def forward(self, x):
        h = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.dropout(F.relu(self.bn2(h)), self.config["dropout"].p, self.training))


class Counting(Configured):
    def forward(self, x):
        self.config["calls"] += 1
        return super().forward(x)


def image(planes=16):
    return torch.randn(2, planes, 8, 8, dtype=DOUBLE)


def fprops(model, x):
    return calls(lambda: model(x))["fprop"]


@pytest.mark.parametrize("part", ["relu1", "conv2", "bn2"])
def test_a_part_that_blocks_share(part):
    """Each of the blocks is one, not the first alone."""
    model = shake(family_x.WideResNet(16, 10, 1)).double()
    for group in (model.block1, model.block2, model.block3):
        setattr(group.layer[1], part, getattr(group.layer[0], part))
    plain, fast = twins(model)
    assert len([name for name in report(fast).accelerated if name[-1].isdigit()]) == 6
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    assert_equal(observe(fast, x, True), observe(plain, x, True))


def test_a_configuration_that_changes_is_noticed():
    config = {"dropout": SimpleNamespace(p=0.5)}
    block, x = accelerate(shake(Configured(config)).double(), require=True), image()
    assert not torch.equal(block(x), block(x))
    config["dropout"].p = 0.0
    assert torch.equal(block(x), block(x)) and fprops(block, x) == 2
    copied = copy.deepcopy(block)
    config["dropout"] = SimpleNamespace(p=0.5)
    assert not torch.equal(block(x), block(x)) and torch.equal(copied(x), copied(x))


def test_a_forward_that_stores_in_what_it_holds_is_left_alone():
    block = Counting({"dropout": SimpleNamespace(p=0.0), "calls": 0}).double()
    assert report(accelerate(block)).why[""] == "its forward stores config on the module"
    block(image())
    assert block.config["calls"] == 1


def test_attributes_of_any_name_are_the_users():
    class Named(Configured):
        def forward(self, x):
            h = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
            return x + h if self._fast_path else h

    block = Named(None).double()
    block._fast_path = True
    accelerate(block, require=True)
    x = image()
    want = block(x) - x
    block._fast_path = False
    assert_equal({"y": block(x).detach()}, {"y": want.detach()})
    assert copy.copy(block)._fast_path is False
    assert block._as_plain()._fast_path is False


def test_a_class_that_registers_its_subclasses_does_not_learn_of_the_fast_one():
    registry = {}

    class Registered(Configured):
        def __init_subclass__(cls, name, **options):
            super().__init_subclass__(**options)
            registry[name] = cls

    class Block(Registered, name="block"):
        pass

    block = accelerate(Block(NO_DROPOUT), require=True)
    assert registry == {"block": Block} and isinstance(block, Block)
    assert type(restore(block)) is Block


def test_a_metaclass_of_the_users_is_left_alone():
    class Meta(type):
        pass

    class Block(Configured, metaclass=Meta):
        pass

    assert "made by a metaclass, Meta" in report(accelerate(Block(NO_DROPOUT))).why[""]


def test_a_new_object_of_a_fast_class_computes_plainly_until_it_is_accelerated():
    model = accelerate(shake(family_x.WideResNet(10, 10, 1, 0.3))).eval()
    block = model.block1.layer[0]
    model.block1.layer[0] = type(block)(16, 16, 1, 0.3).eval()
    assert "call accelerate(model)" in report(model).why["block1.layer.0"]
    x = torch.randn(2, 3, 32, 32)
    assert fprops(model, x) == 4
    assert mc_predict(model, x, 2).mean.shape == (2, 10)
    assert fprops(accelerate(model, check=x), x) == 6
    assert type(pickle.loads(pickle.dumps(model.block1.layer[0]))) is family_x.BasicBlock


class Switched(Configured):
    """A flag and a method that may be exchanged, on the class or on one object."""

    use = True

    def body(self, x):
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))

    def forward(self, x):
        return x + self.body(x) if self.use else x


@pytest.mark.parametrize("name, value", [("use", False), ("body", lambda *args: torch.zeros_like(args[-1]))])
@pytest.mark.parametrize("where", ["class", "base", "object"])
def test_flags_and_methods_that_are_exchanged_later_are_noticed(name, value, where, monkeypatch):
    Block = type("Block", (Switched,), {}) if where == "base" else Switched
    block, x = accelerate(shake(Block(None)).double(), require=True), image()
    before = block(x)
    monkeypatch.setattr(block if where == "object" else Switched, name, value, raising=False)
    assert torch.equal(block(x), x)
    monkeypatch.undo()
    assert torch.equal(block(x), before) and fprops(block, x) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_says_what_to_do():
    model = accelerate(nn.Sequential(family_x.BasicBlock(16, 16, 1))).eval()
    with pytest.raises(WrnFastError, match=r"torch\.jit\.script.*wrn_fast\.restore"):
        torch.jit.script(model)
    x = image().float()
    assert torch.jit.trace(model, x)(x).shape == x.shape


def test_a_function_with_arguments_that_is_exchanged_is_noticed():
    class Leaky(Configured):
        def forward(self, x):
            return x + self.conv2(self.config(self.bn2(self.conv1(self.config(self.bn1(x))))))

    block, x = accelerate(Leaky(partial(F.leaky_relu, negative_slope=0.1)).double(), require=True), image()
    before = block(x)
    block.config = partial(F.leaky_relu, negative_slope=0.2)
    assert not torch.equal(block(x), before) and fprops(block, x) == 2
