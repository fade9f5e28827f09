"""Monte-Carlo dropout in batches: equal to separate forwards, in distribution and mask for mask."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convert.networks import FAMILIES, calls, noted_draws
from families import family_m, family_x
from models import shake
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wrn_fast import WideResNet, WrnFastError, parity, reference
from wrn_fast import random as counter
from wrn_fast.convert import accelerate
from wrn_fast.mc import MCPrediction, mc_predict

DOUBLE = torch.float64


def ours(head="cosine", rate=0.3, depth=10):
    net = WideResNet(depth, 5, 1, rate, head=head, dropout_in_eval=head == "cosine")
    return shake(net).double()


def image(n=2):
    return torch.randn(n, 3, 32, 32, dtype=DOUBLE)


@pytest.mark.parametrize("head", ["cosine", "classic"])
@pytest.mark.parametrize("memory", [None, 1])
def test_mask_for_mask(head, memory, monkeypatch):
    """Each sample equals a plain forward of the reference that is given that sample's part of the masks."""
    net, x, samples = ours(head, depth=16), image(), 3
    with noted_draws(monkeypatch) as draws:
        got = mc_predict(net, x, samples, memory=memory)
    sizes = [1, 1, 1] if memory else [3]
    assert len(draws) == len(sizes) * 6
    plain = reference.WideResNet(16, 5, 1, 0.3, head=head).double().eval()
    plain.load_state_dict(net.state_dict())
    features, outputs = [], []
    for chunk, size in enumerate(sizes):
        for s in range(size):
            rest = list(draws[chunk * 6 : chunk * 6 + 6])

            def dropout(v, p, training, size=size, s=s, rest=rest):
                assert training
                whole = (size * len(v), *v.shape[1:])
                keep = counter.keep_mask(whole, rest.pop(0), p)[s * len(v) : (s + 1) * len(v)]
                return v * keep / (1 - p)

            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr(F, "dropout", dropout)
                y = plain.features(x)
                out = plain.finish(y)
            outputs.append(out[0] if head == "cosine" else out)
            features.append(plain.pooled(y))
    p = torch.stack(outputs).softmax(-1)
    assert parity.error(got.features, torch.stack(features)) <= parity.FLOAT64
    assert parity.error(got.mean, p.mean(0)) <= parity.FLOAT64
    assert parity.error(got.variance, p.var(0, correction=0)) <= parity.FLOAT64
    entropy = -(p.mean(0) * p.mean(0).log()).sum(-1)
    assert parity.error(got.entropy, entropy) <= parity.FLOAT64
    disagreement = entropy + (p * p.log()).sum(-1).mean(0)
    assert (got.mutual_information - disagreement).abs().max() <= parity.FLOAT64 * entropy.max()


@pytest.mark.parametrize("name", ["ours", "x", "m"])
def test_equal_in_distribution_to_separate_forwards(name):
    """Means over many samples agree within their standard errors, and so do the samples' spreads."""
    make = {"ours": lambda: ours("classic", 0.5).float(), "x": lambda: accelerate(family_x.WideResNet(10, 5, 1, 0.5)),
            "m": lambda: accelerate(family_m.WideResNet(10, 1, 0.5, 5))}[name]  # fmt: skip
    net, x, samples = make(), image(1).float(), 300
    got = mc_predict(net, x, samples)
    net.train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    with torch.no_grad():
        p = torch.cat([net(x).softmax(-1) for _ in range(samples)])
    standard_error = (p.var(0) / samples + got.variance[0] / samples).sqrt()
    assert ((p.mean(0) - got.mean[0]) / standard_error).abs().max() < 5
    # the variance of a sample variance is about (kurtosis - 1) / n; 5 standard errors of a kurtosis up to 5
    assert (got.variance[0] / p.var(0)).log().abs().max() < 5 * 2 * (2 / samples) ** 0.5
    assert got.mutual_information.item() > 0


def test_what_lies_before_the_first_dropout_runs_once():
    net, x = ours(depth=16), image()
    counts = calls(lambda: mc_predict(net, x, 9))
    assert counts["fprop"] == 1 + 11  # conv1 of the first block; then nine samples at once
    counts = calls(lambda: mc_predict(net, x, 9, memory=1))
    assert counts["fprop"] == 1 + 9 * 11


def test_memory_bounds_the_batches(monkeypatch):
    seen = []
    net, x = accelerate(family_m.WideResNet(10, 1, 0.3)), image().float()
    net.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    largest = 2 * 32 * 32 * 32 * 4  # h of the second block: there the stride is on conv2
    mc_predict(net, x, 9, memory=3 * 4 * largest)
    assert seen == [2, 6, 6, 4]


