"""Random problems with their tensors, and the primitives in plain PyTorch float64. No Triton."""

from __future__ import annotations

import random as pyrandom
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from wrn_fast.problem import ConvProblem
from wrn_fast.random import keep_mask

ACTS = ("identity", "relu", "silu", "leaky_relu")
PADS = ((0, 0, 0, 0), (1, 1, 1, 1), (1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 2, 0), (0, 3, 1, 0), (4, 0, 0, 5))


@dataclass
class Case:
    """A problem, its tensors by the names of the backend functions, and what seeded it."""

    problem: ConvProblem
    tensors: dict[str, Tensor | None] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor | None:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None


def nhwc(*shape: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Normal values in dense channels_last memory."""
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def draw(seed: int, dtype: torch.dtype = torch.float64, **fixed) -> Case:
    """A random small case. `fixed` overrides fields of the problem; sizes avoid multiples of the tiles on purpose."""
    rng = pyrandom.Random(seed)
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    taps = fixed.pop("taps", rng.choice(((3, 3), (3, 3), (3, 3), (1, 1), (3, 1))))
    drop_at = rng.choice(("none", "none", "none", "prologue", "output", "output_act"))
    act_out = rng.choice(("none", "none", *ACTS)) if drop_at != "output_act" else rng.choice(ACTS)
    prologue, short_prologue = rng.random() < 0.7, rng.random() < 0.7
    values = {
        "device": "cpu",
        "dtype": dtype,
        "w_dtype": dtype if dtype in (torch.float32, torch.float64) or rng.random() < 0.5 else torch.float32,
        "N": rng.choice((1, 1, 2, 3)),
        "H": rng.randint(3, 7),
        "W": rng.randint(3, 7),
        "C": rng.choice((1, 3, 4, 7, 16, 20, 32)),
        "K": rng.choice((1, 2, 5, 8, 16, 24, 36)),
        "R": taps[0],
        "S": taps[1],
        "stride": rng.choice((1, 1, 2, 2, 3)),
        "pad": rng.choice(PADS) if taps != (1, 1) else (0, 0, 0, 0),
        "act": rng.choice(ACTS),
        "slope": 0.1,
        "eps": 1e-5,
        "prologue": prologue,
        "affine": prologue and rng.random() < 0.8,
        "batch_stats": prologue and rng.random() < 0.5,
        "p": 0.3 if drop_at != "none" else 0.0,
        "drop_at": drop_at,
        "bias": rng.random() < 0.4,
        "residual": rng.random() < 0.4,
        "short_C": rng.choice((0, 0, 5, 16, 18)),
        "short_stride": rng.choice((1, 2)),
        "short_prologue": short_prologue,
        "short_affine": short_prologue and rng.random() < 0.8,
        "short_act": rng.choice(ACTS),
        "short_eps": 1e-3,
        "act_out": act_out,
        "want_y": act_out == "none" or rng.random() < 0.7,
        "want_stats": rng.random() < 0.5,
    }
    values.update(fixed)
    if not values["want_y"]:
        values["want_stats"] = False
    problem = ConvProblem(**values)
    problem.check()
    n, c, k, p, q = problem.N, problem.C, problem.K, problem.P, problem.Q
    vec = lambda m, on=True: torch.randn(m, generator=g, dtype=torch.float64).to(wide) if on else None
    stats = lambda m, on: torch.stack([vec(m), vec(m).abs() + 0.1]) if on else None
    w = torch.randn(k, c, *taps, generator=g, dtype=torch.float64).to(problem.w_dtype)
    if rng.random() < 0.5:
        w = w.contiguous(memory_format=torch.channels_last)
    st = problem.short_stride
    h2, w2 = (p - 1) * st + 1 + rng.randrange(st), (q - 1) * st + 1 + rng.randrange(st)
    short = problem.short_C > 0
    both = rng.random() < 0.7
    tensors = {
        "x": nhwc(n, c, problem.H, problem.W, dtype=dtype, g=g),
        "w": w,
        "dy": nhwc(n, k, p, q, dtype=dtype, g=g),
        "stats": stats(c, problem.prologue),
        "gamma": vec(c, problem.affine),
        "beta": vec(c, problem.affine and both),
        "bias": vec(k, problem.bias),
        "residual": nhwc(n, k, p, q, dtype=dtype, g=g) if problem.residual else None,
        "x_short": nhwc(n, problem.short_C, h2, w2, dtype=dtype, g=g) if short else None,
        "w_short": torch.randn(k, problem.short_C, 1, 1, generator=g, dtype=torch.float64).to(problem.w_dtype)
        if short
        else None,
        "stats_short": stats(problem.short_C, short and problem.short_prologue),
        "gamma_short": vec(problem.short_C, short and problem.short_affine and both),
        "beta_short": vec(problem.short_C, short and problem.short_affine),
        "rng": torch.randint(0, 2**63 - 1, (2,), generator=g) if problem.p > 0 else None,
        "out_scale": vec(k, problem.act_out != "none" and rng.random() < 0.7),
        "out_shift": vec(k, problem.act_out != "none" and rng.random() < 0.7),
    }
    if tensors["gamma"] is not None and rng.random() < 0.3:
        tensors["gamma"][rng.randrange(c)] = 0.0
    return Case(problem, tensors)


def act(v: Tensor, name: str, slope: float) -> Tensor:
    return {"identity": lambda: v, "relu": lambda: F.relu(v), "silu": lambda: F.silu(v),
            "leaky_relu": lambda: F.leaky_relu(v, slope)}[name]()  # fmt: skip


def _channel(v: Tensor) -> Tensor:
    return v.double()[:, None, None]


def normal(x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """BatchNorm with given statistics."""
    if stats is None:
        return x
    v = (x - _channel(stats[0])) / torch.sqrt(_channel(stats[1]) + eps)
    v = v if gamma is None else v * _channel(gamma)
    return v if beta is None else v + _channel(beta)


def _mask(case: Case, shape, where: str) -> Tensor | float:
    problem = case.problem
    if problem.p == 0 or problem.drop_at != where:
        return 1.0
    if problem.p == 1:
        return 0.0
    return keep_mask(shape, case.rng, problem.p).double() / (1 - problem.p)


def _convolution(case: Case, v: Tensor, w: Tensor) -> Tensor:
    problem = case.problem
    a = act(v, problem.act, problem.slope) * _mask(case, v.shape, "prologue")
    return F.conv2d(F.pad(a, problem.pad), w, stride=problem.stride)


def fprop(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, stats of y, y_act), all float64; y_act and the statistics are those of the exact y."""
    problem = case.problem
    y = _convolution(case, normal(case.x.double(), case.stats, case.gamma, case.beta, problem.eps), case.w.double())
    if case.bias is not None:
        y = y + _channel(case.bias)
    if case.x_short is not None:
        v = normal(case.x_short.double(), case.stats_short, case.gamma_short, case.beta_short, problem.short_eps)
        y = y + F.conv2d(act(v, problem.short_act, problem.slope), case.w_short.double(), stride=problem.short_stride)
    if case.residual is not None:
        y = y + case.residual.double()
    y = y * _mask(case, y.shape, "output")
    return y, moments(y), y_act(case, y)


def moments(y: Tensor) -> Tensor:
    return torch.stack([y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)])


def y_act(case: Case, y: Tensor) -> Tensor | None:
    problem = case.problem
    if problem.act_out == "none":
        return None
    z = y if case.out_scale is None else y * _channel(case.out_scale)
    z = z if case.out_shift is None else z + _channel(case.out_shift)
    return act(z, problem.act_out, problem.slope) * _mask(case, y.shape, "output_act")


def gradients(case: Case) -> tuple[Tensor, Tensor]:
    """(g = dL/d(bn(x)), dw) by autograd for dL/dy = dy."""
    v = normal(case.x.double(), case.stats, case.gamma, case.beta, case.problem.eps).detach().requires_grad_()
    w = case.w.double().requires_grad_()
    return torch.autograd.grad(_convolution(case, v, w), [v, w], case.dy.double())


def xhat(case: Case) -> Tensor:
    return normal(case.x.double(), case.stats, None, None, case.problem.eps)


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error; inf where a NaN is left."""
    e = (got.double() - want).norm() / (want.norm() + 1e-300)
    return float("inf") if torch.isnan(e) else e.item()
