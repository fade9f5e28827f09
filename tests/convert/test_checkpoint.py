"""Checkpoints of every key scheme, prefix and container: the same outputs as the network that wrote them."""

import copy
import io
import re

import pytest
import torch
from families import family_dm, family_m, family_ssl, family_x
from models import shake
from torch import nn

from wrn_fast import WideResNet, WrnFastError, parity, reference
from wrn_fast.block import FastBlock
from wrn_fast.convert import load_checkpoint
from wrn_fast.convert.network import FamilyNet


def trained(model):
    """As training leaves it: no gradient and no weight decay ever reaches the dead bn1 of family SSL."""
    shake(model)
    if isinstance(model, family_ssl.WideResNet):
        for group in (model.block2, model.block3):
            nn.init.ones_(group.layer[0].bn1.weight)
            nn.init.zeros_(group.layer[0].bn1.bias)
    return model.eval()


def to_functional(state):
    """szagoruyko's names: a dict of functions' parameters, convolutions without `.weight`, no counters."""
    out = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        key = re.sub(r"^conv1\.weight$", "conv0", key)
        key = re.sub(r"^bn1\.", "bn.", key)
        match = re.match(r"block(\d)\.layer\.(\d+)\.(.*)", key)
        if match:
            names = {"conv1.weight": "conv0", "conv2.weight": "conv1", "convShortcut.weight": "convdim"}
            rest = names.get(match[3], match[3].replace("bn1.", "bn0.").replace("bn2.", "bn1."))
            key = f"group{int(match[1]) - 1}.block{match[2]}.{rest}"
        out[key] = value
    return out


def to_zoo(state):
    out = {}
    for key, value in state.items():
        key = key.replace("fc.", "output.")
        key = re.sub(r"^conv1\.", "features.init_block.", key)
        key = re.sub(r"^bn1\.", "features.post_activ.bn.", key)
        match = re.match(r"block(\d)\.layer\.(\d+)\.(\w+)\.(\w+)", key)
        if match:
            part = {"bn1": "body.conv1.bn", "conv1": "body.conv1.conv", "bn2": "body.conv2.bn",
                    "conv2": "body.conv2.conv", "convShortcut": "identity_conv"}[match[3]]  # fmt: skip
            key = f"features.stage{match[1]}.unit{int(match[2]) + 1}.{part}.{match[4]}"
        out[key] = value
    return out


def to_residual(state):
    out = {}
    for key, value in state.items():
        key = re.sub(r"^conv1\.", "init_conv.", key)
        key = re.sub(r"^bn1\.", "bn.", key)
        match = re.match(r"block(\d)\.layer\.(\d+)\.(\w+)\.(\w+)", key)
        if match:
            part = {"bn1": "residual.0", "conv1": "residual.2", "bn2": "residual.3", "conv2": "residual.6",
                    "convShortcut": "shortcut.0"}[match[3]]  # fmt: skip
            key = f"conv{int(match[1]) + 1}.{match[2]}.{part}.{match[4]}"
        out[key] = value
    return out


def same(state):
    return state


CASES = {
    "x": (lambda: family_x.WideResNet(16, 7, 2), same, None, "WRN-16-2, family x, 7 classes, relu, classic"),
    "x k=1": (lambda: family_x.WideResNet(10, 10, 1, name="conv_shortcut"), same, None, "WRN-10-1, family x"),
    "x spare": (lambda: family_x.WideResNet(10, 10, 2, spare=True), same, None, "WRN-10-2, family x"),
    "x widths": (lambda: family_x.WideResNet(counts=[1, 2, 1], widths=[8, 16, 24, 40]), same, None, "(1, 2, 1)"),
    "x in a wrapper": (lambda: family_x.Normalised(family_x.WideResNet(10, 10, 1)), same, None, "WRN-10-1, family x"),
    "functional": (lambda: family_x.WideResNet(10, 10, 2), to_functional, None, "WRN-10-2, family x"),
    "zoo": (lambda: family_x.WideResNet(16, 10, 1), to_zoo, None, "WRN-16-1, family x"),
    "reference": (lambda: reference.WideResNet(10, 10, 2), same, None, "WRN-10-2, family x, 10 classes, relu, cosine"),
    "dm": (lambda: family_dm.WideResNet(depth=16), same, None, "WRN-16-1, family dm, 10 classes, silu"),
    "dm relu": (
        lambda: family_dm.WideResNet(act=nn.ReLU),
        same,
        {"act": "relu"},
        "dm, 10 classes, relu",
    ),
    "ssl": (family_ssl.WideResNet, same, None, "WRN-10-2, family ssl, 10 classes, leaky_relu"),
    "ssl bias": (
        lambda: family_ssl.WideResNet(bias=True, eps=1e-3),
        same,
        {"eps": 1e-3},
        "family ssl",
    ),
    "m": (lambda: family_m.WideResNet(16, 1), same, None, "WRN-16-1, family m"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loaded_model_gives_what_its_writer_gave(name):
    make, rename, arch, plan = CASES[name]
    model = trained(make())
    net, report = load_checkpoint(rename(model.state_dict()), arch)
    assert plan in str(report) and not net.training
    unused = [k for k in report.left if not k.startswith("sub_block1.")]
    assert not unused, report
    assert bool(report.left) == ("spare" in name)
    assert any(isinstance(m, FastBlock) for m in net.modules())
    if name in ("x", "functional", "zoo", "reference"):
        assert type(net) is WideResNet
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if name.startswith("dm"):  # the normalisation is a plain attribute there: no file has it
        assert isinstance(net, FamilyNet)
        want, got = model.double()(x), net.double()((x - model.mean) / model.std)
    else:
        want, got = model.double()(x), net.double()(x)
    for a, b in zip(got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want]):
        assert parity.error(a, b) <= parity.FLOAT64


def test_the_residual_scheme():
    plan_like = load_checkpoint(family_m.WideResNet(10, 1).state_dict())[0].plan
    source = FamilyNet(plan_like._replace(family="residual", stride_on_conv2=False, drop_at="prologue", dropRate=0.5))
    source = shake(source).eval()
    net, report = load_checkpoint(to_residual(source.state_dict()))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert "family residual" in str(report)
    assert parity.error(net.double()(x), source.double()(x)) <= parity.FLOAT64


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.0.", "module.1.", "module.model."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict", "ema_state_dict", "ema", "net", "model"])
def test_prefixes_and_containers(prefix, container):
    model = family_x.WideResNet(10, 10, 1)
    state = {prefix + k: v for k, v in model.state_dict().items()}
    loaded = {"epoch": 3, "optimizer": {}, container: state} if container else state
    net, report = load_checkpoint(loaded)
    assert torch.equal(net.block3.layer[0].conv2.weight, model.block3.layer[0].conv2.weight)
    assert not report.left and report.loaded == len(state)
    assert net.fc.weight.data_ptr() != model.fc.weight.data_ptr()


