"""Random problems that a backend serves, and the primitives on them through the operators."""

from __future__ import annotations

import random

import pytest
import torch
from kernels import oracle

from wrn_fast import dispatch, ops
from wrn_fast.backends import BACKENDS
from wrn_fast.problem import TENSORS

# Relu's derivative is a lottery where the pre-activation is within rounding of 0.
KINK = 1e-5
# On the CPU the convolutions of `cuda` are plain loops: `make test` draws some of its cells, `make test-all` runs all.
CELLS = [pytest.param(name, marks=pytest.mark.rotate(20) if name == "cuda" else ()) for name in BACKENDS]
ALGORITHM = {"fprop": "f4", "dgrad": "f4", "wgrad": "wgrad"}


def device_of(backend):
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def on_device(case, backend):
    device = device_of(backend)
    tensors = {name: None if v is None else v.to(device) for name, v in case.tensors.items()}
    return oracle.Case(case.problem._replace(device=device), tensors)


def dtype_of(backend):
    """One that its convolutions serve."""
    return torch.float16 if backend == "cuda" else torch.float32


def channels_of(backend, channels):
    """The next number of channels that its convolutions serve."""
    return -(-channels // 16) * 16 if backend == "cuda" else channels


def served(backend, op, seed, fixed):
    """`fixed`, and what a random problem rarely has and the backend's convolutions need."""
    if backend != "cuda" or op not in (*RUN, "input_grad"):
        return fixed
    rng = random.Random(seed)
    fields = {"C": (16, 32, 48), "K": (16, 32), "short_C": (0, 0, 16), "stride": (1, 1, 2)}
    widened = {name: channels_of(backend, fixed[name]) for name in ("C", "K", "short_C") if name in fixed}
    return {name: rng.choice(values) for name, values in fields.items()} | fixed | widened


def draw(backend, op, seed, count, dtype, many=False, **fixed):
    """`count` random problems that the backend serves; a skip with its reason where it serves none.

    `many` channels, at least 16 on both sides, are for relative errors: one channel may be all cancellation.
    """
    found, refused = [], []
    for i in range(80 * count):
        case = on_device(oracle.draw(seed + i, dtype, **served(backend, op, seed + i, fixed)), backend)
        if (many and min(case.problem.C, case.problem.K) < 16) or (op == "dgrad" and near_kink(case)):
            continue
        reason = dispatch.load(backend).unsupported(op, case.problem)
        if reason is None:
            found.append(case)
        else:
            refused.append(reason)
        if len(found) == count:
            return found
        if len(refused) == 2 * count:
            break
    if found or not refused:
        pytest.fail(f"{backend} serves {len(found)} problems of {count}, refused {len(refused)}")
    pytest.skip(f"{backend}: {refused[-1]}")


def near_kink(case):
    p = case.problem
    v = oracle.normal(case.x.double(), case.stats, case.gamma, case.beta, p.eps)
    return p.act in ("relu", "leaky_relu") and bool((v.abs() < KINK).any())


def integers(*shape, most, dtype=torch.float32):
    return torch.randint(-most, most + 1, shape).to(dtype).contiguous(memory_format=torch.channels_last)


def integer_case(dtype, n, c, k, h, w, stride, pad, most=1):
    """Whole numbers for the mean, variance 1/4, powers of two or 0 for gamma: every sum is exact in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    problem = oracle.draw(0, dtype, device="cpu", N=n, H=h, W=w, C=c, K=k, taps=(3, 3), stride=stride, pad=pad,
                          act="relu", eps=0.0, prologue=True, affine=True, batch_stats=False, p=0.0, drop_at="none",
                          bias=True, residual=True, short_C=0, act_out="none", want_y=True, want_stats=False,
                          w_dtype=dtype).problem  # fmt: skip
    vector = lambda m: torch.randint(-1, 2, (m,)).to(wide)
    tensors = {
        "x": integers(n, c, h, w, most=2 * most, dtype=dtype),
        "w": integers(k, c, 3, 3, most=most, dtype=dtype),
        "dy": integers(n, k, problem.P, problem.Q, most=most, dtype=dtype),
        "stats": torch.stack([vector(c), torch.full((c,), 0.25, dtype=wide)]),
        "gamma": torch.tensor([0.5, -0.5, 1.0, 0.0]).to(wide)[torch.randint(0, 4, (c,))],
        "beta": vector(c),
        "bias": vector(k),
        "residual": integers(n, k, problem.P, problem.Q, most=most, dtype=dtype),
        **dict.fromkeys(
            ("x_short", "w_short", "stats_short", "gamma_short", "beta_short", "rng", "out_scale", "out_shift")
        ),
    }
    return oracle.Case(problem, tensors)


def arrange(v, how):
    """The same values under other strides."""
    if v is None or not v.is_floating_point() or how == "dense":
        return v
    if v.dim() != 4:
        return torch.stack([v, v], dim=-1)[..., 0]
    if how == "NCHW":
        return v.contiguous()
    if how == "sliced":
        big = torch.full([size + 3 for size in v.shape], float("nan"), dtype=v.dtype, device=v.device)
        view = big[tuple(slice(1, 1 + size) for size in v.shape)]
        return view.copy_(v)
    if how == "transposed":
        return v.transpose(2, 3).contiguous().transpose(2, 3)
    return v[:1, :, :, :1].expand(v.shape)


# The primitives through the operators.


def run_fprop(case, **replaced):
    t, p = {**case.tensors, **replaced}, case.problem
    return ops.fprop(
        *(t.get(name) for name in TENSORS), p.stride, list(p.pad), p.act, p.slope, p.eps, p.batch_stats, p.p,
        p.drop_at, p.short_stride, p.short_act, p.short_eps, False, p.act_out, p.want_y, p.want_stats,
    )  # fmt: skip


def source_scalars(p):
    return p.stride, list(p.pad), p.act, p.slope, p.eps, p.p if p.drop_at == "prologue" else 0.0


def run_dgrad(case, **replaced):
    t = {**case.tensors, **replaced}
    tensors = (t[name] for name in ("dy", "x", "w", "stats", "gamma", "beta", "rng"))
    return ops.dgrad(*tensors, *source_scalars(case.problem), t["stats"] is not None)


def run_wgrad(case, **replaced):
    t = {**case.tensors, **replaced}
    tensors = (t[name] for name in ("dy", "x", "stats", "gamma", "beta", "rng"))
    return (ops.wgrad(*tensors, list(t["w"].shape), t["w"].dtype, *source_scalars(case.problem)),)


RUN = {"fprop": run_fprop, "dgrad": run_dgrad, "wgrad": run_wgrad}
