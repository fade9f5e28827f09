"""What a planted fault is made of."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

NO_CODE = "no such code"
BATTERY = "GPU battery"


class Stale(Exception):
    """The text that a patch replaces is gone, or is there twice."""


class Check(NamedTuple):
    """Tests that must fail: a file of tests and what `pytest -k` selects in it."""

    file: str
    select: str


class Patch(NamedTuple):
    """One fault in one place: `old` becomes `new` in `file`; `check` is what has to notice.

    `recompile` names the sources of csrc/cpu that include a patched header.
    """

    file: str
    old: str
    new: str
    check: Check
    recompile: tuple[str, ...] = ()

    def apply(self, tree: Path) -> str:
        """Changes the file below `tree` and returns what it was.

        Raises:
            Stale: `old` does not occur exactly once.
        """
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise Stale(f"{self.file}: expected once, found {text.count(self.old)} times:\n{self.old}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text


class Absent(NamedTuple):
    """Why a backend has no such fault to plant on a machine without a GPU."""

    state: str  # NO_CODE or BATTERY
    reason: str
