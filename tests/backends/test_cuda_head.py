"""The head of the cuda backend on the CPU: forward and gradient against float64, guards of NaN around every output."""

from __future__ import annotations

import pytest
import torch
from backends import cuda_on_cpu, tape
from head_cases import MODES, build
from operator_cases import KINK

import wrn_fast
from wrn_fast import graphs, ops, parity

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (N, C, K, H, W): single elements, whole vectors, more vectors than threads, classes of several blocks.
SHAPES = ((3, 5, 4, 4, 3), (2, 16, 10, 8, 8), (2, 2048, 130, 3, 1), (2, 2047, 65, 1, 2))
GRADIENTS = ((3, 5, 4, 4, 3), (2, 16, 4, 5, 3), (2, 301, 4, 1, 2))


def draw(mode, dtype, shape):
    """A call whose activation has no kink near its values."""
    n, c, k, h, w = shape
    while True:
        call = build(mode, dtype, n, c, k, h, w, dense=True)
        exact = call.to(torch.float64)
        if exact.normal(exact.given()).abs().min() > KINK:
            return call


def exactly(call, dtype):
    """(float64, float32 rounded once) of the same call."""
    sides = [call.to(wide).plain() for wide in (torch.float64, torch.float32)]
    return sides[0], [v.to(dtype) for v in sides[1]]


def near(got, want, eager):
    bound = parity.one_seed_bound(parity.error(eager, want), got.dtype)
    assert parity.error(got, want) <= bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_classes_and_features(recorder, seeded, mode, dtype, shape):
    call = build(mode, dtype, *shape, dense=True)
    out, feature = call.run()
    assert recorder.names()[-1] == "head" and out.is_contiguous() and feature.is_contiguous()
    want, eager = exactly(call, dtype)
    near(feature, want[1], eager[1])
    near(out, want[0], eager[0])


@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "cosine"])
def test_gradient_of_the_activation(recorder, seeded, mode, dtype, shape):
    """dy and the sums of g and g * xhat of random gradients of the feature."""
    n, c = shape[:2]
    call = draw(mode, dtype, shape)
    t, s = call.given(), call.scalars
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dfeat = torch.randn(n, c, dtype=wide)
    with_stats = t.get("stats") is not None
    vectors = [t.get(name) for name in ("stats", "gamma", "beta")]
    dy, sums = ops.head_bwd(dfeat, t["y"], *vectors, s["act"], s["slope"], s["eps"], s["batch_stats"], with_stats)
    assert recorder.names()[-1] == "head_bwd" and dy.is_contiguous(memory_format=torch.channels_last)
    sides = []
    for kind in (torch.float64, torch.float32):
        same = call.to(kind)
        y = same.tensors["y"].requires_grad_()
        _, feature = same.plain(y=y)
        sides.append(torch.autograd.grad(feature, y, dfeat.to(kind))[0])
    near(dy, sides[0], sides[1].to(dtype))
    assert sums.numel() == (2 * c if with_stats else 0)
    if with_stats:
        exact = call.to(torch.float64)
        v = exact.normal(exact.given()).detach().requires_grad_()
        activated = {"relu": torch.relu, "silu": torch.nn.functional.silu, "identity": lambda v: v,
                     "leaky_relu": lambda v: torch.nn.functional.leaky_relu(v, s["slope"])}[s["act"]](v)  # fmt: skip
        (g,) = torch.autograd.grad(activated.mean((2, 3)), v, dfeat.double())
        mean, var = (u[:, None, None] for u in exact.given()["stats"])
        xhat = (exact.tensors["y"] - mean) * (var + s["eps"]).rsqrt()
        for got, terms in zip(sums, (g, g * xhat), strict=True):
            size = terms.abs().sum((0, 2, 3)).norm()
            bound = parity.term_bound(wide)
            assert (got - terms.sum((0, 2, 3))).norm() <= bound * max(size, 1.0)


@pytest.mark.parametrize("offset", [0, 1])
def test_nothing_is_written_beside_the_outputs(offset, seeded):
    """Outputs off 16 bytes too, and y."""
    e, code = cuda_on_cpu.build(), cuda_on_cpu.CODES["bfloat16"]
    call = build("classic", torch.bfloat16, 2, 16, 10, 4, 4, dense=True)
    t = call.tensors
    flat = torch.empty(t["y"].numel() + offset, dtype=torch.bfloat16)[offset:]
    y = flat.copy_(t["y"].permute(0, 2, 3, 1).reshape(-1))
    rooms = [torch.full((size + 16 + offset,), torch.nan, dtype=torch.bfloat16) for size in (20, 32)]
    out, feat = (room[8 + offset :][:size] for room, size in zip(rooms, (20, 32), strict=True))
    given = {name: t[name].data_ptr() for name in ("stats", "gamma", "beta", "w", "bias")}
    e.head(
        dtype=code, w_dtype=code, N=2, pixels=16, C=16, K=10, y=y.data_ptr(), **given, eps=1e-5, act=1, slope=0.0,
        cosine=False, out=out.data_ptr(), feat=feat.data_ptr(), stream=0,
    )  # fmt: skip
    want, eager = exactly(call, torch.bfloat16)
    near(out.view(2, 10), want[0], eager[0])
    near(feat.view(2, 16), want[1], eager[1])
    assert all(int(room.isnan().sum()) == 16 + offset for room in rooms)


def test_nan_and_no_direction(recorder):
    """NaN reaches its image and no other; a feature of zeros has the classes' bias; a short one has a direction."""
    call = build("cosine", torch.float32, 3, 5, 4, 2, 2)
    y = call.tensors["y"]
    want, _ = call.run()
    y[2] *= 2.0**-30
    y[0, 1, 0, 1], y[1] = torch.nan, 0.0
    out, feature = call.run()
    assert out[0].isnan().all() and int(feature[0].isnan().sum()) == 1
    assert torch.equal(out[1], torch.zeros(4)) and torch.equal(out[2], want[2])


def test_more_features_than_a_block_has_room_for_are_refused(recorder):
    call = build("classic", torch.float32, 1, 2049, 2, 1, 1, dense=True)
    with pytest.raises(wrn_fast.WrnFastError, match="up to 2048 features, got 2049"):
        call.run()


@torch.no_grad()
def test_a_whole_network_is_a_kernel_a_layer(recorder, monkeypatch, seed):
    """The graph of a network: its convolutions, its head, and what fills up the image's channels."""
    tapes = []
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    monkeypatch.setattr(graphs, "_capture", tape.capture(recorder, monkeypatch, tapes))
    torch.manual_seed(seed)
    model = wrn_fast.classic(10, 10, 1).bfloat16().eval()
    image = lambda: torch.randn(1, 3, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
    fast = wrn_fast.graphed(model, image())
    names = [name for name in tapes[0].names if name in ("fprop", "head", "pack", "affine_table", "stack")]
    assert names == ["fprop"] * 7 + ["head"]
    x = image()
    assert torch.equal(fast(x), model(x))
