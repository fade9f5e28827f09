"""The protocol: variants interleaved, medians with the 20th and 80th percentile, ratios pair by pair.

In each round every variant is run once, in an order drawn anew, so that drift (clocks, neighbours) meets all alike and
nobody always follows the same one. A ratio is the median of the ratios within rounds. A sample lasts at least
`MIN_SAMPLE_S`: a short run is repeated and its time divided.

CUDA: a sample is between two events behind a backlog of device work, so that it is not the host that is timed; a buffer
of twice the L2 cache is overwritten before each run, so that nothing is found there.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.benchmark import Timer

REPS = 7
MAX_REPS = 40
WARMUP = 2
MIN_SAMPLE_S = 0.01
MAX_INNER = 200
# Shorter runs come after an untimed one of their own: caches and threads are then as it left them, not a rival.
SHORT_S = 0.25


class Runnable(Protocol):
    """What is timed: `run` gets what `prepare` gave; only `run` counts."""

    def prepare(self) -> Any: ...

    def run(self, state: Any) -> Any: ...


class WallClock:
    """Seconds of `run` on the CPU."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def sample(self, runnable: Runnable, inner: int) -> float:
        """Mean seconds of `inner` runs."""
        total = 0.0
        for _ in range(inner):
            state = runnable.prepare()
            begin = self.now()
            result = runnable.run(state)
            total += self.now() - begin
            del result
        return total / inner


class CudaClock:
    """Seconds of `run` on the current CUDA device."""

    # About 1 ms at 2 GHz: longer than the host needs to launch the first kernels of a run.
    BACKLOG_CYCLES = 2_000_000

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def sample(self, runnable: Runnable, inner: int) -> float:
        """Mean seconds of `inner` runs, each with a cold L2."""
        pairs = []
        for _ in range(inner):
            state = runnable.prepare()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            torch.cuda._sleep(self.BACKLOG_CYCLES)
            begin.record()
            result = runnable.run(state)
            end.record()
            pairs.append((begin, end))
            del result
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / inner


def clock_for(device: str) -> WallClock | CudaClock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else WallClock()


def percentile(values: list[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Times:
    """Seconds of one variant, one value a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        return percentile(list(self.seconds), 0.2)

    @property
    def p80(self) -> float:
        return percentile(list(self.seconds), 0.8)

    def speedup_over(self, other: Times) -> float:
        """How many times as fast as `other`: the median of the ratios within rounds."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds))


def interleave(
    runnables: Mapping[str, Runnable],
    clock: WallClock | CudaClock,
    reps: int = REPS,
    budget_s: float = 0.0,
    tick: Callable[[str], None] = lambda name: None,
    seed: int = 0,
) -> dict[str, Times]:
    """Times of all variants, round by round.

    Args:
        runnables: by name.
        clock: its `sample(runnable, inner)` gives seconds.
        reps: rounds at least; more, up to `MAX_REPS`, as `budget_s` allows.
        tick: called with a variant's name before each of its samples.
        seed: of the order in the rounds.
    """
    inner, short, expected = {}, set(), 0.0
    for name, runnable in runnables.items():
        tick(name)
        for _ in range(WARMUP):
            one = clock.sample(runnable, 1)
        inner[name] = max(1, min(MAX_INNER, math.ceil(MIN_SAMPLE_S / max(one, 1e-9))))
        expected += one * inner[name]
        if one < SHORT_S:
            short.add(name)
    rounds = max(reps, min(MAX_REPS, int(budget_s / max(expected, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in runnables}
    order, draw = list(runnables), random.Random(seed)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            tick(name)
            if name in short:
                clock.sample(runnables[name], 1)
            samples[name].append(clock.sample(runnables[name], inner[name]))
    return {name: Times(tuple(values)) for name, values in samples.items()}


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a square matrix product in the dtype: the yardstick of the machine as it is now."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.5).median


class Neighbours:
    """CPU time that other processes took while a block ran: `cores` of them on average, None where unknown."""

    cores: float | None = None

    def __enter__(self) -> Neighbours:
        self.before = self._read()
        return self

    def __exit__(self, *_: Any) -> None:
        after = self._read()
        if self.before is not None and after is not None:
            wall, busy, own = (b - a for a, b in zip(self.before, after))
            self.cores = max(0.0, busy - own) / max(wall, 1e-9)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """(wall seconds, busy core-seconds of the machine, core-seconds of this process)."""
        try:
            with open("/proc/stat", encoding="ascii") as file:
                fields = [int(v) for v in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system
