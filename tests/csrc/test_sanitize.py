"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m pytest tests/csrc`."""

import pytest
from csrc.building import build, run

from faults.native import processor_flags

SANITIZE = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer".split()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The driver, compiled with the kernels for the widest instruction set of this processor and the portable one."""
    words = processor_flags()
    widest = "avx512" if "avx512bw" in words else "avx2" if {"avx2", "fma"} <= words else None
    return build(tmp_path_factory.mktemp("sanitize"), SANITIZE, ["portable", *([widest] if widest else [])])


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


def test_undefined_behaviour_is_reported(program):
    """The other sanitizer is alive: a shift by the width of its operand is a report."""
    result = run(program, "shift", environment={"ASAN_OPTIONS": "detect_leaks=0"})
    assert result.returncode != 0
    assert "runtime error: shift exponent" in result.stderr
