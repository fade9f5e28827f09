"""Relations that hold without an oracle, on whole numbers, where they hold to the bit.

Of the relations that the operator has, some stand elsewhere: split batches in test_exact.py, a chain of operators in
test_chain.py, accelerate and restore in convert/test_swap.py.
"""

from __future__ import annotations

import pytest
import torch
from backends.harness import (
    RUN,
    channels_of,
    device_of,
    dtype_of,
    integer_case,
    on_device,
    run_dgrad,
    run_fprop,
    run_wgrad,
)
from kernels import oracle

from wrn_fast import dispatch, ops, parity
from wrn_fast.block import batch_norm
from wrn_fast.functional import bn_act_conv
from wrn_fast.precision import precision

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")

NOTHING_ADDED = {"bias": False, "residual": False}
# An even width for stride 2, so that a mirrored image meets the same pixels.
SYMMETRIC = {1: (1, 1, 1, 1), 2: (0, 1, 0, 1)}


@pytest.fixture(autouse=True)
def direct():
    """No rounding: whole numbers stay whole."""
    with precision("direct"):
        yield


def draw(backend, stride=1, pad=(1, 1, 1, 1), n=3, c=20, k=24, h=8, w=10, added=True, most=1, dtype=None):
    """A case of whole numbers that the backend serves."""
    c, k = channels_of(backend, c), channels_of(backend, k)
    case = integer_case(dtype or dtype_of(backend), n, c, k, h, w, stride, pad, most=most)
    # open most activations: of a result that is mostly zero nothing can be said
    case.tensors["beta"] = case.beta.abs() + 1
    if not added:
        tensors = {**case.tensors, "bias": None, "residual": None}
        case = oracle.Case(case.problem._replace(**NOTHING_ADDED), tensors)
    case = on_device(case, backend)
    for op in RUN:
        reason = dispatch.load(backend).unsupported(op, case.problem)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
    return case


def changed(case, **tensors):
    """The case with other tensors of the same or another size; the problem follows x and w."""
    n, c, h, w = tensors.get("x", case.x).shape
    k = tensors.get("w", case.w).shape[0]
    return oracle.Case(case.problem._replace(N=n, C=c, H=h, W=w, K=k), {**case.tensors, **tensors})


def assert_equal(got, want):
    """Bit for bit, on data that is not mostly zero."""
    assert parity.mismatch(got, want) is None, parity.mismatch(got, want)


@pytest.mark.parametrize("stride", [1, 2])
def test_images_change_places(backend, stride):
    case = draw(backend, stride)
    order = torch.randperm(case.problem.N)
    moved = changed(case, **{name: case.tensors[name][order] for name in ("x", "dy", "residual")})
    assert_equal(run_fprop(moved)[0], run_fprop(case)[0][order])
    assert_equal(run_dgrad(moved)[0], run_dgrad(case)[0][order])
    assert_equal(run_wgrad(moved)[0], run_wgrad(case)[0])


@pytest.mark.parametrize("stride", [1, 2])
def test_input_channels_change_places(backend, stride):
    case = draw(backend, stride)
    order = torch.randperm(case.problem.C)
    parts = {name: case.tensors[name][..., order] for name in ("stats", "gamma", "beta")}
    moved = changed(case, x=case.x[:, order], w=case.w[:, order], **parts)
    assert_equal(run_fprop(moved)[0], run_fprop(case)[0])
    g, sums = run_dgrad(case)
    moved_g, moved_sums = run_dgrad(moved)
    assert_equal(moved_g, g[:, order])
    assert_equal(moved_sums, sums[:, order])
    assert_equal(run_wgrad(moved)[0], run_wgrad(case)[0][:, order])


@pytest.mark.parametrize("stride", [1, 2])
def test_output_channels_change_places(backend, stride):
    case = draw(backend, stride)
    order = torch.randperm(case.problem.K)
    moved = changed(
        case, w=case.w[order], bias=case.bias[order], residual=case.residual[:, order], dy=case.dy[:, order]
    )
    assert_equal(run_fprop(moved)[0], run_fprop(case)[0][:, order])
    assert_equal(run_dgrad(moved)[0], run_dgrad(case)[0])
    assert_equal(run_wgrad(moved)[0], run_wgrad(case)[0][order])


def test_linear_in_the_filter(backend):
    case = draw(backend, added=False)
    other = torch.randint_like(case.w, -1, 2)
    y, z = run_fprop(case)[0], run_fprop(case, w=other)[0]
    assert_equal(run_fprop(case, w=2 * case.w)[0], 2 * y)
    assert_equal(run_fprop(case, w=case.w + other)[0], y + z)
    g = run_dgrad(case)[0]
    assert_equal(run_dgrad(case, w=case.w + other)[0], g + run_dgrad(case, w=other)[0])


