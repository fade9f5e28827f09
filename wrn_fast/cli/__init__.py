"""The command `wrn-fast`: what would run here and why (`info`), parity (`verify`), measured tiles (`tune`).

Exit status: 0 all is well, 1 something is out of its bound, 2 the command was used wrongly.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from wrn_fast.cli import info, tune, verify
from wrn_fast.errors import WrnFastError

# A command returns (exit status, what --json prints, what is printed otherwise).
Command = Callable[[argparse.Namespace], tuple[int, dict[str, Any], Sequence[Any]]]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="wrn-fast", description="A drop-in fast WideResNet: what runs here, and proof.")
    commands = top.add_subparsers(dest="command", required=True, metavar="info|verify|tune")
    for module in (info, verify, tune):
        sub = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP)
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        module.options(sub)
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `wrn-fast`; None: those of the process.

    Returns:
        The exit status.
    """
    arguments = parser().parse_args(argv)
    command: Command = arguments.run
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            status, data, lines = command(arguments)
        except WrnFastError as error:
            print(f"wrn-fast {arguments.command}: error: {error}", file=sys.stderr)
            return 2
    notes = list(dict.fromkeys(str(w.message) for w in caught))
    if arguments.json:
        print(json.dumps(data | {"notes": notes}, indent=1, allow_nan=False))
        return status
    # Piped output has no width of its own: the tables then get what they need.
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False, soft_wrap=True)
    for line in [*lines, *(f"note: {note}" for note in notes)]:
        console.print(line, markup=False) if isinstance(line, str) else console.print(line)
    return status
