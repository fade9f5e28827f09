"""What runs in the interpreting process: the kernels' self-check, alone and with a kernel that is wrong."""

from __future__ import annotations

import dataclasses
import os
from contextlib import contextmanager
from unittest import mock

import torch

from wrn_fast.kernels import fprop, selfcheck
from wrn_fast.kernels.configs import ARCHS, heuristic, legal
from wrn_fast.problem import ConvProblem

CPU = torch.device("cpu")
PLAIN = ConvProblem("cpu", torch.float32, torch.float32, 2, 8, 8, 16, 16, 3, 3, 1, (1, 1, 1, 1))


def tile(op: str, problem: ConvProblem):
    """Two accumulators and little else: 32 + 16 columns, 64 rows."""
    config = heuristic(op, problem, ARCHS["interpreter"])
    return dataclasses.replace(config, rows=64, red=16, cols=(32, 16))


def check(op: str, dtype: torch.dtype, source: bool, stride: int, box: bool = False) -> str | None:
    parts = {"prologue": True, "affine": True, "act": "relu"} if source else {}
    problem = PLAIN._replace(dtype=dtype, w_dtype=dtype, stride=stride, **parts)
    config = dataclasses.replace(tile(op, problem), red=32, box=True) if box else tile(op, problem)
    assert legal(config, op, problem, ARCHS["interpreter"])
    return selfcheck.check(op, problem, config, "ieee", CPU)


@contextmanager
def wrong_columns():
    """The second accumulator of fprop off by one: what a miscompiled chain of dots looks like."""
    right = fprop.fprop

    def wrong(problem, config, *args, **vectors):
        y, *rest = right(problem, config, *args, **vectors)
        y[:, config.cols[0] :] += 1
        return (y, *rest)

    with mock.patch.object(fprop, "fprop", wrong):
        yield


def wrong() -> str | None:
    with wrong_columns():
        return selfcheck.check("fprop", PLAIN, tile("fprop", PLAIN), "ieee", CPU)


def history(folder: str) -> list[tuple[int, str | None]]:
    """(checks that ran, answer) of calls in turn: first, again, in a new process, after damage, with a wrong kernel."""
    found: list[tuple[int, str | None]] = []
    runs: list[int] = []
    check_once = selfcheck.check

    def counted(*args):
        runs.append(1)
        return check_once(*args)

    def ask(fresh: bool) -> None:
        if fresh:
            selfcheck._seen.clear()
        runs.clear()
        answer = selfcheck.reason("fprop", PLAIN, tile("fprop", PLAIN), "ieee", CPU)
        found.append((len(runs), answer))

    with mock.patch.dict(os.environ, {"WRN_FAST_CACHE_DIR": folder}), mock.patch.object(selfcheck, "check", counted):
        ask(True)
        ask(False)
        ask(True)
        (path,) = (os.path.join(folder, "selfcheck", name) for name in os.listdir(os.path.join(folder, "selfcheck")))
        with open(path, "r+") as file:
            file.truncate(20)
        ask(True)
        os.remove(path)
        with wrong_columns():
            ask(True)
            ask(True)
        found.append((len(os.listdir(os.path.dirname(path))), None))
    selfcheck._seen.clear()
    return found
