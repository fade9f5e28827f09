"""The bounds: right code passes whatever the seed, planted faults do not, and luck is taken for neither."""

import math

import pytest
import torch
import torch.nn.functional as F

from wrn_fast import WrnFastError, parity

F32, F64 = torch.float32, torch.float64


def gemm(generator):
    """(a, b, oracle) of a matrix product of 700 terms."""
    a, b = (torch.randn(shape, generator=generator) for shape in ((48, 700), (700, 48)))
    return a, b, a.double() @ b.double()


def reordered(a, b, generator):
    """The same product, summed in another order: as right as eager."""
    order = torch.randperm(a.shape[1], generator=generator)
    return a[:, order] @ b[order]


def judged(fast, seeds, dtype=F32, **options):
    """The cell of `fast(a, b, generator)` over the seeds."""
    pool = parity.Pool("product", dtype, **options)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        a, b, want = gemm(generator)
        pool.add(fast(a.to(dtype), b.to(dtype), generator), a.to(dtype) @ b.to(dtype), want)
    return pool.judge()


def test_right_code_passes_over_many_batches_of_seeds(seed):
    for batch in range(30):
        cell = judged(reordered, range(seed + 8 * batch, seed + 8 * batch + 8))
        assert cell.ok, cell
        assert 0.5 < cell.ratio < 1.25


@pytest.mark.parametrize("factor", [1 + 2.0**-20, 1 - 1e-3, -1.0, 0.0])
def test_a_wrong_scale_is_out_of_bounds(seed, factor):
    cell = judged(lambda a, b, g: reordered(a, b, g) * factor, range(seed, seed + 8))
    assert cell.verdict == parity.OUT_OF_BOUNDS and cell.err_fast > cell.bound


def test_one_wrong_seed_of_eight_is_out_of_bounds_when_pooled(seed):
    seen = []

    def sometimes(a, b, generator):
        seen.append(None)
        return reordered(a, b, generator) * (1 + 1e-5 * (len(seen) == 5))

    assert judged(sometimes, range(seed, seed + 8)).verdict == parity.OUT_OF_BOUNDS


def test_the_unit_of_each_dtype_is_its_roundoff():
    for dtype, unit in parity.UNIT.items():
        assert unit == torch.finfo(dtype).eps / 2
        assert (torch.tensor(1.0, dtype=dtype) + unit / 2).item() == 1.0


def test_float64_has_one_absolute_bound(seed):
    right = judged(lambda a, b, g: reordered(a, b, g), [seed], F64)
    wrong = judged(lambda a, b, g: reordered(a, b, g) * (1 + 1e-11), [seed], F64)
    assert right.ok and wrong.verdict == parity.OUT_OF_BOUNDS and right.bound == wrong.bound == parity.FLOAT64


def test_an_algorithm_has_its_own_bound():
    for name, bound in parity.WINOGRAD.items():
        for factor, verdict in ((0.9, parity.OK), (1.1, parity.OUT_OF_BOUNDS)):
            pool = parity.Pool("fprop", F32, algorithm=name)
            for _ in range(parity.SEEDS):
                pool.add_errors(bound * factor, 1e-8)
            assert pool.judge().verdict == verdict
        pool = parity.Pool("fprop", F64, algorithm=name)
        pool.add_errors(bound * 0.9, 1e-8)
        assert pool.judge().verdict == parity.OUT_OF_BOUNDS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rule", ["pooled", "median"])
def test_not_a_number_is_out_of_bounds_even_where_eager_has_it(seed, bad, rule):
    pool = parity.Pool("x", F32, rule)
    for _ in range(parity.SEEDS):
        v = torch.randn(9)
        v[3] = bad
        pool.add(v, v, torch.randn(9).double())
    assert pool.judge().verdict == parity.OUT_OF_BOUNDS


def test_few_seeds_and_bad_words_raise():
    pool = parity.Pool("x", F32)
    for _ in range(parity.SEEDS - 1):
        pool.add(torch.ones(2), torch.ones(2), torch.ones(2).double())
    with pytest.raises(WrnFastError, match=r"`seeds`: expected at least 8.*got 7"):
        pool.judge()
    with pytest.raises(WrnFastError, match="`dtype`"):
        parity.Pool("x", torch.int32)
    with pytest.raises(WrnFastError, match="`rule`"):
        parity.Pool("x", F32, "mean")
    with pytest.raises(WrnFastError, match="`algorithm`"):
        parity.Pool("x", F32, algorithm="f6")


