"""e4m3 on the cuda backend, on the CPU: rounding bit for bit, packed filters, whole calls and a calibrated network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import cuda_on_cpu
from kernels import oracle

import wrn_fast
from wrn_fast import parity, scales
from wrn_fast.backends import cuda
from wrn_fast.fp8 import calibrate
from wrn_fast.kernels import cuda_check, cuda_launch, cuda_passes, cuda_weights
from wrn_fast.kernels.cuda_launch import Tile
from wrn_fast.problem import TENSORS, ConvProblem

E4M3 = torch.float8_e4m3fn
MOST = torch.finfo(E4M3).max
HALVES = (torch.bfloat16, torch.float16)
PROBLEM = ConvProblem("cpu", torch.bfloat16, torch.bfloat16, 2, 8, 8, 32, 48, 3, 3, 1, (1, 1, 1, 1))


def bits(v):
    """Of e4m3, all NaN as one."""
    return torch.where(v.float().isnan(), 0x7F, v.view(torch.uint8))


def unit(scale=1.0):
    """The range by which a number is multiplied by 1 / scale."""
    return torch.tensor([MOST * scale])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_pytorchs(recorder, dtype, seed):
    """Every magnitude, every tie, denormals, both ends, NaN."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.randn(4096, generator=g) * 10 ** torch.empty(4096).uniform_(-4, 3, generator=g)
    ties = torch.arange(-1024, 1024) * torch.finfo(E4M3).smallest_normal / 16
    v = torch.cat([spread, ties, torch.linspace(-500, 500, 2000), torch.full((48,), torch.nan)]).to(dtype)
    x = v.view(1, 1, -1, 16).permute(0, 3, 1, 2)
    got = cuda_passes.quantize(recorder, x, None, None, None, 0.0, "identity", 0.0, None, 0.0, unit(), 0)
    want = x.float().clamp(-MOST, MOST).to(E4M3)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("act", ["relu", "silu", "leaky_relu"])
