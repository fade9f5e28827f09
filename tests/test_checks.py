"""Bad arguments of every primitive, raw and under fake tensors: an error that names the argument, before any kernel."""

from __future__ import annotations

import re

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import wrn_fast
from wrn_fast import dispatch, functional, ops
from wrn_fast.errors import WrnFastError
from wrn_fast.problem import TENSORS, FpropArgs

N, C, H, W, K = 2, 3, 6, 7, 4
NAN, INF = float("nan"), float("inf")


def good():
    """A call of fprop that uses every tensor."""
    torch.manual_seed(0)
    vector = torch.rand
    return {
        "x": torch.randn(N, C, H, W), "w": torch.randn(K, C, 3, 3), "stats": vector(2, C), "gamma": vector(C),
        "beta": vector(C), "bias": vector(K), "residual": torch.randn(N, K, H, W), "x_short": torch.randn(N, 5, H, W),
        "w_short": torch.randn(K, 5, 1, 1), "stats_short": vector(2, 5), "gamma_short": vector(5),
        "beta_short": vector(5), "rng": torch.tensor([1, 2]), "out_scale": vector(K), "out_shift": vector(K),
        "stride": 1, "pad": [1, 1, 1, 1], "act": "relu", "slope": 0.1, "eps": 1e-5, "batch_stats": False, "p": 0.3,
        "drop_at": "prologue", "short_stride": 1, "short_act": "relu", "short_eps": 1e-5, "short_batch_stats": False,
        "act_out": "relu", "want_y": True, "want_stats": True,
    }  # fmt: skip


# Where x changes, another argument may be the one that no longer fits.
BLAMED = {"x": set(TENSORS), "x_short": {"x_short", "w_short", "stats_short", "gamma_short", "beta_short"}}

VALUES = {
    "stride": [0, -1],
    "pad": [[-1, 0, 0, 0], [0, 0, 0, -3], [1, 1, 1], [1] * 5, []],
    "act": ["gelu", "", "ReLU"],
    "slope": [NAN, INF, -INF],
    "eps": [NAN, -1e-9, INF],
    "p": [-0.1, 1.0001, NAN, INF],
    "drop_at": ["input", ""],
    "short_stride": [0, -2],
    "short_act": ["tanh"],
    "short_eps": [NAN, -1.0, INF],
    "act_out": ["gelu", ""],
}
# What Python does not even let pass as the type; the raw operator leaves these to PyTorch's own schema.
TYPES = {
    **{name: [None, "1", [1, 2]] for name in ("stride", "short_stride", "slope", "eps", "p", "short_eps")},
    **{name: [None, 1, 0.5] for name in ("act", "drop_at", "short_act", "act_out")},
    **{name: ["yes"] for name in ("batch_stats", "short_batch_stats", "want_y", "want_stats")},
    **{name: [1.5, "tensor", [1.0, 2.0]] for name in TENSORS},
    "pad": [None, "1", 1.5, [1.5, 1, 1, 1], [None] * 4],
}
TYPES["x"], TYPES["w"] = TYPES["x"] + [None], TYPES["w"] + [None]
DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.uint8, torch.float8_e4m3fn)


def corrupt(name, v, how, where, by):
    """v with another shape, dtype, device or layout; None where that would still be a good argument."""
    if how == "dtype":
        dtype = DTYPES[by % len(DTYPES)]
        vector = v.dim() == 1 and name != "rng"
        fine = (torch.float64,) if vector else (torch.int64,) if name == "rng" else ()
        return None if dtype in fine else v.to(dtype)
    if how == "device":
        return v.to("meta")
    if how == "layout":
        return None if v.dtype == torch.int64 else v.to_sparse()
    if how == "dims":
        return (v[None], v[0], v.flatten() if v.dim() > 1 else v[:, None])[by % 3]
    i = where % v.dim()
    size = v.shape[i] + (by % 3 + 1 if by % 2 else -1 - by % v.shape[i])
    free = (name == "w" and i > 1) or (name in ("x", "w") and i == 0 and size > 0)
    return None if free else torch.zeros([size if j == i else s for j, s in enumerate(v.shape)], dtype=v.dtype)


MUTATIONS = st.one_of(
    st.tuples(
        st.sampled_from(TENSORS), st.sampled_from(["dtype", "device", "layout", "dims", "size"]), st.integers(0, 11),
        st.integers(0, 11),
    ),
    st.sampled_from([(name, value) for name, values in VALUES.items() for value in values]),
)  # fmt: skip