def test_mostly_zero_is_mistrusted(seed):
    for share, verdict in ((0.5, parity.OK), (0.8, parity.MISTRUSTED)):
        pool = parity.Pool("x", F32)
        for _ in range(parity.SEEDS):
            want = torch.randn(1000)
            want[: int(1000 * share)] = 0.0
            pool.add(want, want, want.double())
        cell = pool.judge()
        assert cell.verdict == verdict and cell.ok == (verdict == parity.OK)


def test_error_is_relative_and_refuses_what_it_cannot_measure():
    one, zero = torch.ones(4), torch.zeros(4)
    assert parity.error(one * 1.5, one) == 0.5
    assert parity.error(zero, zero) == parity.error(one[:0], one[:0]) == 0.0
    assert parity.error(one, zero) == parity.error(one, one[:3]) == parity.error(one, one[None]) == math.inf
    assert (
        parity.error(one / zero, one)
        == parity.error(one, one / zero)
        == parity.error(one / zero, one / zero)
        == math.inf
    )
    # Computed in float64: float32 would overflow.
    assert parity.error(one * 1e30, one * 2e30) == pytest.approx(0.5)


def test_mismatch_has_threshold_zero():
    v = torch.arange(-6.0, 6.0).view(3, 4)
    assert parity.mismatch(v, v.double()) is None
    assert parity.mismatch(v.bfloat16(), v) is None
    assert parity.mismatch(v * -0.0, v * 0.0).startswith(parity.MISTRUSTED)
    wrong = v.clone()
    wrong[1, 2] = torch.nextafter(wrong[1, 2], torch.tensor(9.0))
    assert "1 of 12 values differ, the first at (1, 2)" in parity.mismatch(wrong, v)
    assert "expected shape" in parity.mismatch(v.T, v)
    nan = torch.where(v == 3, math.nan, v)
    assert parity.mismatch(nan, nan) is None
    assert "1 of 12" in parity.mismatch(v, nan) and "1 of 12" in parity.mismatch(nan, v)


# The median rule: errors of a ReLU network's gradients have two sizes, without and with a flipped sign.


def lottery(generator, chance, scale=1.0):
    """An error as eager's own: 2e-6 without a flip, 1e-4 to 1e-2 with one."""
    u = torch.rand(3, generator=generator).tolist()
    return scale * (2e-6 * (0.9 + 0.2 * u[1]) if u[0] > chance else 10 ** (-4 + 2 * u[1]))


def lottery_cell(seed, chance, scale=1.0, least=0.0):
    generator = torch.Generator().manual_seed(seed)
    pool = parity.Pool("gradient", F32, "median")
    for _ in range(parity.SEEDS):
        pool.add_errors(max(least, lottery(generator, chance, scale)), lottery(generator, chance))
    return pool.judge()


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_luck_is_not_taken_for_a_fault(seed, chance):
    cells = [lottery_cell(seed + i, chance) for i in range(500)]
    assert sum(not cell.ok for cell in cells) <= 4
    if 0.2 < chance < 1.0:
        assert any(cell.err_fast > cell.bound for cell in cells), "the plain median would have been enough"


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 1.0])
def test_a_fault_is_not_taken_for_luck(seed, chance):
    for i in range(50):
        assert lottery_cell(seed + i, chance, least=0.02).verdict == parity.OUT_OF_BOUNDS
    assert lottery_cell(seed, 0.0, scale=1.6).verdict == parity.OUT_OF_BOUNDS


def test_the_median_of_float64_is_absolute():
    pool = parity.Pool("gradient", F64, "median")
    for e in (1e-15, 1e-15, 1e-3):
        pool.add_errors(e, 1e-15)
    assert pool.judge().ok
    pool.add_errors(1e-11, 1e-15)
    pool.add_errors(1e-11, 1e-15)
    assert pool.judge().verdict == parity.OUT_OF_BOUNDS


# A tiny block in plain PyTorch with faults planted in it: which of them the pooled ratio sees.


class ReluSlopeOneAtZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.relu()

    @staticmethod
    def backward(ctx, dy):
        return dy * (ctx.saved_tensors[0] >= 0)