def test_a_normalisation_in_front_is_loaded():
    model = family_x.Normalised(family_x.WideResNet(10, 10, 1))
    model.mean.uniform_()
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    net, _ = load_checkpoint(state)
    assert torch.equal(net.mean, model.mean) and torch.equal(net.std, model.std)


def test_files_paths_and_bytes(tmp_path):
    model = family_x.WideResNet(10, 10, 1)
    path = tmp_path / "weights.pt"
    for legacy in (False, True):
        torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=not legacy)
        for src in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
            net, _ = load_checkpoint(src)
            assert torch.equal(net.fc.bias, model.fc.bias)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = family_x.WideResNet(10, 10, 1)
    safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    net, _ = load_checkpoint(tmp_path / "weights.safetensors")
    assert torch.equal(net.fc.bias, model.fc.bias)


def test_what_did_not_fit_is_named():
    state = family_x.WideResNet(10, 10, 1).state_dict()
    state |= {"block1.layer.0.gamma.weight": torch.ones(3), "swa_n": torch.ones(()), "epoch": 4}
    _, report = load_checkpoint(state)
    assert set(report.left) == {"block1.layer.0.gamma.weight", "swa_n"}
    assert "not tensors, left out: epoch" in str(report)
    assert "no name of the scheme X" in report.why["swa_n"] and "swa_n" in str(report)


def test_tensors_of_a_trainer_beside_the_weights_are_left():
    """AveragedModel's counter is int64, a queue may hold NaN, and views may share memory."""
    model = family_x.WideResNet(10, 10, 1)
    state = torch.optim.swa_utils.AveragedModel(model).state_dict()
    state |= {"queue": torch.full((2,), torch.nan), "half": torch.zeros(4).expand(3, 4), "flags": torch.ones(2).bool()}
    net, report = load_checkpoint(state)
    assert set(report.left) == {"n_averaged", "queue", "half", "flags"}
    assert torch.equal(net.fc.weight, model.fc.weight)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_values_that_no_file_has_are_of_the_models_dtype(default):
    state = reference.WideResNet(10, 10, 1).state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("bn1.")}
    torch.set_default_dtype(default)
    try:
        net, _ = load_checkpoint(state)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {v.dtype for v in (*net.parameters(), *net.buffers()) if v.dtype.is_floating_point} == {torch.float32}


def test_an_ensemble_is_refused_with_its_prefixes():
    state = family_x.WideResNet(10, 10, 1).state_dict()
    both = {f"nets.{i}.{k}": v.clone() for i in (0, 1) for k, v in state.items()}
    with pytest.raises(WrnFastError, match=r"one network, found 2 with the prefixes nets\.0\., nets\.1\."):
        load_checkpoint(both)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet", "expected a family out of"),
        ({"depth": 28}, "expected some of family"),
        ({"act": "gelu"}, "expected act out of"),
        ({"head": "none"}, "expected head"),
    ],
)
def test_a_wrong_arch_is_named(arch, message):
    with pytest.raises(WrnFastError, match=message):
        load_checkpoint({}, arch)


def test_sixteen_bit_weights_become_float32():
    state = family_x.WideResNet(10, 10, 1).half().state_dict()
    net, _ = load_checkpoint(copy.deepcopy(state))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.fc.weight, state["fc.weight"].float())


def test_the_loaded_model_trains():
    net, _ = load_checkpoint(family_x.WideResNet(10, 10, 1).state_dict(), {"dropRate": 0.3})
    assert net.block1.layer[0].droprate == 0.3
    net.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
