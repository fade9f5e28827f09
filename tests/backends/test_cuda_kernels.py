"""The memory-bound kernels of csrc/cuda/common*.cu, run on the CPU against float64, and what nvcc makes of them.

Every output lies between guards of NaN and begins as NaN.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import cuda_on_cpu
from backends.cuda_on_cpu import ACTS, CODES

from wrn_fast import masks, parity
from wrn_fast.backends import aten
from wrn_fast.random import keep_mask, philox4x32

GUARD = 64
# (rows, C, offset of the first element): whole vectors, single elements by the channels, by the pointer.
SHAPES = ((37, 16, 0), (130, 40, 0), (9, 3, 0), (33, 24, 1), (5, 2600, 0))
DTYPES = {name: getattr(torch, name) for name in CODES}


@pytest.fixture(scope="module")
def cuda():
    return cuda_on_cpu.build()


class Guarded:
    """Memory for outputs; `check` says whether anything was written beside them."""

    def __init__(self):
        self.buffers = []

    def empty(self, *shape, dtype, offset=0):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD + offset,), torch.nan, dtype=dtype)
        self.buffers.append((buffer, GUARD + offset, size))
        return buffer[GUARD + offset : GUARD + offset + size].view(shape)

    def bytes(self, size):
        """Scratch of so many bytes."""
        return self.empty(-(-size // 8), dtype=torch.float64)

    def check(self):
        for buffer, begin, size in self.buffers:
            assert buffer[:begin].isnan().all() and buffer[begin + size :].isnan().all(), "written outside an output"


@pytest.fixture
def guarded():
    memory = Guarded()
    yield memory
    memory.check()


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def code(dtype):
    return CODES[str(dtype).removeprefix("torch.")]


def rows_of(memory, rows, C, dtype, offset, values=None):
    """[rows, C] in guarded memory."""
    x = memory.empty(rows, C, dtype=dtype, offset=offset)
    return x.copy_(torch.randn(rows, C, dtype=torch.float64) if values is None else values)


def integers(least, most, *shape):
    return torch.randint(least, most + 1, shape).double()


def image(v):
    """[rows, C] as the [1, C, 1, rows] that the definitions are written for."""
    return v.t()[None, :, None, :]


def rows(v):
    return v[0, :, 0, :].t()


def vectors(C, dtype):
    """stats, gamma, beta."""
    w = wide(dtype)
    stats = torch.stack([torch.randn(C, dtype=w), torch.rand(C, dtype=w) + 0.1])
    return stats, torch.randn(C, dtype=w), torch.randn(C, dtype=w)


def exact_vectors(C, dtype):
    """stats, gamma, beta that keep integers integer with eps 0: the deviation is 1/2."""
    w = wide(dtype)
    stats = torch.stack([integers(-2, 2, C), torch.full((C,), 0.25, dtype=torch.float64)]).to(w)
    return stats, integers(-1, 1, C).to(w), integers(-2, 2, C).to(w)


def normal(x, norm):
    """bn(x) of [rows, C] in float64, by vectors of `exact_vectors`."""
    stats, gamma, beta = norm
    return x.double() if stats is None else 2 * (x.double() - stats[0]) * gamma + beta


def ptr(v):
    return 0 if v is None else v.data_ptr()


def shape_args(x):
    return {"dtype": code(x.dtype), "rows": x.shape[0], "C": x.shape[1]}


def channel_stats(cuda, memory, x):
    out = memory.empty(2, x.shape[1], dtype=wide(x.dtype))
    scratch = memory.bytes(cuda.channel_stats_workspace(**shape_args(x)))
    cuda.channel_stats(**shape_args(x), x=ptr(x), stats=ptr(out), workspace=ptr(scratch), stream=0)
    return out


def apply(cuda, x, y, norm=(None, None, None), eps=0.0, act="identity", slope=0.0, rng=None, p=0.0):
    stats, gamma, beta = norm
    cuda.apply(
        **shape_args(x), x=ptr(x), stats=ptr(stats), gamma=ptr(gamma), beta=ptr(beta), eps=eps, act=ACTS[act],
        slope=slope, rng=ptr(rng), p=p, y=ptr(y), stream=0,
    )  # fmt: skip
    return y


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (6000, 8, 0), (600, 256, 1)], ids=str)
def test_statistics_of_dyadic_values(cuda, guarded, shape, dtype):
    """Two values a channel, each in half of the rows: mean and variance are known."""
    count, C, offset = shape
    count += -count % 4
    low, step = integers(-4, 4, C), integers(1, 3, C) * 2
    pattern = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat(count // 4)[torch.randperm(count)][:, None]
    x = rows_of(guarded, count, C, dtype, offset, low + step * pattern)
    got = channel_stats(cuda, guarded, x)
    want = torch.stack([low + step / 2, (step / 2) ** 2])
    peers = torch.var_mean(x.to(wide(dtype)), 0, correction=0)
    for mine, peer, exact in zip(got, reversed(peers), want):
        assert parity.error(mine, exact) <= parity.one_seed_bound(parity.error(peer, exact), wide(dtype))


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_statistics_keep_their_digits(cuda, guarded, dtype, mean):
    dtype = DTYPES[dtype]
    pool = parity.Pool("deviation", wide(dtype))
    for _ in range(parity.SEEDS):
        x = rows_of(guarded, 700, 24, dtype, 0, torch.randn(700, 24, dtype=torch.float64) + mean)
        got = channel_stats(cuda, guarded, x)[1].double().sqrt()
        want = x.double().var(0, correction=0).sqrt()
        pool.add(got, x.to(wide(dtype)).var(0, correction=0).double().sqrt(), want)
    assert pool.judge().ok, pool.judge()


def test_more_rows_than_tiles(cuda, guarded):
    """A block takes several chunks from 4,096 tiles on: 8 rows a chunk at 256 vectors a row."""
    x = rows_of(guarded, 33000, 256, torch.bfloat16, 1, torch.randn(33000, 256).double() * 2 + 5)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    peers = torch.var_mean(x.float(), 0, correction=0)
    for got, want, peer in zip(channel_stats(cuda, guarded, x), (mean, var), reversed(peers)):
        assert parity.error(got, want) <= parity.one_seed_bound(parity.error(peer, want), torch.float32)


@pytest.mark.parametrize("parts", [1, 63, 65, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_of_moments(cuda, guarded, parts, dtype):
    """Parts of unequal size, some of them empty; powers of two, so that their means and squares are exact."""
    C = 40
    counts = torch.tensor([0.0, 1.0, 2.0, 4.0])[torch.randint(0, 4, (parts,))]
    counts[0] = 2
    values = [integers(6, 10, int(n), C) for n in counts]
    moments = torch.zeros(parts, 2, C, dtype=dtype)
    for i, v in enumerate(values):
        if len(v):
            moments[i, 0], moments[i, 1] = v.mean(0), ((v - v.mean(0)) ** 2).sum(0)
    got = guarded.empty(2, C, dtype=dtype)
    counts = counts.to(dtype)
    scratch = guarded.bytes(cuda.merge_moments_workspace(wide=code(dtype), parts=parts, C=C))
    cuda.merge_moments(
        wide=code(dtype), C=C, counts=ptr(counts), moments=ptr(moments), parts=parts, stats=ptr(got),
        workspace=ptr(scratch), stream=0,
    )  # fmt: skip
    everything = torch.cat(values)
    peers = torch.var_mean(everything.to(dtype), 0, correction=0)
    for mine, peer, want in zip(got, reversed(peers), reversed(torch.var_mean(everything, 0, correction=0))):
        assert parity.error(mine, want) <= parity.one_seed_bound(parity.error(peer, want), dtype)


@pytest.mark.parametrize("slabs, count", [(1, 8), (3, 1000), (64, 7), (65, 80), (5000, 320), (200, 70000)])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("float64", "float64")], ids=str)
def test_sums_over_slabs(cuda, guarded, slabs, count, dtypes):
    source, target = (DTYPES[name] for name in dtypes)
    if slabs * count > 10**7:
        count //= 10
    v = integers(-1, 1, slabs, count).to(source)
    out = guarded.empty(count, dtype=target)
    scratch = guarded.bytes(cuda.add_slabs_workspace(wide=code(source), slabs=slabs, count=count))
    cuda.add_slabs(
        wide=code(source), from_=ptr(v), slabs=slabs, count=count, dtype=code(target), out=ptr(out),
        workspace=ptr(scratch), stream=0,
    )  # fmt: skip
    assert torch.equal(out, v.double().sum(0).to(target))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu"])
@pytest.mark.parametrize("bn", [False, True])
def test_apply_is_exact_on_integers(cuda, guarded, dtype, act, bn):
    got, want = [], []
    for count, C, offset in SHAPES:
        x = rows_of(guarded, count, C, dtype, offset, integers(-8, 8, count, C))
        norm = exact_vectors(C, dtype) if bn else (None, None, None)
        y = apply(cuda, x, guarded.empty(count, C, dtype=dtype, offset=offset), norm, act=act, slope=0.5)
        got.append(y.flatten())
        want.append(aten.activate(normal(x, norm), act, 0.5).flatten())
    assert parity.mismatch(torch.cat(got), torch.cat(want)) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_apply_of_silu(cuda, guarded, dtype):
    dtype = DTYPES[dtype]
    pool = parity.Pool("silu", dtype)
    for _ in range(parity.SEEDS):
        x, norm = rows_of(guarded, 60, 24, dtype, 0), vectors(24, dtype)
        y = apply(cuda, x, guarded.empty(60, 24, dtype=dtype), norm, 1e-3, "silu")
        stats, gamma, beta = norm
        peer = F.silu(F.batch_norm(image(x), stats[0], stats[1], gamma, beta, eps=1e-3))
        v = aten.normalize(image(x).double(), *(t.double() for t in norm), 1e-3)
        pool.add(y, rows(peer), rows(aten.activate(v, "silu", 0.0)))
    assert pool.judge().ok, pool.judge()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("p", [0.3, 0.999, 1.0])
def test_the_mask_is_the_one_of_every_backend(cuda, guarded, dtype, p):
    for count, C, offset in SHAPES:
        rng = torch.randint(-(2**63), 2**63 - 1, (2,))
        x = rows_of(guarded, count, C, dtype, offset, torch.rand(count, C).double() + 1)
        y = apply(cuda, x, guarded.empty(count, C, dtype=dtype, offset=offset), rng=rng, p=p)
        kept = rows(keep_mask((1, C, 1, count), rng, p))
        assert torch.equal(y != 0, kept if p < 1 else torch.zeros_like(kept))
        want = aten.dropout(_problem(dtype, p), image(x), rng)
        assert torch.equal(y, rows(want))


def test_a_word_at_the_threshold_is_kept(cuda, guarded):
    rng = torch.randint(2**62, (2,))
    words = philox4x32(tuple(torch.tensor([v]) for v in (0, 0, *halves(rng[1]))), halves(rng[0]))
    for i, word in enumerate(words):
        x = rows_of(guarded, 1, 4, torch.float32, 0, torch.ones(1, 4))
        y = apply(cuda, x, guarded.empty(1, 4, dtype=torch.float32), rng=rng, p=int(word) / 2**32)
        assert y[0, i] > 0


def halves(v):
    """Low and high word."""
    return int(v) & 0xFFFFFFFF, int(v) >> 32 & 0xFFFFFFFF


def _problem(dtype, p):
    from wrn_fast.problem import ConvProblem

    return ConvProblem("cpu", dtype, dtype, 1, 1, 1, 1, 1, 1, 1, p=p)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "silu", "identity"])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_nan_stays_nan(cuda, guarded, act, p):
    x = rows_of(guarded, 40, 16, torch.bfloat16, 0, torch.full((40, 16), torch.nan).double())
    rng = torch.tensor([3, 4])
    assert apply(cuda, x, guarded.empty(40, 16, dtype=x.dtype), act=act, rng=rng, p=p).isnan().all()


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bn_bwd_apply_is_exact_on_integers(cuda, guarded, dtype, batch):
    for C, offset in ((16, 0), (40, 0), (3, 0), (24, 1)):
        count = 64
        g = rows_of(guarded, count, C, dtype, offset, integers(-4, 4, count, C))
        x = rows_of(guarded, count, C, dtype, 0, integers(-4, 4, count, C))
        stats, gamma, _ = exact_vectors(C, dtype)
        sums = integers(-2, 2, 2, C).to(wide(dtype)) * count if batch else None
        dx = guarded.empty(count, C, dtype=dtype)
        cuda.bn_bwd_apply(
            **shape_args(x), g=ptr(g), x=ptr(x), stats=ptr(stats), gamma=ptr(gamma), eps=0.0, sums=ptr(sums),
            dx=ptr(dx), stream=0,
        )  # fmt: skip
        want = g.double()
        if batch:
            want = want - sums[0].double() / count - 2 * (x.double() - stats[0]) * sums[1].double() / count
        assert torch.equal(dx.double(), want * 2 * gamma.double())


def act_backward(cuda, memory, da, x, norm, act, rng, p, g=None, want_sums=True):
    stats, gamma, beta = norm
    g = memory.empty(*x.shape, dtype=x.dtype) if g is None else g
    sums = memory.empty(2, x.shape[1], dtype=wide(x.dtype)) if want_sums else None
    scratch = memory.bytes(cuda.act_backward_workspace(**shape_args(x)))
    cuda.act_backward(
        **shape_args(x), da=ptr(da), x=ptr(x), stats=ptr(stats), gamma=ptr(gamma), beta=ptr(beta), eps=0.0,
        act=ACTS[act], slope=0.5, rng=ptr(rng), p=p, g=ptr(g), sums=ptr(sums), workspace=ptr(scratch), stream=0,
    )  # fmt: skip
    return g, sums


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_act_backward_is_exact_on_integers(cuda, guarded, dtype, act, p):
    for count, C, offset in (*SHAPES, (3000, 8, 0)):
        da = rows_of(guarded, count, C, dtype, offset, integers(1, 4, count, C))
        x = rows_of(guarded, count, C, dtype, 0, integers(-4, 4, count, C))
        norm = exact_vectors(C, dtype)
        rng = torch.randint(2**62, (2,)) if p else None
        kept = rows(keep_mask((1, C, 1, count), rng, p)) / (1 - p) if p else 1.0
        want = aten.act_backward(da.double() * kept, normal(x, norm), act, 0.5)
        g, sums = act_backward(cuda, guarded, da, x, norm, act, rng, p)
        assert torch.equal(g.double(), want)
        assert torch.equal(sums.double(), torch.stack([want.sum(0), (want * 2 * (x.double() - norm[0][0])).sum(0)]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_act_backward_of_silu(cuda, guarded, dtype):
    dtype = DTYPES[dtype]
    pool = parity.Pool("silu", dtype)
    for _ in range(parity.SEEDS):
        da, x = rows_of(guarded, 60, 24, dtype, 0), rows_of(guarded, 60, 24, dtype, 0)
        g, _ = act_backward(cuda, guarded, da, x, (None, None, None), "silu", None, 0.0)
        want = aten.act_backward(da.double(), x.double(), "silu", 0.0)
        pool.add(g, aten.act_backward(da, x, "silu", 0.0), want)
    assert pool.judge().ok, pool.judge()


def test_act_backward_may_write_over_its_input(cuda, guarded):
    da, x = rows_of(guarded, 50, 16, torch.bfloat16, 0), rows_of(guarded, 50, 16, torch.bfloat16, 0)
    norm = exact_vectors(16, torch.bfloat16)
    want, _ = act_backward(cuda, guarded, da, x, norm, "relu", None, 0.0)
    got, _ = act_backward(cuda, guarded, da, x, norm, "relu", None, 0.0, g=da, want_sums=False)
    assert torch.equal(got, want)


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_masks_of_the_derivative_and_back(cuda, guarded, dtype, bn, act):
    for count, C, offset in SHAPES:
        x = rows_of(guarded, count, C, dtype, offset, integers(-3, 3, count, C))
        x[0, 0] = torch.nan
        norm = exact_vectors(C, dtype) if bn else (None, None, None)
        stats, gamma, beta = norm
        bits = torch.full((count, (C + 7) // 8), 0xAA, dtype=torch.uint8)
        cuda.act_mask(
            **shape_args(x), x=ptr(x), stats=ptr(stats), gamma=ptr(gamma), beta=ptr(beta), eps=0.0, act=ACTS[act],
            bits=ptr(bits), stream=0,
        )  # fmt: skip
        v = normal(x, norm)
        passes = ~(v <= 0) if act == "relu" else v > 0
        assert torch.equal(bits, masks.pack(image(passes))[0, 0])
        da = rows_of(guarded, count, C, dtype, offset, integers(1, 4, count, C))
        scale = (integers(0, 1, C) * 2 - 1).to(wide(dtype))
        slope, rng = (0.5 if act == "leaky_relu" else 0.0), torch.randint(2**62, (2,))
        g = guarded.empty(count, C, dtype=dtype)
        cuda.mask_backward(
            **shape_args(x), da=ptr(da), bits=ptr(bits), scale=ptr(scale), slope=slope, rng=ptr(rng), p=0.5, g=ptr(g),
            stream=0,
        )  # fmt: skip
        kept = rows(keep_mask((1, C, 1, count), rng, 0.5)) * 2
        assert torch.equal(g.double(), da.double() * kept * torch.where(passes, 1.0, slope).double() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_affine_table(cuda, guarded, dtype):
    C = 300
    stats, gamma, beta = exact_vectors(C, dtype)
    table = guarded.empty(4, C, dtype=dtype)
    cuda.affine_table(
        wide=code(dtype), C=C, stats=ptr(stats), gamma=ptr(gamma), beta=ptr(beta), eps=0.0, table=ptr(table), stream=0
    )
    mean, rstd = stats[0], torch.full((C,), 2.0, dtype=dtype)
    assert parity.mismatch(table, torch.stack([2 * gamma, beta - mean * 2 * gamma, mean, rstd])) is None
