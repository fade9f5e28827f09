"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m pytest tests/csrc`."""

import ast
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
SANITIZE = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer".split()


def build_constant(name):
    """A constant of setup.py: the sanitized build has the flags of the real one."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return eval(compile(ast.Expression(node.value), "setup.py", "eval"))
    raise AssertionError(f"setup.py has no {name}")


def run(*command, environment=None, timeout=300):
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env={**os.environ, **(environment or {})},
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The driver, compiled with the kernels for the widest instruction set of this processor and the portable one."""
    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("sanitize")
    # -O0: the compilation is most of the cost; the instrumented code runs for a second.
    common = [compiler, "-std=c++17", "-O0", "-fopenmp", "-ffp-contract=off", *SANITIZE, f"-I{ROOT / 'csrc'}"]
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    if run(*common, str(probe), "-o", str(folder / "probe")).returncode:
        pytest.skip(f"{compiler} cannot link the sanitizers here")
    flags = build_constant("ISA_FLAGS")
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    widest = "avx512" if "avx512bw" in words else "avx2" if "avx2" in words and "fma" in words else None
    isas = ["portable", *([widest] if widest else [])]
    have = [f"-DWRN_HAVE_{isa.upper()}=1" for isa in isas]
    once = [CPU / name for name in ("isa.cpp", "scratch.cpp", "policy.cpp")] + [
        Path(__file__).with_name("sanitize.cpp")
    ]
    skipped = {CPU / name for name in build_constant("CPU_ONCE")}
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
    linked = run(*common, *objects, "-o", str(folder / "sanitize"))
    assert linked.returncode == 0, linked.stderr[-4000:]
    return str(folder / "sanitize")


def test_no_kernel_leaves_its_buffers(program, seed):
    # OpenMP's pool is never freed, which is no leak of ours.
    result = run(program, "200", str(seed), environment={"ASAN_OPTIONS": "detect_leaks=0"})
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "200 cases, 0 wrong" in result.stdout


def test_an_overflow_is_reported(program):
    """The sanitizer is alive: an output one element short is a report."""
    result = run(program, "plant", environment={"ASAN_OPTIONS": "detect_leaks=0"})
    assert result.returncode != 0
    assert "AddressSanitizer" in result.stderr and "WRITE of size" in result.stderr
