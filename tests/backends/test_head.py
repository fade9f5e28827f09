"""The head of every backend that has one beside eager, through the operators."""

from __future__ import annotations

import pytest
import torch
from backends.harness import CELLS, device_of
from head_cases import build

from wrn_fast import dispatch, ops, parity
from wrn_fast.checks import channel_stats_problem

pytestmark = [
    pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning"),
    pytest.mark.parametrize(
        "backend", [cell for cell in CELLS if hasattr(dispatch.load(cell.values[0]), "head")], indirect=True
    ),
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MODES = {
    "classic": {},
    "training": {"batch_stats": True},
    "silu in training": {"act": "silu", "batch_stats": True},
    "cosine": {"bn": False, "act": "identity", "cosine": True, "bias": False},
    "cosine with everything": {"act": "leaky_relu", "slope": 0.1, "cosine": True},
}
SIZES = {"8x8": {"h": 8, "w": 8, "c": 24, "k": 10}, "odd": {"h": 3, "w": 5, "c": 37, "k": 19}}


@pytest.fixture
def serving(backend):
    """The device of the backend under test."""
    return device_of(backend)


def drawn(mode, size, dtype, device):
    """(the call in dtype with wide vectors as a model has them, the same in dtype, in float64)."""
    call = build(MODES[mode], torch.float64, n=4, dense=True, **SIZES[size])
    wide = torch.promote_types(dtype, torch.float32)
    vectors = {name: v.to(dtype).to(wide) for name, v in call.tensors.items() if name not in ("y", "w")}
    same = call.to(dtype)
    on = lambda c: c._replace(tensors={name: v.to(device) for name, v in c.tensors.items()})
    return on(same._replace(tensors=same.tensors | vectors)), on(same), on(same.to(torch.float64))


def served(backend, op, y, device):
    """A skip with the backend's reason where it does not serve the dtype."""
    reason = dispatch.load(backend).unsupported(op, channel_stats_problem(y))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_parity(backend, serving, mode, size, dtype):
    dtype = DTYPES[dtype]
    pools = {name: parity.Pool(name, dtype) for name in ("out", "feature", "dy", "sums")}
    for _ in range(parity.SEEDS):
        fast, eager, exact = drawn(mode, size, dtype, serving)
        served(backend, "head", fast.tensors["y"], serving)
        for name, got, peer, want in zip(("out", "feature"), fast.run(), eager.plain(), exact.plain()):
            pools[name].add(got, peer, want)
        d = torch.randn(eager.tensors["y"].shape[:2]).to(dtype).to(serving)
        y, stats, gamma, beta, _, _, *scalars = fast.arguments()
        wide = d.to(torch.promote_types(dtype, torch.float32))
        dy, sums = ops.head_bwd(wide, y, stats, gamma, beta, *scalars[:4], stats is not None)
        peers = [_backward(c, d) for c in (eager, exact)]
        pools["dy"].add(dy, peers[0][0], peers[1][0])
        if stats is not None:
            pools["sums"].add(sums, peers[0][1], peers[1][1])
    cells = [pool.judge() for pool in pools.values() if pool.fast]
    assert len(cells) == 4 - (MODES[mode].get("bn") is False)
    assert all(cell.ok for cell in cells), "\n".join(map(str, cells))


def _backward(call, d):
    """(dy, [dbeta, dgamma]) by autograd in the call's dtype."""
    leaves = call.leaves("y", "gamma", "beta")
    _, feature = call.plain(**leaves)
    dy, *vectors = torch.autograd.grad(feature, list(leaves.values()), d.to(feature.dtype))
    return dy, torch.stack(vectors[::-1]) if vectors else None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_whole_numbers_are_rounded_once(backend, serving, dtype):
    """Images of 4 pixels of integers: features in quarters, products in float32 exact."""
    dtype = DTYPES[dtype]
    y = torch.randint(-60, 61, (3, 40, 2, 2)).to(dtype).contiguous(memory_format=torch.channels_last).to(serving)
    served(backend, "head", y, serving)
    w = torch.randint(-9, 10, (12, 40)).float().to(serving)
    bias = torch.randint(-9, 10, (12,)).float().to(serving)
    out, feature = ops.head(y, None, None, None, w, bias, "relu", 0.0, 0.0, False, False)
    want = y.double().relu().mean((2, 3))
    assert parity.mismatch(feature, want.to(dtype)) is None
    assert parity.mismatch(out, (want @ w.double().T + bias.double()).to(dtype)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["classic", "cosine"])
def test_special_values_stay_in_their_image(backend, serving, mode, value):
    call, _, _ = drawn(mode, "8x8", torch.float32, serving)
    served(backend, "head", call.tensors["y"], serving)
    call.tensors["y"][1, 2, 0, 0] = value
    for got, want in zip(call.run(), call.plain()):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert got[0].isfinite().all()


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e30])
def test_features_without_a_usable_length(backend, serving, length):
    """0 and what is shorter than 1e-12 is divided by that; squares that overflow give eager's values."""
    call, _, _ = drawn("cosine", "8x8", torch.float32, serving)
    served(backend, "head", call.tensors["y"], serving)
    call.tensors["y"].mul_(length)
    (out, _), (want, _) = call.run(), call.plain()
    assert out.isfinite().all() and torch.equal(out == 0, want == 0)
    assert parity.error(out, want.double()) <= parity.ROUNDINGS * parity.UNIT[torch.float32]


def test_two_runs_are_bit_equal(backend, serving):
    call, _, _ = drawn("training", "odd", torch.float32, serving)
    served(backend, "head", call.tensors["y"], serving)
    y, stats, gamma, beta, _, _, *scalars = call.arguments()
    d = torch.randn(y.shape[:2]).to(serving)
    runs = [[*call.run(), *ops.head_bwd(d, y, stats, gamma, beta, *scalars[:4], True)] for _ in range(2)]
    assert all(map(torch.equal, *runs))