def test_a_generator_reproduces_and_leaves_the_default_alone():
    net, x = ours(), image()
    state = torch.get_rng_state()
    results = [mc_predict(net, x, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert not torch.equal(results[0].mean, results[2].mean)
    torch.manual_seed(0)
    first = mc_predict(net, x, 4)
    torch.manual_seed(0)
    assert torch.equal(mc_predict(net, x, 4).features, first.features)
    assert not torch.equal(mc_predict(net, x, 4).features, first.features)


@pytest.mark.parametrize("name", ["x dict", "x widths", "x normalised", "m", "reference"])
@pytest.mark.parametrize("training", [False, True])
def test_flags_and_statistics_are_as_before(name, training):
    net = accelerate(shake(FAMILIES[name](0.3))).train(training)
    flags = [(m.training, m.__dict__.get("dropout_in_eval")) for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    got = mc_predict(net, image(3).float(), 5)
    assert flags == [(m.training, m.__dict__.get("dropout_in_eval")) for m in net.modules()]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert got.mean.shape == (3, 10) and got.variance.min() > 0
    assert (got.features is not None) == (name in ("x dict", "reference"))
    if got.features is not None:
        assert got.features.shape[:2] == (5, 3) and not torch.equal(got.features[0], got.features[1])


def test_flags_come_back_after_an_exception():
    net = ours().train()
    with pytest.raises(WrnFastError, match="32x32"):
        mc_predict(net, torch.randn(1, 3, 40, 40, dtype=DOUBLE), 2)
    assert all(m.training for m in net.modules())


def test_dropout_only_in_training_is_switched_on():
    net = ours("classic").eval()
    x = image()
    assert torch.equal(net(x), net(x))
    got = mc_predict(net, x, 4)
    assert not torch.equal(got.features[0], got.features[1]) and torch.equal(net(x), net(x))


def test_a_listened_part_still_gives_samples():
    net, x, seen = ours(), image(), []
    handle = net.block2.layer[0].bn2.register_forward_hook(lambda m, i, o: seen.append(o))
    got = mc_predict(net, x, 3)
    handle.remove()
    assert seen and got.features.shape == (3, 2, 64) and got.variance.min() > 0


def test_loaders_of_tuples_and_of_tensors(capsys):
    net, x = ours(), image(5)
    loader = DataLoader(TensorDataset(x, torch.arange(5)), batch_size=2)
    for source in (loader, list(x.split(2)), (part for part in x.split(2))):
        got = mc_predict(net, source, 4, generator=torch.Generator().manual_seed(3))
        assert isinstance(got, MCPrediction) and got.mean.shape == (5, 5) and got.features.shape == (4, 5, 64)
    by_hand = mc_predict(net, list(x.split(2)), 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(got.mean, by_hand.mean)
    assert capsys.readouterr().out == ""


def test_unaccelerated_models_with_dropout_modules_work():
    net = shake(family_m.WideResNet(10, 1, 0.3))
    got = mc_predict(net, image().float(), 6)
    assert got.variance.min() > 0 and calls(lambda: net(image().float()))["fprop"] == 0


def test_a_compiled_model_runs_uncompiled():
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    torch._dynamo.reset()
    net = torch.compile(accelerate(family_m.WideResNet(10, 1, 0.3)), backend=refuse)
    assert mc_predict(net, image().float(), 2).mean.shape == (2, 10)


def test_no_gradient_is_kept():
    net = ours()
    assert not mc_predict(net, image().requires_grad_(), 2).mean.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "`samples`: expected an integer of at least 1"),
        ({"memory": 0}, "`memory`: expected a positive"),
        ({"x_or_loader": []}, "at least one batch"),
        ({"x_or_loader": ["x"]}, "batches of tensors, got str"),
        ({"model": ours(rate=0.0)}, "`model`: expected dropout"),
        ({"model": family_x.WideResNet(10, 10, 1, 0.3)}, "found in accelerated blocks"),
        ({"model": nn.Dropout(0.5)}, r"expected outputs \[N, K\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"model": ours(), "x_or_loader": image(), "samples": 2} | change
    with pytest.raises(WrnFastError, match=message):
        mc_predict(**arguments)


def test_copies_of_a_model_do_not_share_flags():
    net = ours().train()
    twin = copy.deepcopy(net).eval()
    mc_predict(twin, image(), 2)
    assert net.training and not twin.training
