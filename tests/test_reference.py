"""The reference: seeded weights of the published models, both heads, every quirk that a drop-in must keep."""

import pytest
import torch
import torch.nn.functional as F

from wrn_fast import reference
from wrn_fast.errors import WrnFastError
from wrn_fast.parity import UNIT, error

# First three values of WideResNet(16, 7, 2, 0.1) after manual_seed(3), made by the published sources themselves
# (zaeemzadeh/OOD wideresnet_UoS.py, xternalz/WideResNet-pytorch wideresnet.py), and the draw that follows.
PUBLISHED = {
    "cosine": {
        "conv1.weight": ("-0.23401", "-0.10804", "0.11769"),
        "block2.layer.0.convShortcut.weight": ("-0.08111", "0.33098", "-0.03241"),
        "block3.layer.1.conv2.weight": ("0.01390", "0.03809", "0.01716"),
        "next": ("0.77897",),
    },
    "classic": {
        "conv1.weight": ("0.01237", "-0.00043", "0.03889"),
        "block2.layer.0.convShortcut.weight": ("0.03190", "0.26599", "0.37809"),
        "block3.layer.1.conv2.weight": ("-0.00478", "0.09400", "0.07452"),
        "fc.weight": ("-0.05099", "0.03447", "0.08806"),
        "next": ("0.52399",),
    },
}


@pytest.mark.parametrize("head", reference.HEADS)
def test_weights_for_a_seed_are_the_published_models(head):
    torch.manual_seed(3)
    model = reference.WideResNet(16, 7, 2, 0.1, head=head)
    found = model.state_dict() | {"next": torch.rand(1)}
    for name, values in PUBLISHED[head].items():
        assert tuple(f"{v:.5f}" for v in found[name].flatten()[:3].tolist()) == values, name


def test_keys_and_sizes():
    model = reference.WideResNet(28, 10, 10)
    assert len(model.state_dict()) == 154
    assert sum(p.numel() for p in model.parameters()) == 36_479_184
    assert sum(p.numel() for p in reference.classic(28, 10, 10).parameters()) == 36_479_194
    assert sum(p.numel() for p in reference.classic(16, 100, 4).parameters()) == 2_772_020


def test_attributes_of_the_reference():
    model = reference.WideResNet(10, 6, 1, 0.3)
    assert model.nChannels == 64
    assert torch.equal(model.ID_mat, torch.eye(6)) and "ID_mat" not in model.state_dict()
    assert model.dropout.p == 0.3
    assert not model.fc.weight.requires_grad and model.fc.bias is None
    assert error(model.fc.weight @ model.fc.weight.T, torch.eye(6)) < 16 * UNIT[torch.float32]
    first, second = model.block1.layer[0], model.block2.layer[0]
    assert first.equalInOut and first.convShortcut is None and first.droprate == 0.3
    assert not second.equalInOut and second.convShortcut.stride == (2, 2)


def test_cosine_head_is_a_pair_and_never_runs_the_last_batch_norm():
    model = reference.WideResNet(10, 4).eval()
    x = torch.randn(3, 3, 32, 32)
    out, feature = model(x)
    assert torch.equal(out, (F.normalize(feature) @ model.fc.weight.T).abs())
    model.bn1.weight.data.zero_()
    assert torch.equal(model(x)[1], feature)


def test_classic_head_runs_the_last_batch_norm():
    model = reference.classic(10, 4).eval()
    model.bn1.weight.data.zero_()
    model.bn1.bias.data.fill_(-1.0)
    assert torch.equal(model(torch.randn(3, 3, 32, 32)), model.fc.bias.expand(3, 4))


def test_dropout_is_on_in_eval_for_the_reference_and_off_for_classic():
    x = torch.randn(2, 3, 32, 32)
    model = reference.WideResNet(10, 4, dropRate=0.5).eval()
    assert not torch.equal(model(x)[1], model(x)[1])
    model = reference.classic(10, 4, dropRate=0.5).eval()
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_a_larger_image_changes_the_batch_dimension_as_it_always_did():
    x = torch.randn(2, 3, 64, 64)
    assert reference.WideResNet(10, 4)(x)[0].shape == (8, 4)
    assert reference.WideResNet(10, 4, pool="global")(x)[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("depth", (4, 11, 28.0, "28", 0, -2)),
        ("num_classes", (0, 1.5, "ten")),
        ("widen_factor", (0, -1, 2.5)),
        ("dropRate", (-0.1, 1.1, float("nan"))),
        ("head", ("linear",)),
        ("pool", ("max",)),
        ("act", ("gelu",)),
    ],
)
def test_bad_arguments_name_the_argument(argument, values):
    for value in values:
        arguments = {"depth": 10, "num_classes": 4, argument: value}
        with pytest.raises(WrnFastError, match=f"`{argument}`: expected"):
            reference.WideResNet(**arguments)
