"""One body for all backends: each primitive against plain PyTorch in float64, through the operators.

A problem that a backend refuses is a skip with the backend's reason. The bounds are `parity`'s: pooled over random
problems against eager, threshold 0 where small integers make the result exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import eager
from kernels import oracle

from wrn_fast import dispatch, ops, parity
from wrn_fast.backends import BACKENDS
from wrn_fast.precision import precision
from wrn_fast.random import keep_mask

DTYPES = {
    "float32": (torch.float32, "fast"),
    "float32 direct": (torch.float32, "direct"),
    "bfloat16": (torch.bfloat16, "fast"),
    "float16": (torch.float16, "fast"),
    "float64": (torch.float64, "fast"),
}
# Drawn problems have a random choice of everything; each feature is pinned on in cells of its own.
FEATURES = {
    "anything": {},
    "identity": {"act": "identity"},
    "relu": {"act": "relu"},
    "silu": {"act": "silu"},
    "leaky_relu": {"act": "leaky_relu"},
    "no prologue": {"prologue": False, "affine": False, "batch_stats": False, "act": "identity"},
    "stride 2": {"stride": 2, "taps": (3, 3)},
    "four-sided padding": {"pad": (0, 3, 2, 1), "taps": (3, 3)},
    "1x1": {"taps": (1, 1), "pad": (0, 0, 0, 0)},
    "residual and bias": {"residual": True, "bias": True},
    "raw shortcut": {"short_C": 16, "short_prologue": False, "short_affine": False, "short_act": "identity"},
    "activated shortcut": {"short_C": 18, "short_prologue": True, "short_affine": True, "short_act": "relu"},
    "dropout": {"p": 0.3, "drop_at": "prologue"},
    "dropout of the output": {"p": 0.3, "drop_at": "output"},
    "dropout of the second output": {"p": 0.3, "drop_at": "output_act", "act_out": "relu"},
    "second output alone": {"act_out": "silu", "want_y": False, "drop_at": "none", "p": 0.0},
    "statistics": {"want_stats": True, "prologue": True, "C": 23},
    "tiles": {"H": 13, "W": 18, "C": 40, "K": 72, "taps": (3, 3), "pad": (1, 1, 1, 1), "stride": 1},
}  # fmt: skip
OF_FPROP = (
    "residual and bias", "raw shortcut", "activated shortcut", "dropout of the output", "dropout of the second output",
    "second output alone",
)  # fmt: skip
# Relu's derivative is a lottery where the pre-activation is within rounding of 0.
KINK = 1e-5
ALGORITHM = {"fprop": "f4", "dgrad": "f4", "wgrad": "wgrad"}

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """A backend that is alone in the selection; what it allocates is full of NaN before it writes."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with dispatch.backend(request.param):
        yield request.param
    torch.use_deterministic_algorithms(before)


def device_of(backend):
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def on_device(case, backend):
    device = device_of(backend)
    tensors = {name: None if v is None else v.to(device) for name, v in case.tensors.items()}
    return oracle.Case(case.problem._replace(device=device), tensors)


def draw(backend, op, seed, count, dtype, **fixed):
    """`count` random problems that the backend serves; a skip with its reason where it serves none."""
    found, reason = [], None
    for i in range(6 * count):
        case = on_device(oracle.draw(seed + i, dtype, **fixed), backend)
        if op == "dgrad" and near_kink(case):
            continue
        reason = dispatch.load(backend).unsupported(op, case.problem)
        if reason is None:
            found.append(case)
        if len(found) == count:
            return found
    if found:
        pytest.fail(f"{backend} serves {len(found)} of {6 * count} problems, too few to pool: {reason}")
    pytest.skip(f"{backend}: {reason}")


def near_kink(case):
    p = case.problem
    v = oracle.normal(case.x.double(), case.stats, case.gamma, case.beta, p.eps)
    return p.act in ("relu", "leaky_relu") and bool((v.abs() < KINK).any())


# The primitives through the operators.


def run_fprop(case, **replaced):
    t, p = {**case.tensors, **replaced}, case.problem
    return ops.fprop(
        *(t.get(name) for name in ops.TENSORS), p.stride, list(p.pad), p.act, p.slope, p.eps, p.batch_stats, p.p,
        p.drop_at, p.short_stride, p.short_act, p.short_eps, False, p.act_out, p.want_y, p.want_stats,
    )  # fmt: skip


