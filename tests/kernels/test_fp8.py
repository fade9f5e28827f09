"""Inference in e4m3: rounding bit for bit, sums as near to float64 as float32's, and a network from calibration on."""

import importlib.metadata
import importlib.util

import pytest
import torch
from kernels import eight_bits

import wrn_fast
from wrn_fast import parity
from wrn_fast.backends import triton
from wrn_fast.fp8 import calibrate
from wrn_fast.problem import ConvProblem

OLD = importlib.util.find_spec("triton") is not None and importlib.metadata.version("triton").startswith("3.6.")
FORMATS = [
    torch.float8_e4m3fn,
    pytest.param(torch.float8_e4m3fnuz, marks=pytest.mark.skipif(OLD, reason="Triton 3.6 cannot interpret e4m3fnuz")),
]
PROBLEM = ConvProblem("cuda", torch.bfloat16, torch.bfloat16, 8, 8, 8, 64, 64, 3, 3, 1, (1, 1, 1, 1))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_rounding_is_pytorchs(interpreter, dtype, seed):
    assert interpreter(eight_bits.rounding, dtype, seed)


@pytest.mark.parametrize("short", [False, True], ids=["conv", "conv and shortcut"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_sums_are_as_near_as_float32s(interpreter, dtype, short, seed):
    pool = parity.Pool("y", torch.float32)
    for fast, eager in interpreter(eight_bits.errors, list(range(seed, seed + parity.SEEDS)), dtype, short):
        pool.add_errors(fast, eager)
    assert pool.judge().ok, pool.judge()


@pytest.mark.parametrize("source", [False, True], ids=["plain", "source"])
def test_small_integers_are_exact(interpreter, source):
    assert interpreter(eight_bits.integers, source) is None


def test_special_values(interpreter):
    assert interpreter(eight_bits.special) == (True, True, True)


def test_a_calibrated_network(interpreter, seed):
    report = interpreter(eight_bits.whole_model, seed)
    # All convolutions but the first, which has 3 channels; the shortcuts too.
    assert [n for n in report["ranges"] if n.startswith("block3")] == [
        "block3.layer.0.conv1.weight", "block3.layer.0.conv2.weight", "block3.layer.0.convShortcut.weight"
    ]  # fmt: skip
    assert 0 < report["error"] < parity.MEANINGLESS and f"{report['error']:.2%}" in report["text"]
    assert report["differs"] and report["repeats"]
    training, batch_statistics, no_range = report["refused"]
    assert "no_grad" in training and "eval" in batch_statistics and "calibrate" in no_range


def test_a_device_without_it_says_so(monkeypatch):
    with torch.no_grad(), wrn_fast.precision("fp8"), pytest.raises(wrn_fast.WrnFastError, match="fprop_fp8"):
        wrn_fast.bn_act_conv(torch.randn(1, 16, 4, 4), torch.randn(16, 16, 3, 3))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(triton, "_failed_proof", lambda op, problem: None)
    triton._refused_gpu.cache_clear()
    triton._without_fp8.cache_clear()
    assert triton.unsupported("fprop", PROBLEM) is None and "8.9" in triton.unsupported("fprop_fp8", PROBLEM)
    triton._refused_gpu.cache_clear()
    triton._without_fp8.cache_clear()


def test_what_cannot_be_calibrated_is_named():
    model = wrn_fast.WideResNet(10, 10, 1, pool="global")
    with pytest.raises(wrn_fast.WrnFastError, match=r"`model`.*eval"):
        calibrate(model, [torch.randn(1, 3, 8, 8)])
    with pytest.raises(wrn_fast.WrnFastError, match=r"`batches`.*none"):
        calibrate(model.eval(), [])
    with pytest.raises(wrn_fast.WrnFastError, match=r"`model`.*accelerate"):
        calibrate(torch.nn.Conv2d(3, 4, 3).eval(), [torch.randn(1, 3, 8, 8)])
    x = torch.full((1, 3, 8, 8), float("nan"))
    with pytest.raises(wrn_fast.WrnFastError, match="finite"):
        calibrate(model, [x])
