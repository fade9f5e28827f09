"""What runs in the interpreting process: kernels on whole numbers too wide for 16 bits, and on guarded memory."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from backends.guarded import canaries
from backends.harness import integer_case
from kernels import oracle
from kernels.interpreted import FPROP
from torch import Tensor

from wrn_fast import parity
from wrn_fast.kernels import dgrad, fprop, wgrad
from wrn_fast.kernels.configs import ARCHS, heuristic


def run(op: str, case: oracle.Case) -> Tensor:
    """y, g or dw by the written rule's tile, cut to 16 rows."""
    problem, t = case.problem, case.tensors
    tile = dataclasses.replace(heuristic(op, problem, ARCHS["interpreter"]), rows=16)
    if op == "fprop":
        return fprop.fprop(problem, tile, "ieee", *[t[name] for name in FPROP])[0]
    prologue = [t[name] for name in ("stats", "gamma", "beta")]
    if op == "dgrad":
        return dgrad.dgrad(problem, tile, "ieee", t["dy"], t["x"], t["w"], *prologue)[0]
    return wgrad.wgrad(problem, tile, "ieee", t["dy"], t["x"], *prologue)


def wanted(op: str, case: oracle.Case) -> Tensor:
    return oracle.fprop(case)[0] if op == "fprop" else oracle.gradients(case)[op == "wgrad"]


def rounded_once(op: str, dtype: torch.dtype, seed: int) -> str | None:
    """Why the result is not one rounding of the exact value."""
    torch.manual_seed(seed)
    case = integer_case(dtype, 2, 24, 20, 9, 7, 1, (1, 1, 1, 1), most=24)
    want = wanted(op, case)
    assert (want.to(dtype).double() != want).any()
    return parity.mismatch(run(op, case), want.to(dtype))


class Guarded(NamedTuple):
    """What guards saw of a call."""

    right: bool
    written_over: int  # canaries
    inputs_stay: bool


def guarded(op: str, seed: int) -> Guarded:
    """17 and 21 channels: the last tile of columns and the last vector of a row are cut."""
    torch.manual_seed(seed)
    case = integer_case(torch.float32, 3, 17, 21, 5, 7, 1, (1, 1, 1, 1))
    before = {name: None if v is None else v.clone() for name, v in case.tensors.items()}
    with canaries() as broken:
        got = run(op, case)
    stay = all(v is None or torch.equal(v, before[name]) for name, v in case.tensors.items())
    return Guarded(torch.equal(got.double(), wanted(op, case)), broken(), stay)
