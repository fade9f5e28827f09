"""act_mask and input_grad of every backend against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from backends import eager
from backends.harness import draw
from backends.test_primitives import DTYPES, FEATURES
from kernels import oracle

from wrn_fast import masks, ops, parity
from wrn_fast.precision import precision

ACTS = ("relu", "leaky_relu", "identity")
pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")


def passing(v, act):
    return ~(v <= 0) if act == "relu" else v > 0


def mask_of(case, x):
    p = case.problem
    return ops.act_mask(x, case.stats, case.gamma, case.beta, p.act, p.slope, p.eps)


def run_input_grad(case, dy, mask, scale):
    p = case.problem
    drop = p.p if p.drop_at == "prologue" else 0.0
    return ops.input_grad(
        dy, case.w, mask, scale, case.rng if drop else None, list(case.x.shape), p.stride, list(p.pad), p.act, p.slope,
        drop,
    )  # fmt: skip


def factor(case, dtype=torch.float64):
    if case.stats is None:
        return None
    rstd = (case.stats[1].double() + case.problem.eps).rsqrt()
    return (rstd if case.gamma is None else rstd * case.gamma.double()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_mask_has_the_bits_of_the_derivative(backend, act, dtype, seed):
    dtype, _ = DTYPES[dtype]
    for case in draw(backend, "dgrad", seed, 6, dtype, act=act):
        v = oracle.normal(case.x.double(), case.stats, case.gamma, case.beta, case.problem.eps)
        mask = mask_of(case, case.x)
        assert mask.dtype == torch.uint8 and mask.shape == masks.shape(case.x.shape) and mask.is_contiguous()
        assert torch.equal(masks.unpack(mask, case.problem.C), passing(v, act))
        assert torch.equal(masks.unpack(mask, 8 * mask.shape[-1])[:, case.problem.C :].any(), torch.tensor(False))


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_mask_of_special_values(backend, act, seed):
    """As PyTorch's own backward: relu lets the gradient of a NaN pass, leaky_relu does not; 0 is closed."""
    (case,) = draw(
        backend, "dgrad", seed, 1, torch.float32, act=act, C=20, prologue=False, affine=False, batch_stats=False
    )
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, -1e-42, 1.0])
    x = values.to(case.x.device).repeat(case.x.numel() // 8 + 1)[: case.x.numel()].reshape(case.x.shape)
    leaf = x.clone().requires_grad_()
    slope = case.problem.slope
    v = torch.relu(leaf) if act == "relu" else torch.nn.functional.leaky_relu(leaf, slope)
    (want,) = torch.autograd.grad(v.sum(), [leaf])
    assert torch.equal(masks.unpack(mask_of(case, x), 20), want == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("feature", ["anything", "stride 2", "four-sided padding", "1x1", "dropout", "tiles"])
def test_parity_of_input_grad(backend, feature, act, dtype, seed):
    dtype, exactness = DTYPES[dtype]
    algorithm = "f4" if dtype == torch.float32 and exactness == "fast" else None
    pool = parity.Pool("dx", dtype, algorithm=algorithm)
    with precision(exactness):
        for case in draw(backend, "dgrad", seed, 10, dtype, many=True, **{**FEATURES[feature], "act": act}):
            mask = None if act == "identity" else mask_of(case, case.x)
            scale = factor(case, case.problem.stats_dtype)
            got = run_input_grad(case, case.dy, mask, scale)
            want, peer = oracle.gradients(case)[0], eager.gradients(case)[0]
            if scale is not None:
                want, peer = want * factor(case)[:, None, None], peer * scale.to(peer.dtype)[:, None, None]
            pool.add_errors(parity.error(got, want), parity.error(peer, want))
    assert pool.judge().ok, pool.judge()


@pytest.mark.parametrize("taps, stride", [((3, 3), 1), ((1, 1), 2)])
def test_infinite_gradient_behind_a_closed_relu_is_zero(backend, taps, stride, seed):
    case = draw(
        backend, "dgrad", seed, 1, torch.float32, act="relu", taps=taps, stride=stride, C=20, K=20, p=0.0,
        drop_at="none",
    )[0]  # fmt: skip
    dy = torch.full_like(case.dy, float("inf"))
    closed = torch.zeros(masks.shape(case.x.shape), dtype=torch.uint8, device=dy.device)
    assert not run_input_grad(case, dy, closed, None).any()


def test_mask_of_an_image_does_not_depend_on_the_batch(backend, seed):
    """Rows of the mask end inside a byte: images alone and in a batch agree bit for bit."""
    case = draw(backend, "dgrad", seed, 1, torch.float32, act="relu", N=3, C=21, K=16, taps=(1, 1), p=0.0,
                drop_at="none")[0]  # fmt: skip
    mask = mask_of(case, case.x)
    alone = torch.cat([mask_of(case, image[None]) for image in case.x])
    assert torch.equal(mask, alone)