@pytest.mark.parametrize("exponent", [-20, -7, 7, 20])
@pytest.mark.parametrize("exactness", ["direct", "fast"])
@pytest.mark.parametrize("op", RUN)
def test_powers_of_two_pass_through(backend, op, exactness, exponent):
    """The error does not depend on the scale of the data: every step is linear, so not one bit changes."""
    # float16 does not hold the largest of them.
    dtype = torch.bfloat16 if dtype_of(backend) == torch.float16 else None
    case = draw(backend, added=False, c=64, k=64, dtype=dtype)
    case = oracle.Case(
        case.problem._replace(prologue=False, affine=False, act="relu"),
        {**case.tensors, "stats": None, "gamma": None, "beta": None},
    )
    scaled = "x" if op == "fprop" else "dy"
    noisy = case.tensors[scaled] + torch.randn_like(case.tensors[scaled])
    with precision(exactness):
        want = RUN[op](case, **{scaled: noisy})[0]
        got = RUN[op](case, **{scaled: noisy * 2.0**exponent})[0]
    assert_equal(got, want * 2.0**exponent)


@pytest.mark.parametrize("stride", [1, 2])
def test_mirrored_image_and_filter(backend, stride):
    case = draw(backend, stride, (1, 1, 1, 1), w=11)
    mirrored = {name: case.tensors[name].flip(3) for name in ("x", "w", "dy", "residual")}
    assert_equal(run_fprop(case, **mirrored)[0], run_fprop(case)[0].flip(3))
    assert_equal(run_dgrad(case, **mirrored)[0], run_dgrad(case)[0].flip(3))
    assert_equal(run_wgrad(case, **mirrored)[0], run_wgrad(case)[0].flip(3))


@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_image_and_filter(backend, stride):
    case = draw(backend, stride, SYMMETRIC[stride])
    turned = changed(case, **{name: case.tensors[name].transpose(2, 3) for name in ("x", "w", "dy", "residual")})
    assert_equal(run_fprop(turned)[0], run_fprop(case)[0].transpose(2, 3))
    assert_equal(run_dgrad(turned)[0], run_dgrad(case)[0].transpose(2, 3))
    assert_equal(run_wgrad(turned)[0], run_wgrad(case)[0].transpose(2, 3))


@pytest.mark.parametrize("stride", [1, 2])
def test_an_image_moved_by_a_stride(backend, stride):
    case = draw(backend, stride, added=False)
    y = run_fprop(case)[0]
    moved = run_fprop(case, x=case.x.roll((stride, 2 * stride), (2, 3)))[0]
    assert_equal(moved[:, :, 2:-1, 3:-1], y[:, :, 1:-2, 1:-3])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_frame_that_the_activation_closes(backend, stride):
    """A border of values with bn(x) <= 0 is what the padding is: zero after the prologue."""
    case = draw(backend, stride, added=False)
    framed = case.x.new_empty(*case.x.shape[:2], case.x.shape[2] + 2 * stride, case.x.shape[3] + 2 * stride)
    gamma = torch.where(case.gamma == 0, 1.0, case.gamma)
    case.tensors["gamma"] = gamma
    # bn(x) = 2 (x - mean) gamma + beta, and beta <= 2
    framed[:] = (case.stats[0] - 2 * gamma.sign())[:, None, None]
    framed[:, :, stride:-stride, stride:-stride] = case.x
    y = run_fprop(changed(case, x=framed))[0]
    assert_equal(y[:, :, 1:-1, 1:-1], run_fprop(case)[0])


@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu"])
def test_the_filter_that_does_nothing(backend, act):
    case = draw(backend, added=False, k=20)
    w = torch.zeros_like(case.w)
    every = torch.arange(case.problem.C)
    w[every, every, 1, 1] = 1
    case = oracle.Case(case.problem._replace(act=act, slope=0.5), {**case.tensors, "w": w})
    v = 2 * (case.x - case.stats[0][:, None, None]) * case.gamma[:, None, None] + case.beta[:, None, None]
    want = {"identity": v, "relu": v.clamp(min=0), "leaky_relu": torch.where(v > 0, v, v / 2)}[act]
    assert_equal(run_fprop(case)[0], want)


