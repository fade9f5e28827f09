"""The report: tables on a terminal, JSON, a plot, and `docs/benchmarks.md`, all from one dictionary.

Schema of the JSON (`SCHEMA`):

    schema        1
    head          words: device, cpu, threads, kernels, versions, commit, command, environment, date, clocks before and
                  after, load before and after
    rows          one a case:
      case, subject, task, dtype    names;  batch, images (time is divided by images)
      gflop                         of the timed part, as direct convolution counts
      matmul_gflops                 rate of a matrix product in the same process
      fastest_peer                  the fastest variant that is not wrn_fast; null if there is none
      neighbours_cores              cores that other processes used meanwhile; null if unknown
      optimizer_ms                  an SGD step, of training_step only
      variants                      name; ms, p20_ms, p80_ms; rounds; ratio (times as fast as the fastest peer, median
                                    over rounds); quantity, error, bound of the parity check before the timing
      missing                       name, reason, refused (its result was out of bounds)
    left_out      case, reason: cases for which there was no time
    memory        subject, batch; saved: drop_rate, fast_bytes, eager_bytes, ratio; resident: variant -> peak_mib,
                  over_model_mib; null if not measured
    startup       runs, import_ms, first_ms and later_ms (by side), wheel_mib; null if not measured
    copy_gbytes   rate of a copy, for a roofline; null if not measured
    summary       cases, geomean, worst_case, worst_ratio of wrn_fast; null without a case
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import TASKS
from benchmarks.memory import SAVED_LIMIT
from benchmarks.peers import FAST

SCHEMA = 1
BUSY_CORES = 0.1
Report = dict[str, Any]


def ours(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row's entry of wrn_fast, if it was timed."""
    return next((v for v in row["variants"] if v["name"] == FAST), None)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Geometric mean of wrn_fast's ratios to the fastest peer of each case, and the worst case."""
    ratios = {row["case"]: found["ratio"] for row in rows if (found := ours(row)) and found["ratio"] is not None}
    if not ratios:
        return None
    worst = min(ratios, key=lambda case: ratios[case])
    geomean = math.exp(math.fsum(map(math.log, ratios.values())) / len(ratios))
    return {"cases": len(ratios), "geomean": geomean, "worst_case": worst, "worst_ratio": ratios[worst]}


def lost(rows: list[dict[str, Any]]) -> list[str]:
    """Cases in which a peer was faster."""
    return [row["case"] for row in rows if (found := ours(row)) and (found["ratio"] or 1.0) < 1.0]


def refused(rows: list[dict[str, Any]]) -> list[str]:
    """Cases in which the result of wrn_fast was out of bounds."""
    return [row["case"] for row in rows if any(a["name"] == FAST and a["refused"] for a in row["missing"])]


def figure_of(value: float) -> str:
    """Three significant digits, never an exponent for large values."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def cells(row: dict[str, Any], variant: dict[str, Any]) -> list[str]:
    """One variant's cells after its name, the same in every kind of table."""
    rate = row["gflop"] / (variant["ms"] / 1e3)
    return [
        f"{figure_of(variant['ms'])} ({figure_of(variant['p20_ms'])}-{figure_of(variant['p80_ms'])})",
        figure_of(variant["ms"] / row["images"]),
        f"{rate:.0f}",
        f"{100 * rate / row['matmul_gflops']:.0f} %",
        "-" if variant["ratio"] is None else f"{variant['ratio']:.2f}x",
    ]


COLUMNS = ("variant", "ms (p20-p80)", "ms/image", "GFLOP/s", "of matmul", "vs fastest")


def summary_line(report: Report) -> str:
    """The last line: geometric mean and the worst case."""
    found = report["summary"]
    if found is None:
        return "No case has both wrn_fast and a peer."
    return (
        f"wrn_fast against the fastest peer of each case: geometric mean {found['geomean']:.2f}x over "
        f"{found['cases']} cases; worst {found['worst_ratio']:.2f}x, {found['worst_case']}"
    )


def memory_lines(memory: dict[str, Any]) -> list[str]:
    """The memory figures as sentences."""
    where = f"{memory['subject']} batch {memory['batch']}"
    lines = [
        f"{where}, dropRate {s['drop_rate']}: saved for backward {s['fast_bytes'] / 2**20:.0f} MiB, the reference "
        f"{s['eager_bytes'] / 2**20:.0f} MiB: {s['ratio']:.3f}x (limit {SAVED_LIMIT}: "
        f"{'met' if s['ratio'] <= SAVED_LIMIT else 'NOT met'})"
        for s in memory["saved"]
    ]
    lines += [
        f"{where}, inference, {name}: peak resident {r['peak_mib']:.0f} MiB, {r['over_model_mib']:.0f} MiB of them "
        "above the loaded model"
        for name, r in memory["resident"].items()
    ]
    return lines


