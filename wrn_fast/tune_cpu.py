"""`wrn-fast tune` on a CPU: measures the algorithms of each convolution of a network and keeps the fastest.

Only algorithms at least as exact as the policy's choice for the shape are candidates, so the error bounds stay.
Candidates take turns, and the median counts. Each finished class is written at once: a run that was cut short goes on
where it stopped, and a file that was damaged is started anew.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from wrn_fast import cache, measured, native, tune
from wrn_fast.backends import cpu
from wrn_fast.errors import WrnFastError
from wrn_fast.precision import pin_algorithm
from wrn_fast.problem import ConvProblem

ROUNDS = 9
_EXACT = {"f4": 0, "f3": 1, "f2": 2, "f2s2": 2, "direct": 3}

Task = tuple[str, ConvProblem]


def unsupported() -> str | None:
    """Why there is nothing to measure, or None."""
    return native.load()[1]


def tasks(depth: int, width: int, batch: int, dtype: str) -> list[Task]:
    """The convolutions of WRN-depth-width that have a choice.

    Raises:
        WrnFastError: no such network, batch or dtype.
    """
    if dtype not in ("fp32", "bf16"):
        raise WrnFastError(f"`dtype`: expected fp32 or bf16 on a CPU, got {dtype!r}")
    found = tune.tasks(depth, width, batch, dtype, "cpu")
    classes = {measured.key(op, p): (op, p) for op, p in found if op in measured.OPS}
    return [task for task in classes.values() if len(candidates(*task)) > 1]


def candidates(op: str, problem: ConvProblem) -> list[str]:
    """The pins that lead to different algorithms, none less exact than the policy allows for the shape."""
    with pin_algorithm("1"):
        least = _EXACT[str(cpu.algorithm(op, problem))]
    found: dict[str, str] = {}
    for pin in measured.PINS:
        with pin_algorithm(pin):
            name = str(cpu.algorithm(op, problem))
        if _EXACT[name] >= least:
            found.setdefault(name, pin)
    return list(found.values())


def measure(op: str, problem: ConvProblem) -> dict[str, float]:
    """Median microseconds of each candidate, fastest first."""
    arguments = tune.tensors(op, problem, torch.device("cpu"))
    call = getattr(cpu, op)
    pins = candidates(op, problem)
    seconds: dict[str, list[float]] = {pin: [] for pin in pins}
    with torch.no_grad():
        for turn in range(ROUNDS + 2):
            for pin in pins:
                with pin_algorithm(pin):
                    begin = time.perf_counter()
                    call(problem, *arguments)
                    end = time.perf_counter()
                # The first call packs the filter, the second keeps the pack.
                if turn >= 2:
                    seconds[pin].append(end - begin)
    medians = {pin: statistics.median(times) * 1e6 for pin, times in seconds.items()}
    return dict(sorted(medians.items(), key=lambda pair: pair[1]))


def run(wanted: Sequence[Task], *, limit_s: float = float("inf")) -> dict[str, Any]:
    """Measure every class of `wanted` that the file does not have, with a progress bar.

    Args:
        wanted: operators and problems, as `tasks` gives them.
        limit_s: no new class is begun after so many seconds.

    Returns:
        `head`, `path`, `rows` (all of the file), and how many classes were `measured`, there already (`kept`) and
        `left` for another run.

    Raises:
        WrnFastError: nothing can be measured here, or nothing can be written.
    """
    reason = unsupported()
    if reason:
        raise WrnFastError(f"`tune`: expected a CPU that the cpu backend serves: {reason}")
    isa, threads = str(native.isa()), torch.get_num_threads()
    path = measured.path(isa, threads, create=True)
    if path is None:
        raise WrnFastError("`WRN_FAST_CACHE_DIR`: expected a folder of this user's own, that nobody else may write")
    head = measured.head(isa, threads)
    rows = measured.rows(isa, threads)
    there = set(map(measured.key_of, rows))
    counts = dict.fromkeys(("measured", "kept", "left"), 0)
    begin = time.monotonic()
    with tune.progress_bar() as progress:
        bar = progress.add_task("algorithms", total=len(wanted))
        for op, problem in wanted:
            key = measured.key(op, problem)
            progress.update(bar, description=f"{op} {problem.C} to {problem.K} at {problem.H}x{problem.W}")
            if key in there:
                counts["kept"] += 1
            elif time.monotonic() - begin > limit_s:
                counts["left"] += 1
            else:
                us = measure(op, problem)
                rows.append({**key._asdict(), "pin": next(iter(us)), "us": us})
                if not cache.write(path, {"format": measured.FORMAT, "head": head, "rows": rows}):
                    raise WrnFastError(
                        f"`WRN_FAST_CACHE_DIR`: expected a folder that can be written, got {path.parent}"
                    )
                counts["measured"] += 1
            progress.advance(bar)
    measured.forget()
    return {"head": head, "path": str(path), "rows": rows, **counts}
