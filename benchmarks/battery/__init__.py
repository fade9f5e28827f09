"""The stages of benchmarks/gpu_battery.py: each module gives the steps of its stages, the most telling first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.machine import ROOT

Result = dict[str, Any]
OK, FAILED, NOT_RUN = "ok", "failed", "not run"


class Step(NamedTuple):
    """One step of a stage.

    Args:
        run: gets the seconds that it may take and gives its result.
        seconds: that it is expected to take on an H100 with 16 CPU cores, compilation included. Not measured yet.
        always: run it also where an earlier run has a result: a fresh machine has no build of ours.
    """

    run: Callable[[float], Result]
    seconds: float
    always: bool = False


Steps = dict[str, Step]


class Goal(NamedTuple):
    """A number that is aimed at, and the one that was measured."""

    text: str
    want: float
    got: float
    at_most: bool = False  # else at least

    @property
    def met(self) -> bool:
        """NaN meets nothing."""
        return self.got <= self.want if self.at_most else self.got >= self.want

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.text}: {self.got:.4g}, goal {sign} {self.want:.4g}, {'met' if self.met else 'MISSED'}"


def result(status: str, text: str, goals: Sequence[Goal] = (), **figures: Any) -> Result:
    """What a step gives: a status, a line for the table, goals, figures for the report."""
    stated = [{**goal._asdict(), "met": goal.met} for goal in goals]
    return {"status": status, "text": "; ".join([text, *map(str, goals)]), "goals": stated, **figures}


def python(words: Sequence[str], seconds: float, before: Sequence[str] = (), **environment: str) -> Result:
    """Run a Python command of the repository in a process of its own; its last line is the text."""
    command = [*before, sys.executable, *words]
    folders = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=variables)
    except subprocess.TimeoutExpired:
        return result(FAILED, f"not finished after {seconds:.0f} s")
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return result(OK if done.returncode == 0 else FAILED, lines[-1][:200], exit=done.returncode, output=lines[-30:])
