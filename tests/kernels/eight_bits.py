"""What runs in the interpreting process for test_fp8.py: e4m3 kernels beside float64 on operands rounded by PyTorch."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kernels import oracle
from kernels.interpreted import FPROP, poisoned
from torch import Tensor

import wrn_fast
from wrn_fast import parity, scales
from wrn_fast.kernels import fp8, fprop, selfcheck, tile
from wrn_fast.kernels.configs import ARCHS, heuristic, in_fp8
from wrn_fast.problem import ConvProblem

ARCH = ARCHS["interpreter"]


@triton.jit
def _round_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tile.round_to(tl.load(x + i), y.dtype.element_ty))


def rounding(dtype: torch.dtype, seed: int) -> bool:
    """Every magnitude, every tie, denormals, NaN: bit for bit what PyTorch's cast gives."""
    g = torch.Generator().manual_seed(seed)
    most = torch.finfo(dtype).max
    spread = torch.randn(4096, generator=g) * 10 ** torch.empty(4096).uniform_(-5, 2, generator=g)
    ties = torch.arange(-1024, 1024) * torch.finfo(dtype).tiny / 16
    v = torch.cat([spread, ties, torch.linspace(-most, most, 2000), torch.full((48,), float("nan"))]).clamp(-most, most)
    y = torch.empty(v.shape, dtype=dtype)
    _round_kernel[(1,)](v, y, v.numel())
    got, want = y.float(), v.to(dtype).float()
    return bool(((got == want) | (got.isnan() & want.isnan())).all())


