"""wgrad of the cpu backend, Winograd and direct: float64, bits, special values, and which runs."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from kernels import oracle
from torch import Tensor

from wrn_fast import parity
from wrn_fast.backends import aten, cpu
from wrn_fast.precision import precision
from wrn_fast.problem import ConvProblem

pytestmark = pytest.mark.native

CHANNELS = (8, 16, 17, 33, 40, 64)
# Larger than a chunk of 128 tiles, rows and columns of 4x4 tiles cut by the border.
LONG = {
    "N": 5, "H": 22, "W": 25, "C": 40, "K": 24, "pad": (1, 1, 1, 1), "prologue": True, "act": "relu",
    "drop_at": "none", "act_out": "none",
}  # fmt: skip


@pytest.fixture
def threads():
    """A setter of torch's thread count that is undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the adapter allocates holds NaN until a kernel writes it."""
    empty = torch.empty
    fill = lambda *a, **k: (lambda t: t.fill_(torch.nan) if t.is_floating_point() else t)(empty(*a, **k))
    monkeypatch.setattr(cpu.torch, "empty", fill)


def draw(seed: int, dtype: torch.dtype = torch.float32, **fixed) -> oracle.Case:
    """A case that the Winograd kernel takes, unless `fixed` says otherwise."""
    rng = random.Random(seed)
    sizes = {
        "H": rng.randint(3, 14),
        "W": rng.randint(3, 14),
        "C": rng.choice(CHANNELS),
        "K": rng.choice((1, 5, 16, 33)),
    }
    return oracle.draw(seed, dtype, **{**sizes, "taps": (3, 3), "stride": 1, "short_C": 0, **fixed})


def run(case: oracle.Case, module=cpu) -> Tensor:
    t = case.tensors
    return module.wgrad(case.problem, *(t[name] for name in ("dy", "x", "stats", "gamma", "beta", "rng")))


def oracle_dw(case: oracle.Case) -> Tensor:
    return oracle.gradients(case)[1]


def worst_of(seeds, algo="f4", **fixed) -> float:
    """The largest error of drawn cases, all of which `algo` serves."""
    worst = 0.0
    for seed in seeds:
        case = draw(seed, **fixed)
        assert cpu._plan(case.problem).wgrad_algo == algo
        got, want = run(case), oracle_dw(case)
        assert got.dtype is case.problem.w_dtype and got.is_contiguous(memory_format=torch.channels_last)
        worst = max(worst, parity.error(got, want))
    return worst


def test_shapes_prologues_and_paddings(seed):
    assert worst_of(range(seed, seed + 80)) <= parity.WINOGRAD["wgrad"]


