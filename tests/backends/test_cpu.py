"""The cpu backend against float64: odd shapes, all algorithms and instruction sets, threads, special values."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import oracle

from wrn_fast import WideResNet, backend, native, parity
from wrn_fast.backends import aten, cpu
from wrn_fast.precision import pin_algorithm, precision

pytestmark = pytest.mark.native

DTYPES = (torch.float32, torch.bfloat16)
CASES = 24
# "" is the policy; by it small cases seldom reach F(4x4), so each algorithm is pinned as well.
ALGORITHMS = ("", "f4", "f3", "f2", "direct")


@pytest.fixture
def pin(request, monkeypatch):
    """The algorithm of a test."""
    monkeypatch.setenv("WRN_FAST_PIN_ALGO", request.param)
    return request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What torch.empty and torch.empty_like give is NaN, so that an element nobody writes is seen."""

    def poison(make):
        def poisoned_make(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return poisoned_make

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def own_threads():
    """A test may set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cases(seed, dtype, count=CASES, **fixed):
    """Random small problems; half of them are what Winograd serves, images have 1 to 13 rows and columns."""
    rng = random.Random(seed)
    for _ in range(count):
        shape = {"H": rng.randint(1, 13), "W": rng.randint(1, 13), "C": rng.choice((1, 3, 5, 16, 17, 33, 40))}
        if rng.random() < 0.5:
            shape.update(taps=(3, 3), stride=1, pad=(1, 1, 1, 1))
        elif min(shape["H"], shape["W"]) < 3:
            shape.update(taps=(1, 1))
        yield oracle.draw(rng.randrange(2**31), dtype, **{**shape, **fixed})


def fprop(backend, case):
    t = case.tensors
    return backend.fprop(
        case.problem, t["x"], t["w"], t["stats"], t["gamma"], t["beta"], t["bias"], t["residual"], t["x_short"],
        t["w_short"], t["stats_short"], t["gamma_short"], t["beta_short"], t["rng"], t["out_scale"], t["out_shift"],
    )  # fmt: skip


def source_problem(case):
    """The problem of dgrad: the prologue stays, the epilogue goes, sums where there is a BatchNorm."""
    p = case.problem
    drop = p.drop_at == "prologue"
    return p._replace(
        bias=False, residual=False, short_C=0, short_stride=1, short_prologue=False, short_affine=False,
        short_act="identity", short_eps=0.0, act_out="none", want_y=True, want_stats=p.prologue,
        p=p.p if drop else 0.0, drop_at=p.drop_at if drop else "none",
    )  # fmt: skip


def dgrad(backend, case):
    t = case.tensors
    problem = source_problem(case)
    rng = t["rng"] if problem.p > 0 else None
    return backend.dgrad(problem, t["dy"], t["x"], t["w"], t["stats"], t["gamma"], t["beta"], rng)


def sums_of(case, g):
    g = g.double()
    return torch.stack([g.sum((0, 2, 3)), (g * oracle.xhat(case)).sum((0, 2, 3))])


class Pools(dict):
    """One Pool a (quantity, algorithm)."""

    def add(self, name, algorithm, dtype, fast, eager, oracle_of_fast, oracle_of_eager=None):
        bound = algorithm if algorithm in parity.WINOGRAD and dtype == torch.float32 else None
        pool = self.setdefault((name, algorithm), parity.Pool(f"{name} {algorithm}", dtype, algorithm=bound))
        other = oracle_of_fast if oracle_of_eager is None else oracle_of_eager
        pool.add_errors(parity.error(fast, oracle_of_fast), parity.error(eager, other))

    def judged(self):
        return [pool.judge() for pool in self.values() if len(pool.fast) >= parity.SEEDS]


@pytest.mark.parametrize("pin", ALGORITHMS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_oracle(dtype, pin, seed):
    """y and g against float64; what follows from them (statistics, y_act, sums) against that of the stored tensor."""
    pools = Pools()
    for case in cases(seed, dtype):
        p = case.problem
        y, stats, y_act = fprop(cpu, case)
        y_eager, stats_eager, y_act_eager = fprop(aten, case)
        algorithm = cpu._plan(p).fprop_algo
        want, _, want_act = oracle.fprop(case)
        if p.want_y:
            pools.add("y", algorithm, dtype, y, y_eager, want)
        if p.want_stats and p.N * p.P * p.Q > 1:
            moments = oracle.moments
            pools.add("stats", "", dtype, stats, stats_eager, moments(y.double()), moments(y_eager.double()))
        if want_act is not None and p.want_y:
            of = lambda v, case=case: oracle.y_act(case, v.double())
            pools.add("y_act", "", dtype, y_act, y_act_eager, of(y), of(y_eager))
        elif want_act is not None and algorithm == "direct":
            pools.add("y_act alone", algorithm, dtype, y_act, y_act_eager, want_act)
        g, sums = dgrad(cpu, case)
        g_eager, sums_eager = dgrad(aten, case)
        pools.add("g", cpu._plan(source_problem(case)).dgrad_algo, dtype, g, g_eager, oracle.gradients(case)[0])
        if p.prologue:
            pools.add("sums", "", dtype, sums, sums_eager, sums_of(case, g), sums_of(case, g_eager))
    cells = pools.judged()
    assert len(cells) >= 4, [cell.name for cell in cells]
    assert all(cell.ok for cell in cells), "\n".join(map(str, cells))


@pytest.mark.parametrize("isa", ("avx512", "avx2", "portable"))
def test_every_instruction_set(isa, request):
    """The tests above and below, in a process of their own with each kernel table."""
    if os.environ.get("WRN_FAST_ISA"):
        pytest.skip("this is that process")
    if isa == native.isa():
        pytest.skip("the tests of this process run it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
    chosen = "oracle or integers or special or threads or (test_masks and cpu)"
    files = [__file__, str(Path(__file__).with_name("test_masks.py"))]
    command += ["--seed", str(request.config.option.seed), "-k", chosen, *files]
    environment = {**os.environ, "WRN_FAST_ISA": isa}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if f"this processor lacks {isa}" in result.stdout + result.stderr:
        pytest.skip(f"this processor lacks {isa}")
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("channels", (32, 160, 640))
@pytest.mark.parametrize("algorithm", ("f4", "f3", "f2"))
def test_the_bound_of_winograd(channels, algorithm, seed):
    """relu(normal) input and normal filters, as wide as the widest network: fprop and dgrad within the stated bound."""
    case = oracle.draw(
        seed, torch.float32, taps=(3, 3), stride=1, pad=(1, 1, 1, 1), N=2, H=8, W=8, C=channels, K=channels, act="relu",
        prologue=True, affine=False, batch_stats=False, drop_at="none", p=0.0, bias=False, residual=False, short_C=0,
        short_prologue=False, act_out="none", want_y=True, want_stats=True,
    )  # fmt: skip
    with pin_algorithm(algorithm):
        assert cpu._plan(case.problem).fprop_algo == algorithm
        y, g = fprop(cpu, case)[0], dgrad(cpu, case)[0]
    assert parity.error(y, oracle.fprop(case)[0]) <= parity.WINOGRAD[algorithm]
    assert parity.error(g, oracle.gradients(case)[0]) <= parity.WINOGRAD[algorithm]


@pytest.mark.parametrize("algorithm", ("f4", "f3", "f2", "direct"))
def test_errors_of_a_convolution_have_no_direction(algorithm, seed):
    """The part of fprop's and dgrad's error that scales the whole output is what deep networks would add up.

    The mean over seeds: roundings of the prologue, few because channels are few, scale one draw by 1e-8.
    """
    scales = []
    for i in range(parity.SEEDS):
        case = oracle.draw(
            seed + i, torch.float32, taps=(3, 3), stride=1, pad=(1, 1, 1, 1), N=8, H=16, W=16, C=64, K=64, act="relu",
            prologue=True, affine=False, batch_stats=False, drop_at="none", p=0.0, bias=False, residual=False,
            short_C=0, short_prologue=False, act_out="none", want_y=True, want_stats=True,
        )  # fmt: skip
        with pin_algorithm(algorithm):
            y, g = fprop(cpu, case)[0], dgrad(cpu, case)[0]
        pairs = (y, oracle.fprop(case)[0]), (g, oracle.gradients(case)[0])
        scales.append(torch.stack([((got - want) * want).sum() / want.square().sum() for got, want in pairs]))
    assert torch.stack(scales).mean(0).abs().max() <= parity.SCALE


@pytest.mark.parametrize("channels", (32, 160, 320))
def test_the_bound_of_the_polyphase_form(channels, seed):
    """Stride 2, where it is the policy's choice for fprop alone."""
    case = oracle.draw(
        seed, torch.float32, taps=(3, 3), stride=2, pad=(1, 1, 1, 1), N=2, H=16, W=16, C=channels, K=2 * channels,
        act="relu", prologue=True, affine=False, batch_stats=False, drop_at="none", p=0.0, bias=False, residual=False,
        short_C=0, short_prologue=False, act_out="none", want_y=True, want_stats=True,
    )  # fmt: skip
    plan = cpu._plan(case.problem)
    assert plan.fprop_algo == "f2s2" and plan.dgrad_algo == "direct"
    assert parity.error(fprop(cpu, case)[0], oracle.fprop(case)[0]) <= parity.WINOGRAD["f2s2"]
    with precision("direct"):
        assert cpu._plan(case.problem).fprop_algo == "direct"


@pytest.mark.parametrize("exactness", ("direct", "f2"))
@pytest.mark.parametrize("stride", (1, 2))
def test_small_integers_are_exact(exactness, stride, seed):
    """F(2x2) scales by quarters, the direct kernel by nothing: products and sums of small integers have no rounding."""
    case = oracle.draw(
        seed, torch.float32, taps=(3, 3), stride=stride, pad=(1, 0, 2, 1), H=9, W=11, C=36, K=36, prologue=False,
        act="relu", drop_at="none", p=0.0, bias=True, residual=True, short_C=5, short_stride=1, short_prologue=False,
        short_act="identity", act_out="none", want_y=True, want_stats=False,
    )  # fmt: skip
    for name, t in case.tensors.items():
        if t is not None and t.is_floating_point():
            case.tensors[name] = torch.randint_like(t, -4, 5)
    with precision(exactness):
        algorithm = "f2s2" if exactness == "f2" and stride == 2 else exactness
        assert cpu._plan(case.problem).fprop_algo == algorithm
        assert parity.mismatch(fprop(cpu, case)[0], oracle.fprop(case)[0]) is None
        assert parity.mismatch(dgrad(cpu, case)[0], oracle.gradients(case)[0]) is None


def large(seed, n, **fixed):
    """A problem with more than one chunk of tiles a thread, and everything that an epilogue can do."""
    values = {
        "taps": (3, 3), "stride": 1, "pad": (1, 1, 1, 1), "N": n, "H": 16, "W": 16, "C": 48, "K": 72, "act": "relu",
        "prologue": True, "affine": True, "batch_stats": False, "drop_at": "output", "p": 0.3, "bias": True,
        "residual": True, "short_C": 16, "short_stride": 1, "short_prologue": True, "short_act": "relu",
        "act_out": "silu", "want_y": True, "want_stats": True,
    }  # fmt: skip
    return oracle.draw(seed, torch.float32, **{**values, **fixed})


@pytest.mark.parametrize("pin", ALGORITHMS, indirect=True)
@pytest.mark.parametrize("batch, stride", ((1, 1), (9, 1), (1, 2), (9, 2)))
def test_bits_do_not_depend_on_threads(pin, batch, stride, seed):
    case = large(seed, batch, stride=stride)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append((*fprop(cpu, case), *dgrad(cpu, case)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_image_does_not_depend_on_its_batch_when_pinned(seed, monkeypatch):
    """640 channels at 4x4: the policy takes F(2x2) for one image and F(4x4) for more, unless it is pinned."""
    case = large(seed, 7, H=4, W=4, C=640, K=640, p=0.0, drop_at="none", want_stats=False)
    one = oracle.Case(
        case.problem._replace(N=1),
        {k: v[:1] if k in ("x", "residual", "x_short", "dy") else v for k, v in case.tensors.items()},
    )
    algorithms = lambda: [cpu._plan(c.problem).fprop_algo for c in (case, one)]
    assert algorithms() == ["f4", "f2"]
    monkeypatch.setenv("WRN_FAST_PIN_ALGO", "1")
    assert algorithms() == ["f4", "f4"]
    assert torch.equal(fprop(cpu, case)[0][:1], fprop(cpu, one)[0])


@pytest.mark.parametrize("pin", ALGORITHMS, indirect=True)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("act", ("relu", "identity"))
def test_special_values(pin, value, act, seed):
    """A NaN or infinity of x reaches every output that eager gives one; direct gives eager's own pattern."""
    case = large(seed, 2, stride=1, act=act, p=0.0, drop_at="none", act_out="none", want_stats=False, residual=False)
    case.x[0, 3, 5, 6] = value
    case.dy[1, 7, 2, 3] = value
    pairs = [(fprop(cpu, case)[0], fprop(aten, case)[0]), (dgrad(cpu, case)[0], dgrad(aten, case)[0])]
    for got, want in pairs:
        if pin == "direct":
            assert torch.equal(got.isfinite(), want.isfinite())
            assert torch.equal(got.isnan(), want.isnan())
        assert not (got.isfinite() & ~want.isfinite()).any()
        assert got.isfinite().double().mean() > 0.5


def test_statistics_of_a_large_mean(seed):
    """Mean 10,000 beside a deviation of 1: the variance keeps its digits."""
    case = large(seed, 4, short_C=0, drop_at="none", p=0.0, act_out="none", bias=False)
    case.tensors["residual"] = case.residual + 1e4
    y, stats, _ = fprop(cpu, case)
    want = oracle.moments(y.double())
    assert parity.error(stats[0], want[0]) <= parity.UNIT[torch.float32]
    assert parity.error(stats[1], want[1]) <= 8 * parity.UNIT[torch.float32]


def test_dropout_is_the_mask_of_every_backend(seed):
    """With p the same elements vanish in the prologue, the output and y_act as the definition says."""
    for drop_at in ("prologue", "output", "output_act"):
        case = large(seed, 2, drop_at=drop_at, p=0.4, act_out="identity", want_stats=False)
        y, _, y_act = fprop(cpu, case)
        want, _, want_act = oracle.fprop(case)
        assert parity.error(y, want) <= parity.WINOGRAD["f4"]
        assert torch.equal(y_act == 0, want_act == 0)


def test_a_chain_keeps_its_activations_up_to_a_limit(seed, monkeypatch):
    """The block is the calling thread's, and the next call's bits do not depend on what is left in it."""
    model = WideResNet(10, 10, 1, 0.0).eval()
    x = torch.randn(2, 3, 32, 32)
    held = []
    with torch.no_grad(), backend("cpu"):
        want = model(x)[0]
        for limit in (cpu.KEPT_BYTES, 0):
            monkeypatch.setattr(cpu, "KEPT_BYTES", limit)
            native.extension().scratch_release()
            assert native.scratch_bytes() == 0
            assert torch.equal(model(x)[0], want)
            held.append(native.scratch_bytes())
            assert torch.equal(model(x)[0], want) and native.scratch_bytes() == held[-1]
    # inner activations and those of two blocks in turns, 2 x 16 x 32 x 32 float32 each
    assert held[0] - held[1] >= 2 * 4 * 2 * 16 * 32 * 32


@pytest.mark.parametrize("count", (1, 1 << 19, (1 << 20) + 3))
def test_large_blocks_begin_on_huge_pages(count):
    memory = native.floats(count)
    assert memory.shape == (count,) and memory.dtype == torch.float32 and memory.is_contiguous()
    assert memory.data_ptr() % (native.extension().HUGE_PAGE if 4 * count >= native.extension().HUGE_PAGE else 64) == 0
    assert not memory.fill_(1.0).ne(1.0).any()


def test_what_is_not_served():
    problem = oracle.draw(1, torch.float32).problem
    assert cpu.unsupported("fprop", problem) is None
    assert "float64" in cpu.unsupported("fprop", problem._replace(dtype=torch.float64, w_dtype=torch.float64))
    assert "float16" in cpu.unsupported("fprop", problem._replace(dtype=torch.float16, w_dtype=torch.float16))
    assert "cuda" in cpu.unsupported("fprop", problem._replace(device="cuda"))
    assert "49 taps" in cpu.unsupported("fprop", problem._replace(R=8, S=8))
    assert cpu.unsupported("fprop", problem._replace(R=7, S=7)) is None


def test_an_unknown_instruction_set_is_a_reason():
    code = "from wrn_fast import native; print(native.load()[1])"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "WRN_FAST_ISA": "mmx"}, capture_output=True, text=True
    )
    assert "WRN_FAST_ISA: expected avx512, avx2 or portable" in result.stdout, result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes(seed):
    """OpenMP's threads do not survive a fork: the child uses one, and gives the same bits."""
    code = (
        "import os, sys, torch\n"
        "from wrn_fast.functional import bn_act_conv\n"
        "torch.set_num_threads(2)\n"
        # small: torch's own copies run in threads too
        "x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)\n"
        "w = torch.randn(32, 32, 3, 3)\n"
        "y = bn_act_conv(x, w, act='identity').y\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if torch.equal(bn_act_conv(x, w, act='identity').y, y) else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
