"""The operator's own tests with every kernel interpreted: all that is asked of any backend, asked of this one.

All of it at once, by hand (a quarter of an hour on one core):

    TRITON_INTERPRET=1 WRN_FAST_BACKEND=triton python -m pytest tests/test_ops.py tests/test_head.py tests/backends \\
        -k "test_ops or test_head or triton"
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = "tests/test_ops.py"
PRIMITIVES = "tests/backends/test_primitives.py"
EXACT = "tests/backends/test_exact.py"
HEAD = "tests/test_head.py"
HEADS = "tests/backends/test_head.py"
MASKS = "tests/backends/test_masks.py"
# About a minute each on one core.
PIECES = {
    "opcheck of fprop": (OPS, "opcheck and fprop"),
    "opcheck of dgrad and wgrad": (OPS, "opcheck and (dgrad or wgrad) and not channels_last"),
    "opcheck of the rest": (OPS, "opcheck and (channels_last or bn_bwd or channel_stats or dropout)"),
    "values and gradients": (OPS, "not opcheck and not gradcheck and (value or gradient or derivative)"),
    "what runs": (OPS, "not opcheck and not gradcheck and not value and not gradient and not derivative"),
    "primitives in float16": (PRIMITIVES, "triton and float16 and not bfloat16"),
    "primitives in bfloat16": (PRIMITIVES, "triton and bfloat16"),
    "primitives in float32": (PRIMITIVES, "triton and float32 and not direct"),
    "primitives in float32, direct": (PRIMITIVES, "triton and direct"),
    "primitives in float64": (PRIMITIVES, "triton and float64"),
    "masks in 16 bits": (MASKS, "triton and (float16 or bfloat16)"),
    "masks": (MASKS, "triton and not float16 and not bfloat16"),
    "exact": (EXACT, "triton and not every_small_image"),
    "opcheck of the head": (HEAD, "opcheck"),
    "head": (HEAD, "not opcheck and not gradcheck"),
    "head beside eager": (HEADS, "triton"),
}
# Minutes each.
LONG = {
    "derivatives by differences": (OPS, "gradcheck"),
    "derivatives of the head by differences": (HEAD, "gradcheck"),
    "every small image": (EXACT, "triton and every_small_image"),
}


def passes(path: str, expression: str, seed: int, limit_s: float) -> str:
    """The last line of pytest in a process whose triton interprets; fails with its output."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    words = [path, "-k", expression, "-q", "-x", "--benchmark-disable", "--all-cases", "--seed", str(seed)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"TRITON_INTERPRET": "1", "WRN_FAST_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words],
        capture_output=True, text=True, timeout=limit_s, cwd=ROOT, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.rotate(1)
@pytest.mark.parametrize("piece", PIECES)
def test_piece(piece, seed):
    assert " passed" in passes(*PIECES[piece], seed, 550)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("piece", LONG)
def test_long_piece(piece, seed):
    assert " passed" in passes(*LONG[piece], seed, 3500)
