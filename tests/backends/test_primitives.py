"""One body for all backends: each primitive against plain PyTorch in float64, through the operators.

A problem that a backend refuses is a skip with the backend's reason. The bounds are `parity`'s: random problems pooled,
against eager.
"""

from __future__ import annotations

import pytest
import torch
from backends import eager
from backends.harness import ALGORITHM, RUN, draw, run_fprop
from kernels import oracle

from wrn_fast import ops, parity
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

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")


def results(op, case):
    """(name, got, eager, oracle) of every output that the problem asks for."""
    got = RUN[op](case)
    if op == "fprop":
        (y, _, y_act), (peer, _, peer_act) = oracle.fprop(case), eager.fprop(case)
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
    if case.stats is not None:
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
        for case in draw(backend, op, seed, 10, dtype, many=True, **{"want_y": True, **FEATURES[feature]}):
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
    for case in draw(backend, "channel_stats", seed, 10, dtype, many=True, H=9, W=7):
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
        for case in draw(
            backend, "fprop", seed, 10, dtype, many=True, bias=True, want_y=True, want_stats=True, H=9, W=7
        ):
            y, stats, _ = run_fprop(case, bias=case.bias + 1000)
            got, peer, want = deviations(stats, eager.moments(y, stats.dtype), oracle.moments(y.double()))
            pool.add_errors(parity.error(got[1], want[1]), parity.error(peer[1], want[1]))
    assert pool.judge().ok, pool.judge()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_stats", [True, False])
def test_parity_of_bn_bwd_apply(backend, batch_stats, dtype, seed):
    dtype, _ = DTYPES[dtype]
    pool = parity.Pool("dx", dtype)
    for case in draw(backend, "bn_bwd_apply", seed, 10, dtype, many=True, prologue=True, batch_stats=batch_stats):
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
