"""The swap: what must survive it, what switches it off, and that it is never half done."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from convert.networks import FAMILIES, assert_equal, calls, observe, twins
from families import family_m, family_x
from models import shake
from torch import nn
from torch.nn.utils import parametrizations, prune

from wrn_fast import WrnFastError, parity
from wrn_fast.block import FastBlock
from wrn_fast.convert import accelerate, entry, report, restore, swap


def net(rate=0.0):
    return shake(family_x.WideResNet(16, 10, 1, rate))


def image(dtype=torch.float32, n=2):
    return torch.randn(n, 3, 32, 32, dtype=dtype)


def fprops(model, x):
    return calls(lambda: model(x))["fprop"]


def test_the_object_and_its_names_stay():
    model = net()
    keys, text, modules = list(model.state_dict()), repr(model), dict(model.named_modules())
    assert accelerate(model) is model
    assert list(model.state_dict()) == keys and repr(model) == text
    assert dict(model.named_modules()) == modules
    block = model.block1.layer[0]
    assert isinstance(block, family_x.BasicBlock) and type(block).__name__ == "BasicBlock"
    assert isinstance(model.block1.layer, nn.Sequential) and len(model.block1.layer[:1]) == 1
    assert fprops(model, image()) == 12
    assert accelerate(model) is model and fprops(model, image()) == 12


def test_restore_is_bit_equal():
    model, x = net(), image()
    want = model.eval()(x)
    accelerate(model)
    model(x)
    assert restore(model) is model
    assert all("wrn_fast" not in str(type(m).__mro__) for m in model.modules())
    assert not any(name.startswith("_fast") for m in model.modules() for name in m.__dict__)
    assert torch.equal(model(x), want)


def test_files_hold_the_users_classes():
    model, x = accelerate(net()).eval(), image(torch.float64)
    model.double()
    want = model(x)
    data = pickle.dumps(model)
    assert b"wrn_fast" not in data and b"_fast" not in data
    loaded = pickle.loads(data)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in restore(copy.deepcopy(model)).modules()]
    assert parity.error(loaded(x), want) <= parity.FLOAT64
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert fprops(loaded, x) == 0 and fprops(accelerate(loaded), x) == 12


def test_copies_stay_fast_and_apart():
    model, x = accelerate(net()).eval(), image()
    twin, shallow = copy.deepcopy(model), copy.copy(model.block1.layer[0])
    assert fprops(twin, x) == 12 and torch.equal(twin(x), model(x))
    assert isinstance(shallow, FastBlock) and shallow.conv1 is model.block1.layer[0].conv1
    assert fprops(shallow, torch.randn(1, 16, 8, 8)) == 2
    with torch.no_grad():
        model.block1.layer[0].conv1.weight.zero_()
    assert not torch.equal(twin(x), model(x))


def test_a_copy_follows_references_to_itself():
    block = shake(family_x.BasicBlock(16, 16, 1))
    block.relu1.owner = [block]
    accelerate(block)
    twin = copy.deepcopy(block)
    assert twin.relu1.owner[0] is twin


def test_a_replica_uses_its_own_weights():
    """DataParallel: the replica's parameters are plain tensors, and its class is the fast one."""
    block = accelerate(shake(family_x.BasicBlock(16, 16, 1))).double().eval()
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    replica, other = block._replicate_for_data_parallel(), restore(copy.deepcopy(block))
    for name, child in block._modules.items():
        if child is not None:
            replica._modules[name] = twin = child._replicate_for_data_parallel()
            for key, value in child._parameters.items():
                setattr(twin, key, None if value is None else value * 2)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert fprops(replica, x) == 2
    assert parity.error(replica(x), other(x)) <= parity.FLOAT64


def test_hooks_see_plain_tensors():
    plain, fast = twins(net().double())
    x = image(torch.float64)
    for part in ("block2.layer.1", "block2.layer", "block2"):
        seen = []
        for model in (plain, fast):
            handle = model.get_submodule(part).register_forward_hook(lambda m, i, o, seen=seen: seen.extend([i[0], o]))
            model(x)
            handle.remove()
        assert parity.error(seen[2], seen[0]) <= parity.FLOAT64 and parity.error(seen[3], seen[1]) <= parity.FLOAT64


