"""What no ratio to eager can see, one body for all backends: exact integers, special values, strides, order."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import eager
from backends.harness import ALGORITHM, RUN, arrange, channels_of, draw, dtype_of, integer_case, on_device, run_fprop
from kernels import oracle

from wrn_fast import dispatch, parity
from wrn_fast.precision import precision

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")


# Exact integers.

IMAGES = list(itertools.product(range(1, 14), range(1, 14)))
PADS = {"no padding": (0, 0, 0, 0), "padding 1": (1, 1, 1, 1), "right and bottom": (0, 1, 0, 1)}


# Pinned, because by the policy of the cpu backend so few channels never meet Winograd.
@pytest.mark.parametrize("algorithm, exactness", [("direct", "direct"), ("f2", "f2"), ("f3", "fast"), ("f4", "fast")])
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", RUN)
def test_integers_are_exact_for_every_small_image(
    backend, op, stride, pad, algorithm, exactness, seed, monkeypatch
):  # fmt: skip
    """Threshold 0 without Winograd and with F(2x2), whose factors are quarters; with F(4x4) and F(3x3) (wgrad has no
    other) an error that any misplaced element would show in full.
    """
    if algorithm in ("f2", "f3") and backend != "cpu":
        pytest.skip(f"{backend} has no {algorithm}")
    monkeypatch.setenv("WRN_FAST_PIN_ALGO", algorithm)
    rounded = algorithm in ("f4", "f3") or (algorithm == "f2" and op == "wgrad")
    channels = [(1, 5), (3, 1), (4, 8), (17, 3), (8, 16), (2, 33)]
    reason, distance, size = None, 0.0, 0.0
    with precision(exactness):
        for i, (h, w) in enumerate(IMAGES):
            if min(h + PADS[pad][2] + PADS[pad][3], w + PADS[pad][0] + PADS[pad][1]) < 3:
                continue
            c, k = (channels_of(backend, n) for n in channels[(i + seed) % len(channels)])
            case = on_device(integer_case(dtype_of(backend), 1 + i % 2, c, k, h, w, stride, PADS[pad]), backend)
            reason = dispatch.load(backend).unsupported(op, case.problem)
            if reason is not None:
                break
            got = RUN[op](case)[0]
            want = oracle.fprop(case)[0] if op == "fprop" else oracle.gradients(case)[op == "wgrad"]
            got, want = got.double(), want.to(got.dtype).double()
            distance += (got - want).square().sum().item()
            size += want.square().sum().item()
            assert torch.equal((got * 4).round() / 4 if rounded else got, want), (h, w, c, k)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    assert size > 0 and (distance / size) ** 0.5 <= (parity.WINOGRAD[ALGORITHM[op]] if rounded else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", RUN)
def test_integers_too_wide_for_the_dtype_are_rounded_once(backend, op, dtype):
    """Eager rounds its convolution before the residual is added, so no ratio to eager can see the second rounding."""
    if backend == "aten" and (op == "fprop" or dtype == torch.float16):
        pytest.skip(
            "aten: the library rounds its convolution before bias and residual are added, partial sums in float16"
        )
    k = 48 if backend == "cuda" else 40
    case = on_device(integer_case(dtype, 2, 48, k, 11, 9, 1, (1, 1, 1, 1), most=12), backend)
    reason = dispatch.load(backend).unsupported(op, case.problem)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with precision("direct"):
        got = RUN[op](case)[0]
    want = oracle.fprop(case)[0] if op == "fprop" else oracle.gradients(case)[op == "wgrad"]
    assert (want.to(dtype).double() != want).any()
    assert parity.mismatch(got, want.to(dtype)) is None


# Special values, layouts, order of computation.


@pytest.mark.parametrize("op", RUN)
def test_denormals_are_kept(backend, op):
    """Whole multiples of 2^-140 stay exact sums of whole multiples; a mode that flushes them would leave zeros."""
    case = integer_case(torch.float32, 2, 24, 20, 9, 7, 1, (1, 1, 1, 1))
    none = dict.fromkeys(("stats", "gamma", "beta", "bias", "residual"))
    tiny = {name: case.tensors[name] * 2.0**-140 for name in ("x", "dy") if op != "wgrad" or name == "dy"}
    plain = case.problem._replace(prologue=False, affine=False, act="identity", bias=False, residual=False)
    case = on_device(oracle.Case(plain, {**case.tensors, **none, **tiny}), backend)
    reason = dispatch.load(backend).unsupported(op, case.problem)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with precision("direct"):
        got = RUN[op](case)[0]
    want = oracle.fprop(case)[0] if op == "fprop" else oracle.gradients(case)[op == "wgrad"]
    assert 0 < want.abs().max() < torch.finfo(torch.float32).tiny
    assert parity.mismatch(got, want) is None, parity.mismatch(got, want)


@pytest.mark.parametrize("exactness", ["direct", "fast"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", ["identity", "relu", "silu", "leaky_relu"])
def test_nan_and_infinity_travel_as_in_eager(backend, act, value, exactness, seed):
    """Never at fewer positions; at more only where Winograd spreads them over its tiles."""
    fixed = {"act": act, "H": 9, "W": 11, "taps": (3, 3), "pad": (1, 1, 1, 1), "p": 0.0, "drop_at": "none",
             "act_out": "none", "want_y": True}  # fmt: skip
    for case in draw(backend, "fprop", seed, 2, dtype_of(backend), **fixed):
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
    case = draw(backend, op, seed, 1, dtype_of(backend), **fixed)[0]
    case.dy[0, 0, 1, 1] = float("nan")
    got, want = RUN[op](case)[0], eager.gradients(case)[op == "wgrad"]
    assert (got.isfinite() <= want.isfinite()).all()


@pytest.mark.parametrize("how", ["dense", "NCHW", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("op", RUN)
def test_strides_do_not_matter_and_inputs_stay(backend, op, how, seed):
    # The library's convolution adds in another order for a filter in another layout: equal within float64's bound.
    plain = backend == "aten"
    for case in draw(backend, op, seed, 8, torch.float64 if plain else dtype_of(backend)):
        arranged = {name: arrange(v, how) for name, v in case.tensors.items()}
        if how == "expanded":
            case.tensors.update({name: v if v is None else v.clone() for name, v in arranged.items()})
            arranged["w"] = case.tensors["w"]
        before = {name: None if v is None else v.clone() for name, v in arranged.items()}
        got, want = RUN[op](case, **arranged), RUN[op](case)
        for a, b in zip(got, want):
            assert parity.error(a, b) <= parity.FLOAT64 if plain else torch.equal(a, b)
        assert all(v is None or torch.equal(arranged[name], v) for name, v in before.items())


@pytest.mark.parametrize("op", RUN)
def test_bits_do_not_depend_on_threads_or_on_the_run(backend, op, seed):
    threads = torch.get_num_threads()
    for case in draw(backend, op, seed, 2, dtype_of(backend), N=3, H=17, W=14, C=40, K=48, taps=(3, 3), want_stats=True,
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
    case = draw(backend, op, 1, 1, dtype_of(backend), drop_at="none", p=0.0, act_out="none", want_y=True)[0]
    empty = {name: v[:0] for name in ("x", "dy", "residual", "x_short") if (v := case.tensors[name]) is not None}
    got = RUN[op](case, **empty)[0]
    if op == "wgrad":
        assert got.shape == case.w.shape and not got.any()
    else:
        assert got.shape == (0, *RUN[op](case)[0].shape[1:])
