"""Everything that needs a GPU, in stages of under nine minutes, the most telling first.

    python -m benchmarks.gpu_battery --stage all           every stage in turn; --stage chip one of them
    python -m benchmarks.gpu_battery --stage all --within 540       what fits in nine minutes; again: what comes next
    python -m benchmarks.gpu_battery --list                stages and steps, with the seconds that they may take
    python -m benchmarks.gpu_battery --stage all --dry-run small, on the CPU, to prove the script itself

    chip           what the Hopper kernels believe of the chip: E0 to E5, which decide between designs
    parity-cuda    the hand-written kernels: integers, split reductions, every primitive against float64
    layers         TFLOP/s of each layer and direction beside a matrix product, cuDNN and Triton; passes in GB/s
    targets        images a second and latency from end to end against torch.compile max-autotune
    models-cuda    whole models on the hand-written kernels: outputs, gradients, graphs, Monte-Carlo dropout
    sanitize-cuda  the hand-written kernels and a graph under the GPU vendor's sanitizers
    tiles-triton, parity-triton, models-triton, sanitize-triton  the same of the Triton kernels
    tune-wide, tune-narrow  the fastest tiles of this GPU
    bench-wide, bench-narrow  more networks and batches against the same rivals

Each step's result is written as soon as it is there, so a run that was cut short goes on where it stopped; what failed
or could not run is run again. A step that would not end within the limit waits for the next run. A step that hangs or
leaves the GPU's context broken has failed for good; a new process goes on with the others. The report is one JSON file
with GPU, driver and versions, prediction beside measurement, and each goal with whether it was met; a table; and a log
in Markdown beside the JSON file, which keeps what was measured with earlier code.
Exit status: 0 if every step that ran is well, 1 if one failed, 3 if the time limit left steps for another run. A goal
that was missed is no failure.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.battery import FAILED, OK, Result, Step, Steps, result

STAGES = (
    "chip", "parity-cuda", "layers", "targets", "models-cuda", "sanitize-cuda", "tiles-triton", "parity-triton",
    "models-triton", "sanitize-triton", "tune-wide", "tune-narrow", "bench-wide", "bench-narrow",
)  # fmt: skip
STAGE_S = 9 * 60
PATIENCE_S = 60.0  # with a step that is expected to take little
COMPILING_S = 480.0  # with one that compiles
FORMAT = 2
# Of the head: a report of other code, GPU or versions is not gone on with.
SAME = ("gpu", "versions", "commit", "dry run")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_battery", description=__doc__.split("\n\n")[0])
    parser.add_argument("--stage", choices=(*STAGES, "all"))
    parser.add_argument("--list", action="store_true", help="stages and steps with expected seconds; runs nothing")
    parser.add_argument("--dry-run", action="store_true", help="small problems on the CPU, Triton's interpreter")
    parser.add_argument("--again", action="store_true", help="run the steps that have a result too")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the report; default: benchmarks/results/battery-*.json"
    )
    parser.add_argument(
        "--limit", type=float, default=STAGE_S, metavar="S", help="seconds a stage; default: %(default)s"
    )
    parser.add_argument(
        "--within", type=float, default=math.inf, metavar="S", help="seconds for all stages together; default: no limit"
    )
    args = parser.parse_args(arguments)
    if args.stage is None and not args.list:
        parser.error("one of --stage and --list is needed")
    return args


def steps_of(stage: str, dry: bool) -> Steps:
    """The steps of a stage by name."""
    from benchmarks.battery import bench, hopper, layers, models, parity, sanitize, targets, tuning

    makers: dict[str, Callable[[bool], Steps]] = {
        "chip": hopper.steps,
        "parity-cuda": parity.cuda_steps,
        "layers": layers.steps,
        "targets": targets.steps,
        "models-cuda": models.cuda_steps,
        "sanitize-cuda": sanitize.cuda_steps,
        "tiles-triton": parity.tile_steps,
        "parity-triton": parity.triton_steps,
        "models-triton": models.triton_steps,
        "sanitize-triton": sanitize.triton_steps,
        "tune-wide": tuning.wide_steps,
        "tune-narrow": tuning.narrow_steps,
        "bench-wide": bench.wide_steps,
        "bench-narrow": bench.narrow_steps,
    }
    return makers[stage](dry)


def listed() -> Table:
    """Every step of every stage, with the seconds that it may take."""
    shown = Table("stage", "step", "s")
    for stage in STAGES:
        steps = steps_of(stage, False)
        shown.add_row(stage, f"{len(steps)} steps", f"{sum(step.seconds for step in steps.values()):.0f}")
        for name, step in steps.items():
            shown.add_row("", name, f"{step.seconds:.0f}")
    return shown


def head(dry: bool) -> dict[str, str]:
    """What ran where, as text."""
    from benchmarks import machine

    found = machine.head("cpu" if dry else "cuda", 1, [])
    return {"gpu": found.get("gpu", "none"), "cpu": found["cpu"], "versions": found["versions"],
            "commit": found["commit"], "date": found["date"], "dry run": str(dry)}  # fmt: skip


class Report:
    """The JSON file: read if it is of the same machine and code, written after each step. Beside it a log in Markdown,
    which only grows: what was predicted and measured with earlier code stays there.
    """

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        from wrn_fast import cache

        self.path = path
        self.begun = False  # has a step that counts begun in this run?
        self.data: dict[str, Any] = {"format": FORMAT, "head": about, "stages": {}}
        found = cache.read(path)
        if isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("stages"), dict):
            old = found.get("head")
            if isinstance(old, dict) and all(old.get(name) == about[name] for name in SAME):
                self.data["stages"] = found["stages"]

    def result(self, stage: str, step: str) -> dict[str, Any] | None:
        """What a step gave in this run or an earlier one."""
        return self.data["stages"].get(stage, {}).get(step)

    def add(self, stage: str, step: str, result: dict[str, Any]) -> None:
        """Keeps a result; an unwritable folder ends the run, because results would be lost."""
        from wrn_fast import cache

        self.data["stages"].setdefault(stage, {})[step] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not cache.write(self.path, self.data):
            sys.exit(f"gpu_battery: {self.path} cannot be written")
        log = self.path.with_suffix(".md")
        about = self.data["head"]
        row = (about["date"], about["commit"], stage, step, result["status"], result["text"].replace("|", "/"))
        new = not log.exists()
        with log.open("a", encoding="utf-8") as file:
            if new:
                columns = ("date", "commit", "stage", "step", "status", "result")
                file.write(f"{about['gpu']}\n\n{_line(columns)}{_line(['---'] * len(columns))}")
            file.write(_line(row))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def attempt(step: Step, seconds: float) -> Result:
    """The step's result; an exception is a failure of the step, not of the battery."""
    try:
        return step.run(seconds)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return result(FAILED, f"{type(error).__name__}: {text[0]}")


