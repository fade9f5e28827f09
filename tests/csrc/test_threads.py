"""The C++ kernels under ThreadSanitizer, without torch and with an OpenMP runtime that it understands (openmp.cpp)."""

from pathlib import Path

import pytest
from csrc.building import build, run

SANITIZE = ["-g1", "-fsanitize=thread"]
# Address space layouts that this GCC's ThreadSanitizer does not know end it before main.
LAYOUT = "unexpected memory mapping"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The portable kernels: threads are the same for every instruction set."""
    runtime = Path(__file__).with_name("openmp.cpp")
    program = build(tmp_path_factory.mktemp("threads"), SANITIZE, ["portable"], runtime)
    if LAYOUT in run(program, "0").stderr:
        pytest.skip("ThreadSanitizer cannot run here: the kernel's address space layout")
    return program


def test_no_race(program, seed):
    result = run(program, "60", str(seed))
    assert "ThreadSanitizer" not in result.stderr, result.stderr[-6000:]
    assert result.returncode == 0 and "60 cases, 0 wrong" in result.stdout, result.stdout[-2000:]


def test_a_race_is_reported(program):
    """The sanitizer is alive: two threads that add to one number are a report."""
    result = run(program, "race")
    assert result.returncode != 0
    assert "ThreadSanitizer: data race" in result.stderr
