"""`wrn-fast tune` on a CPU: measures the algorithms of each convolution of a network and keeps the fastest.

Only algorithms at least as exact as the policy's choice for the shape are candidates, so the error bounds stay.
Candidates take turns, and the median counts. Each finished class is written at once: a run that was cut short goes on
where it stopped, and a file that was damaged is started anew.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wrn_fast import cache, measured, native, tune
from wrn_fast.backends import cpu
from wrn_fast.errors import WrnFastError
from wrn_fast.problem import ConvProblem

ROUNDS = 9
_EXACT = {"f4": 0, "f2": 1, "f2s2": 1, "direct": 2}

Task = tuple[str, ConvProblem]


@contextmanager
def _pinned(name: str) -> Iterator[None]:
    before = os.environ.get("WRN_FAST_PIN_ALGO")
    os.environ["WRN_FAST_PIN_ALGO"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["WRN_FAST_PIN_ALGO"]
        else:
            os.environ["WRN_FAST_PIN_ALGO"] = before


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
    with _pinned("1"):
        least = _EXACT[str(cpu.algorithm(op, problem))]
    found: dict[str, str] = {}
    for pin in measured.PINS:
        with _pinned(pin):
            name = str(cpu.algorithm(op, problem))
        if _EXACT[name] >= least:
            found.setdefault(name, pin)
    return list(found.values())


def measure(op: str, problem: ConvProblem, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Median microseconds of each candidate, fastest first."""
    arguments = tune.tensors(op, problem, torch.device("cpu"))
    call = getattr(cpu, op)
    pins = candidates(op, problem)
    seconds: dict[str, list[float]] = {pin: [] for pin in pins}
    with torch.no_grad():
        for turn in range(ROUNDS + 2):
            for pin in pins:
                with _pinned(pin):
                    begin = clock()
                    call(problem, *arguments)
                    end = clock()
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
    rows = _rows(path, head)
    there = {measured.Key(*(row[name] for name in measured.Key._fields)) for row in rows}
    counts = dict.fromkeys(("measured", "kept", "left"), 0)
    begin = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
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


def _rows(path: Path, head: dict[str, str]) -> list[dict[str, Any]]:
    """The rows that are there already and count here."""
    document = cache.read(path)
    try:
        measured.validate(document)
    except WrnFastError:
        return []
    assert isinstance(document, dict)
    same = all(document["head"][name] == head[name] for name in measured.HEAD if name != "date")
    return document["rows"] if same else []