def mutated(mutation):
    """(name, arguments) of a call with one bad argument; None where the mutation is harmless."""
    call, name = good(), mutation[0]
    call[name] = corrupt(name, call[name], *mutation[1:]) if name in TENSORS else mutation[1]
    return None if call[name] is None else (name, call)


def check_blame(name, error):
    said = re.match(r"`(\w+)`: expected .+", str(error.value), re.DOTALL)
    assert said, str(error.value)
    assert said.group(1) in BLAMED.get(name, {name}), str(error.value)


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """The checks come first: nothing here may reach the choice of a backend."""

    def choose(op, problem):
        pytest.fail(f"{op} reached a kernel")

    monkeypatch.setattr(dispatch, "choose", choose)


def raw(call):
    return ops.fprop(*FpropArgs(**call))


def door(call):
    return functional.bn_act_conv(**call)


def fake(call):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) and v.layout == torch.strided else v
                for k, v in call.items()}  # fmt: skip
        return ops.fprop(*FpropArgs(**call))


@pytest.mark.parametrize("entry", [raw, door], ids=lambda entry: entry.__name__)
def test_one_bad_argument_of_a_thousand_kinds(entry, seed, request):
    """Half of the thousand at each entry; what is harmless is not counted, another takes its place."""
    count = int(500 * request.config.getoption("--fuzz-scale"))
    met = 0

    @hypothesis.seed(seed)
    @settings(
        deadline=None, max_examples=count, database=None, print_blob=False, suppress_health_check=list(HealthCheck)
    )
    @given(MUTATIONS)
    def fuzz(mutation):
        nonlocal met
        found = mutated(mutation)
        assume(found is not None)
        name, call = found
        with pytest.raises(WrnFastError) as error, torch.no_grad():
            entry(call)
        check_blame(name, error)
        met += 1

    fuzz()
    assert met >= count


@pytest.mark.parametrize("name, value", [(name, value) for name, values in VALUES.items() for value in values])
def test_bad_values_raise_under_fake_tensors_too(name, value):
    with pytest.raises(WrnFastError) as error:
        fake({**good(), name: value})
    check_blame(name, error)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("how", ["dtype", "dims", "size"])
def test_bad_tensors_raise_under_fake_tensors_too(name, how):
    found = mutated((name, how, 1, 0))
    if found is None:
        pytest.skip(f"{name} may have any size there")
    with pytest.raises(WrnFastError) as error:
        fake(found[1])
    check_blame(name, error)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in TYPES.items() for value in values])
def test_bad_types_raise_at_the_door(name, value):
    with pytest.raises(WrnFastError) as error, torch.no_grad():
        door({**good(), name: value})
    check_blame(name, error)


COMBINATIONS = [
    ("stats", {"stats": None}),
    ("stats_short", {"stats_short": None}),
    ("w_short", {"w_short": None}),
    ("w_short", {"x_short": None}),
    ("stats_short", {"x_short": None, "w_short": None}),
    ("gamma_short", {"x_short": None, "w_short": None, "stats_short": None}),
    ("x_short", {"short_stride": 2}),
    (
        "residual",
        {"stride": 2, "x_short": None, "w_short": None, "stats_short": None, "gamma_short": None, "beta_short": None},
    ),
    ("x", {"pad": [0, 0, 0, 0], "w": torch.randn(K, C, 7, 7)}),
    ("want_y", {"want_y": False}),
    ("want_y", {"want_y": False, "want_stats": False, "act_out": "none"}),
    ("drop_at", {"drop_at": "output_act", "act_out": "none"}),
    ("w_short", {"w_short": torch.randn(K, 5, 3, 3)}),
    ("residual", {"residual": torch.randn(N, K, H, W, dtype=torch.bfloat16)}),
]


@pytest.mark.parametrize("name, changed", COMBINATIONS)
def test_arguments_that_do_not_fit_each_other(name, changed):
    with pytest.raises(WrnFastError) as error, torch.no_grad():
        raw({**good(), **changed})
    check_blame(name, error)


def test_dropout_without_rng_is_refused_by_the_raw_operator():
    with pytest.raises(WrnFastError, match="`rng`: expected dense int64"):
        raw({**good(), "rng": None})


