"""The benchmark suite's cases against eager and torch.compile, the contract's networks first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import wrn_fast
from benchmarks import timing
from benchmarks.battery import FAILED, OK, Result, result
from benchmarks.cases import DTYPES, Case, Network
from benchmarks.peers import FAST, PEERS
from benchmarks.runner import run_case

RIVALS = ("eager-channels-last", "compile", "compile-max-autotune")
NARROW = (Network(28, 2), Network(16, 4), Network(40, 2))
CASES = (
    *(Case(network, task, 512, "bf16") for network in NARROW for task in ("inference", "training_step")),
    *(Case(Network(28, 10), task, 128, "bf16") for task in ("inference", "training_step", "input_grad")),
    *(Case(Network(28, 10), "inference", n, "bf16") for n in (1, 512, 1024)),
    Case(Network(28, 10), "inference", 128, "fp32"),
)  # fmt: skip


def steps(dry: bool) -> dict[str, Callable[[float], Result]]:
    """By name."""
    if dry:
        tiny = Case(Network(10, 1), "inference", 2, "fp32")
        return {tiny.name: partial(measure, tiny, "cpu", ("eager-channels-last",))}
    found = {case.name: partial(measure, case, "cuda", RIVALS) for case in CASES}
    wide = [case for case in CASES if case.network.width == 10 and case.dtype == "bf16"]
    return found | {f"{case.name}, cuda backend": partial(hand_written, case) for case in wide}


def hand_written(case: Case, seconds: float) -> Result:
    """The case with the cuda backend first."""
    return measure(case, "cuda", RIVALS, seconds, "cuda,triton,aten")


def measure(
    case: Case, device: str, rivals: tuple[str, ...], seconds: float, backends: str = "triton,aten"
) -> Result:  # fmt: skip
    """One case, every variant within its bound or refused."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    peers = [peer for peer in PEERS if peer.name in (FAST, *rivals)]
    rate, budget = timing.matmul_rate(DTYPES[case.dtype], device), min(20.0, seconds / 4)
    with wrn_fast.backend("aten" if device == "cpu" else backends):
        row = run_case(case, peers, device, rate, budget_s=budget)
    ours = next((v for v in row["variants"] if v["name"] == FAST), None)
    if ours is None:
        why = next((m["reason"] for m in row["missing"] if m["name"] == FAST), "no result")
        return result(FAILED, f"{FAST}: {why}", row=row)
    times = ", ".join(f"{v['name']} {v['ms']:.3g} ms" for v in row["variants"])
    ratio = f"{ours['ratio']:.2f}x of {row['fastest_peer']}; " if ours["ratio"] else ""
    return result(OK, ratio + times, row=row)
