"""docs/faults.json and docs/faults.md: fault x backend, and the test that notices."""

from __future__ import annotations

import json
import platform
import subprocess
from typing import Any

import torch

from faults import shared
from faults.catalogue import BACKENDS, GROUPS, NAMES, SHARED, entry
from faults.native import ROOT
from faults.patch import Absent
from faults.plant import Outcome

DATA, PAGE = ROOT / "docs" / "faults.json", ROOT / "docs" / "faults.md"
# They look at what is compiled for a GPU; all others run code.
AHEAD_OF_TIME = ("tests/backends/test_cuda_code.py", "tests/kernels/test_bound.py")
HEAD = """# Planted faults

A test suite is worth what it notices. These are {total} faults that convolution and BatchNorm kernels really have had,
each a patch of a few lines in [faults/](../faults), planted one at a time in a copy of the checkout. For each the tests
named beside it must fail. `python -m faults` plants them all and fails if one survives; `make test` draws twelve by the
seed that its header prints.

{summary}

A fault in code that all backends share is planted once, in column "all". No GPU is needed: Triton's kernels run in its
interpreter, those of CUDA on the CPU over a model of the hardware that checks every access. *Caught ahead of time* is
what shows in the code that is compiled for a GPU. A cell without a test says why: *no such code* means that the backend
cannot have this fault; *GPU battery* that only a GPU can show it (`python -m benchmarks.gpu_battery`).
"""


def load() -> dict[str, Any]:
    """What docs/faults.json says, an empty table where there is none."""
    return json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {"cells": {}}


def write(outcome: Outcome) -> None:
    """Puts an outcome into docs/faults.json; the other cells stay."""
    data = load()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    data |= {
        "commit": commit.stdout.strip(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    data["cells"][f"{outcome.cell.fault} {outcome.cell.backend}"] = {
        "state": outcome.state, "by": outcome.by, "seconds": round(outcome.seconds, 1)
    }  # fmt: skip
    DATA.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def text_of(found: dict[str, Any], fault: int, backend: str) -> str:
    """One cell of the page."""
    where = SHARED if backend == "all" else backend
    result = found.get(f"{fault} {where}")
    if result is not None:
        file, *name = result["by"].split("::")
        state = f"{result['state']} ahead of time" if file in AHEAD_OF_TIME else result["state"]
        return f"{state}: " + ("`" + name[-1].replace("|", "\\|") + "`" if name else file)
    if backend == "all":
        return "not run yet" if fault in shared.PATCHES else ""
    if fault in shared.PATCHES:
        return "see all"
    planted = entry(fault, backend)
    return f"{planted.state}: {planted.reason}" if isinstance(planted, Absent) else "not run yet"


def page() -> str:
    """docs/faults.md as docs/faults.json has it."""
    data = load()
    found = data["cells"]
    lines = []
    for backend in ("all", *BACKENDS):
        where = SHARED if backend == "all" else backend
        of = [v for k, v in found.items() if k.split()[1] == where]
        absent = 0 if backend == "all" else sum(isinstance(entry(f, backend), Absent) for f in NAMES)
        note = f", {absent} without such a fault here" if absent else ""
        lines.append(f"| {backend} | {len(of)} | {sum(v['state'] == 'caught' for v in of)} |{note.lstrip(',')} |")
    summary = "| backend | planted | caught | |\n| --- | --- | --- | --- |\n" + "\n".join(lines)
    text = [HEAD.format(total=len(NAMES), summary=summary)]
    for group, numbers in GROUPS.items():
        text.append(f"## {group}\n\n| | fault | all | {' | '.join(BACKENDS)} |\n|{' --- |' * (3 + len(BACKENDS))}")
        for fault in numbers:
            cells = " | ".join(text_of(found, fault, backend) for backend in ("all", *BACKENDS))
            text.append(f"| {fault} | {NAMES[fault]} | {cells} |")
        text[-1] += "\n"
    text.append(f"Python {data.get('python')}, torch {data.get('torch')}, commit {data.get('commit')}.")
    return "\n".join(text) + "\n"


def render() -> None:
    """Writes it."""
    PAGE.write_text(page(), encoding="utf-8")