def test_what_precedes_the_rounding(recorder, seeded, act):
    """BatchNorm, activation, mask and range: as near to float64 as float32, before e4m3 takes its digits."""
    x = torch.randn(3, 48, 5, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    stats, gamma, beta = torch.stack([torch.randn(48), torch.rand(48) + 0.5]), torch.randn(48), torch.randn(48)
    rng = torch.tensor([3, 7])
    got = cuda_passes.quantize(recorder, x, stats, gamma, beta, 1e-5, act, 0.2, rng, 0.5, torch.tensor([6.0]), 0)
    sides = []
    for kind in (torch.float64, torch.float32):
        v = oracle.normal(x.to(kind), stats.to(kind), gamma.to(kind), beta.to(kind), 1e-5)
        v = {"relu": F.relu, "silu": F.silu, "leaky_relu": lambda v: F.leaky_relu(v, 0.2)}[act](v)
        kept = wrn_fast.random.keep_mask(x.shape, rng, 0.5) * 2
        sides.append((v * kept * (MOST / 6.0)).clamp(-MOST, MOST).to(torch.float32).to(E4M3).double())
    # Where float32 falls on the other side of a tie than float64, so may the kernel.
    assert parity.error(got.double(), sides[0]) <= parity.one_seed_bound(
        parity.error(sides[1], sides[0]), torch.bfloat16
    )


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["KCRS", "KRSC"])
@pytest.mark.parametrize("w_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("k, c, r, s", [(160, 80, 3, 3), (16, 16, 3, 3), (48, 144, 1, 1), (96, 320, 3, 1)])
def test_the_image_of_a_filter(recorder, k, c, r, s, w_dtype, memory):
    w = (torch.randn(k, c, r, s) * torch.rand(k, 1, 1, 1)).to(w_dtype).contiguous(memory_format=memory)
    w[1] = 0
    buffer, factor = cuda_weights.packed_e4m3(recorder, w, unit(0.5), 0)
    block = next(b for b in (160, 128, 96, 80, 64, 48, 32, 16) if k % b == 0)
    chunks = -(-c // 128)
    image = buffer.view(k // block, chunks, s, r, block, 8, 16)
    row = torch.arange(block)[:, None]
    image = image[:, :, :, :, row, torch.arange(8)[None, :] ^ row % 8]
    image = image.permute(0, 4, 1, 5, 6, 3, 2).reshape(k, chunks * 128, r, s)
    scale = w.float().abs().amax((1, 2, 3)) / MOST
    scale[1] = 1
    assert torch.equal(image[:, :c], (w.float() / scale[:, None, None, None]).to(E4M3).view(torch.uint8))
    assert not image[:, c:].any() and torch.equal(factor, scale * 0.5)


def rounded(v, most):
    """e4m3 of v in units of the range, in float64."""
    return (v.float() * (MOST / most)).clamp(-MOST, MOST).to(E4M3).double() * (most.double() / MOST)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("short", [False, True], ids=["conv", "conv and shortcut"])
def test_calls_are_as_near_as_float32_on_the_same_operands(recorder, seed, dtype, short):
    """All before the rounding is exact: integers, powers of two; so both sides multiply the same operands."""
    parts = {"short_C": 32, "short_stride": 2, "short_prologue": True, "short_affine": True, "short_act": "relu"}
    case = oracle.draw(
        seed, dtype, N=2, H=6, W=5, C=48, K=32, taps=(3, 3), stride=1 + seed % 2, pad=(1, 1, 1, 1), act="relu",
        prologue=True, affine=True, p=0.0, drop_at="none", eps=0.0, residual=True, bias=True, act_out="none",
        want_y=True, want_stats=True, w_dtype=torch.float32, batch_stats=False, **(parts if short else {"short_C": 0}),
    )  # fmt: skip
    case.problem, t = case.problem._replace(short_eps=0.0), case.tensors
    g = torch.Generator().manual_seed(seed)
    draw = lambda shape, most: torch.randint(-most, most + 1, shape, generator=g).float()
    ranges, y = [], [t["bias"][:, None, None].double() + t["residual"].double()] * 2
    for suffix in ("", "_short") if short else ("",):
        c = t[f"x{suffix}"].shape[1]
        t[f"x{suffix}"] = draw(t[f"x{suffix}"].shape, 200).to(dtype).contiguous(memory_format=torch.channels_last)
        t[f"stats{suffix}"] = torch.stack([draw((c,), 5), torch.ones(c)])
        t[f"gamma{suffix}"], t[f"beta{suffix}"] = draw((c,), 1) * 2 + 0.5, draw((c,), 9)
        w = draw(t[f"w{suffix}"].shape, int(MOST) - 1)
        w.flatten(1)[:, 0] = MOST
        t[f"w{suffix}"] = w * 2.0 ** torch.randint(-18, -12, (32, 1, 1, 1), generator=g)
        ranges.append(unit(2.0 ** torch.randint(-1, 2, (1,), generator=g).item()))
        x, stats, gamma, beta = (t[f"{n}{suffix}"].double() for n in ("x", "stats", "gamma", "beta"))
        a = rounded(F.relu(oracle.normal(x, stats, gamma, beta, 0.0)), ranges[-1])
        w8 = rounded(t[f"w{suffix}"], t[f"w{suffix}"].abs().amax((1, 2, 3), keepdim=True))
        how = {"stride": 2} if suffix else {"stride": case.problem.stride, "padding": 1}
        y = [side + F.conv2d(a.to(kind), w8.to(kind), **how).double()
             for side, kind in zip(y, (torch.float64, torch.float32), strict=True)]  # fmt: skip
    got, stats_y, _ = cuda_launch.fprop(
        recorder, case.problem, Tile(), *(t.get(name) for name in TENSORS), (ranges + [None])[:2]
    )
    assert parity.error(got, y[0]) <= parity.one_seed_bound(parity.error(y[1].to(dtype), y[0]), dtype)
    stored = got.double()
    want = torch.stack([stored.mean((0, 2, 3)), stored.var((0, 2, 3), unbiased=False)])
    assert parity.error(stats_y, want) <= parity.one_seed_bound(parity.UNIT[torch.float32], torch.float32)


def test_a_calibrated_network(recorder, seed):
    torch.manual_seed(seed)
    model = wrn_fast.WideResNet(10, 10, 1, pool="global").bfloat16().eval()
    images = [torch.randn(2, 3, 8, 8).bfloat16() for _ in range(2)]
    found = calibrate(model, images)
    assert 0 < found.error < parity.MEANINGLESS and "block1.layer.0.conv1.weight" in found.ranges
    with torch.no_grad():
        plain = model(images[0])[0]
        recorder.calls.clear()
        with wrn_fast.precision("fp8"):
            coarse = model(images[0])[0]
    assert recorder.names().count("quantize") == recorder.names().count("pack_e4m3") == 8
    assert recorder.names().count("pack") == 1, "the first convolution has 3 channels"
    assert not torch.equal(plain, coarse)
    assert all("factor" in kwargs for name, kwargs in recorder.calls if name == "fprop")


def test_a_filter_without_a_range_is_named(recorder):
    with torch.no_grad(), wrn_fast.precision("fp8"), pytest.raises(wrn_fast.WrnFastError, match=r"`w`.*calibrate"):
        wrn_fast.bn_act_conv(torch.randn(1, 16, 4, 4).bfloat16(), torch.randn(16, 16, 3, 3).bfloat16())
    assert scales.of(torch.empty(1)) is None


@pytest.mark.parametrize("change, word", [({"C": 24}, "C to be"), ({"K": 40}, "K to be"), ({"stride": 3}, "stride"),
                                          ({"dtype": torch.float32}, "float32")])  # fmt: skip
def test_refusals_are_sentences(recorder, change, word):
    assert cuda.refused("fprop_fp8", PROBLEM) is None
    assert word in cuda.refused("fprop_fp8", PROBLEM._replace(**change))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("source", [False, True], ids=["plain", "act"])
def test_the_self_check_passes_right_kernels_and_no_others(recorder, monkeypatch, source, kind):
    problem = PROBLEM._replace(prologue=True, affine=True, act="relu") if source else PROBLEM
    problem, place = problem._replace(K=64), torch.device("cpu")
    assert cuda.wrong("fprop_fp8", problem, Tile(kind), place) is None
    assert {"quantize", "pack_e4m3"} <= set(recorder.names()) and recorder.of("fprop")["tile"] == kind
    right = cuda_launch.fprop

    def wrong(*args):
        out = right(*args)
        out[0][-1, -1, -1, -1] = 1000
        return out

    monkeypatch.setattr(cuda_launch, "fprop", wrong)
    assert "integers wrong" in cuda.wrong("fprop_fp8", problem, Tile(kind), place)
    assert cuda_check.check.__doc__


def test_bad_arguments_are_named():
    e = cuda_on_cpu.build()
    call = {"dtype": 1, "rows": 4, "C": 16, "x": 16, "stats": 0, "gamma": 0, "beta": 0, "eps": 0.0, "act": 0,
            "slope": 0.0, "rng": 0, "p": 0.0, "amax": 16, "y": 16, "stream": 0}  # fmt: skip
    for change, word in (({"C": 24}, "C"), ({"dtype": 0}, "dtype"), ({"y": 8}, "y"), ({"amax": 0}, "amax")):
        with pytest.raises(ValueError, match=f"`{word}`"):
            e.quantize(**call | change)
