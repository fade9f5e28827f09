"""`python -m benchmarks`: wrn_fast against the strongest peers of this machine; table, JSON, plot."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks import compare, machine, memory, report, roofline, startup, timing
from benchmarks.cases import (
    BLOCK_TASKS,
    DTYPES,
    LAYER_TASKS,
    NETWORK_TASKS,
    PRESETS,
    Case,
    Network,
    network_cases,
    part_cases,
)
from benchmarks.peers import FAST, PEERS, Peer
from benchmarks.runner import run_case
from wrn_fast import native

RESULTS = machine.ROOT / "benchmarks" / "results"
DOCUMENT = machine.ROOT / "docs" / "benchmarks.md"
# Seconds in all; a preset that is not here may take as long as it needs.
BUDGETS = {"quick": 110.0, "default": 600.0}
COMPILED = ("compile", "compile-max-autotune")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    what = parser.add_argument_group("what is measured (without --depth or --parts: a preset)")
    what.add_argument("--preset", choices=PRESETS, default="default", help="a list of cases; default: %(default)s")
    what.add_argument("--quick", action="store_const", dest="preset", const="quick", help="--preset quick: two minutes")
    what.add_argument("--depth", type=int, nargs="+", metavar="D", help="networks WRN-D-K, each with its --width")
    what.add_argument("--width", type=int, nargs="+", metavar="K", help="as many as depths, or one for all")
    what.add_argument("--parts", choices=("layers", "blocks"), help="layers or blocks of width --width, not networks")
    tasks = list(dict.fromkeys([*NETWORK_TASKS, *BLOCK_TASKS, *LAYER_TASKS]))
    what.add_argument("--task", nargs="+", choices=tasks, metavar="TASK", help=f"out of {', '.join(tasks)}")
    what.add_argument("--batch", type=int, nargs="+", default=[8], metavar="N", help="default: 8")
    what.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="bf16, fp16: autocast")
    what.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    what.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    what.add_argument("--list", action="store_true", help="print the cases and stop")
    how = parser.add_argument_group("how")
    rivals = [p.name for p in PEERS if p.name != FAST]
    how.add_argument("--peers", nargs="+", choices=rivals, metavar="PEER", help=f"out of {', '.join(rivals)}")
    how.add_argument("--max-autotune", action="store_true", help="torch.compile with max-autotune too (CUDA: always)")
    how.add_argument("--reps", type=int, default=timing.REPS, help="rounds at least; default: %(default)s")
    how.add_argument("--budget", type=float, metavar="S", help="seconds after which no case is begun")
    how.add_argument("--seed", type=int, default=0, help="of weights, inputs, order; default: %(default)s")
    how.add_argument("--startup", action="store_true", help="import, first call and size too, in fresh processes")
    how.add_argument("--memory", action=argparse.BooleanOptionalAction, default=None,
                     help="saved bytes and resident memory; default: with a preset, on the CPU")  # fmt: skip
    where = parser.add_argument_group("where it goes")
    where.add_argument("--json", type=Path, metavar="FILE", help="the report; its schema is in benchmarks/report.py")
    where.add_argument("--plot", type=Path, metavar="FILE", help="a PNG")
    where.add_argument("--roofline", type=Path, metavar="FILE", help="a PNG of layers (--parts layers) under ceilings")
    where.add_argument("--compare", type=Path, metavar="OLD.json",
                       help="show what became slower since that report; exit status 1 if anything did")  # fmt: skip
    where.add_argument(
        "--against", type=Path, metavar="NEW.json", help="with --compare: this report, nothing is measured"
    )
    where.add_argument("--write-docs", action="store_true",
                       help="only rewrite docs/benchmarks.md from benchmarks/results/*.json")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU")
    if min(args.batch) < 1 or args.threads < 1 or args.reps < 1:
        parser.error("--batch, --threads and --reps must be at least 1")
    if args.against is not None and args.compare is None:
        parser.error("--against needs --compare")
    if (args.plot or args.roofline) and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot and --roofline need matplotlib: pip install matplotlib")
    args.custom = args.depth is not None or args.parts is not None
    if args.custom and args.width is None:
        parser.error("--depth and --parts need --width")
    if args.depth and len(args.width) not in (1, len(args.depth)):
        parser.error("--width: expected one number, or one for each depth")
    for depth in args.depth or ():
        if depth < 10 or (depth - 4) % 6:
            parser.error(f"--depth: expected 6n + 4 with n >= 1 (10, 16, 28, 40...), got {depth}")
    return args


def select_cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the command line, in order of importance."""
    if args.parts:
        known = LAYER_TASKS if args.parts == "layers" else BLOCK_TASKS
        return part_cases(args.width, args.task or known, args.batch, args.dtype, args.parts)
    if args.depth:
        widths = args.width * len(args.depth) if len(args.width) == 1 else args.width
        tasks = args.task or ["inference", "training_step", "input_grad"]
        return network_cases(zip(args.depth, widths), [t for t in tasks if t in NETWORK_TASKS], args.batch, args.dtype)
    return PRESETS[args.preset]()


