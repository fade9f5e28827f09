"""Each family: recognised, and equal to its own forward in outputs, all gradients and running statistics."""

import pytest
import torch
from convert.networks import FAMILIES, assert_equal, masks_of, noted_draws, observe, twins, vanishing
from families import other
from models import shake

from wrn_fast import parity
from wrn_fast.block import FastBlock
from wrn_fast.convert import accelerate, report, restore

FAST = {"x": 6, "x spare": 4, "x widths": 6, "dm": 6, "ssl": 6, "m": 6}  # blocks; 3 where not listed


def blocks(model):
    return [m for m in model.modules() if isinstance(m, FastBlock)]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_its_own_forward_in_float64(name):
    plain, fast = twins(shake(FAMILIES[name]()).double())
    assert len(blocks(fast)) == FAST.get(name, 3), report(fast)
    assert not report(fast).left
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        assert_equal(observe(fast, x, training), observe(plain, x, training))


@pytest.mark.parametrize("name", ["x", "dm custom", "ssl bias", "m"])
def test_float32_within_the_bound(name):
    """Pooled over 8 seeds: outputs and statistics; gradients of a ReLU network by the median."""
    pools = {}
    for _ in range(parity.SEEDS):
        plain, fast = twins(shake(FAMILIES[name]()))
        plain = plain.to(memory_format=torch.channels_last)
        x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
        oracle, _ = twins(restore(fast))
        accelerate(fast)
        want = observe(oracle.double(), x.double(), True)
        got, eager = observe(fast, x, True), observe(plain, x, True)
        for key, value in want.items():
            if value is None or not value.dtype.is_floating_point or key in vanishing(want):
                continue
            rule = "median" if key.startswith("gradient") else "pooled"
            pools.setdefault(key, parity.Pool(key, torch.float32, rule, "f4")).add(got[key], eager[key], value)
    bad = [str(cell) for cell in (pool.judge() for pool in pools.values()) if not cell.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("name", ["x", "ssl", "m", "reference"])
def test_dropout_sits_where_the_user_has_it(name, monkeypatch):
    """The plain network with the fused operator's masks gives the same outputs, gradients and statistics."""
    plain, fast = twins(shake(FAMILIES[name](0.3)).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        with noted_draws(monkeypatch) as draws:
            got = observe(fast, x, training)
        assert len(draws) == (len(blocks(fast)) if training or name == "reference" else 0)
        with masks_of(draws, monkeypatch) as rest:
            want = observe(plain, x, training)
        assert not rest
        assert_equal(got, want)


@pytest.mark.parametrize("make", [other.Residual, other.ZooUnit])
@pytest.mark.parametrize("shape", [(16, 16, 1), (16, 24, 2)])
def test_other_module_trees(make, shape, monkeypatch):
    plain, fast = twins(shake(make(*shape)).double())
    assert isinstance(fast, FastBlock) and isinstance(fast, make)
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    with noted_draws(monkeypatch) as draws:
        got = observe(fast, x, True)
    with masks_of(draws, monkeypatch):
        want = observe(plain, x, True)
    assert_equal(got, want)


@pytest.mark.parametrize("cls", other.REASONS, ids=lambda cls: cls.__name__)
def test_look_alikes_are_left_alone_with_a_reason(cls):
    block = shake(cls())
    before = {k: v.clone() for k, v in block.state_dict().items()}
    keys, x, state = list(block.__dict__), torch.randn(2, 16, 8, 8), torch.get_rng_state()
    accelerate(block)
    assert type(block) is cls and list(block.__dict__) == keys
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    found = report(block)
    assert found.left == ("",) and not found.accelerated
    assert other.REASONS[cls] in found.why[""]
    assert other.REASONS[cls] in str(found)
    assert block(x.clone()).shape == x.shape


def test_recognising_leaves_no_trace():
    """Statistics, random numbers, hooks and gradients of the original do not move."""
    model = shake(FAMILIES["x"](0.3))
    fired = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append(1))
        module.register_full_backward_hook(lambda *_: fired.append(1))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    accelerate(model)
    assert len(blocks(model)) == 6 and not fired
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
