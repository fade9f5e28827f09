"""The driver of the kernels (sanitize.cpp), compiled with a sanitizer."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from faults import native

HERE = Path(__file__).parent
CPU = native.ROOT / "csrc" / "cpu"
DRIVER = ("isa.cpp", "scratch.cpp", "policy.cpp")


def run(*command, environment=None, timeout=300):
    """The finished process and what it said."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env={**os.environ, **(environment or {})},
    )


def build(folder: Path, sanitize: list[str], isas: list[str], runtime: Path | None = None) -> str:
    """The program; a skip with the reason where it cannot be had.

    -O0: compiling is most of the cost, and the instrumented code runs for a second. `runtime` stands in for OpenMP's.
    """
    try:
        compiler = native.compiler()
    except native.CannotCompile as reason:
        pytest.skip(str(reason))
    common = [compiler, "-std=c++17", "-O0", "-D_GLIBCXX_ASSERTIONS", "-fopenmp", "-ffp-contract=off", *sanitize]
    common += [f"-I{native.ROOT / 'csrc'}"]
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    if run(*common, str(probe), "-o", str(folder / "probe")).returncode:
        pytest.skip(f"{compiler} cannot link the sanitizers here")
    have = [f"-DWRN_HAVE_{isa.upper()}=1" for isa in isas]
    skipped = {CPU / name for name in native.setup_constant("CPU_ONCE")}
    flags = native.setup_constant("ISA_FLAGS")
    once = [*(CPU / name for name in DRIVER), HERE / "sanitize.cpp", *([runtime] if runtime else [])]
    jobs = [(source, source.stem, have) for source in once]
    for source in sorted(set(CPU.glob("*.cpp")) - skipped):
        jobs += [(source, f"{source.stem}.{isa}", [*flags[isa], f"-DWRN_ISA={isa}"]) for isa in isas]

    def compile_one(job):
        source, name, extra = job
        result = run(*common, *extra, "-c", str(source), "-o", str(folder / f"{name}.o"))
        assert result.returncode == 0, result.stderr[-4000:]
        return str(folder / f"{name}.o")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, jobs))
    link = [word for word in common if runtime is None or word != "-fopenmp"]
    linked = run(*link, "-pthread", *objects, "-o", str(folder / "sanitize"))
    assert linked.returncode == 0, linked.stderr[-4000:]
    return str(folder / "sanitize")
