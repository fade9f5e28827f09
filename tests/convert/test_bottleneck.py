"""Post-activation bottlenecks: fused in inference, BatchNorm folded and never stale, everything else the user's own."""

import copy
import gc
import pickle

import pytest
import torch
from convert.networks import assert_equal, observe, twins
from families import bottleneck
from models import shake
from torch import nn

import wrn_fast
from wrn_fast import WrnFastError, packing, parity
from wrn_fast.convert import accelerate, report, restore, swap

TREES = [bottleneck.Bottleneck, bottleneck.OtherNames]
pytestmark = pytest.mark.native


def image(n=2, side=64):
    return torch.randn(n, 3, side, side)


@pytest.fixture
def served(monkeypatch):
    """Whether each bottleneck that was asked ran fused."""
    seen, run = [], swap.run_bottleneck

    def noting(pairs, x):
        y = run(pairs, x)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(swap, "run_bottleneck", noting)
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("tree", TREES)
def test_inference_is_within_the_bound(tree, layout, served):
    """Whole networks and single blocks, pooled over 8 seeds, in the layout in which they came."""
    pools = {name: parity.Pool(name, torch.float32, algorithm="f4") for name in ("logits", "block")}
    for _ in range(parity.SEEDS):
        plain, fast = (m.eval().to(memory_format=layout) for m in twins(shake(bottleneck.ResNet(tree))))
        oracle = copy.deepcopy(plain).double()
        x, y = image().contiguous(memory_format=layout), torch.randn(2, 32, 15, 15).contiguous(memory_format=layout)
        with torch.no_grad():
            pools["logits"].add(fast(x), plain(x), oracle(x.double()))
            got, want = fast.layer1[1](y), plain.layer1[1](y)
            pools["block"].add(got, want, oracle.layer1[1](y.double()))
        assert got.stride() == want.stride()
    assert len(served) == 7 * parity.SEEDS and all(served)
    for pool in pools.values():
        cell = pool.judge()
        assert cell.ok, cell


def test_the_report_says_when_it_serves():
    model = accelerate(bottleneck.ResNet())
    found = report(model)
    assert len(found.accelerated) == 6 + 2 and not found.left
    assert "in eval and no_grad on the CPU" in str(found) and "1x1 shortcut" in found.why["layer1.0"]
    assert "1x1 shortcut" not in found.why["layer1.1"]
    assert accelerate(bottleneck.ResNet(), require=True)


def test_training_and_gradients_are_the_users_own(served):
    plain, fast = twins(shake(bottleneck.ResNet()))
    x = image(3)
    for training in (True, False):
        got, want = observe(fast, x, training), observe(plain, x, training)
        assert all(torch.equal(got[k], want[k]) for k in want)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast.eval()(x), plain.eval()(x))
    assert not any(served)
    double = (m.double().eval() for m in (fast, plain))
    with torch.no_grad():
        assert_equal(*({"output 0": m(x.double())} for m in double))
    assert not any(served)


@pytest.mark.parametrize("change", ["weights", "statistics", "affine", "eps", "hidden", "training step", "load"])
def test_what_is_folded_is_never_stale(change, served):
    """After each change the block equals a fresh one of the same weights, bit for bit."""
    model = accelerate(shake(bottleneck.ResNet())).eval()
    x = image()
    with torch.no_grad():
        before = [model(x) for _ in range(4)][-1]
        assert packing.report() and any(row.key == "folded" for row in packing.report())
        block = model.layer1[0]
        if change == "weights":
            block.conv3.weight.mul_(1.5)
        elif change == "statistics":
            block.downsample[1].running_var.mul_(3)
        elif change == "affine":
            block.bn1.weight.mul_(-1)
        elif change == "eps":
            block.bn3.eps = 0.5
        elif change == "hidden":
            block.conv3.weight.data.mul_(1.5)
        elif change == "load":
            model.load_state_dict(shake(bottleneck.ResNet()).state_dict())
    if change == "training step":
        model.train()(image(4)).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1, fused=True).step()
        model.eval()
    fresh = accelerate(restore(copy.deepcopy(model)))
    del served[:]
    with torch.no_grad():
        got = [model(x) for _ in range(4)]
        want = fresh(x)
    assert all(served) and len(served) == 5 * 6
    assert not torch.equal(want, before) and all(torch.equal(y, want) for y in got)


