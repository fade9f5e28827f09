"""What runs in the interpreting process: the head's kernels on poisoned memory, against plain PyTorch in float64."""

from __future__ import annotations

import random
from typing import Any

import head_cases
import torch
from kernels.interpreted import poisoned
from torch import Tensor

from wrn_fast.checks import head_bwd_problem, head_problem
from wrn_fast.parity import error

ACTS = ("identity", "relu", "silu", "leaky_relu")


def drawn(seed: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(mode, sizes): any of the choices together; sizes off the tiles, and one that needs several of each."""
    rng = random.Random(seed)
    mode = {
        "act": rng.choice(ACTS), "slope": 0.3, "cosine": rng.random() < 0.4, "bias": rng.random() < 0.6,
        "bn": rng.random() < 0.7, "affine": rng.random() < 0.7,
    }  # fmt: skip
    mode["batch_stats"] = mode["bn"] and rng.random() < 0.6
    sizes = {"n": rng.choice((1, 2, 3)), "c": rng.choice((1, 3, 16, 20, 33)), "k": rng.choice((1, 2, 10, 20, 150)),
             "h": rng.choice((1, 2, 5, 8)), "w": rng.choice((1, 3, 8))}  # fmt: skip
    if rng.random() < 0.15:
        sizes |= {"c": 2050, "k": 20, "n": 2}
    if mode["batch_stats"]:  # of one image alone the gradient by y may be 0 but for rounding
        sizes |= {"n": max(2, sizes["n"]), "h": max(2, sizes["h"])}
    return mode, sizes


def errors(seeds: list[int]) -> list[dict[str, float]]:
    """Relative L2 error of every output of every case."""
    return [_errors(seed) for seed in seeds]


def _errors(seed: int) -> dict[str, float]:
    from wrn_fast.kernels.head import head, head_bwd

    torch.manual_seed(seed)
    mode, sizes = drawn(seed)
    call = head_cases.build(mode, torch.float64, dense=True, **sizes)
    arguments = call.arguments()
    y, stats, gamma, beta, w, bias = arguments[:6]
    dfeat = torch.randn(y.shape[:2], dtype=torch.float64)
    scalars, want_sums = arguments[6:10], stats is not None and random.Random(seed).random() < 0.7
    with poisoned():
        out, feat = head(head_problem(*arguments), y, stats, gamma, beta, w, bias)
        backward = head_bwd_problem(dfeat, y, stats, gamma, beta, *scalars, want_sums)
        dy, sums = head_bwd(backward, dfeat, y, stats, gamma, beta)
    leaf = y.clone().requires_grad_()
    v = call.normal({**call.tensors, "y": leaf})
    want_out, want_feat = call.plain(y=leaf)
    got: dict[str, Tensor] = {"out": out, "feat": feat, "dy": dy}
    want = {"out": want_out, "feat": want_feat, "dy": torch.autograd.grad(want_feat, leaf, dfeat)[0]}
    if want_sums:
        g = torch.autograd.grad(_feature(call, v), v, dfeat)[0]
        got["sums"] = sums
        xhat = (y - stats[0][:, None, None]) / (stats[1] + call.scalars["eps"]).sqrt()[:, None, None]
        want["sums"] = torch.stack([g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))])
    return {name: error(value, want[name]) for name, value in got.items()}


def _feature(call: head_cases.Call, v: Tensor) -> Tensor:
    """The feature of what BatchNorm gave."""
    bare = call._replace(tensors={"y": v, "w": call.tensors["w"]}, scalars=call.scalars | {"batch_stats": False})
    return bare.plain()[1]


def guarded(seed: int) -> tuple[int, bool]:
    """(canaries written over, do the inputs stay?) of both kernels; 17 channels and 11 classes, which fill no tile."""
    from backends.guarded import canaries

    from wrn_fast.kernels.head import head, head_bwd

    torch.manual_seed(seed)
    call = head_cases.build("classic in training", torch.float32, c=17, k=11, dense=True)
    arguments = call.arguments()
    dfeat = torch.randn(3, 17)
    before = [v.clone() for v in (*arguments[:6], dfeat)]
    with canaries() as broken:
        head(head_problem(*arguments), *arguments[:6])
        head_bwd(head_bwd_problem(dfeat, *arguments[:4], *arguments[6:10], True), dfeat, *arguments[:4])
    return broken(), all(map(torch.equal, before, (*arguments[:6], dfeat)))