def _wanted(found: Result | None, step: Step) -> bool:
    """Is the step to run? What ended its process would end the next one."""
    if found is None or step.always:
        return True
    return found["status"] != OK and not found.get("fatal")


def restart(report: Report, args: argparse.Namespace, last: float) -> None:
    """A new process in the place of this one goes on."""
    left = max(0.0, last - time.monotonic())
    words = ["--stage", args.stage, "--json", str(report.path), "--limit", str(args.limit), "--within", str(left)]
    sys.stdout.flush()
    dry = ["--dry-run"] if args.dry_run else []
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_battery", *words, *dry])


def give_up(report: Report, stage: str, name: str, patience: float, args: argparse.Namespace, last: float) -> None:
    """In a thread of its own, where a step hangs: a kernel on a GPU cannot be stopped but with its process."""
    found = result(FAILED, f"a hang: not finished after {patience:.0f} s, tried again with --again only", fatal=True)
    report.add(stage, name, {**found, "seconds": round(patience, 1)})
    restart(report, args, last)


def usable() -> bool:
    """Gives the device's memory back, which steps that are processes of their own need; False after a fatal error."""
    import torch

    gc.collect()
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def run_stage(stage: str, report: Report, args: argparse.Namespace, console: Console, last: float) -> tuple[int, int]:
    """(failed steps, steps left); nothing begins after `last` on the monotonic clock."""
    until = min(last, time.monotonic() + args.limit)
    failed = left = 0
    steps = steps_of(stage, args.dry_run)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(stage, total=len(steps))
        for name, step in steps.items():
            progress.update(bar, description=f"{stage}: {name}")
            found = None if args.again else report.result(stage, name)
            if _wanted(found, step):
                started = time.monotonic()
                remaining = until - started
                # The first one of a run begins in any case, or it would wait for ever.
                if remaining <= 0 or (report.begun and step.seconds > remaining):
                    left += 1
                    continue
                report.begun = report.begun or not step.always
                patience = max(COMPILING_S if step.compiles else PATIENCE_S, 3 * step.seconds)
                guard = threading.Timer(patience, give_up, (report, stage, name, patience, args, last))
                guard.daemon = True
                guard.start()
                # What ends by itself in time ends before the guard.
                found = attempt(step, min(remaining, 0.9 * patience))
                broken = not usable()
                guard.cancel()
                found = {
                    **found,
                    "seconds": round(time.monotonic() - started, 1),
                    **({"fatal": True} if broken else {}),
                }
                report.add(stage, name, found)
                if broken:
                    restart(report, args, last)
            assert found is not None
            failed += found["status"] == FAILED
            progress.advance(bar)
    return failed, left


def table(report: Report) -> Table:
    """Every step that has a result."""
    head = report.data["head"]
    shown = Table(
        "stage", "step", "status", "s", "result", title=f"{head['gpu']} | {head['versions']} | {head['commit']}"
    )
    for stage in STAGES:
        for name, found in report.data["stages"].get(stage, {}).items():
            shown.add_row(stage, name, found["status"], f"{found['seconds']:.0f}", found["text"])
    return shown


def goals(report: Report) -> str:
    """How many goals were met, and which were not."""
    steps = [(name, found) for stage in report.data["stages"].values() for name, found in stage.items()]
    stated = [(name, goal) for name, found in steps for goal in found.get("goals", ())]
    missed = [f"{name}: {goal['text']}" for name, goal in stated if not goal["met"]]
    return f"{len(stated) - len(missed)} of {len(stated)} goals met" + "".join(f"\n  missed: {line}" for line in missed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, print."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which reads it once
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if args.list:
        console.print(listed())
        return 0
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_battery: torch sees no CUDA GPU; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    from benchmarks import machine
    from benchmarks.battery.layers import totals

    where = args.json or machine.ROOT / "benchmarks" / "results" / f"battery-{machine.slug('cuda')}.json"
    report = Report(where, head(args.dry_run))
    failed = left = 0
    until = time.monotonic() + args.within
    for stage in STAGES if args.stage == "all" else (args.stage,):
        counts = run_stage(stage, report, args, console, until)
        failed, left = failed + counts[0], left + counts[1]
    console.print(table(report))
    console.print("\n".join([*totals(report.data["stages"].get("layers", {})), goals(report)]))
    if left:
        console.print(f"{left} steps are left: run the same command again")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