def _operands(v: Tensor, most: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3(v / most) in units of the format's largest number, in float64: `most` is a power of two times that."""
    top = torch.finfo(dtype).max
    return (v.double() * (top / most.double())).clamp(-top, top).to(torch.float32).to(dtype).double() * (most / top)


def _exact(shape: tuple[int, ...], steps: int, g: torch.Generator) -> Tensor:
    """Integers that e4m3 has to round."""
    return torch.randint(-steps, steps + 1, shape, generator=g).float()


def errors(seeds: list[int], dtype: torch.dtype, short: bool) -> list[tuple[float, float]]:
    """(error, that of float32 convolutions on the same operands) of y a seed.

    Everything before the rounding to e4m3 is exact (integers, powers of two), so both sides multiply the same operands.
    """
    top = torch.finfo(dtype).max
    found = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        parts = {"short_C": 18, "short_stride": 2, "short_prologue": True, "short_affine": True, "short_act": "relu"}
        case = oracle.draw(
            seed, torch.float32, N=2, H=6, W=5, C=20, K=24, taps=(3, 3), pad=(1, 1, 1, 1), act="relu", prologue=True,
            affine=True, p=0.0, drop_at="none", eps=0.0, residual=True, bias=True, act_out="none", want_y=True,
            want_stats=False, w_dtype=torch.float32, batch_stats=False, **(parts if short else {"short_C": 0}),
        )  # fmt: skip
        problem, t = case.problem._replace(short_eps=0.0), case.tensors
        case.problem = problem
        for suffix, c in (("", 20), ("_short", 18)) if short else (("", 20),):
            t[f"x{suffix}"] = _exact(t[f"x{suffix}"].shape, 200, g).contiguous(memory_format=torch.channels_last)
            t[f"stats{suffix}"] = torch.stack([_exact((c,), 5, g), torch.ones(c)])
            t[f"gamma{suffix}"], t[f"beta{suffix}"] = _exact((c,), 1, g) * 2 + 0.5, _exact((c,), 9, g)
            # The largest of each filter is a power of two times the format's, so that its scale is a power of two.
            w = _exact(t[f"w{suffix}"].shape, int(top) - 1, g)
            w.flatten(1)[:, 0] = top
            t[f"w{suffix}"] = w * 2.0 ** torch.randint(-6, 3, (24, 1, 1, 1), generator=g)
        amax = [torch.tensor([top * 2.0 ** torch.randint(-1, 2, (1,), generator=g).item()]) for _ in range(2)]
        ranges = fp8.Ranges(amax[0], amax[1] if short else None, dtype)
        config = in_fp8(dataclasses.replace(heuristic("fprop", problem, ARCH), rows=16), problem, ARCH)
        with poisoned():
            y = fprop.fprop(problem, config, "fp8", *[t[n] for n in FPROP], ranges)[0]
        sides = [_plain(case, amax, dtype, kind) for kind in (torch.float64, torch.float32)]
        found.append((parity.error(y, sides[0]), parity.error(sides[1], sides[0])))
    return found


def _plain(case: oracle.Case, amax: list[Tensor], dtype: torch.dtype, kind: torch.dtype) -> Tensor:
    """The convolutions of the rounded operands in `kind`."""
    problem, t = case.problem, case.tensors
    y = t["bias"].to(kind)[:, None, None] + t["residual"].to(kind)
    for i, suffix in enumerate(("", "_short") if problem.short_C else ("",)):
        x, stats, gamma, beta, w = (t[f"{name}{suffix}"] for name in ("x", "stats", "gamma", "beta", "w"))
        a = _operands(F.relu(oracle.normal(x.double(), stats, gamma, beta, 0.0)), amax[i], dtype)
        w = _operands(w, w.abs().amax((1, 2, 3), keepdim=True), dtype)
        stride, padding = (problem.short_stride, 0) if suffix else (problem.stride, 1)
        y = y + F.conv2d(a.to(kind), w.to(kind), stride=stride, padding=padding)
    return y


def integers(source: bool) -> str | None:
    """The self-check of an fp8 tile."""
    problem = ConvProblem("cpu", torch.float16, torch.float16, 2, 8, 8, 32, 32, 3, 3, 1, (1, 1, 1, 1))
    problem = problem._replace(**({"prologue": True, "affine": True, "act": "relu"} if source else {}))
    config = in_fp8(heuristic("fprop", problem, ARCH), problem, ARCH)
    return selfcheck.check("fprop", problem, dataclasses.replace(config, rows=16, red=32), "fp8", torch.device("cpu"))


def special() -> tuple[bool, bool, bool]:
    """(a NaN reaches its pixel, a value beyond the range becomes its end, a filter of zeros gives zeros)."""
    dtype = torch.float8_e4m3fn
    problem = ConvProblem("cpu", torch.float32, torch.float32, 1, 4, 4, 32, 16, 1, 1)
    config = in_fp8(heuristic("fprop", problem, ARCH), problem, ARCH)
    unit = torch.finfo(dtype).max / 256  # so that both scales are powers of two
    x = torch.ones(1, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1], x[0, 4, 2, 2] = float("nan"), 1e9
    w = torch.full((16, 32, 1, 1), unit)
    w[5] = 0
    ranges = fp8.Ranges(torch.tensor([unit]), None, dtype)
    y = fprop.fprop(problem, config, "fp8", x, w, ranges=ranges)[0][0]
    nan = y.isnan()
    full = [k for k in range(16) if k != 5]
    return (
        bool(nan[:, 1, 1].all()) and int(nan.sum()) == 16,
        bool((y[full, 2, 2] == unit * (31 + unit)).all() and (y[full, 0, 0] == unit * 32).all()),
        bool((y[5, 0] == 0).all()),
    )


def whole_model(seed: int) -> dict[str, object]:
    """A network calibrated and run: what was reported, what repeats, and what is refused."""
    torch.manual_seed(seed)
    model = wrn_fast.WideResNet(10, 10, 1, pool="global").eval()
    images = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    report: dict[str, object] = {}
    with wrn_fast.backend("triton"):
        from wrn_fast.fp8 import calibrate

        calibration = calibrate(model, images)
        with torch.no_grad():
            plain = model(images[0])[0]
            with wrn_fast.precision("fp8"):
                coarse = model(images[0])[0]
                again = model(images[0])[0]
        report["ranges"] = sorted(calibration.ranges)
        report["error"], report["text"] = calibration.error, str(calibration)
        report["differs"] = not torch.equal(plain, coarse)
        report["repeats"] = torch.equal(coarse, again)
        report["refused"] = [_refusal(call) for call in _refusals(model, images[0])]
        report["forgotten"] = scales.of(torch.empty(1)) is None
    return report


def _refusals(model: torch.nn.Module, x: Tensor):
    def training() -> None:
        with wrn_fast.precision("fp8"):
            model(x)

    def batch_statistics() -> None:
        with torch.no_grad(), wrn_fast.precision("fp8"):
            model.train()
            try:
                model(x)
            finally:
                model.eval()

    def no_range() -> None:
        with torch.no_grad(), wrn_fast.precision("fp8"):
            wrn_fast.bn_act_conv(torch.randn(1, 16, 4, 4), torch.randn(16, 16, 3, 3))

    return training, batch_statistics, no_range


def _refusal(call) -> str:
    try:
        call()
    except wrn_fast.WrnFastError as e:
        return str(e)
    return "nothing"
