"""`wrn-fast tune`: measures tiles on this GPU and keeps the fastest of each class of problems in the user's own table.

From the rule's tile one knob after another is varied and the best kept, so a class costs some twenty compiles. A tile
is measured only after it gave exact integers. Where the kernels of `_cuda` are faster, a row of theirs joins the table.
Each finished class is written at once: a run that was cut short goes on where it stopped, and a table that was damaged
is started anew.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from wrn_fast import __version__, activated, cache, dispatch, tuned
from wrn_fast.backends import cuda, triton
from wrn_fast.errors import WrnFastError
from wrn_fast.kernels import configs
from wrn_fast.kernels.configs import TileConfig
from wrn_fast.problem import ConvProblem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDS = 20

# Median seconds of a call.
Clock = Callable[[Callable[[], Any]], float]
Task = tuple[str, ConvProblem]


def unsupported(device: str = "cuda") -> str | None:
    """Why there is nothing to tune on `device`, or None."""
    return triton.unsupported("channel_stats", ConvProblem(device, torch.float32, torch.float32, 1, 8, 8, 16, 16, 1, 1))


def tasks(depth: int = 28, width: int = 10, batch: int = 128, dtype: str = "bf16", device: str = "cuda") -> list[Task]:
    """The convolutions of a training step and of inference of WRN-depth-width on 32x32 images, one of each class.

    Raises:
        WrnFastError: no such network, batch or dtype.
    """
    if depth < 10 or (depth - 4) % 6:
        raise WrnFastError(f"`depth`: expected 6n + 4 of at least 10, got {depth}")
    for name, value in (("width", width), ("batch", batch)):
        if value < 1:
            raise WrnFastError(f"`{name}`: expected at least 1, got {value}")
    if dtype not in DTYPES:
        raise WrnFastError(f"`dtype`: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    kind = DTYPES[dtype]
    source: dict[str, Any] = {"prologue": True, "affine": True, "batch_stats": True, "act": "relu", "eps": 1e-5}

    def layer(c: int, k: int, image: int, stride: int = 1, taps: int = 3, **parts: Any) -> ConvProblem:
        pad = (taps // 2,) * 4
        return ConvProblem(device, kind, kind, batch, image, image, c, k, taps, taps, stride, pad, **parts)

    found: list[Task] = [("fprop", layer(3, 16, 32, want_stats=True)), ("wgrad", layer(3, 16, 32))]
    before, image = 16, 32
    for group in range(3):
        planes, stride = 16 * width * 2**group, 1 if group == 0 else 2
        out = image // stride
        first = [layer(before, planes, image, stride, **source, want_stats=True)]
        if before != planes:
            first.append(layer(before, planes, image, stride, 1, **source, want_stats=True))
        rest = layer(planes, planes, out, **source, want_stats=True)
        found += [("fprop", first[0]), ("fprop", rest._replace(residual=True))]
        # What they cost without the prologue, and what a second output costs: `activated` compares.
        found += [("fprop", layer(before, planes, image, stride, act_out="relu", want_y=False))]
        found += [("fprop", layer(planes, planes, out, act_out="relu", want_y=False))]
        found += [("fprop", layer(planes, planes, out, residual=True, act_out="relu"))]
        found += [(op, p) for p in (*first, rest) for op in ("dgrad", "wgrad")]
        before, image = planes, out
    return list({tuned.key(triton.NAME, op, p): (op, p) for op, p in found}.values())


def event_clock(call: Callable[[], Any]) -> float:
    """Device seconds between two events, with a cold L2: the median of ROUNDS calls behind a backlog of device work."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    # Twice the cache would be enough to empty it; the rest is 100 us in which the host queues the call.
    flush = torch.empty(8 * size, dtype=torch.uint8, device="cuda")
    pairs = []
    call()
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def wall_clock(call: Callable[[], Any]) -> float:
    """Wall seconds of one call, for the interpreter."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def tensors(op: str, problem: ConvProblem, device: torch.device) -> list[Tensor | None]:
    """Random arguments of `op`, in order."""
    p = problem

    def nhwc(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(p.dtype).contiguous(memory_format=torch.channels_last)

    def vector(wanted: bool, *shape: int) -> Tensor | None:
        return torch.rand(shape, device=device) + 0.5 if wanted else None

    x, w, dy = nhwc(p.N, p.C, p.H, p.W), nhwc(p.K, p.C, p.R, p.S), nhwc(p.N, p.K, p.P, p.Q)
    prologue = [vector(p.prologue, 2, p.C), vector(p.affine, p.C), vector(p.affine, p.C)]
    if op == "fprop":
        return [x, w, *prologue, None, torch.randn_like(dy) if p.residual else None, *[None] * 8]
    return [dy, x, w, *prologue, None] if op == "dgrad" else [dy, x, *prologue, None]


def search(
    op: str, problem: ConvProblem, arch: configs.Arch, seconds: Callable[[TileConfig], float | None]
) -> list[tuple[float, TileConfig]]:
    """What was measured, fastest first: one knob after another from the rule's tile. None of `seconds` is a refusal."""
    measured: dict[TileConfig, float | None] = {}

    def look(config: TileConfig) -> None:
        if config not in measured:
            measured[config] = seconds(config)

    def ranking() -> list[tuple[float, TileConfig]]:
        return sorted(((s, c) for c, s in measured.items() if s is not None), key=lambda pair: pair[0])

    look(configs.heuristic(op, problem, arch))
    for knob in configs.KNOBS:
        ranked = ranking()
        if not ranked:
            break
        for config in configs.variations(knob, ranked[0][1], op, problem, arch):
            look(config)
    return ranking()


