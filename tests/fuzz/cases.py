"""One fuzzed call of the operator: what may be chosen, the tensors that follow, and the judgement.

The oracle is plain PyTorch in float64. A difference is measured against the size of what is added, that is the same
sums over absolute values: cancellation, which costs any code its digits, is no fault, and a misplaced element still is
of that size.

    python tests/fuzz/cases.py cpu '{"seed": 1, ...}'    one case again; a failing run prints the line
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wrn_fast import dispatch, parity
from wrn_fast.block import batch_norm
from wrn_fast.functional import bn_act_conv
from wrn_fast.precision import precision
from wrn_fast.random import keep_mask

LEAVES = ("x", "w", "gamma", "beta", "residual")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Pre-activations nearer to 0 than so many units of their terms have a derivative that rounding may decide.
KINK_UNITS = 32


@dataclass(frozen=True)
class Choice:
    """Everything that is drawn; tensors follow from it and its seed."""

    seed: int = 0
    n: int = 1
    c: int = 3
    k: int = 4
    h: int = 5
    w: int = 6
    taps: int = 3
    stride: int = 1
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    act: str = "relu"
    norm: str = "train"  # none, eval, train
    affine: str = "both"  # none, zero (some gammas are), both
    momentum: float | None = 0.1
    residual: bool = False
    short: str = "none"  # none, raw, activated
    p: float = 0.0
    drop_at: str = "prologue"
    dtype: str = "float32"
    layout: str = "NHWC"
    grads: int = 31  # a bit for each of LEAVES
    threads: int = 1
    data: str = "normal"  # normal, integer, special, mean
    exactness: str = "fast"

    @property
    def batch_stats(self) -> bool:
        """Statistics of the batch; BatchNorm refuses those of a single value."""
        return self.norm == "train" and self.n * self.h * self.w > 1


def replay(backend: str, choice: Choice) -> str:
    """The command that runs a case again."""
    return f"python tests/fuzz/cases.py {backend} '{json.dumps(asdict(choice))}'"


def _values(choice: Choice, *shape: int) -> Tensor:
    if choice.data == "integer":
        return torch.randint(-3, 4, shape).double()
    v = torch.randn(shape, dtype=torch.float64)
    return v + 1000 if choice.data == "mean" else v


def _arrange(v: Tensor, layout: str) -> Tensor:
    """The same values under other strides."""
    if layout == "NCHW":
        return v.contiguous()
    if layout == "transposed":
        return v.transpose(2, 3).contiguous().transpose(2, 3)
    if layout in ("sliced", "offset"):
        more = 3 if layout == "sliced" else 1
        big = v.new_full([size + more for size in v.shape], float("nan"))
        return big[tuple(slice(more - 1, more - 1 + size) for size in v.shape)].copy_(v)
    if layout == "expanded":
        return v[:, :, :, :1].expand(v.shape)
    return v.contiguous(memory_format=torch.channels_last)


def tensors(choice: Choice) -> dict[str, Tensor]:
    """Inputs in the dtype of the case; in float32 and wider where the operator takes them so."""
    torch.manual_seed(choice.seed)
    dtype = DTYPES[choice.dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    left, right, top, bottom = choice.pad
    p = (choice.h + top + bottom - choice.taps) // choice.stride + 1
    q = (choice.w + left + right - choice.taps) // choice.stride + 1
    t = {"x": _values(choice, choice.n, choice.c, choice.h, choice.w).to(dtype)}
    if choice.data == "special":
        for value in (float("nan"), float("inf")):
            t["x"].view(-1)[torch.randint(t["x"].numel(), ())] = value
    t["x"] = _arrange(t["x"], choice.layout)
    weight = torch.randn(choice.k, choice.c, choice.taps, choice.taps, dtype=torch.float64)
    t["w"] = (weight.round() if choice.data == "integer" else weight / choice.taps).to(dtype)
    t["dy"] = torch.randn(choice.n, choice.k, p, q, dtype=torch.float64).to(dtype)
    if choice.norm != "none" and choice.affine != "none":
        t["gamma"] = torch.randn(choice.c, dtype=torch.float64).to(wide)
        t["beta"] = torch.randn(choice.c, dtype=torch.float64).to(wide)
        if choice.affine == "zero":
            t["gamma"][:: max(1, choice.c // 3)] = 0.0
    if choice.residual:
        t["residual"] = _arrange(torch.randn(choice.n, choice.k, p, q, dtype=torch.float64).to(dtype), choice.layout)
    if choice.short != "none":
        t["x_short"] = torch.randn(choice.n, 5, 2 * p - 1, 2 * q - 1, dtype=torch.float64).to(dtype)
        t["w_short"] = torch.randn(choice.k, 5, 1, 1, dtype=torch.float64).to(dtype)
    if choice.p > 0:
        t["rng"] = torch.randint(2**62, (2,))
    return t


def _act(v: Tensor, choice: Choice) -> Tensor:
    functions = {"identity": lambda v: v, "relu": F.relu, "silu": F.silu, "leaky_relu": lambda v: F.leaky_relu(v, 0.1)}
    return functions[choice.act](v)


def _normalisation(choice: Choice, dtype: torch.dtype) -> nn.BatchNorm2d:
    """A BatchNorm with statistics of its own, in the mode of the case."""
    torch.manual_seed(choice.seed + 1)
    bn = nn.BatchNorm2d(choice.c, momentum=choice.momentum, affine=False, dtype=torch.float64)
    around = 1000.0 if choice.data == "mean" else 0.0
    bn.running_mean.normal_().add_(around)  # type: ignore[union-attr]
    bn.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return bn.to(dtype).train(choice.batch_stats)


def _leaves(choice: Choice, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the inputs that require a gradient, as leaves with the same strides."""
    names = [name for i, name in enumerate(LEAVES) if choice.grads >> i & 1 and name in t]
    return {name: t[name].detach().requires_grad_() for name in names}