def test_a_dtype_is_asked_of_filters_and_statistics():
    bf16 = {k: v.bfloat16() if k in ("x", "residual", "x_short") else v for k, v in good().items()}
    for name, v in (("w", torch.float16), ("w_short", torch.bfloat16), ("stats", torch.bfloat16)):
        with pytest.raises(WrnFastError) as error:
            raw({**bf16, name: bf16[name].to(v)})
        check_blame(name, error)
    double = {k: v.double() if k in ("x", "w", "residual", "x_short", "w_short") else v for k, v in good().items()}
    with pytest.raises(WrnFastError, match=r"`stats`: expected torch\.float64"):
        raw(double)


# The other primitives.


def others():
    x, dy, w = torch.randn(N, C, H, W), torch.randn(N, K, H, W), torch.randn(K, C, 3, 3)
    source = {"stats": torch.rand(2, C), "gamma": torch.rand(C), "beta": torch.rand(C), "rng": torch.tensor([1, 2])}
    scalars = {"stride": 1, "pad": [1, 1, 1, 1], "act": "relu", "slope": 0.1, "eps": 1e-5, "p": 0.5}
    return {
        "dgrad": {"dy": dy, "x": x, "w": w, **source, **scalars, "want_sums": True},
        "wgrad": {"dy": dy, "x": x, **source, "w_shape": [K, C, 3, 3], "w_dtype": torch.float32, **scalars},
        "bn_bwd_apply": {"g": x, "x": x, "stats": source["stats"], "gamma": source["gamma"],
                         "sums_g": torch.rand(2, C), "eps": 1e-5, "batch_stats": True},
        "act_mask": {"x": x, "stats": source["stats"], "gamma": source["gamma"], "beta": source["beta"], "act": "relu",
                     "slope": 0.1, "eps": 1e-5},
        "input_grad": {"dy": dy, "w": w, "mask": torch.zeros(N, H, W, (C + 7) // 8, dtype=torch.uint8),
                       "scale": torch.rand(C), "rng": source["rng"], "x_shape": [N, C, H, W], "stride": 1,
                       "pad": [1, 1, 1, 1], "act": "relu", "slope": 0.1, "p": 0.5},
        "channel_stats": {"x": x},
        "dropout": {"x": x, "rng": source["rng"], "p": 0.5},
    }  # fmt: skip


BAD = [
    ("dgrad", "dy", torch.randn(N, K, H, W + 1)),
    ("dgrad", "dy", torch.randn(N, K, H, W).double()),
    ("dgrad", "w", torch.randn(K, C, 3)),
    ("dgrad", "w", torch.randn(K, C + 1, 3, 3)),
    ("dgrad", "w", torch.randn(0, C, 3, 3)),
    ("dgrad", "w", torch.randn(K, C, 3, 3).half()),
    ("dgrad", "x", torch.randint(3, (N, C, H, W))),
    ("dgrad", "stats", None),
    ("dgrad", "rng", None),
    ("dgrad", "stride", 0),
    ("dgrad", "pad", [1, 1, 1]),
    ("dgrad", "act", "gelu"),
    ("dgrad", "eps", NAN),
    ("dgrad", "p", 2.0),
    ("dgrad", "gamma", torch.rand(C, device="meta")),
    ("wgrad", "dy", torch.randn(N, K + 1, H, W)),
    ("wgrad", "w_shape", [K, C, 3]),
    ("wgrad", "w_shape", [K, C + 1, 3, 3]),
    ("wgrad", "w_shape", [K, C, 0, 3]),
    ("wgrad", "w_dtype", torch.int64),
    ("wgrad", "w_dtype", torch.float64),
    ("wgrad", "x", torch.randn(N, C, 0, W)),
    ("wgrad", "beta", torch.rand(C + 1)),
    ("bn_bwd_apply", "g", torch.randn(N, C, H, W + 1)),
    ("bn_bwd_apply", "g", torch.randn(N, C, H, W).bfloat16()),
    ("bn_bwd_apply", "stats", torch.rand(C, 2)),
    ("bn_bwd_apply", "sums_g", None),
    ("bn_bwd_apply", "sums_g", torch.rand(2, C).double()),
    ("bn_bwd_apply", "gamma", torch.rand(1)),
    ("bn_bwd_apply", "eps", -1.0),
    ("act_mask", "x", torch.zeros(N, C, H, W, dtype=torch.int32)),
    ("act_mask", "stats", torch.rand(2, C + 1)),
    ("act_mask", "gamma", torch.rand(C, device="meta")),
    ("act_mask", "act", "silu"),
    ("act_mask", "act", "identity"),
    ("act_mask", "eps", -1.0),
    ("input_grad", "dy", torch.randn(N, K, H, W + 1)),
    ("input_grad", "dy", torch.zeros(N, K, H, W, dtype=torch.int32)),
    ("input_grad", "w", torch.randn(K, C + 1, 3, 3)),
    ("input_grad", "w", torch.randn(K, C, 3, 3).double()),
    ("input_grad", "mask", None),
    ("input_grad", "mask", torch.zeros(N, H, W, (C + 7) // 8 + 1, dtype=torch.uint8)),
    ("input_grad", "mask", torch.zeros(N, H, W, (C + 7) // 8, dtype=torch.bool)),
    ("input_grad", "mask", torch.zeros(N, H, 2 * W, (C + 7) // 8, dtype=torch.uint8)[:, :, ::2]),
    ("input_grad", "scale", torch.rand(C + 1)),
    ("input_grad", "scale", torch.rand(C).double()),
    ("input_grad", "rng", None),
    ("input_grad", "x_shape", [N, C, H]),
    ("input_grad", "x_shape", [N + 1, C, H, W]),
    ("input_grad", "x_shape", [N, C, 0, W]),
    ("input_grad", "stride", 0),
    ("input_grad", "pad", [1, 1, 1]),
    ("input_grad", "act", "silu"),
    ("input_grad", "p", NAN),
    ("channel_stats", "x", torch.randn(N, C, H)),
    ("channel_stats", "x", torch.zeros(N, C, H, W, dtype=torch.int32)),
    ("channel_stats", "x", torch.zeros(N, 0, H, W)),
    ("dropout", "x", torch.randn(C, H, W)),
    ("dropout", "rng", torch.rand(2)),
    ("dropout", "rng", torch.tensor([1, 2, 3])),
    ("dropout", "rng", torch.arange(4)[::2]),
    ("dropout", "p", NAN),
    ("dropout", "p", 1.5),
]  # fmt: skip


@pytest.mark.parametrize("tensors", ["real", "fake"])
@pytest.mark.parametrize("op, name, value", BAD, ids=[f"{op}-{name}-{i}" for i, (op, name, _) in enumerate(BAD)])
def test_bad_argument_of_another_primitive(op, name, value, tensors):
    arguments = {**others()[op], name: value}
    with pytest.raises(WrnFastError) as error:
        if tensors == "real":
            getattr(ops, op)(*arguments.values())
        else:
            with FakeTensorMode() as mode:
                getattr(ops, op)(
                    *(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments.values())
                )
    blamed = {"want_sums", "stats"} if name == "stats" else {"x", "dy", "w"} if name == "x" else {name}
    assert re.match(r"`(\w+)`", str(error.value)).group(1) in blamed, str(error.value)


def test_good_arguments_reach_a_kernel(monkeypatch):
    """Or the tests above would pass on checks that refuse everything."""
    asked = []

    def choose(op, problem):
        asked.append(op)
        return dispatch.load("aten")

    monkeypatch.setattr(dispatch, "choose", choose)
    with torch.no_grad():
        raw(good())
        door(good())
    for op, arguments in others().items():
        getattr(ops, op)(*arguments.values())
    assert asked == ["fprop", "fprop", *others()]


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda net, x: wrn_fast.accelerate(None), "model"),
        (lambda net, x: wrn_fast.report(None), "model"),
        (lambda net, x: wrn_fast.restore(x), "model"),
        (lambda net, x: wrn_fast.refresh("all"), "model"),
        (lambda net, x: wrn_fast.verify(None), "a"),
        (lambda net, x: wrn_fast.verify(net, x), "b"),
        (lambda net, x: wrn_fast.mc_predict(x, x, 2), "model"),
        (lambda net, x: wrn_fast.mc_predict(net, None, 2), "x_or_loader"),
        (lambda net, x: wrn_fast.mc_predict(net, x, 2.5), "samples"),
        (lambda net, x: wrn_fast.mc_predict(net, x, 2, memory="1G"), "memory"),
        (lambda net, x: wrn_fast.classic(10, 10, 1, "0.3"), "dropRate"),
        (lambda net, x: wrn_fast.WideResNet(10, 10, 1, None), "dropRate"),
    ],
)
def test_a_public_function_names_the_argument_that_is_of_another_type(call, name):
    with pytest.raises(WrnFastError, match=f"^`{name}`: expected .* got "):
        call(wrn_fast.classic(10, 10, 1, 0.3), torch.randn(2, 3, 32, 32))