def source_scalars(p):
    return p.stride, list(p.pad), p.act, p.slope, p.eps, p.p if p.drop_at == "prologue" else 0.0


def run_dgrad(case, **replaced):
    t = {**case.tensors, **replaced}
    tensors = (t[name] for name in ("dy", "x", "w", "stats", "gamma", "beta", "rng"))
    return ops.dgrad(*tensors, *source_scalars(case.problem), t["stats"] is not None)


def run_wgrad(case, **replaced):
    t = {**case.tensors, **replaced}
    tensors = (t[name] for name in ("dy", "x", "stats", "gamma", "beta", "rng"))
    return (ops.wgrad(*tensors, list(t["w"].shape), t["w"].dtype, *source_scalars(case.problem)),)


RUN = {"fprop": run_fprop, "dgrad": run_dgrad, "wgrad": run_wgrad}


def results(op, case):
    """(name, got, eager, oracle) of every output that the problem asks for."""
    got = RUN[op](case)
    if op == "fprop":
        (y, _, y_act), (peer, peer_stats, peer_act) = oracle.fprop(case), eager.fprop(case)
        if case.problem.want_y:
            yield "y", got[0], peer, y
        if case.problem.want_stats:
            # Statistics and sums are those of the tensor as it was written, or BatchNorm's terms would not cancel.
            yield "stats", got[1], eager.moments(got[0], got[1].dtype), oracle.moments(got[0].double())
        if case.problem.act_out != "none":
            yield "y_act", got[2], peer_act, y_act
        return
    (g, dw), (peer_g, peer_dw) = oracle.gradients(case), eager.gradients(case)
    if op == "wgrad":
        yield "dw", got[0], peer_dw, dw
        return
    yield "g", got[0], peer_g, g
    # The sum of a few values of either sign is all cancellation; the norm of many such sums is not.
    if case.stats is not None and case.problem.C >= 16:
        g = got[0].double()
        exact = torch.stack([g.sum((0, 2, 3)), (g * oracle.xhat(case)).sum((0, 2, 3))])
        yield "sums_g", got[1], eager.sums(case, got[0]), exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "op, feature", [(op, feature) for op in RUN for feature in FEATURES if op == "fprop" or feature not in OF_FPROP]
)
def test_parity(backend, op, feature, dtype, seed):
    dtype, exactness = DTYPES[dtype]
    pools = {}
    algorithm = ALGORITHM[op] if dtype == torch.float32 and exactness == "fast" else None
    with precision(exactness):
        for case in draw(backend, op, seed, 10, dtype, **{"want_y": True, **FEATURES[feature]}):
            for name, got, peer, want in results(op, case):
                pool = pools.setdefault(name, parity.Pool(f"{op} {name}", dtype, algorithm=algorithm))
                pool.add_errors(parity.error(got, want), parity.error(peer, want))
    cells = [pool.judge() for pool in pools.values() if len(pool.fast) >= parity.SEEDS]
    assert cells
    assert all(cell.ok for cell in cells), "\n".join(map(str, cells))


