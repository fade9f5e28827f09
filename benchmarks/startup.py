"""What a user pays before the first result: import, first call, and the size of what is installed."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine

RUNS = 5
# Each in a fresh process, torch imported before the clock starts: its own import is not ours to answer for.
IMPORT = """
import time, torch
begin = time.perf_counter()
import wrn_fast
print(1e3 * (time.perf_counter() - begin))
"""
FIRST_CALL = """
import time, torch, sys
make = {make}
torch.set_num_threads({threads})
model = make(28, 10, 10).eval()
x = torch.randn(1, 3, 32, 32)
times = []
with torch.inference_mode():
    for _ in range(6):
        begin = time.perf_counter()
        model(x)
        times.append(1e3 * (time.perf_counter() - begin))
print(*times)
"""
SIDES = {
    "wrn_fast": "__import__('wrn_fast').classic",
    "eager": "__import__('wrn_fast.reference', fromlist=['classic']).classic",
}


def _run(code: str) -> list[float]:
    """The numbers that a fresh process prints."""
    environment = {**os.environ, "PYTHONPATH": str(machine.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def wheel_bytes() -> int:
    """The package's files and its extensions, compressed as a wheel is."""
    package = machine.ROOT / "wrn_fast"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "wheel.zip")
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(package.rglob("*")):
                if file.suffix in (".py", ".json", ".so", ".typed") and "__pycache__" not in file.parts:
                    archive.write(file, file.relative_to(package.parent))
        return target.stat().st_size


def measure(runs: int = RUNS) -> dict[str, Any]:
    """Milliseconds: medians over fresh processes.

    Returns:
        import_ms: of `import wrn_fast` after torch. first_ms and later_ms: {wrn_fast, eager}, WRN-28-10, batch 1.
        wheel_mib: compressed size of the package with its extensions.
    """
    first: dict[str, list[float]] = {side: [] for side in SIDES}
    later: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side, make in SIDES.items():
            times = _run(FIRST_CALL.format(make=make, threads=torch.get_num_threads()))
            first[side].append(times[0])
            later[side].append(statistics.median(times[1:]))
    median = statistics.median
    return {
        "runs": runs,
        "import_ms": median(_run(IMPORT)[0] for _ in range(runs)),
        "first_ms": {side: median(of) for side, of in first.items()},
        "later_ms": {side: median(of) for side, of in later.items()},
        "wheel_mib": wheel_bytes() / 2**20,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures as sentences."""
    first, later = found["first_ms"], found["later_ms"]
    return [
        f"import wrn_fast: {found['import_ms']:.0f} ms after torch (median of {found['runs']} fresh processes)",
        *(
            f"WRN-28-10 batch 1, {side}: first call {first[side]:.0f} ms, later ones {later[side]:.0f} ms"
            for side in first
        ),
        f"size of the package with its extensions, compressed: {found['wheel_mib']:.2f} MiB",
    ]
