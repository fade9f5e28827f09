"""The stages of benchmarks/gpu_battery.py: each module's `steps(dry)` gives its steps, the most telling first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import ROOT

Result = dict[str, Any]
OK, FAILED, NOT_RUN = "ok", "failed", "not run"


def result(status: str, text: str, **figures: Any) -> Result:
    """What a step gives: a status, a line for the table, figures for the report."""
    return {"status": status, "text": text, **figures}


def python(words: Sequence[str], seconds: float, before: Sequence[str] = (), **environment: str) -> Result:
    """Run a Python command of the repository in a process of its own; its last line is the text."""
    command = [*before, sys.executable, *words]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=variables)
    except subprocess.TimeoutExpired:
        return result(FAILED, f"not finished after {seconds:.0f} s")
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return result(OK if done.returncode == 0 else FAILED, lines[-1][:200], exit=done.returncode, output=lines[-30:])
