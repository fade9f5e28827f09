"""Nothing is written or read outside of tensors, in the optimised build: canaries, and pages without access."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends.guarded import canaries
from backends.harness import RUN, draw

from wrn_fast import ops

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")

GUARDED = Path(__file__).with_name("guarded.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", RUN)
def test_nothing_past_the_end(backend, op, dtype, seed):
    """Odd channels, so that the last vector of a row is cut."""
    for c, k in ((17, 33), (3, 5), (40, 24)):
        fixed = {"C": c, "K": k, "residual": True, "want_y": True, "want_stats": True}
        for case in draw(backend, op, seed, 3, dtype, **fixed):
            with canaries() as broken:
                got = RUN[op](case)
            assert broken() == 0
            assert all(v.isfinite().all() for v in got), "an element was not written"


def test_a_canary_is_alive():
    with canaries() as broken:
        v = torch.empty(3, 4)
        assert v.isnan().all() and broken() == 0
        v.as_strided((1,), (1,), 12)[0] = 0.0
        assert broken() == 1


def test_elementwise_passes_stay_inside(backend, seed):
    for case in draw(backend, "bn_bwd_apply", seed, 3, torch.float32, C=19, prologue=True, batch_stats=True):
        with canaries() as broken:
            sums = torch.zeros(2, 19)
            dx = ops.bn_bwd_apply(case.x, case.x, case.stats, case.gamma, sums, case.problem.eps, True)
            stats = ops.channel_stats(case.x)
            dropped = ops.dropout(case.x, torch.tensor([1, 2]), 0.5)
        assert broken() == 0
        assert all(v.isfinite().all() for v in (dx, stats, dropped))


def guarded_process(*arguments):
    paths = [str(GUARDED.parents[2]), str(GUARDED.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(GUARDED), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect by ctypes as Linux has it")
def test_pages_behind_every_tensor_are_not_touched(seed):
    alive = guarded_process("plant")
    assert alive.returncode == -signal.SIGSEGV and "survived" not in alive.stdout
    result = guarded_process(seed, 60)
    assert result.returncode == 0 and "survived" in result.stdout, (seed, result.returncode, result.stderr[-2000:])