def deviations(stats, *others):
    """Mean and standard deviation, which is what BatchNorm subtracts and divides by."""
    return [torch.stack([v[0].double(), v[1].double().sqrt()]) for v in (stats, *others)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_parity_of_channel_stats(backend, mean, dtype, seed):
    """Also of a mean that dwarfs the deviation."""
    dtype, _ = DTYPES[dtype]
    pools = [parity.Pool(name, dtype) for name in ("both", "deviation")]
    for case in draw(backend, "channel_stats", seed, 10, dtype, H=9, W=7):
        x = case.x + mean
        compared = deviations(
            ops.channel_stats(x), eager.moments(x, case.problem.stats_dtype), oracle.moments(x.double())
        )
        for pool, (got, peer, want) in zip(pools, (compared, [v[1] for v in compared])):
            pool.add_errors(parity.error(got, want), parity.error(peer, want))
    for pool in pools:
        assert pool.judge().ok, pool.judge()


@pytest.mark.parametrize("dtype", ["float32", "float32 direct", "float64"])
def test_statistics_of_the_output_keep_their_digits(backend, dtype, seed):
    dtype, exactness = DTYPES[dtype]
    pool = parity.Pool("deviation", dtype)
    with precision(exactness):
        for case in draw(backend, "fprop", seed, 10, dtype, bias=True, want_y=True, want_stats=True, H=9, W=7):
            y, stats, _ = run_fprop(case, bias=case.bias + 1000)
            got, peer, want = deviations(stats, eager.moments(y, stats.dtype), oracle.moments(y.double()))
            pool.add_errors(parity.error(got[1], want[1]), parity.error(peer[1], want[1]))
    assert pool.judge().ok, pool.judge()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_stats", [True, False])
def test_parity_of_bn_bwd_apply(backend, batch_stats, dtype, seed):
    dtype, _ = DTYPES[dtype]
    pool = parity.Pool("dx", dtype)
    for case in draw(backend, "bn_bwd_apply", seed, 10, dtype, prologue=True, batch_stats=batch_stats):
        g = torch.randn(case.x.shape, dtype=torch.float64).to(case.x)
        g = g.contiguous(memory_format=torch.channels_last)
        sums = torch.stack([g.double().sum((0, 2, 3)), (g.double() * oracle.xhat(case)).sum((0, 2, 3))])
        m = g.numel() // g.shape[1]
        scale = (case.stats[1].double() + case.problem.eps).rsqrt()
        scale = scale if case.gamma is None else scale * case.gamma.double()
        want = g.double()
        if batch_stats:
            want = want - (sums[0][:, None, None] + oracle.xhat(case) * sums[1][:, None, None]) / m
        want = want * scale[:, None, None]
        given = sums.to(case.stats.dtype) if batch_stats else None
        got = ops.bn_bwd_apply(g, case.x, case.stats, case.gamma, given, case.problem.eps, batch_stats)
        pool.add_errors(parity.error(got, want), parity.error(eager.bn_bwd_apply(case, g), want))
    assert pool.judge().ok, pool.judge()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.3, 0.999, 1.0])
def test_parity_of_dropout(backend, p, dtype, seed):
    """The kept elements are those of the definition, bit for bit."""
    dtype, _ = DTYPES[dtype]
    for case in draw(backend, "dropout", seed, 4, dtype):
        rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=case.x.device)
        x = case.x.abs() + 1
        y = ops.dropout(x, rng, p)
        kept = keep_mask(x.shape, rng, p)
        assert torch.equal(y != 0, kept)
        assert parity.error(y[kept], x[kept].double() / (1 - p)) <= 2 * parity.UNIT.get(dtype, parity.FLOAT64)


@pytest.mark.parametrize("op", RUN)
@pytest.mark.parametrize("where", ["prologue", "output"])
def test_everything_dropped(backend, op, where, seed):
    """p = 1: the convolution contributes nothing; bias, shortcut and residual stay unless they are dropped too."""
    case = draw(backend, op, seed, 1, torch.float32, p=1.0, drop_at=where, act_out="none", want_y=True, bias=True)[0]
    got = RUN[op](case)
    if op == "fprop":
        assert parity.error(got[0], oracle.fprop(case)[0]) <= parity.WINOGRAD["f4"]
        assert where == "prologue" or not got[0].any()
    elif where == "prologue":
        assert all(not v.any() for v in got)


# Exact integers.


def integers(*shape, most, dtype=torch.float32):
    return torch.randint(-most, most + 1, shape).to(dtype).contiguous(memory_format=torch.channels_last)


