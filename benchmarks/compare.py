"""Two reports of one machine, case by case: what became slower, what became faster."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.report import Report, figure_of, ours

# Below this even two runs whose spreads do not touch are called equal.
LEAST = 1.05

SLOWER, FASTER, EQUAL, GONE, NEW = "slower", "faster", "equal", "gone", "new"


class Change(NamedTuple):
    """One case: milliseconds of wrn_fast then and now (None where it was not timed), and what to call it."""

    case: str
    old: float | None
    new: float | None
    verdict: str


def change(case: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Change:
    """Slower or faster where the medians differ by 5 % and the spreads (p20 to p80) do not touch."""
    if old is None or new is None:
        return Change(case, old and old["ms"], new and new["ms"], NEW if old is None else GONE)
    verdict = EQUAL
    if new["p20_ms"] > old["p80_ms"] and new["ms"] > LEAST * old["ms"]:
        verdict = SLOWER
    if new["p80_ms"] < old["p20_ms"] and LEAST * new["ms"] < old["ms"]:
        verdict = FASTER
    return Change(case, old["ms"], new["ms"], verdict)


def changes(old: Report, new: Report) -> list[Change]:
    """Every case of either report in which wrn_fast was timed, the old report's order first."""
    before, after = ({row["case"]: ours(row) for row in report["rows"]} for report in (old, new))
    names = dict.fromkeys([*before, *after])
    found = [change(name, before.get(name), after.get(name)) for name in names]
    return [each for each in found if each.old is not None or each.new is not None]


def regressions(found: list[Change]) -> list[str]:
    """Cases that became slower, and cases that wrn_fast no longer serves."""
    return [each.case for each in found if each.verdict in (SLOWER, GONE)]


def differences(old: Report, new: Report) -> list[str]:
    """What else differs between the reports, so that a time may differ for it."""
    names = ("cpu", "gpu", "threads", "kernels", "versions", "environment")
    heads = old["head"], new["head"]
    lines = [f"{name}: {heads[0].get(name)} then, {heads[1].get(name)} now" for name in names
             if heads[0].get(name) != heads[1].get(name)]  # fmt: skip
    rates = [{row["dtype"]: row["matmul_gflops"] for row in report["rows"]} for report in (old, new)]
    for dtype in rates[0].keys() & rates[1].keys():
        ratio = rates[1][dtype] / rates[0][dtype]
        if not 1 / LEAST <= ratio <= LEAST:
            lines.append(f"the machine itself: a {dtype} matrix product runs at {ratio:.2f} of its rate then")
    return lines


def show(console: Console, old: Report, new: Report) -> list[str]:
    """Prints the table; returns the regressions."""
    found = changes(old, new)
    table = Table("case", "ms then", "ms now", "now / then", "", box=box.SIMPLE)
    for each in found:
        factor = "-" if each.old is None or each.new is None else f"{each.new / each.old:.2f}x"
        times = ["-" if ms is None else figure_of(ms) for ms in (each.old, each.new)]
        colour = {SLOWER: "bold red", GONE: "bold red", FASTER: "green"}.get(each.verdict)
        table.add_row(each.case, *times, factor, each.verdict, style=colour)
    console.print(f"commit {old['head'].get('commit')} then, {new['head'].get('commit')} now")
    console.print(table)
    for line in differences(old, new):
        console.print(f"[yellow]{line}", highlight=False)
    return regressions(found)
