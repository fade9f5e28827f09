"""What runs in the interpreting process for test_values.py."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from kernels import oracle
from kernels.interpreted import FPROP
from torch import Tensor

from wrn_fast import parity
from wrn_fast.kernels import dgrad, dropout, fprop, wgrad
from wrn_fast.kernels.configs import ARCHS, heuristic
from wrn_fast.kernels.masks import act_mask
from wrn_fast.masks import unpack
from wrn_fast.problem import ConvProblem
from wrn_fast.random import keep_mask

PLAIN = ConvProblem("cpu", torch.float32, torch.float32, 2, 5, 6, 8, 8, 3, 3, 1, (1, 1, 1, 1), slope=0.1)


def tile(op: str, problem: ConvProblem):
    return dataclasses.replace(heuristic(op, problem, ARCHS["interpreter"]), rows=16)


def reach(dtype: torch.dtype, act: str, seed: int) -> dict[str, tuple[list, list]]:
    """Per special value and position: which outputs are NaN and which infinite, in eager and here."""
    g = torch.Generator().manual_seed(seed)
    problem = PLAIN._replace(dtype=dtype, w_dtype=dtype, act=act)
    w = torch.rand(8, 8, 3, 3, generator=g).to(dtype) + 0.5
    found = {}
    for value in (float("nan"), float("inf"), float("-inf")):
        for at in ((0, 0, 0, 0), (1, 7, 4, 5), (0, 3, 2, 2)):
            x = oracle.nhwc(2, 8, 5, 6, dtype=dtype, g=g)
            x[at] = value
            y = fprop.fprop(problem, tile("fprop", problem), "ieee", x, w)[0]
            want = F.conv2d(oracle.act(x.double(), act, 0.1), w.double(), padding=1)
            kinds = [[v.isnan().tolist(), v.isposinf().tolist(), v.isneginf().tolist()] for v in (want, y)]
            found[f"{value} at {at}"] = (kinds[0], kinds[1])
    return found


def mask_bits(dtype: torch.dtype, act: str) -> tuple[list[bool], list[bool]]:
    """(where eager lets a gradient of 1 pass, the bits of act_mask) of special values, in a row that ends in a byte."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-7, -1e-7, 1.0, -1.0, 0.0, 2.0])
    x = values.to(dtype).reshape(1, -1, 1, 1)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(oracle.act(leaf, act, 0.1).sum(), [leaf])
    problem = PLAIN._replace(N=1, H=1, W=1, C=x.shape[1], dtype=dtype, w_dtype=dtype, R=1, S=1, pad=(0,) * 4, act=act)
    bits = act_mask(problem, x.contiguous(memory_format=torch.channels_last), None, None, None)
    return (g == 1).flatten().tolist(), unpack(bits, x.shape[1]).flatten().tolist()


def large_mean(dtype: torch.dtype, seed: int) -> str:
    """The verdict of mean and variance of what fprop wrote, against eager's own.

    Tiles of 16 rows: the interpreter adds the rows of a tile one after the other, a GPU as a tree.
    """
    pools = [parity.Pool(name, dtype) for name in ("mean", "variance")]
    problem = PLAIN._replace(dtype=dtype, w_dtype=dtype, N=3, R=1, S=1, pad=(0,) * 4, want_stats=True)
    w = torch.eye(8, dtype=dtype)[:, :, None, None]
    for i in range(parity.SEEDS):
        g = torch.Generator().manual_seed(seed + i)
        x = oracle.nhwc(3, 8, 5, 6, dtype=torch.float64, g=g).add(1000).to(dtype)
        y, stats_y, _ = fprop.fprop(problem, tile("fprop", problem), "ieee", x, w)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        for pool, got, peer, want in zip(pools, stats_y, (mean, var), oracle.moments(y.double())):
            pool.add_errors(parity.error(got, want), parity.error(peer, want))
    cells = [pool.judge() for pool in pools]
    return "ok" if all(cell.ok for cell in cells) else "\n".join(map(str, cells))


def repeats(seed: int) -> bool:
    """Every output of two runs, bit for bit: several tiles, several splits."""
    case = oracle.draw(
        seed, torch.float32, N=3, H=9, W=7, C=16, K=24, taps=(3, 3), stride=1, pad=(1, 1, 1, 1), prologue=True,
        affine=True, act="relu", drop_at="none", p=0.0, want_y=True, want_stats=True,
    )  # fmt: skip
    problem, t = case.problem, case.tensors
    vectors = [t[n] for n in ("stats", "gamma", "beta")]
    split = dataclasses.replace(tile("wgrad", problem), red=16, splits=5)

    def run() -> list[Tensor]:
        return [
            *fprop.fprop(problem, tile("fprop", problem), "ieee", *[t[n] for n in FPROP])[:2],
            *dgrad.dgrad(problem, tile("dgrad", problem), "ieee", t["dy"], t["x"], t["w"], *vectors),
            wgrad.wgrad(problem, split, "ieee", t["dy"], t["x"], *vectors),
        ]

    return all(torch.equal(a, b) for a, b in zip(run(), run()))


def masks(channels: int, p: float, seed: int) -> dict[str, Tensor]:
    """Which elements are kept, by kernel; 1x1 identity filters hand them through."""
    rng = torch.randint(2**40, 2**63 - 1, (2,), generator=torch.Generator().manual_seed(seed))
    shape = (2, channels, 3, 5)
    ones = torch.ones(shape).contiguous(memory_format=torch.channels_last)
    problem = PLAIN._replace(H=3, W=5, C=channels, K=channels, R=1, S=1, pad=(0,) * 4, p=p)
    w = torch.eye(channels)[:, :, None, None]
    prologue = problem._replace(drop_at="prologue")
    output = problem._replace(drop_at="output")
    second = problem._replace(drop_at="output_act", act_out="relu")

    def run(problem: ConvProblem) -> tuple[Tensor, Tensor, Tensor]:
        return fprop.fprop(problem, tile("fprop", problem), "ieee", ones, w, rng=rng)

    found = {
        "dropout": dropout.dropout(output, ones, rng),
        "prologue": run(prologue)[0],
        "output": run(output)[0],
        "output_act": run(second)[2],
        "dgrad": dgrad.dgrad(prologue, tile("dgrad", prologue), "ieee", ones, ones, w, rng=rng)[0],
    }
    rule = keep_mask(shape, rng, p) if p < 1 else torch.zeros(shape, dtype=torch.bool)
    return {"rule": rule, **{name: v != 0 for name, v in found.items()}}
