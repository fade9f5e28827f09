"""Everything that needs a GPU, in five stages of under nine minutes: parity, sanitize, tune, bench, hopper.

    python -m benchmarks.gpu_battery --stage parity        one stage; --stage all for the five in turn
    python -m benchmarks.gpu_battery --stage all --dry-run small, on the CPU, to prove the script itself

A stage is a list of steps. Each step's result is written as soon as it is there, so a run that was cut short goes on
where it stopped; a failed step is run again. The report is one JSON file with GPU, driver and versions, and a table.
Exit status: 0 if every step that ran is well, 1 if one failed, 3 if the time limit left steps for another run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

STAGES = ("parity", "sanitize", "tune", "bench", "hopper")
STAGE_S = 9 * 60
FORMAT = 1
# Of the head: a report of other code, GPU or versions is not gone on with.
SAME = ("gpu", "versions", "commit", "dry run")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_battery", description=__doc__.split("\n\n")[0])
    parser.add_argument("--stage", choices=(*STAGES, "all"), required=True)
    parser.add_argument("--dry-run", action="store_true", help="small problems on the CPU, Triton's interpreter")
    parser.add_argument("--again", action="store_true", help="run the steps that have a result too")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the report; default: benchmarks/results/battery-*.json"
    )
    parser.add_argument(
        "--limit", type=float, default=STAGE_S, metavar="S", help="seconds a stage; default: %(default)s"
    )
    return parser.parse_args(arguments)


def steps_of(stage: str, dry: bool) -> dict[str, Callable[[float], dict[str, Any]]]:
    """The steps of a stage by name: each gets the seconds that it may take and gives its result."""
    from benchmarks.battery import bench, hopper, parity, sanitize, tuning

    modules = {"parity": parity, "sanitize": sanitize, "tune": tuning, "bench": bench, "hopper": hopper}
    return modules[stage].steps(dry)


def head(dry: bool) -> dict[str, str]:
    """What ran where, as text."""
    from benchmarks import machine

    found = machine.head("cpu" if dry else "cuda", 1, [])
    return {"gpu": found.get("gpu", "none"), "cpu": found["cpu"], "versions": found["versions"],
            "commit": found["commit"], "date": found["date"], "dry run": str(dry)}  # fmt: skip


class Report:
    """The JSON file: read if it is of the same machine and code, written after each step."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        from wrn_fast import cache

        self.path = path
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


def attempt(step: Callable[[float], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The step's result; an exception is a failure of the step, not of the battery."""
    try:
        return step(seconds)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return {"status": "failed", "text": f"{type(error).__name__}: {text[0]}"}


def run_stage(stage: str, report: Report, args: argparse.Namespace, console: Console) -> tuple[int, int]:
    """(failed steps, steps left)."""
    begin = time.monotonic()
    failed = left = 0
    steps = steps_of(stage, args.dry_run)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(stage, total=len(steps))
        for name, step in steps.items():
            progress.update(bar, description=f"{stage}: {name}")
            result = None if args.again else report.result(stage, name)
            if result is None or result["status"] == "failed":
                remaining = args.limit - (time.monotonic() - begin)
                if remaining <= 0:
                    left += 1
                    continue
                started = time.monotonic()
                result = attempt(step, remaining)
                report.add(stage, name, {**result, "seconds": round(time.monotonic() - started, 1)})
            failed += result["status"] == "failed"
            progress.advance(bar)
    return failed, left


def table(report: Report) -> Table:
    """Every step that has a result."""
    head = report.data["head"]
    shown = Table(
        "stage", "step", "status", "s", "result", title=f"{head['gpu']} | {head['versions']} | {head['commit']}"
    )
    for stage in STAGES:
        for name, result in report.data["stages"].get(stage, {}).items():
            shown.add_row(stage, name, result["status"], f"{result['seconds']:.0f}", result["text"])
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, print."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which reads it once
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_battery: torch sees no CUDA GPU; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    from benchmarks import machine

    where = args.json or machine.ROOT / "benchmarks" / "results" / f"battery-{machine.slug('cuda')}.json"
    report = Report(where, head(args.dry_run))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    failed = left = 0
    for stage in STAGES if args.stage == "all" else (args.stage,):
        counts = run_stage(stage, report, args, console)
        failed, left = failed + counts[0], left + counts[1]
    console.print(table(report))
    if left:
        console.print(f"{left} steps are left: run the same command again")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