def run(choice: Choice) -> tuple[dict[str, Tensor], nn.BatchNorm2d]:
    """The operator: y, and a gradient by the name of each leaf."""
    t = tensors(choice)
    leaves = _leaves(choice, t)
    dy = t.pop("dy")
    t |= leaves
    bn = _normalisation(choice, torch.float64 if t["x"].dtype == torch.float64 else torch.float32)
    statistics: dict[str, Any] = {}
    if choice.norm != "none":
        with torch.no_grad():
            prologue = batch_norm(bn, t["x"].detach(), None)
        statistics = {"stats": prologue.stats, "eps": prologue.eps, "batch_stats": prologue.batch_stats}
    y = bn_act_conv(
        **t, **statistics, stride=choice.stride, pad=choice.pad, act=choice.act, slope=0.1, p=choice.p,
        drop_at=choice.drop_at, short_stride=2, short_act="relu" if choice.short == "activated" else "identity",
    ).y  # fmt: skip
    found = {"y": y.detach()}
    if leaves:
        found |= dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)))
    return found, bn


@dataclass
class Wanted:
    """Exact values, the size of the terms behind each, and whether a derivative hangs on rounding."""

    values: dict[str, Tensor]
    sizes: dict[str, Tensor]
    bn: nn.BatchNorm2d
    at_a_kink: bool
    overflows: bool  # may an activation, a sum or a gradient pass what the dtype can hold?


def wanted(choice: Choice) -> Wanted:
    """The same in plain float64, and once more over absolute values."""
    t = tensors(choice)
    low = t["x"].dtype
    t = {name: v.double() if v.is_floating_point() else v for name, v in t.items()}
    leaves = _leaves(choice, t)
    t |= leaves
    bn = _normalisation(choice, torch.float64 if low == torch.float64 else torch.float32).double()
    x, w, dy = t["x"], t["w"], t["dy"]
    gamma, beta = t.get("gamma"), t.get("beta")
    if choice.norm == "none":
        v, rstd, centred = x, torch.ones(choice.c, dtype=torch.float64), x.abs().detach()
    else:
        mean = x.mean((0, 2, 3)).detach() if choice.batch_stats else bn.running_mean.clone()  # type: ignore[union-attr]
        var = x.var((0, 2, 3), correction=0).detach() if choice.batch_stats else bn.running_var.clone()  # type: ignore[union-attr]
        rstd = (var + bn.eps).rsqrt()
        centred = (x.detach().abs() + mean.abs()[:, None, None]) * rstd[:, None, None]
        v = bn(x)
        v = v if gamma is None else v * gamma[:, None, None] + beta[:, None, None]
    scale = torch.ones_like(rstd) if gamma is None else gamma.detach().abs()
    terms = centred * scale[:, None, None] + (0 if beta is None else beta.detach().abs()[:, None, None])
    mask = torch.ones((), dtype=torch.float64)
    if choice.p > 0:
        shape = x.shape if choice.drop_at == "prologue" else dy.shape
        mask = keep_mask(shape, t["rng"], choice.p).double() / (1 - choice.p)
    before, behind = (mask, 1.0) if choice.drop_at == "prologue" else (1.0, mask)

    def convolved(a: Tensor, w: Tensor, short: Tensor | None, residual: Tensor | None) -> Tensor:
        y = F.conv2d(F.pad(a * before, choice.pad), w, stride=choice.stride)
        y = y if short is None else y + short
        return (y if residual is None else y + residual) * behind

    short = size_short = None
    if choice.short != "none":
        s = F.relu(t["x_short"]) if choice.short == "activated" else t["x_short"]
        short = F.conv2d(s, t["w_short"], stride=2)
        size_short = F.conv2d(s.abs(), t["w_short"].abs(), stride=2)
    y = convolved(_act(v, choice), w, short, t.get("residual"))
    values = {"y": y.detach()}
    if leaves:
        values |= dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)))
    residual = t["residual"].detach().abs() if choice.residual else None
    sizes = {"y": convolved(terms, w.detach().abs(), size_short, residual)}
    below = w.detach().abs(), dy.abs() * behind
    sizes |= _gradient_sizes(choice, x.detach(), terms, centred, scale * rstd, *below, before)
    unit = parity.UNIT.get(low, parity.FLOAT64)
    # Whole numbers without a BatchNorm are activated exactly, zeros among them.
    rounded = choice.data != "integer" or choice.norm != "none"
    near = bool((v.detach().abs() <= KINK_UNITS * unit * terms).any())
    at_a_kink = rounded and near and choice.act in ("relu", "leaky_relu")
    largest = max(v.max().item() for v in (terms * before, *sizes.values()) if v.numel())
    return Wanted(values, sizes, bn, at_a_kink, largest > torch.finfo(low).max)


