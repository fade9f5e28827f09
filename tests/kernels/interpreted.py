"""What runs in the interpreting process: kernels with any legal tile, on poisoned memory, against the oracle.

python tests/kernels/interpreted.py 7 '{"taps": [3, 3], ...}'    one case again; a failing run prints the line
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from kernels import oracle
from kernels.oracle import Case
from torch import Tensor

from wrn_fast import masks as bits
from wrn_fast.kernels.configs import ARCHS, TileConfig, heuristic, legal
from wrn_fast.parity import FLOAT64, error
from wrn_fast.problem import ConvProblem

ARCH = ARCHS["interpreter"]
OPS = ("fprop", "dgrad", "wgrad", "elementwise")
PROLOGUE = ("stats", "gamma", "beta")
FPROP = ("x", "w", *PROLOGUE, "bias", "residual", "x_short", "w_short", *(f"{n}_short" for n in PROLOGUE), "rng",
         "out_scale", "out_shift")  # fmt: skip


def interpreting() -> tuple[str | None, bool]:
    """(the environment's word, triton's own) in this process."""
    from wrn_fast.kernels import tile

    return os.environ.get("TRITON_INTERPRET"), tile.INTERPRETED


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, so that a value nobody wrote is seen."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(make: Callable) -> Callable:
        def made(*args, **kwargs):
            v = make(*args, **kwargs)
            return v.fill_(float("nan")) if v.dtype.is_floating_point else v

        return made

    torch.empty, torch.empty_like, Tensor.new_empty = poison(empty), poison(empty_like), poison(new_empty)
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = empty, empty_like, new_empty


def tile(op: str, problem: ConvProblem, rng: random.Random) -> TileConfig:
    """The rule's tile, or any other legal one: a tuned row may name it."""
    if rng.random() < 0.3:
        return heuristic(op, problem, ARCH)
    while True:
        config = TileConfig(
            rows=rng.choice((16, 64, 128)), red=rng.choice((16, 32, 64)),
            cols=rng.choice(((16, 0), (32, 16), (64, 32), (128, 32), (16, 32))), warps=4, stages=1,
            apply=rng.random() < 0.3, splits=rng.choice((1, 2, 3, 7)) if op == "wgrad" else 1, box=rng.random() < 0.5,
        )  # fmt: skip
        if legal(config, op, problem, ARCH):
            return config


def outputs(case: Case, ops: tuple[str, ...]) -> dict[str, Tensor]:
    """What the kernels give, by name; an absent output is left out."""
    from wrn_fast.kernels import bn_bwd_apply, dgrad, dropout, fprop, masks, stats, wgrad

    problem, t = case.problem, case.tensors
    rng = random.Random(int(t["x"].double().sum().abs().item() * 1e6))
    prologue = [t[n] for n in PROLOGUE]
    drop = t["rng"] if problem.drop_at == "prologue" else None
    backward = problem if problem.drop_at == "prologue" else problem._replace(p=0.0, drop_at="none")
    got: dict[str, Tensor] = {}
    with poisoned():
        if "fprop" in ops:
            config = tile("fprop", problem, rng)
            y, stats_y, y_act = fprop.fprop(problem, config, "ieee", *[t[n] for n in FPROP])
            got |= {"y": y, "stats_y": stats_y, "y_act": y_act}
        if "dgrad" in ops:
            sums = backward._replace(want_stats=problem.prologue)
            g, sums_g = dgrad.dgrad(sums, tile("dgrad", sums, rng), "ieee", t["dy"], t["x"], t["w"], *prologue, drop)
            got |= {"g": g, "sums_g": sums_g}
            if problem.act in (*bits.ACTS, "identity") and rng.random() < 0.5:
                alone = backward._replace(prologue=factor(case) is not None)
                mask = None
                if problem.act != "identity":
                    mask = masks.act_mask(problem, t["x"], *prologue)
                    got["mask"] = mask.to(problem.dtype)
                got["dx_alone"] = dgrad.input_grad(
                    alone, tile("dgrad", alone, rng), "ieee", t["dy"], t["w"], mask, factor(case), drop
                )
        if "wgrad" in ops:
            got["dw"] = wgrad.wgrad(backward, tile("wgrad", problem, rng), "ieee", t["dy"], t["x"], *prologue, drop)
        if "elementwise" in ops:
            got["stats_x"] = stats.channel_stats(problem, t["x"])
            if problem.prologue:
                sums_x = oracle_sums(case).to(problem.stats_dtype)
                batch = problem._replace(batch_stats=True)
                got["dx"] = bn_bwd_apply.bn_bwd_apply(batch, t["x_grad"], t["x"], t["stats"], t["gamma"], sums_x)
                frozen = problem._replace(batch_stats=False)
                got["dx_frozen"] = bn_bwd_apply.bn_bwd_apply(frozen, t["x_grad"], t["x"], t["stats"], t["gamma"], None)
            if t["rng"] is not None:
                got["dropped"] = dropout.dropout(problem, t["x"], t["rng"])
    return {name: v for name, v in got.items() if v.numel()}


