"""Packages from PyPI that build such networks (optional): pytorchcv, robustbench, torchvision, timm."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from convert.networks import assert_equal, observe, twins
from models import shake

from wrn_fast import parity
from wrn_fast.block import FastBlock
from wrn_fast.convert import report
from wrn_fast.convert.swap import FastBottleneck


def module_of(package, *inside):
    """One file of an installed package, without the package's own imports (data sets, other frameworks)."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    path = Path(spec.submodule_search_locations[0]).joinpath(*inside)
    name = f"{package}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def robustbench(file):
    return module_of("robustbench", "model_zoo", "architectures", f"{file}.py")


def dm(**options):
    module = robustbench("dm_wide_resnet")
    options = {k: getattr(module, v) if isinstance(v, str) else v for k, v in options.items()}
    return module.DMWideResNet(num_classes=10, width=1, **options)


NETWORKS = {
    "robustbench X": (lambda: robustbench("wide_resnet").WideResNet(depth=16, widen_factor=1), 6),
    "robustbench sub_block1": (
        lambda: robustbench("wide_resnet").WideResNet(depth=10, widen_factor=1, sub_block1=True),
        4,
    ),
    "robustbench DM": (lambda: dm(depth=16), 6),
    "robustbench DM Swish": (lambda: dm(depth=10, activation_fn="Swish", mean="CIFAR10_MEAN", std="CIFAR10_STD"), 3),
    "pytorchcv": (
        lambda: pytest.importorskip("pytorchcv.models.wrn_cifar").get_wrn_cifar(
            num_classes=10, blocks=16, width_factor=1
        ),
        6,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_packages_network_is_accelerated_and_equal(name):
    make, blocks = NETWORKS[name]
    plain, fast = twins(shake(make()).double())
    assert sum(isinstance(m, FastBlock) for m in fast.modules()) == blocks
    assert not report(fast).left
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        assert_equal(observe(fast, x, training), observe(plain, x, training))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_wide_resnet_50_2_of_a_package_in_inference(library):
    """Needs a torchvision of this torch's version."""
    spec = importlib.util.find_spec(library)
    if spec is None:
        pytest.skip(f"{library} is not installed")
    try:
        module = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{library} does not load beside torch {torch.__version__}: {error}")
    make = module.wide_resnet50_2 if library == "torchvision" else lambda: module.create_model("wide_resnet50_2")
    plain, fast = (m.eval() for m in twins(shake(make())))
    assert sum(isinstance(m, FastBottleneck) for m in fast.modules()) == 16 and not report(fast).left
    pool = parity.Pool("logits", torch.float32, algorithm="f4")
    oracle = copy.deepcopy(plain).double()
    with torch.no_grad():
        for _ in range(parity.SEEDS):
            x = torch.randn(1, 3, 64, 64)
            pool.add(fast(x), plain(x), oracle(x.double()))
    cell = pool.judge()
    assert cell.ok, cell