def test_folded_filters_go_with_their_model():
    packing.refresh()
    model = accelerate(shake(bottleneck.ResNet())).eval()
    with torch.no_grad():
        for _ in range(3):
            model(image())
        assert packing.kept_bytes() > 0
        packing.refresh(model)
        assert not any(row.key == "folded" for row in packing.report())
        for _ in range(2):
            model(image())
    assert any(row.key == "folded" for row in packing.report())
    del model
    gc.collect()
    assert not any(row.key == "folded" for row in packing.report())


def test_a_frozen_batchnorm_in_training_and_hooks_are_respected(served):
    plain, fast = twins(shake(bottleneck.ResNet()))
    oracle, x, seen = copy.deepcopy(plain).double().eval(), image(), []
    oracle.layer1[1].bn2.train()
    with torch.no_grad():
        for model in (plain, fast):
            model.eval().layer1[1].bn2.train()
            model.layer3[0].conv2.register_forward_hook(lambda m, i, y: seen.append(y))
            model.layer3[1].register_forward_hook(lambda m, i, y: seen.append(y))
        got, want, exact = fast(x), plain(x), oracle(x.double())
    assert len(seen) == 4 and seen[2].stride() == seen[0].stride() and seen[3].stride() == seen[1].stride()
    assert served == [True] * 4  # all but layer1[1] and layer3[0]
    bound = parity.one_seed_bound(parity.error(want, exact), torch.float32, False)
    assert parity.error(got, exact) <= bound
    assert fast.layer1[1].bn2.num_batches_tracked == plain.layer1[1].bn2.num_batches_tracked


def test_copies_files_and_restore():
    model = accelerate(shake(bottleneck.ResNet())).eval()
    x = image()
    with torch.no_grad():
        want = model(x)
        assert torch.equal(copy.deepcopy(model)(x), want)
        data = pickle.dumps(model)
        assert b"wrn_fast" not in data
        assert torch.equal(accelerate(pickle.loads(data))(x), want)
        plain = restore(model)
        assert type(plain.layer1[0]) is bottleneck.Bottleneck and type(plain.layer1) is nn.Sequential


def test_compiled_and_exported_models_are_the_users_own():
    plain, fast = (m.eval() for m in twins(shake(bottleneck.ResNet(counts=(1, 1, 1, 1)))))
    x = image()
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(fast, backend="eager", fullgraph=True)(x), plain(x))
        assert torch.equal(torch.export.export(fast, (x,)).module()(x), plain(x))


def test_check_proves_it():
    accelerate(shake(bottleneck.ResNet()), check=image(4))


def test_verify_compares_it_with_the_users_own(served):
    found = wrn_fast.verify(
        accelerate(bottleneck.ResNet()), dtypes=(torch.float32,), steps=1, batch=2, size=64
    )  # fmt: skip
    assert found.ok, found
    assert any(served) and "accelerate(" in found.settings["candidate"]
    with pytest.raises(WrnFastError, match="expected the plain model to compare"):
        wrn_fast.verify(bottleneck.ResNet())


@pytest.mark.parametrize("name", ["LeakyBottleneck", "ScaledBottleneck", "NoLastActivation", "OtherInEval"])
def test_look_alikes_are_left_alone(name):
    block = getattr(bottleneck, name)(32, 8)
    accelerate(block)
    assert type(block) is getattr(bottleneck, name)
    assert "not that of a post-activation bottleneck" in report(block).why[""]


def test_other_submodules_are_named():
    grouped, biased, synced = (bottleneck.Bottleneck(32, 8) for _ in range(3))
    grouped.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
    biased.conv1 = nn.Conv2d(32, 16, 1)
    synced.bn2 = nn.SyncBatchNorm(16)
    for block, said in ((grouped, "groups=4"), (biased, "not plain"), (synced, "SyncBatchNorm")):
        assert said in report(accelerate(block)).why[""]


def test_another_backend_leaves_it_to_the_user(served):
    plain, fast = (m.eval() for m in twins(shake(bottleneck.ResNet())))
    x = image()
    with torch.no_grad(), wrn_fast.backend("aten"):
        assert torch.equal(fast(x), plain(x))
    assert not any(served)