def select_peers(args: argparse.Namespace) -> tuple[list[Peer], str | None]:
    """Who competes, and a sentence about who was left out on purpose."""
    if args.peers:
        return [p for p in PEERS if p.name in (FAST, *args.peers)], None
    if args.preset == "quick" and not args.custom:
        return [p for p in PEERS if p.name not in COMPILED], "torch.compile: not in --quick, compiling takes minutes"
    autotune = args.max_autotune or args.device == "cuda"
    left = None if autotune else "compile-max-autotune: only with --max-autotune, its search takes minutes a case"
    return [p for p in PEERS if autotune or p.name != COMPILED[1]], left


def warn_if_busy(console: Console) -> None:
    """Half a second of looking at what other processes do."""
    with timing.Neighbours() as neighbours:
        time.sleep(0.5)
    if (neighbours.cores or 0.0) > report.BUSY_CORES:
        console.print(f"[bold yellow]This machine is busy: other processes use {neighbours.cores:.1f} cores.")


def warn_if_plain(console: Console, device: str) -> None:
    """In a checkout the wrn_fast beside the benchmarks runs, not an installed one; its kernels may be missing."""
    reason = native.load()[1]
    if device == "cpu" and reason is not None:
        console.print(f"[bold yellow]wrn_fast runs on plain PyTorch here: {escape(reason)}", highlight=False)


def progress_bar(console: Console) -> Progress:
    """Spinner, bar, cases, time so far and left, and what is going on."""
    return Progress(
        SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.description}"), console=console, transient=True,
    )  # fmt: skip


def _describe(bar: Progress, line: TaskID, name: str, what: str) -> None:
    bar.update(line, description=f"{name}: {what}")


def measure(args: argparse.Namespace, arguments: Sequence[str], console: Console) -> report.Report:
    """Run every case and print it as soon as it is there."""
    begin = time.monotonic()
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cases = select_cases(args)
    peers, note = select_peers(args)
    head = machine.head(args.device, args.threads, list(arguments))
    head["load before"] = f"{machine.load():.2f}"
    report.print_head(console, head)
    warn_if_busy(console)
    warn_if_plain(console, args.device)
    if note:
        console.print(f"[dim]{note}", highlight=False)
    budget = args.budget if args.budget is not None else None if args.custom else BUDGETS.get(args.preset)
    want_memory = not args.custom and args.device == "cpu" if args.memory is None else args.memory
    rates = {name: timing.matmul_rate(DTYPES[name], args.device) for name in {case.dtype for case in cases}}
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    figures = None
    said: set[tuple[str, str]] = set()
    with progress_bar(console) as bar:
        line = bar.add_task("", total=len(cases) + want_memory)
        if want_memory:
            network = Network(28, 10)
            figures = memory.report(network, 16, partial(_describe, bar, line, "memory"))
            bar.advance(line)
        for i, case in enumerate(cases):
            left = None if budget is None else budget - (time.monotonic() - begin)
            if left is not None and left < 0 and rows:
                left_out.append({"case": case.name, "reason": f"the time budget of {budget:.0f} s was used up"})
                continue
            row = run_case(
                case, peers, args.device, rates[case.dtype], reps=args.reps, seed=args.seed,
                budget_s=20.0 if left is None else max(0.0, left) / (len(cases) - i) / 3,
                tick=partial(_describe, bar, line, case.name),
            )  # fmt: skip
            rows.append(row)
            report.print_row(console, row, said)
            bar.advance(line)
    head["clocks after"] = machine.clocks()
    head["load after"] = f"{machine.load():.2f}"
    return {
        "schema": report.SCHEMA,
        "head": head,
        "rows": rows,
        "left_out": left_out,
        "memory": figures,
        "startup": startup.measure() if args.startup else None,
        "copy_gbytes": roofline.copy_rate(args.device) / 1e9 if args.roofline else None,
        "summary": report.summary(rows),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if wrn_fast was refused because its result was wrong, or became slower than `--compare`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    # Wide enough for a table where the output is a file or a pipe.
    console = Console(width=None if sys.stdout.isatty() else 110)
    if args.write_docs:
        console.print(f"docs/{DOCUMENT.name}: {report.write_docs(RESULTS, DOCUMENT)} reports")
        return 0
    if args.list:
        console.print("\n".join(case.name for case in select_cases(args)), highlight=False)
        return 0
    if args.against is not None:
        return 1 if compare.show(console, report.read_json(args.compare), report.read_json(args.against)) else 0
    # Read first: a file that is no report is an error before ten minutes, not after.
    old = None if args.compare is None else report.read_json(args.compare)
    result = measure(args, arguments, console)
    file = args.json
    if file is None and args.preset == "readme" and not args.custom:
        file = RESULTS / f"{machine.slug(args.device)}.json"
    if file is not None:
        report.write_json(result, file)
    if args.plot is not None:
        from benchmarks.plot import plot

        plot(result, args.plot)
    if args.roofline is not None:
        roofline.plot(result, args.roofline)
    for line in startup.lines(result["startup"]) if args.startup else ():
        console.print(line, highlight=False)
    report.print_end(console, result)
    slower = [] if old is None else compare.show(console, old, result)
    return 1 if slower or report.refused(result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