def progress_bar() -> Progress:
    """What is measured, how many are done, and for how long; gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, transient=True)


class Table:
    """The user's file of one GPU, with the rows that are there already."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.rows: list[dict[str, Any]] = []
        found = cache.read(path)
        try:
            tuned.validate(found)
        except WrnFastError:
            return
        assert isinstance(found, dict)
        versions = ("gpu", "arch", "driver", "cuda", "torch", "triton", "wrn_fast")
        if all(found["head"][name] == head[name] for name in versions):
            self.rows = found["rows"]

    def __contains__(self, key: tuned.Key) -> bool:
        return any(tuned.Key(*(row[name] for name in tuned.Key._fields)) == key for row in self.rows)

    def add(self, key: tuned.Key, ranking: Sequence[tuple[float, TileConfig]]) -> dict[str, Any]:
        """Writes the winner of a class.

        Raises:
            WrnFastError: the file cannot be written.
        """
        best, second = ranking[0], ranking[min(1, len(ranking) - 1)]
        tile = {name: getattr(best[1], name) for name in tuned.TILE} | {"cols": list(best[1].cols)}
        row = {**key._asdict(), "tile": tile, "us": best[0] * 1e6, "runner_up_us": second[0] * 1e6}
        self.rows.append(row)
        if not cache.write(self.path, {"format": tuned.FORMAT, "head": self.head, "rows": self.rows}):
            raise WrnFastError(f"`WRN_FAST_TUNED_DIR`: expected a folder that can be written, got {self.path.parent}")
        return row


def head(index: int | None) -> dict[str, Any]:
    """What is measured on what."""
    import importlib.metadata

    here = triton.arch(index)
    return {
        "gpu": triton.gpu(index), "arch": here.name, "sms": here.sms, "driver": triton.driver(index),
        "cuda": str(torch.version.cuda or torch.version.hip or "none"), "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"), "wrn_fast": __version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "command": "wrn-fast tune",
    }  # fmt: skip


def run(
    wanted: Sequence[Task], *, clock: Clock | None = None, folder: Path | None = None, limit_s: float = float("inf")
) -> dict[str, Any]:
    """Measure every class of `wanted` that the table does not have, with a progress bar.

    Args:
        wanted: operators and problems, as `tasks` gives them; all on one device.
        clock: median seconds of a call; None: events on a GPU, wall time in the interpreter.
        folder: of the table; None: `WRN_FAST_TUNED_DIR` or the cache.
        limit_s: no new class is begun after so many seconds.

    Returns:
        `head`, `path`, `rows` (all of the table), and how many classes were `measured`, there already (`kept`), without
        a legal tile (`failed`) and `left` for another run.

    Raises:
        WrnFastError: nothing can run here, or nothing can be written.
    """
    device = wanted[0][1].device if wanted else "cuda"
    reason = unsupported(device)
    if reason:
        raise WrnFastError(f"`tune`: expected a GPU that the triton backend serves, got {device}: {reason}")
    index = torch.cuda.current_device() if device == "cuda" else None
    where = folder or tuned.user_folder(create=True)
    if where is None:
        raise WrnFastError("`WRN_FAST_CACHE_DIR`: expected a folder of this user's own, that nobody else may write")
    where.mkdir(parents=True, exist_ok=True)
    about = head(index)
    name = "".join(c if c.isalnum() else "-" for c in f"{about['arch']}-{about['gpu']}".lower())
    table = Table(where / f"{name}.json", about)
    clock = clock or (wall_clock if index is None else event_clock)
    counts = dict.fromkeys(("measured", "kept", "failed", "left"), 0)
    begin = time.monotonic()
    with progress_bar() as progress:
        bar = progress.add_task("tiles", total=len(wanted))
        for op, problem in wanted:
            key = tuned.key(triton.NAME, op, problem)
            progress.update(bar, description=f"{op} {problem.C} to {problem.K} at {problem.H}x{problem.W}")
            if key in table:
                counts["kept"] += 1
            elif time.monotonic() - begin > limit_s:
                counts["left"] += 1
            else:
                ranking = _measure(op, problem, index, clock)
                counts["measured" if ranking else "failed"] += 1
                if ranking:
                    table.add(key, ranking)
                rival = _measure_cuda(op, problem, index, clock)
                if rival and (not ranking or rival[0][0] < ranking[0][0]):
                    table.add(tuned.key(cuda.NAME, op, problem), rival)
            progress.advance(bar)
    triton.forget()
    cuda.forget()
    activated.forget()
    dispatch.forget()
    return {"head": about, "path": str(table.path), "rows": table.rows, **counts}


def _measure(op: str, problem: ConvProblem, index: int | None, clock: Clock) -> list[tuple[float, TileConfig]]:
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    arguments = tensors(op, problem, device)

    def seconds(config: TileConfig) -> float | None:
        if triton.refused_tile(op, problem, config, device):
            return None
        return clock(lambda: triton.launch(op, problem, config, *arguments))

    return search(op, problem, triton.arch(index), seconds)


def _measure_cuda(op: str, problem: ConvProblem, index: int | None, clock: Clock) -> list[tuple[float, TileConfig]]:
    """The kernels of `_cuda` on the same arguments, fastest first; none where they cannot serve."""
    if index is None or cuda.refused(op, problem):
        return []
    device = torch.device("cuda", index)
    arguments = tensors(op, problem, device)
    columns = problem.C if op == "dgrad" else problem.K
    measured = []
    for tile in cuda.tiles(op, problem):
        if cuda.refused_tile(op, problem, tile, device) is None:
            seconds = clock(lambda tile=tile: cuda.launch(op, problem, tile, *arguments))  # type: ignore[misc]
            row = TileConfig(cuda.rows(tile), 64, (columns, 0), 12, 2, apply=tile.apply)
            measured.append((seconds, row))
    return sorted(measured, key=lambda pair: pair[0])
