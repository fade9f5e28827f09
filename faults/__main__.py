"""`python -m faults`: plants every fault, prints which test noticed, and fails if one survives."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from faults import native, table
from faults.catalogue import BACKENDS, NAMES, SHARED, Cell, cells
from faults.plant import CAUGHT, SKIPPED, Copy, Outcome


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--backend", nargs="+", choices=(SHARED, *BACKENDS), default=[], help="default: all")
    parser.add_argument("--fault", nargs="+", type=int, choices=sorted(NAMES), metavar="1..48", help="default: all")
    parser.add_argument("--count", type=int, help="so many of them, drawn by the seed")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of the tests")
    parser.add_argument("--write", action="store_true", help="write docs/faults.json and docs/faults.md")
    parser.add_argument(
        "--render", action="store_true", help="write docs/faults.md from docs/faults.json, plant nothing"
    )
    options = parser.parse_args(argv)
    if options.render:
        table.render()
        return 0
    chosen = [cell for cell in cells(*options.backend) if not options.fault or cell.fault in options.fault]
    if options.count:
        chosen = sorted(random.Random(options.seed).sample(chosen, min(options.count, len(chosen))))
    console = Console()
    console.print(f"{len(chosen)} faults, --seed {options.seed}")
    outcomes = []
    for outcome in plant(chosen, options.seed, console):
        outcomes.append(outcome)
        line = f"{outcome.state:12} {outcome.seconds:5.1f} s  {outcome.cell}: {outcome.by}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        if options.write and outcome.state != SKIPPED:
            table.write(outcome)
    console.print(summary(outcomes))
    if options.write:
        table.render()
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def plant(chosen: list[Cell], seed: int, console: Console) -> Iterator[Outcome]:
    """Each in turn, in one copy of the checkout."""
    with Copy() as copy:
        if any(cell.backend in ("cpu", SHARED) for cell in chosen):
            try:
                copy.link()
            except native.CannotCompile as reason:
                console.print(f"cpu left out: {reason}")
                chosen = [cell for cell in chosen if cell.backend != "cpu"]
        for cell in chosen:
            yield copy.plant(cell, seed)


def summary(outcomes: list[Outcome]) -> Table:
    """Caught of planted, a backend."""
    found = Table("backend", "planted", "caught", "left")
    for backend in dict.fromkeys(outcome.cell.backend for outcome in outcomes):
        of = [outcome for outcome in outcomes if outcome.cell.backend == backend]
        left = ", ".join(str(outcome.cell.fault) for outcome in of if not outcome.ok)
        found.add_row(backend, str(len(of)), str(sum(outcome.state == CAUGHT for outcome in of)), left or "-")
    return found


if __name__ == "__main__":
    sys.exit(main())
