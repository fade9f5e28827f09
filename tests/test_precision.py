"""The precision switch: what it lets the cpu backend run, and that a backward pass keeps its forward's."""

import pytest
import torch

from wrn_fast.backends import cpu
from wrn_fast.errors import WrnFastError
from wrn_fast.functional import bn_act_conv
from wrn_fast.precision import PRECISIONS, current, precision
from wrn_fast.precision import pinned as pinned_algorithm
from wrn_fast.problem import ConvProblem

PROBLEM = ConvProblem("cpu", torch.float32, torch.float32, 8, 16, 16, 64, 64, 3, 3, 1, (1, 1, 1, 1))


def test_the_switch_and_its_default(monkeypatch):
    monkeypatch.delenv("WRN_FAST_PRECISION", raising=False)
    assert current() == "fast"
    with precision("direct"):
        with precision("f2"):
            assert current() == "f2"
        assert current() == "direct"
    assert current() == "fast"


def test_the_environment(monkeypatch):
    monkeypatch.setenv("WRN_FAST_PRECISION", "f2")
    assert current() == "f2"
    with precision("direct"):
        assert current() == "direct"
    monkeypatch.setenv("WRN_FAST_PRECISION", "exact")
    with pytest.raises(WrnFastError, match=r"WRN_FAST_PRECISION.*expected one of fast, f2, direct, got 'exact'"):
        current()


def test_an_unknown_name():
    with pytest.raises(WrnFastError, match="`precision`: expected one of fast, f2, direct, fp8, got 'tf32'"):
        precision("tf32")


@pytest.mark.parametrize(
    "value, pinned",
    (("1", "1"), ("f4", "f4"), ("f3", "f3"), ("f2", "f2"), ("direct", "direct"), ("0", ""), ("", ""), (None, "")),
)
def test_the_pin(monkeypatch, value, pinned):
    if value is None:
        monkeypatch.delenv("WRN_FAST_PIN_ALGO", raising=False)
    else:
        monkeypatch.setenv("WRN_FAST_PIN_ALGO", value)
    assert pinned_algorithm() == pinned


def test_an_unknown_pin(monkeypatch):
    monkeypatch.setenv("WRN_FAST_PIN_ALGO", "f6")
    said = "`WRN_FAST_PIN_ALGO`: expected one of 0, 1, f4, f3, f2, direct, measured, got 'f6'"
    with pytest.raises(WrnFastError, match=said):
        pinned_algorithm()


@pytest.mark.native
def test_the_policy(monkeypatch):
    """Which algorithm runs: by shape, by batch only where the filter is large, never by the number of threads."""
    monkeypatch.delenv("WRN_FAST_PIN_ALGO", raising=False)

    def algorithm(exactness="fast", **fields):
        with precision(exactness):
            return cpu._plan(PROBLEM._replace(**fields)).fprop_algo

    assert [algorithm(name) for name in PRECISIONS] == ["f4", "f2", "direct"]
    assert [algorithm(C=c) for c in (8, 16, 31, 32, 63, 64)] == ["direct", "f2", "f2", "f3", "f3", "f4"]
    assert [algorithm(C=32, H=h, W=h) for h in (4, 8, 10, 12)] == ["f2", "f3", "f2", "f3"]
    assert algorithm(K=8) == "direct"
    assert [algorithm(stride=2, C=c) for c in (16, 31, 32)] == ["direct", "direct", "f2s2"]
    assert algorithm("direct", stride=2) == "direct"
    assert algorithm(stride=3) == "direct"
    assert algorithm(R=1, S=1) == "direct"
    assert algorithm(H=2, W=2) == "f2"
    wide = {"C": 640, "K": 640, "H": 8, "W": 8}
    assert [algorithm(N=n, **wide) for n in (1, 2, 8)] == ["f2", "f4", "f4"]
    monkeypatch.setenv("WRN_FAST_PIN_ALGO", "1")
    assert algorithm(N=1, **wide) == "f4"
    for pin, at_stride_2 in (("f4", "direct"), ("f3", "direct"), ("f2", "f2s2"), ("direct", "direct")):
        monkeypatch.setenv("WRN_FAST_PIN_ALGO", pin)
        assert algorithm() == algorithm(C=8) == pin
        assert algorithm(stride=2) == at_stride_2


@pytest.mark.native
def test_a_backward_pass_has_the_precision_of_its_forward_pass():
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    w, dy = torch.randn(16, 16, 3, 3), torch.randn(2, 16, 12, 12)

    def gradient(forward, backward):
        leaf = x.clone().requires_grad_()
        with precision(forward):
            y = bn_act_conv(leaf, w, act="silu").y
        with precision(backward):
            return torch.autograd.grad(y, leaf, dy)[0]

    assert torch.equal(gradient("direct", "fast"), gradient("direct", "direct"))
    assert not torch.equal(gradient("direct", "fast"), gradient("fast", "fast"))