def print_head(console: Console, head: dict[str, str]) -> None:
    """Machine, versions, commit, command."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, words in head.items():
        table.add_row(f"[bold]{name}", escape(words))
    console.print(table)


def print_row(console: Console, row: dict[str, Any], said: set[tuple[str, str]]) -> None:
    """One case as a table, the fastest peer and lost cases marked; below it, once a run, why a peer is not there."""
    busy = row["neighbours_cores"] or 0.0
    title = f"{row['case']}  ({row['gflop']:.4g} GFLOP, matmul {row['matmul_gflops']:.0f} GFLOP/s)"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for variant in sorted(row["variants"], key=lambda v: v["ms"]):
        if variant["name"] == FAST:
            style = "bold red" if (variant["ratio"] or 1.0) < 1.0 else "bold green"
        else:
            style = "cyan" if variant["name"] == row["fastest_peer"] else ""
        table.add_row(variant["name"], *cells(row, variant), style=style)
    console.print(table)
    if row["optimizer_ms"] is not None:
        console.print(f"  optimizer apart: SGD step {figure_of(row['optimizer_ms'])} ms, the same for every variant")
    if busy > BUSY_CORES:
        console.print(f"  [yellow]other processes used {busy:.1f} cores meanwhile")
    for absent in row["missing"]:
        sentence = (absent["name"], absent["reason"])
        if sentence not in said:
            said.add(sentence)
            console.print(f"  [dim]{absent['name']}: {escape(absent['reason'])}", highlight=False)


def print_end(console: Console, report: Report) -> None:
    """Memory, lost and left-out cases, and the summary as the last line."""
    if report["memory"]:
        for line in memory_lines(report["memory"]):
            console.print(line, highlight=False)
    for case in lost(report["rows"]):
        console.print(f"[red]lost: {case}")
    for case in refused(report["rows"]):
        console.print(f"[bold red]wrn_fast refused: {case}")
    for absent in report["left_out"]:
        console.print(f"[yellow]left out: {absent['case']}: {escape(absent['reason'])}")
    console.print(f"[bold]{summary_line(report)}", highlight=False)


def write_json(report: Report, file: Path) -> None:
    """The report as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> Report:
    """A report of this schema.

    Raises:
        ValueError: the file is of another schema.
    """
    report = json.loads(file.read_text(encoding="utf-8"))
    if report.get("schema") != SCHEMA:
        raise ValueError(f"{file.name}: expected schema {SCHEMA}, got {report.get('schema')}")
    return report


INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks --write-docs` from the files in `benchmarks/results/`: change those, not this page.

- A case is a network or a part of one, a task, a batch size and a dtype. All variants have the same weights and input.
- Before a variant is timed, its result has to be that of plain PyTorch in float64 within the bound that
  `wrn_fast/parity.py` gives for one seed. One that is not is refused.
- Variants run interleaved, in an order drawn anew each round. A time is the median over the rounds, with the 20th and
  80th percentile. **vs fastest** is the median, over the rounds, of the fastest peer's time divided by the variant's:
  above 1 is faster than every peer.
- GFLOP/s count the multiplications and additions of direct convolution. An algorithm that needs fewer (Winograd) can
  pass 100 % of the matrix product that the same process measured.

To repeat a table, run the command above it on a quiet machine; `make bench ARGS="--preset readme"` sets itself up
first, and `python -m benchmarks --quick` takes two minutes.

| task | what is timed |
| --- | --- |
"""


def markdown(report: Report) -> str:
    """One report as a section of the page."""
    head = report["head"]
    lines = [f"## {head['gpu'] if 'gpu' in head else head['cpu']}", "", f"`{head['command']}`", ""]
    lines += [f"- {name}: {words}" for name, words in head.items() if name not in ("command", "device")]
    lines += ["", f"**{summary_line(report)}**", ""]
    for case in lost(report["rows"]):
        lines += [f"Lost: {case}.", ""]
    if report["memory"]:
        lines += [f"- {line}" for line in memory_lines(report["memory"])] + [""]
    lines += [f"| case | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    notes: list[str] = []
    absences: dict[tuple[str, str], list[str]] = {}
    for row in report["rows"]:
        case = row["case"]
        for variant in sorted(row["variants"], key=lambda v: v["ms"]):
            words = [case, variant["name"], *cells(row, variant)]
            lines.append(f"| {' | '.join(f'**{w}**' if variant['name'] == FAST and w else w for w in words)} |")
            case = ""
        if row["optimizer_ms"] is not None:
            notes.append(
                f"- {row['case']}: an SGD step takes {figure_of(row['optimizer_ms'])} ms more, whatever the variant."
            )
        for absent in row["missing"]:
            absences.setdefault((absent["name"], absent["reason"]), []).append(row["case"])
    notes += [f"- {name}: {reason} ({'; '.join(cases)})." for (name, reason), cases in absences.items()]
    notes += [f"- {absent['case']}: {absent['reason']}." for absent in report["left_out"]]
    return "\n".join(
        [*lines, "", "<details><summary>What is not in the table</summary>", "", *notes, "", "</details>", ""]
    )


def page(reports: list[Report]) -> str:
    """The whole of docs/benchmarks.md."""
    tasks = "".join(f"| `{name}` | {task.words} |\n" for name, task in TASKS.items())
    return "\n".join([INTRODUCTION + tasks, *map(markdown, reports)])


def write_docs(results: Path, document: Path) -> int:
    """Rewrite the page from every report in a folder; how many there were."""
    reports = [read_json(file) for file in sorted(results.glob("*.json"))]
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(page(reports), encoding="utf-8")
    return len(reports)