def factor(case: Case, dtype: torch.dtype | None = None) -> Tensor | None:
    """[C]: gamma / sqrt(var + eps), what BatchNorm in eval multiplies a gradient by; None without BatchNorm."""
    stats, gamma = case.tensors["stats"], case.tensors["gamma"]
    if stats is None:
        return None
    rstd = (stats[1].double() + case.problem.eps).rsqrt()
    return (rstd if gamma is None else rstd * gamma.double()).to(dtype or stats.dtype)


def oracle_sums(case: Case) -> Tensor:
    """[2, C]: sums of x_grad and of x_grad * xhat, exact."""
    g, xhat = case.tensors["x_grad"].double(), oracle.xhat(case)
    return torch.stack([g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))])


def wanted(case: Case, got: dict[str, Tensor]) -> dict[str, Tensor]:
    """The oracle's values under the same names. Statistics and sums are those of what the kernel stored."""
    problem, t = case.problem, case.tensors
    want: dict[str, Tensor] = {}
    y, _, y_act = oracle.fprop(case)
    if "y" in got:
        want["y"] = y
    if "stats_y" in got:
        want["stats_y"] = oracle.moments(got["y"].double())
    if "y_act" in got:
        want["y_act"] = y_act
    if "g" in got or "dw" in got:
        g, dw = oracle.gradients(case)
        want |= {"g": g, "dw": dw}
    if "dx_alone" in got:
        scale = factor(case, torch.float64)
        want["dx_alone"] = g if scale is None else g * scale[:, None, None]
    if "mask" in got:
        v = oracle.normal(t["x"].double(), t["stats"], t["gamma"], t["beta"], problem.eps)
        want["mask"] = bits.pack(~(v <= 0) if problem.act == "relu" else v > 0).double()
    if "sums_g" in got:
        stored = got["g"].double()
        want["sums_g"] = torch.stack([stored.sum((0, 2, 3)), (stored * oracle.xhat(case)).sum((0, 2, 3))])
    if "stats_x" in got:
        want["stats_x"] = oracle.moments(t["x"].double())
    if "dx" in got:
        rstd = (t["stats"][1].double() + problem.eps).rsqrt()
        scale = rstd if t["gamma"] is None else rstd * t["gamma"].double()
        g, m = t["x_grad"].double(), problem.N * problem.H * problem.W
        mean_g, mean_gx = (oracle_sums(case) / m)[:, :, None, None]
        want["dx_frozen"] = g * scale[:, None, None]
        want["dx"] = (g - mean_g - oracle.xhat(case) * mean_gx) * scale[:, None, None]
    if "dropped" in got:
        keep = oracle.keep_mask(t["x"].shape, t["rng"], problem.p) if problem.p < 1 else torch.zeros(())
        want["dropped"] = t["x"].double() * keep.double() / (1 - problem.p if problem.p < 1 else 1)
    return want


def draw(seed: int, dtype: torch.dtype, fixed: dict) -> Case:
    case = oracle.draw(seed, dtype, **fixed)
    g = torch.Generator().manual_seed(seed + 1)
    case.tensors["x_grad"] = oracle.nhwc(*case.tensors["x"].shape, dtype=dtype, g=g)
    return case


def errors(seeds: list[int], dtype: torch.dtype, fixed: list[dict], ops: tuple[str, ...]) -> list[dict[str, float]]:
    """Relative L2 error of every output of every case."""
    found = []
    for seed, values in zip(seeds, fixed, strict=True):
        case = draw(seed, dtype, values)
        got = outputs(case, ops)
        want = wanted(case, got)
        found.append({name: error(v, want[name]) for name, v in got.items()})
    return found


def errors_beside_eager(seeds: list[int], dtype: torch.dtype, op: str) -> dict[str, list[tuple[float, float]]]:
    """(error, eager's error) of every output that all cases have, one a case.

    Gradients by smooth activations: relu's derivative is a lottery where bn(x) is within rounding of 0.
    """
    from backends import eager

    found: dict[str, list[tuple[float, float]]] = {}
    smooth = ("identity", "silu")
    for i, seed in enumerate(seeds):
        fixed = {"want_y": True, "want_stats": True, "act_out": "relu", "drop_at": "none", "p": 0.0}
        case = draw(seed, dtype, fixed if op == "fprop" else {**fixed, "act": smooth[i % 2]})
        got = outputs(case, (op,))
        if op == "fprop":
            want = dict(zip(("y", "y_act"), oracle.fprop(case)[::2]))
            peer = dict(zip(("y", "y_act"), eager.fprop(case)[::2]))
        else:
            want, peer = (dict(zip(("g", "dw"), side.gradients(case))) for side in (oracle, eager))
        for name in want.keys() & got.keys():
            found.setdefault(name, []).append((error(got[name], want[name]), error(peer[name], want[name])))
    return found


def wrong(seed: int, values: dict) -> str | None:
    """Every kernel on one case in float64, where a right one is at 1e-15: None, or what is off and the line for it."""
    (found,) = errors([seed], torch.float64, [values], OPS)
    bad = {name: e for name, e in found.items() if not e <= FLOAT64}
    return f"{bad}\npython tests/kernels/interpreted.py {seed} '{json.dumps(values)}'" if bad else None


if __name__ == "__main__":
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(sys.argv[2]).items()}
    said = wrong(int(sys.argv[1]), fields)
    print(said or "nothing is wrong")
    sys.exit(said is not None)
