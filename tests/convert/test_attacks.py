"""Adversarial attacks on accelerated models: what a step computes and keeps, and the attack libraries' own loops."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from convert.networks import FAMILIES, assert_equal, calls, twins
from families import family_x
from models import shake

from benchmarks.memory import saved_bytes
from wrn_fast import parity
from wrn_fast.convert import accelerate

DOUBLE = torch.float64


def net(rate=0.0, depth=10):
    return shake(family_x.WideResNet(depth, 10, 1, rate)).double()


def image(n=2):
    return torch.randn(n, 3, 32, 32, dtype=DOUBLE)


def test_an_attack_computes_no_weight_gradients():
    plain, fast = (m.eval() for m in twins(net()))
    x = image().requires_grad_()
    grads = []

    def step(model):
        grads.append(torch.autograd.grad(F.cross_entropy(model(x), torch.tensor([1, 2])), [x])[0])

    counts = calls(lambda: step(fast))
    step(plain)
    assert counts["wgrad"] == counts["dgrad"] == 0 and counts["input_grad"] >= 6
    assert parity.error(*grads) <= parity.FLOAT64
    assert torch.equal(fast(x), fast(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_an_attack_in_training_mode(frozen):
    """Batch statistics move with x: their term is in the gradient, and the running ones move at each step."""
    results, x = [], image()
    for model in twins(net()):
        model.train().requires_grad_(not frozen)
        v = x.clone()
        for _ in range(3):
            v.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(v), torch.tensor([1, 2])), [v])
            v = v.detach() + 0.01 * g
        results.append({"x": v, "gradient x": g, **dict(model.named_buffers())})
    assert_equal(results[1], results[0])
    assert results[1]["block1.layer.0.bn1.num_batches_tracked"] == 3


def test_trades_moves_the_statistics_three_times():
    results = []
    x = image()
    noise = torch.randn_like(x)
    for model in twins(shake(FAMILIES["x spare"]()).double()):
        model.train()
        for v in (x, x + 0.1 * noise, x):
            loss = model(v).square().sum()
        loss.backward()
        results.append({**dict(model.named_buffers()), **{f"g {k}": p.grad for k, p in model.named_parameters()}})
    assert_equal(results[1], results[0])
    assert results[1]["block1.layer.0.bn1.num_batches_tracked"] == 3
    assert results[1]["g sub_block1.layer.0.conv1.weight"] is None


def test_a_frozen_user_model_keeps_an_eighth_of_the_bytes():
    """WRN-28-10 at batch 16 on meta tensors: unique storages, parameters excluded."""
    sizes = []
    for fast in (False, True):
        with torch.device("meta"):
            model = family_x.WideResNet(28, 10, 10).eval().requires_grad_(False)
            x = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
        if fast:
            accelerate(model, require=True)
        sizes.append(saved_bytes(partial(model, x), model))
    assert 1 / 100 < sizes[1] / sizes[0] <= 1 / 8


def test_no_python_function_named_grad_or_backward_runs_in_forward():
    """AutoAttack takes such a name for a defence that attacks its own input, and warns."""
    model, x, names = accelerate(net()).float().eval(), image().float(), set()

    def note(frame, event, argument):
        if event == "call":
            names.add(frame.f_code.co_name)

    model(x)
    sys.setprofile(note)
    try:
        model(x)
        with torch.no_grad():
            model(x)
    finally:
        sys.setprofile(None)
    assert "forward" in names and not names & {"grad", "backward"}


def adversaries(attack):
    """The attack's examples on the plain and on the accelerated network, from equal random numbers."""
    x, y = torch.rand(2, 3, 32, 32, dtype=DOUBLE), torch.tensor([1, 2])
    results = []
    for model in (m.eval() for m in twins(net())):
        torch.manual_seed(0)
        results.append(attack(model, x, y))
    # signs of gradients: equal wherever no gradient is zero but for rounding
    assert (results[0] != results[1]).double().mean() < 2**-10
    assert 4 / 255 < (results[0] - x).abs().max() <= 8 / 255 * (1 + 2**-20)


@pytest.mark.parametrize("random_start", [False, True])
def test_projected_gradient_descent_of_torchattacks(random_start):
    torchattacks = pytest.importorskip("torchattacks")
    options = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 4, "random_start": random_start}
    adversaries(lambda model, x, y: torchattacks.PGD(model, **options)(x, y))


@pytest.mark.parametrize("random_start", [False, True])
def test_projected_gradient_descent_of_foolbox(random_start):
    foolbox = pytest.importorskip("foolbox")
    pgd = foolbox.attacks.LinfPGD(abs_stepsize=2 / 255, steps=4, random_start=random_start)
    adversaries(lambda m, x, y: pgd(foolbox.PyTorchModel(m, bounds=(0, 1)), x, y, epsilons=8 / 255)[1])


def test_auto_attack_of_torchattacks_counts_no_difference():
    """Three of its four passes have no backward; the same victims fall."""
    torchattacks = pytest.importorskip("torchattacks")
    x, y, fooled = torch.rand(4, 3, 32, 32), torch.arange(4), []
    for model in (m.float().eval() for m in twins(net())):
        y = model(x).argmax(1)
        attack = torchattacks.Square(model, eps=8 / 255, n_queries=50, seed=1)
        fooled.append(model(attack(x, y)).argmax(1) != y)
    assert torch.equal(*fooled)