def _gradient_sizes(
    choice: Choice, x: Tensor, terms: Tensor, centred: Tensor, scale: Tensor, w: Tensor, dy: Tensor, before: Any
) -> dict[str, Tensor]:
    """The gradients' sums over absolute values. No activation has a slope beyond 1.1; silu's moves by at most 0.5 v."""
    padded = F.pad(x, choice.pad)
    g = torch.nn.grad.conv2d_input(padded.shape, w, dy, stride=choice.stride)
    left, _, top, _ = choice.pad
    g = g[:, :, top : top + choice.h, left : left + choice.w] * before
    if choice.act == "silu":
        g = g * (1 + terms / 2)
    dw = torch.nn.grad.conv2d_weight(F.pad(terms * before, choice.pad), w.shape, dy, stride=choice.stride)
    dx = g
    if choice.batch_stats:
        m = x.numel() // x.shape[1]
        sums = [v.sum((0, 2, 3))[:, None, None] / m for v in (g, g * centred)]
        dx = g + sums[0] + centred * sums[1]
    return {
        "x": dx * scale[:, None, None], "w": dw, "gamma": (g * centred).sum((0, 2, 3)), "beta": g.sum((0, 2, 3)),
        "residual": dy,
    }  # fmt: skip


class Verdict(NamedTuple):
    """What is wrong with a case, and the share of zeros among the expected values: if nearly all, it could not fail."""

    wrong: list[str]
    zeros: float

    @property
    def mistrusted(self) -> bool:
        return self.zeros > parity.MOSTLY_ZERO


def judge(backend: str, choice: Choice) -> Verdict:
    """Runs a case and compares."""
    before = torch.get_num_threads()
    torch.set_num_threads(choice.threads)
    try:
        with dispatch.backend(backend), precision(choice.exactness), warnings.catch_warnings():
            warnings.simplefilter("error")
            got, bn = run(choice)
    finally:
        torch.set_num_threads(before)
    want = wanted(choice)
    dtype = DTYPES[choice.dtype]
    bound = parity.term_bound(dtype)
    found = []
    if got.keys() != want.values.keys():
        found.append(f"gradients of {sorted(got)}, expected {sorted(want.values)}")
    for name, exact in want.values.items():
        value = got[name].double()
        if value.shape != exact.shape:
            found.append(f"{name}: expected shape {list(exact.shape)}, got {list(value.shape)}")
            continue
        if choice.data == "special" or want.overflows:
            if name == "y" and choice.data == "special" and bool((value.isfinite() & ~exact.isfinite()).any()):
                found.append("y: finite where the oracle is not")
            continue
        if name != "y" and (want.at_a_kink or not exact.isfinite().all()):
            continue
        size = want.sizes[name].norm().item()
        distance = (value - exact).norm().item()
        if not distance <= bound * size:
            found.append(f"{name}: off by {distance:.3g}, the terms are {size:.3g}, bound {bound:.3g}")
    if choice.norm != "none" and choice.data != "special":
        for name, buffer in bn.named_buffers():
            exact = want.bn.get_buffer(name).double()
            distance = (buffer.double() - exact).norm().item()
            around = exact.norm().item() + want.values["y"].new_tensor(float(choice.data == "mean") * 1e3).item()
            if not distance <= parity.term_bound(torch.float32) * max(around, 1.0):
                found.append(f"{name}: off by {distance:.3g} of {around:.3g}")
    return Verdict(found, parity.zero_share(torch.cat([v.flatten() for v in want.values.values()])))


if __name__ == "__main__":
    fields = json.loads(sys.argv[2])
    wrong = judge(sys.argv[1], Choice(**{**fields, "pad": tuple(fields["pad"])})).wrong
    print("\n".join(wrong) or "nothing is wrong")
    sys.exit(bool(wrong))
