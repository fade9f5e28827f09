"""The stages of benchmarks/gpu_battery.py: each module gives the steps of its stages, the most telling first."""

from __future__ import annotations

import os
import signal
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
        compiles: much, or runs under a tool that slows it down: how long depends on the machine, so it hangs later.
    """

    run: Callable[[float], Result]
    seconds: float
    always: bool = False
    compiles: bool = False


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


def tests_on_path() -> None:
    """Lets this process import what stands in tests/."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))


def python(words: Sequence[str], seconds: float, before: Sequence[str] = (), **environment: str) -> Result:
    """Run a Python command of the repository in a process of its own; its last line is the text."""
    command = [*before, sys.executable, *words]
    folders = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=variables,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # With the processes that it started: the output would else stay open, and a hanging kernel would stay.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return result(FAILED, f"not finished after {seconds:.0f} s")
    lines = output.strip().splitlines() or [""]
    return result(
        OK if process.returncode == 0 else FAILED, lines[-1][:200], exit=process.returncode, output=lines[-30:]
    )  # fmt: skip