@pytest.mark.parametrize("taps", [(3, 3), (1, 1), (3, 1), (5, 2)])
@pytest.mark.parametrize("stride", [2, 3])
def test_direct_shapes(seed, taps, stride):
    sizes = {"H": 11, "W": seed % 40 + 3, "pad": (1, 2, 0, 3)}
    # Single seeds, so the operator's bound; test_primitives.py judges direct beside eager, pooled.
    assert worst_of(range(seed, seed + 12), "direct", taps=taps, stride=stride, **sizes) <= parity.WINOGRAD["wgrad"]


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_instruction_sets(isa, seed):
    code = (
        "import sys, pytest; sys.path[:0] = ['.', 'tests']\n"
        "from backends import test_cpu_wgrad as t\n"
        "if t.cpu.unsupported('wgrad', t.draw(0).problem): sys.exit(77)\n"
        f"assert t.cpu.isa() == {isa!r}\n"
        f"print(max(t.worst_of(range({seed}, {seed} + 20)), t.worst_of(range({seed}, {seed} + 9), 'direct', stride=2)))"
    )
    env = {**os.environ, "WRN_FAST_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"this processor or build lacks {isa}")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) <= parity.WINOGRAD["wgrad"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_beside_eager(seed, dtype):
    pool = parity.Pool("wgrad", dtype, algorithm="wgrad")
    for i in range(parity.SEEDS):
        case = draw(seed + i, dtype, **LONG)
        pool.add(run(case), run(case, aten), oracle_dw(case))
    cell = pool.judge()
    assert cell.ok, cell


def test_long_sums_stay_short(seed):
    """1.8e-6 with one chain of additions over the tiles; 4.6e-7 cut every 32."""
    case = draw(seed, N=32, H=32, W=32, C=8, K=16, pad=(1, 1, 1, 1), act="relu", prologue=False, drop_at="none")
    assert parity.error(run(case), oracle_dw(case)) <= parity.WINOGRAD["wgrad"] / 2


def test_bits_do_not_depend_on_threads(seed, threads):
    for fixed in (LONG, {**LONG, "C": 160, "K": 8, "W": 9}, {**LONG, "C": 8, "K": 64}, {**LONG, "stride": 2}):
        case = draw(seed, **fixed)
        results = []
        for n in (1, 2, 3, 4):
            threads(n)
            results.append(run(case))
        assert parity.error(results[0], oracle_dw(case)) <= parity.WINOGRAD["wgrad"]
        assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("stride", [1, 2])
def test_special_values_reach_all_that_eager_reaches(seed, value, where, stride):
    case = draw(seed, stride=stride, N=2, H=9, W=7, C=17, K=5, pad=(1, 2, 0, 1), act="leaky_relu", drop_at="none")
    v = case.tensors[where]
    # An odd pixel: one at an even place may meet no tap at stride 2.
    index = torch.randint(v.shape[1], (1,)) + v.shape[1] * (v.shape[3] + 1)
    v.permute(0, 2, 3, 1).view(-1)[index] = value
    got, want = run(case), run(case, aten)
    assert not want.isfinite().all()
    assert not (got.isfinite() & ~want.isfinite()).any()
    # Other channels are not touched.
    untouched = want.flatten(2).isfinite().all(2)
    assert untouched.any() and got.flatten(2).isfinite().all(2)[untouched].all()


@pytest.mark.parametrize("stride", [1, 2])
def test_dropout(seed, stride):
    for p in (0.5, 1.0):
        case = draw(seed, stride=stride, N=3, H=12, W=11, C=40, p=p, drop_at="prologue", act_out="none")
        case.tensors["rng"] = torch.randint(0, 2**63 - 1, (2,))
        assert parity.error(run(case), oracle_dw(case)) <= parity.WINOGRAD["wgrad"]


def test_no_images(seed):
    case = draw(seed, N=0, H=8, W=8, drop_at="none")
    got = run(case)
    assert got.shape == (case.problem.K, case.problem.C, 3, 3) and not got.any()


def test_float32_filter_beside_bfloat16(seed):
    case = draw(seed, torch.bfloat16, w_dtype=torch.float32)
    got, want = run(case), oracle_dw(case)
    assert got.dtype is torch.float32
    # x and dy are exact in float32, so nothing is rounded to bfloat16.
    assert parity.error(got, want) <= parity.WINOGRAD["wgrad"]


@pytest.mark.parametrize(
    ("exactness", "fixed", "algo"),
    [
        ("fast", {}, "f4"),
        ("f2", {}, "f4"),
        ("direct", {}, "direct"),
        ("fast", {"stride": 2}, "direct"),
        ("fast", {"R": 1, "S": 1, "pad": (0, 0, 0, 0)}, "direct"),
        ("fast", {"C": 3}, "f4"),
    ],
)
def test_when_it_runs(exactness, fixed, algo):
    sizes = {"N": 2, "H": 8, "W": 8, "C": 16, "K": 16, "R": 3, "S": 3, "pad": (1, 1, 1, 1), **fixed}
    problem = ConvProblem(device="cpu", dtype=torch.float32, w_dtype=torch.float32, **sizes)
    with precision(exactness):
        assert cpu._plan(problem).wgrad_algo == algo


@pytest.mark.parametrize("stride", [1, 2])
def test_direct_is_exact_on_integers(seed, stride):
    case = draw(
        seed,
        stride=stride,
        N=2,
        C=16,
        K=5,
        prologue=False,
        affine=False,
        batch_stats=False,
        act="relu",
        drop_at="none",
        p=0.0,
    )
    for name in ("x", "dy"):
        case.tensors[name] = torch.randint_like(case.tensors[name], -4, 5)
    with precision("direct"):
        reason = parity.mismatch(run(case), oracle_dw(case))
    assert reason is None, reason