def block(x, p, *, fault=None, act=F.silu):
    """y and the running variance of y = conv(act(bn(x))) + x in training."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    n = x.numel() // x.shape[1]
    eps = {"eps 1e-3": 1e-3, "eps 1e-4": 1e-4}.get(fault, 1e-5)
    root = (var + eps).sqrt() if fault != "eps outside the root" else var.sqrt() + eps
    xhat = (x - mean[:, None, None]) / root[:, None, None]
    if fault == "statistics without gradient":
        xhat = (x - mean.detach()[:, None, None]) / root.detach()[:, None, None]
    gamma = p["gamma"].abs() if fault == "sign of gamma lost" else p["gamma"]
    a = act(xhat * gamma[:, None, None] + (0.0 if fault == "beta lost" else p["beta"])[..., None, None])
    w = p["w"].transpose(2, 3) if fault == "taps transposed" else p["w"]
    pad = F.pad(a, (1, 1, 1, 1), value=0.0)
    if fault == "padding before the prologue":
        pad = F.pad(a, (1, 1, 1, 1), mode="replicate")
    y = F.conv2d(pad, w)
    if fault != "residual missing":
        y = y + (a if fault == "residual activated" else x)
    running = 0.9 * p["running_var"] + 0.1 * var.detach() * (1.0 if fault == "biased running variance" else n / (n - 1))
    if fault == "momentum swapped":
        running = 0.1 * p["running_var"] + 0.9 * var.detach() * n / (n - 1)
    return y, running


FAULTS = [
    "eps 1e-3",
    "eps 1e-4",
    "eps outside the root",
    "statistics without gradient",
    "sign of gamma lost",
    "taps transposed",
    "padding before the prologue",
    "residual missing",
    "residual activated",
    "biased running variance",
    "momentum swapped",
]


def block_cells(seed, fault, act=F.silu):
    """Cells of output, running variance and gradients of the block."""
    pools = {}
    for i in range(parity.SEEDS):
        generator = torch.Generator().manual_seed(seed + i)
        c = 8
        p = {
            "gamma": torch.rand(c, generator=generator) * torch.tensor([1.0, -1.0]).repeat(c // 2),
            "beta": torch.randn(c, generator=generator),
            "w": torch.randn(c, c, 3, 3, generator=generator),
            "running_var": torch.rand(c, generator=generator) + 0.5,
        }
        x, dy = (torch.randn(3, c, 6, 7, generator=generator) for _ in range(2))
        # A channel whose normalised values are exactly 0 in the beta of 0 that follows: relu'(0) must be 0.
        x[:, 0], p["beta"][0] = 1.5, 0.0

        def run(dtype, fault=None, act=act, x=x, dy=dy, p=p):
            leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in (p | {"x": x}).items()}
            y, running = block(leaves["x"], leaves, fault=fault, act=act)
            y.backward(dy.to(dtype))
            return {"y": y, "running_var": running} | {
                f"d{k}": leaves[k].grad for k in ("x", "gamma", "beta", "w") if leaves[k].grad is not None
            }

        want, eager, fast = run(F64), run(F32), run(F32, fault)
        for name in want:
            pools.setdefault(name, parity.Pool(name, F32)).add(fast[name], eager[name], want[name])
    return {name: pool.judge() for name, pool in pools.items()}


def test_the_block_without_a_fault_is_within_the_bounds(seed):
    cells = block_cells(seed, None)
    assert set(cells) == {"y", "running_var", "dx", "dgamma", "dbeta", "dw"}
    assert all(cell.ok for cell in cells.values()), [str(c) for c in cells.values()]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_out_of_bounds(seed, fault):
    cells = block_cells(seed, fault)
    assert any(cell.verdict == parity.OUT_OF_BOUNDS for cell in cells.values()), [str(c) for c in cells.values()]


def test_the_slope_of_relu_at_zero_is_seen_where_zeros_are(seed):
    """On random data no value is exactly 0 and no ratio can see it: a channel of equal values makes some."""
    pool = parity.Pool("dbeta", F32)
    for i in range(parity.SEEDS):
        generator = torch.Generator().manual_seed(seed + i)
        v, dy = (torch.randn(4, 64, generator=generator) for _ in range(2))
        v[:, :16] = 0.0
        leaf = v.clone().requires_grad_()
        (want,) = torch.autograd.grad((leaf.double().relu() * dy).sum(), leaf)
        (eager,) = torch.autograd.grad((leaf.relu() * dy).sum(), leaf)
        (fast,) = torch.autograd.grad((ReluSlopeOneAtZero.apply(leaf) * dy).sum(), leaf)
        pool.add(fast, eager, want)
    assert pool.judge().verdict == parity.OUT_OF_BOUNDS