def integer_case(dtype, n, c, k, h, w, stride, pad, most=1):
    """BatchNorm with a mean of whole numbers, variance 1/4 and powers of two for gamma: every sum is exact in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    problem = oracle.draw(0, dtype, device="cpu", N=n, H=h, W=w, C=c, K=k, taps=(3, 3), stride=stride, pad=pad,
                          act="relu", eps=0.0, prologue=True, affine=True, batch_stats=False, p=0.0, drop_at="none",
                          bias=True, residual=True, short_C=0, act_out="none", want_y=True, want_stats=False,
                          w_dtype=dtype).problem  # fmt: skip
    vector = lambda m: torch.randint(-1, 2, (m,)).to(wide)
    tensors = {
        "x": integers(n, c, h, w, most=2 * most, dtype=dtype),
        "w": integers(k, c, 3, 3, most=most, dtype=dtype),
        "dy": integers(n, k, problem.P, problem.Q, most=most, dtype=dtype),
        "stats": torch.stack([vector(c), torch.full((c,), 0.25, dtype=wide)]),
        "gamma": torch.tensor([0.5, -0.5, 1.0]).to(wide)[torch.randint(0, 3, (c,))],
        "beta": vector(c),
        "bias": vector(k),
        "residual": integers(n, k, problem.P, problem.Q, most=most, dtype=dtype),
        **dict.fromkeys(
            ("x_short", "w_short", "stats_short", "gamma_short", "beta_short", "rng", "out_scale", "out_shift")
        ),
    }
    return oracle.Case(problem, tensors)


IMAGES = list(itertools.product(range(1, 14), range(1, 14)))
PADS = {"no padding": (0, 0, 0, 0), "padding 1": (1, 1, 1, 1), "right and bottom": (0, 1, 0, 1)}


@pytest.mark.parametrize("exactness", ["direct", "fast"])
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", RUN)
def test_integers_are_exact_for_every_small_image(backend, op, stride, pad, exactness, seed):
    """Threshold 0 without Winograd; with it, an error that any misplaced element would show in full."""
    channels = [(1, 5), (3, 1), (4, 8), (17, 3), (8, 16), (2, 33)]
    reason = None
    ran = 0
    with precision(exactness):
        for i, (h, w) in enumerate(IMAGES):
            if min(h + PADS[pad][2] + PADS[pad][3], w + PADS[pad][0] + PADS[pad][1]) < 3:
                continue
            c, k = channels[(i + seed) % len(channels)]
            case = on_device(integer_case(torch.float32, 1 + i % 2, c, k, h, w, stride, PADS[pad]), backend)
            reason = dispatch.load(backend).unsupported(op, case.problem)
            if reason is not None:
                continue
            ran += 1
            got = RUN[op](case)[0]
            want = oracle.fprop(case)[0] if op == "fprop" else oracle.gradients(case)[op == "wgrad"]
            if exactness == "fast":
                assert parity.error(got, want) <= parity.WINOGRAD[ALGORITHM[op]], (h, w, c, k)
                got = (got * 4).round() / 4
            assert torch.equal(got.double(), want), (h, w, c, k)
    if not ran:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", RUN)
def test_integers_too_wide_for_the_dtype_are_rounded_once(backend, op, dtype):
    """Eager rounds its convolution before the residual is added, so no ratio to eager can see the second rounding."""
    if backend == "aten" and (op == "fprop" or dtype == torch.float16):
        pytest.skip(
            "aten: the library rounds its convolution before bias and residual are added, partial sums in float16"
        )
    case = on_device(integer_case(dtype, 2, 48, 40, 11, 9, 1, (1, 1, 1, 1), most=12), backend)
    reason = dispatch.load(backend).unsupported(op, case.problem)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with precision("direct"):
        got = RUN[op](case)[0]
    want = oracle.fprop(case)[0] if op == "fprop" else oracle.gradients(case)[op == "wgrad"]
    assert (want.to(dtype).double() != want).any()
    assert parity.mismatch(got, want.to(dtype)) is None


# Special values, layouts, order of computation.


@pytest.mark.parametrize("exactness", ["direct", "fast"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", ["identity", "relu", "silu", "leaky_relu"])
def test_nan_and_infinity_travel_as_in_eager(backend, act, value, exactness, seed):
    """Never at fewer positions; at more only where Winograd spreads them over its tiles."""
    fixed = {"act": act, "H": 9, "W": 11, "taps": (3, 3), "pad": (1, 1, 1, 1), "p": 0.0, "drop_at": "none",
             "act_out": "none", "want_y": True}  # fmt: skip
    for case in draw(backend, "fprop", seed, 2, torch.float32, **fixed):
        for _ in range(3):
            case.x[tuple(int(torch.randint(0, size, ())) for size in case.x.shape)] = value
        with precision(exactness):
            got = run_fprop(case)[0]
        want = eager.fprop(case)[0]
        assert (got.isfinite() <= want.isfinite()).all()
        if exactness == "direct":
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isfinite(), want.isfinite())
            infinite = want.isinf()
            assert torch.equal(got[infinite], want[infinite])


@pytest.mark.parametrize("op", ["dgrad", "wgrad"])
def test_nan_in_the_gradient_is_not_swallowed(backend, op, seed):
    fixed = {"act": "identity", "p": 0.0, "drop_at": "none", "stride": 1, "taps": (3, 3), "pad": (1, 1, 1, 1)}
    case = draw(backend, op, seed, 1, torch.float32, **fixed)[0]
    case.dy[0, 0, 1, 1] = float("nan")
    got, want = RUN[op](case)[0], eager.gradients(case)[op == "wgrad"]
    assert (got.isfinite() <= want.isfinite()).all()


def arrange(v, how):
    """The same values under other strides."""
    if v is None or not v.is_floating_point():
        return v
    if v.dim() != 4:
        return torch.stack([v, v], dim=-1)[..., 0]
    if how == "NCHW":
        return v.contiguous()
    if how == "sliced":
        big = torch.full([size + 3 for size in v.shape], float("nan"), dtype=v.dtype, device=v.device)
        view = big[tuple(slice(1, 1 + size) for size in v.shape)]
        return view.copy_(v)
    if how == "transposed":
        return v.transpose(2, 3).contiguous().transpose(2, 3)
    return v[:1, :, :, :1].expand(v.shape)


@pytest.mark.parametrize("how", ["NCHW", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("op", RUN)
def test_strides_do_not_matter(backend, op, how, seed):
    for case in draw(backend, op, seed, 8, torch.float32):
        arranged = {name: arrange(v, how) for name, v in case.tensors.items()}
        if how == "expanded":
            case.tensors.update({name: v if v is None else v.clone() for name, v in arranged.items()})
            arranged["w"] = case.tensors["w"]
        before = {name: None if v is None else v.clone() for name, v in arranged.items()}
        got, want = RUN[op](case, **arranged), RUN[op](case)
        for a, b in zip(got, want):
            # The library's convolution adds in another order for a filter in another layout.
            assert parity.error(a, b.double()) <= parity.WINOGRAD["f4"] if backend == "aten" else torch.equal(a, b)
        assert all(v is None or torch.equal(arranged[name], v) for name, v in before.items())


@pytest.mark.parametrize("op", RUN)
def test_bits_do_not_depend_on_threads_or_on_the_run(backend, op, seed):
    threads = torch.get_num_threads()
    for case in draw(backend, op, seed, 2, torch.float32, N=3, H=17, W=14, C=40, K=48, taps=(3, 3), want_stats=True,
                     want_y=True):  # fmt: skip
        outputs = []
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(RUN[op](case))
        torch.set_num_threads(threads)
        # The library does not promise the second half for its own convolutions.
        for other in outputs[1 : 2 if backend == "aten" else None]:
            assert all(map(torch.equal, outputs[0], other))


@pytest.mark.parametrize("op", RUN)
def test_images_do_not_depend_on_their_neighbours(backend, op, seed):
    """fprop and dgrad image by image equal the batch, with the algorithm pinned; wgrad is their sum."""
    fixed = {
        "N": 3,
        "taps": (3, 3),
        "p": 0.0,
        "drop_at": "none",
        "want_stats": False,
        "act_out": "none",
        "want_y": True,
    }
    with precision("direct"):
        for case in draw(backend, op, seed, 4, torch.float32, **fixed):
            whole = RUN[op](case)[0]
            batched = ("x", "dy", "residual", "x_short")
            parts = []
            for i in range(3):
                one = {n: None if v is None else v[i : i + 1] for n, v in case.tensors.items() if n in batched}
                parts.append(RUN[op](oracle.Case(case.problem._replace(N=1), {**case.tensors, **one}))[0])
            want = sum(part.double() for part in parts) if op == "wgrad" else torch.cat(parts).double()
            assert parity.error(whole, want) <= parity.WINOGRAD[ALGORITHM[op]]


@pytest.mark.parametrize("op", RUN)
def test_empty_batch(backend, op):
    case = draw(backend, op, 1, 1, torch.float32, drop_at="none", p=0.0, act_out="none", want_y=True)[0]
    empty = {name: v[:0] for name in ("x", "dy", "residual", "x_short") if (v := case.tensors[name]) is not None}
    got = RUN[op](case, **empty)[0]
    if op == "wgrad":
        assert got.shape == case.w.shape and not got.any()
    else:
        assert got.shape == (0, *RUN[op](case)[0].shape[1:])