def test_gradients_are_adjoint(backend):
    """<dy, y> = <dw, w> = <dx, x>: y is linear in w, and in x where nothing is activated."""
    case = draw(backend, added=False)
    y, dw = run_fprop(case)[0], run_wgrad(case)[0]
    left, right = (case.dy.double() * y.double()).sum(), (dw.double() * case.w.double()).sum()
    assert left == right and left != 0
    plain = oracle.Case(
        case.problem._replace(prologue=False, affine=False, act="identity"),
        {**case.tensors, "stats": None, "gamma": None, "beta": None},
    )
    y, g = run_fprop(plain)[0], run_dgrad(plain)[0]
    left, right = (case.dy.double() * y.double()).sum(), (g.double() * case.x.double()).sum()
    assert left == right and left != 0


def test_every_image_twice(backend):
    """The statistics stay, the filter's gradient doubles."""
    case = draw(backend, added=False)
    twice = changed(case, **{name: torch.cat([case.tensors[name]] * 2) for name in ("x", "dy")})
    assert_equal(run_wgrad(twice)[0], 2 * run_wgrad(case)[0])
    assert_equal(run_dgrad(twice)[1], 2 * run_dgrad(case)[1])
    bound, (mean, var) = parity.term_bound(torch.float32), ops.channel_stats(case.x)
    terms = case.x.double().abs().mean((0, 2, 3)), var.double()
    for got, want, size in zip(ops.channel_stats(twice.x), (mean, var), terms):
        assert (got - want).norm() <= bound * size.norm()


def test_relu_is_homogeneous(backend):
    case = draw(backend, added=False)
    scaled = {"gamma": 4 * case.gamma, "beta": 4 * case.beta}
    assert_equal(run_fprop(case, **scaled)[0], 4 * run_fprop(case)[0])
    assert_equal(run_wgrad(case, **scaled)[0], 4 * run_wgrad(case)[0])


# Training: statistics of the batch.


def batch_case(backend):
    """x, w, gamma, beta of a training call."""
    case = draw(backend, added=False)
    return {name: case.tensors[name] for name in ("x", "w", "beta")} | {"gamma": case.gamma + 0.25}


def train(x, w, gamma, beta, eps=0.0):
    return bn_act_conv(x, w, ops.channel_stats(x.detach()), gamma, beta, batch_stats=True, eps=eps).y


def test_scale_and_shift_of_a_batch_cancel(backend):
    t = batch_case(backend)
    y = train(**t)
    scaled = train(**{**t, "x": t["x"] * 2.0**9})
    assert_equal(scaled, y)
    moved = train(**{**t, "x": t["x"] + 8})
    assert parity.error(moved, y) <= parity.WINOGRAD["f4"]


def test_a_gradient_through_batch_statistics_has_no_mean_and_no_slope(backend):
    """dx is orthogonal to 1 and to x, which is what the two terms of BatchNorm's backward take away."""
    t = batch_case(backend)
    x = t["x"].clone().requires_grad_()
    y = train(**{**t, "x": x})
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    dims = (0, 2, 3)
    xhat = x.detach().double() - x.detach().double().mean(dims, keepdim=True)
    xhat = xhat / xhat.square().mean(dims, keepdim=True).sqrt()
    dx = dx.double()
    without = dx - dx.mean(dims, keepdim=True)
    without = without - xhat * (without * xhat).mean(dims, keepdim=True)
    assert parity.error(without, dx) <= parity.UNIT[y.dtype]


def test_frozen_is_training_with_momentum_one(backend):
    x = draw(backend, added=False).x
    n = x.numel() // x.shape[1]
    bn = torch.nn.BatchNorm2d(x.shape[1], momentum=1.0, device=device_of(backend)).train()
    batch = batch_norm(bn, x, None)
    assert batch.batch_stats and bn.num_batches_tracked == 1
    bn.eval()
    frozen = batch_norm(bn, x, None)
    assert not frozen.batch_stats
    assert torch.equal(frozen.stats[0], batch.stats[0])
    assert parity.error(frozen.stats[1], batch.stats[1].double() * n / (n - 1)) <= parity.UNIT[torch.float32]


def test_frozen_statistics_stay(backend):
    x = draw(backend, added=False).x
    bn = torch.nn.BatchNorm2d(x.shape[1], device=device_of(backend)).eval()
    before = {name: v.clone() for name, v in bn.state_dict().items()}
    batch_norm(bn, x, None)
    # what the producer of x measured must not move them either
    batch_norm(bn, x, ops.channel_stats(x))
    bn.train()
    bn.track_running_stats = False
    batch_norm(bn, x, None)
    assert all(torch.equal(v, before[name]) for name, v in bn.state_dict().items())
