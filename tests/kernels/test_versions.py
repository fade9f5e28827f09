"""The kernels' tests with the oldest Triton that is served, in a folder of its own beside the installed packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Its interpreter fails with numpy 2.4.
OLDEST = ("triton==3.6.0", "numpy<2.4")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_oldest_triton(tmp_path, seed):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *OLDEST]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"pip cannot install {OLDEST[0]}: {done.stderr.strip().splitlines()[-1]}")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [
        "tests/kernels",
        "-m",
        "not long",
        "-k",
        "not test_piece",
        "-q",
        "--benchmark-disable",
        "--seed",
        str(seed),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words],
        capture_output=True, text=True, timeout=2600, cwd=ROOT, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