def test_an_inner_hook_gets_its_tensors_and_only_its_block_is_plain():
    plain, fast = twins(net().double())
    x, seen = image(torch.float64), []
    handles = [m.block1.layer[1].bn2.register_forward_hook(lambda _, i, o: seen.append(o)) for m in (plain, fast)]
    assert_equal(observe(fast, x, True), observe(plain, x, True))
    assert len(seen) == 2 and parity.error(seen[0], seen[1]) <= parity.FLOAT64
    assert fprops(fast, x) == 10
    assert "while bn2 has a hook" in str(report(fast))
    for handle in handles:
        handle.remove()
    assert fprops(fast, x) == 12


def test_a_global_hook_sees_every_module():
    model, x, seen = accelerate(net()).eval(), image(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert fprops(model, x) == 0
    finally:
        handle.remove()
    assert set(seen) == {m for m in model.modules() if not isinstance(m, type(None))}
    assert fprops(model, x) == 12


@pytest.mark.parametrize(
    "apply",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruning"],
)
def test_parametrized_weights(apply):
    plain, fast = twins(net().double())
    x = image(torch.float64)
    for model in (plain, fast):
        torch.manual_seed(0)
        apply(model.block1.layer[1].conv1)
    want, got = observe(plain, x, True), observe(fast, x, True)
    assert parity.error(got["output 0"], want["output 0"]) <= parity.FLOAT64
    assert_equal(observe(fast, x, False), observe(plain, x, False))
    assert fprops(fast, x) == 10
    restore(fast)
    assert_equal(observe(fast, x, False), observe(plain, x, False))


def test_a_class_put_in_front_of_ours_is_switched_off_and_on_again():
    block = accelerate(shake(family_x.BasicBlock(16, 16, 1)))
    x, fast = torch.randn(2, 16, 8, 8), type(block)
    block.__class__ = type("Front", (fast,), {})
    restore(block)
    assert fprops(block, x) == 0
    block.__class__ = fast
    assert fprops(block, x) == 0
    assert fprops(accelerate(block), x) == 2


def test_an_instance_forward_is_respected():
    block = shake(family_x.BasicBlock(16, 16, 1))
    block.forward = lambda x: x
    accelerate(block)
    assert type(block) is family_x.BasicBlock and "replaced on the instance" in report(block).why[""]
    x = torch.randn(1, 16, 8, 8)
    assert block(x) is x


def test_a_subclass_that_overrides_forward_is_noticed():
    class Louder(family_x.BasicBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(family_x.BasicBlock):
        pass

    louder, same = accelerate(Louder(16, 16, 1)), accelerate(Same(16, 16, 1))
    assert type(louder) is Louder and "mul" in report(louder).why[""]
    assert isinstance(same, FastBlock)


def test_a_forward_changed_later_is_noticed(monkeypatch):
    block = accelerate(shake(family_x.BasicBlock(16, 16, 1)))
    x = torch.randn(1, 16, 8, 8)
    assert fprops(block, x) == 2
    monkeypatch.setattr(family_x.BasicBlock, "forward", lambda self, x: x + 1)
    assert torch.equal(block(x), x + 1)
    monkeypatch.undo()
    assert fprops(block, x) == 2


def test_attributes_changed_later_are_noticed():
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    plain, fast = twins(shake(family_x.BasicBlock(16, 16, 1)).double())
    with_dropout = copy.deepcopy(fast)
    with_dropout.rate = 0.5
    assert not torch.equal(with_dropout(x), with_dropout(x)) and fprops(with_dropout, x) == 2
    for block in (plain, fast):
        block.relu2 = nn.Tanh()
    assert_equal(observe(fast, x, True), observe(plain, x, True))
    assert fprops(fast.eval(), x) == 0
    for block in (plain, fast):
        block.relu2, block.bn1.eps, block.conv2 = nn.ReLU(), 0.1, nn.Conv2d(16, 16, 3, padding=1).double()
    fast.conv2 = copy.deepcopy(plain.conv2)
    assert_equal(observe(fast, x, True), observe(plain, x, True))
    assert fprops(fast.eval(), x) == 2


def test_a_dropout_modules_own_flags_count():
    model = accelerate(shake(family_m.WideResNet(10, 1, 0.3))).eval()
    x = image()
    assert torch.equal(model(x), model(x))
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.train()
    assert not torch.equal(model(x), model(x))
    model.layer1[0].dropout.p = model.layer2[0].dropout.p = model.layer3[0].dropout.p = 0.0
    assert torch.equal(model(x), model(x)) and fprops(model, x) == 6


@pytest.mark.parametrize("flag", ["eval", "track", "momentum 0", "momentum None", "no statistics", "frozen"])
def test_batchnorm_flags_are_read_per_call(flag):
    plain, fast = twins(net().double())
    x = image(torch.float64)
    for model in (plain, fast):
        model.train()
        for m in model.modules():
            if not isinstance(m, nn.BatchNorm2d):
                continue
            if flag == "track":
                m.track_running_stats = False
            elif flag.startswith("momentum"):
                m.momentum = None if flag.endswith("None") else 0.0
            elif flag == "no statistics":
                m.running_mean = m.running_var = m.num_batches_tracked = None
            elif flag == "frozen":
                m.weight.requires_grad_(False)
                m.bias.requires_grad_(False)
    for training in (True, False):
        if flag != "eval":
            assert_equal(observe(fast, x, training), observe(plain, x, training))
            continue
        for model in (plain, fast):  # Monte-Carlo dropout: train(), then every BatchNorm in eval
            model.train(training)
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        before = [b.clone() for b in fast.buffers()]
        assert parity.error(fast(x), plain(x)) <= parity.FLOAT64
        assert all(map(torch.equal, before, fast.buffers()))
    assert fprops(fast, x) == 12


def test_one_value_a_channel_raises_as_batchnorm_does():
    for block in twins(family_x.BasicBlock(16, 16, 1)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(torch.randn(1, 16, 1, 1))


@pytest.mark.parametrize("x", [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 8, 8).double(), torch.randn(16, 8, 8), 3])
def test_bad_input_raises_what_the_users_block_raises(x):
    plain, fast = twins(family_x.BasicBlock(16, 16, 1))
    with pytest.raises(Exception) as want:
        plain(x)
    with pytest.raises(type(want.value)) as got:
        fast(x)
    assert str(got.value) == str(want.value)


def test_nothing_is_half_done(monkeypatch):
    model = net()
    classes = [type(m) for m in model.modules()]
    swapped, really = [], entry._swap

    def failing(target, mixin, fresh):
        if len(swapped) == 4:
            raise KeyboardInterrupt
        swapped.append(target)
        really(target, mixin, fresh)

    monkeypatch.setattr(entry, "_swap", failing)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert len(swapped) == 4 and [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("name", ["x normalised", "dm", "ssl bias", "m", "reference"])
def test_check_trusts_what_is_equal_and_touches_nothing(name):
    model = shake(FAMILIES[name](0.3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, state = image(n=4), torch.get_rng_state()
    accelerate(model, check=x)
    assert report(model).accelerated
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_check_catches_a_difference_and_restores(monkeypatch):
    model, run = net(), swap.run_chain

    def wrong(units, x, stats=None):
        y = run(units, x, stats)
        return y * (1 + 1e-5)

    monkeypatch.setattr(swap, "run_chain", wrong)
    with pytest.raises(WrnFastError, match="differs from its own forward"):
        accelerate(model, check=image())
    assert type(model.block1.layer) is nn.Sequential and type(model.block1.layer[0]) is family_x.BasicBlock


def test_check_wants_an_input_of_the_model():
    model = net()
    for bad in (torch.randn(2, 5, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.int64), "x"):
        with pytest.raises(WrnFastError, match="`check`"):
            accelerate(model, check=bad)
    assert type(model.block1.layer[0]) is family_x.BasicBlock


def test_require_raises_where_nothing_could_be_done():
    with pytest.raises(WrnFastError, match="at least one residual block"):
        accelerate(nn.Sequential(nn.Linear(2, 2)), require=True)
    with pytest.raises(WrnFastError, match=r"`model`: expected a torch\.nn\.Module"):
        accelerate(F.relu)
    assert "no module here" in str(report(nn.Linear(2, 2)))
    assert isinstance(accelerate(family_x.BasicBlock(16, 16, 1), require=True), FastBlock)


def test_a_report_prints_what_and_why():
    bad = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model = nn.ModuleDict({"good": net(), "bad": bad})
    assert "call accelerate(model)" in str(report(model))
    found = report(accelerate(model))
    assert len(found.accelerated) == 9 and found.left == ("bad",)
    assert "good.block1.layer.0" in found.accelerated
    assert str(found).splitlines()[0] == "9 accelerated, 1 left as they are"
    assert "found 1, 2 and 0" in str(found)
