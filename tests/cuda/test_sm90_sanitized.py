"""The Hopper kernels, and the machine that runs them, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda import host_run

SANITIZE = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
# In a process of its own: the sanitizers' libraries have to come first.
PROGRAM = """
import sys
from ctypes import byref
sys.path[:0] = {paths!r}
from cuda import conv_cases, host_run
tool = host_run.Tool({library!r})
{code}
print("done")
"""
SHORT = """
whole = conv_cases.poisoned
conv_cases.poisoned = lambda dtype, *shape: whole(dtype, *shape) if shape[1:] else whole(dtype, shape[0] - 1)
conv_cases.check(tool, conv_cases.Call(want_sums=True))
"""
NO_FILTERS = """
tool.wgrad_workspace(conv_cases.Call("wgrad", K=0).shape, 132)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs code with the sanitized tool: the finished process."""
    folder = tmp_path_factory.mktemp("sanitized")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        asked = [host_run.compiler(), f"-print-file-name={name}"]
        runtimes.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        if not Path(runtimes[-1]).is_absolute():
            pytest.skip(f"{asked[0]} has no {name}")
    library = host_run.library(folder, flags=host_run.NARROW, everywhere=SANITIZE)
    paths = [str(host_run.HERE.parents[1]), str(host_run.HERE.parent)]
    environment = {**os.environ, "LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}

    def process(code):
        program = PROGRAM.format(paths=paths, library=library, code=code)
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, timeout=500)

    return process


def test_no_kernel_leaves_its_buffers(run, seed, request):
    count = int(60 * request.config.getoption("--fuzz-scale"))
    result = run(f"conv_cases.fuzz(tool, {seed}, {count}, narrow=True)")
    assert result.returncode == 0 and result.stdout.endswith("done\n"), (result.stdout + result.stderr)[-6000:]


def test_an_overflow_is_reported(run):
    """The sanitizer is alive: an output one element short is a report."""
    result = run(SHORT)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr and "WRITE of size 4" in result.stderr


def test_undefined_behaviour_is_reported(run):
    """The other sanitizer is alive: a division of the multiprocessors among no filters is a report."""
    result = run(NO_FILTERS)
    assert result.returncode != 0
    assert "runtime error: division by zero" in result.stderr
