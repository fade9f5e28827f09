"""The operators as PyTorch sees them: registration, derivatives, and what a backward call runs."""

from __future__ import annotations

import operator_cases as cases
import pytest
import torch
from operator_cases import MODES, build, close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import wrn_fast
from wrn_fast import dispatch, ops, parity
from wrn_fast.functional import bn_act_conv, channel_stats
from wrn_fast.problem import TENSORS, FpropArgs

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")

LAYOUTS = ("NCHW", "channels_last", "sliced")


def lay(v, layout):
    if v is None or v.dim() != 4 or v.dtype == torch.uint8 or layout == "channels_last":
        return v
    if layout == "NCHW":
        return v.contiguous()
    wide = torch.cat([v, v], dim=3)
    return wide[..., : v.shape[3]]


@pytest.fixture
def calls(monkeypatch):
    return cases.count_calls(monkeypatch)


# Registration.


def fprop_arguments(call):
    """The raw operator's arguments."""
    defaults = dict.fromkeys(TENSORS) | {"act_out": "none", "want_y": True, "want_stats": True}
    t = dict(call.tensors)
    for suffix in ("", "_short"):
        if call.scalars[(f"{suffix}_batch_stats").lstrip("_")]:
            t[f"stats{suffix}"] = channel_stats(t[f"x{suffix}"])
    return list(FpropArgs(**{**defaults, **t, **call.scalars, "pad": list(call.scalars["pad"])}))


def primitive_arguments(name, mode, dtype):
    call = build(mode, dtype, dense=True)
    a = FpropArgs(*fprop_arguments(call))
    if name == "fprop":
        return list(a)
    dy = torch.randn_like(call.run().y)
    p = a.p if a.drop_at == "prologue" else 0.0
    source = (a.stride, a.pad, a.act, a.slope, a.eps, p)
    return {
        "dgrad": lambda: [dy, a.x, a.w, a.stats, a.gamma, a.beta, a.rng, *source, a.stats is not None],
        "wgrad": lambda: [dy, a.x, a.stats, a.gamma, a.beta, a.rng, list(a.w.shape), a.w.dtype, *source],
        "bn_bwd_apply": lambda: [a.x.flip(0), a.x, a.stats, a.gamma, a.stats, a.eps, a.batch_stats],
        "act_mask": lambda: [a.x, a.stats, a.gamma, a.beta, "relu", a.slope, a.eps],
        "input_grad": lambda: [
            dy,
            a.w,
            ops.act_mask(a.x, a.stats, a.gamma, a.beta, "relu", a.slope, a.eps),
            None if a.stats is None else a.stats[1].clone(),
            a.rng,
            list(a.x.shape),
            a.stride,
            a.pad,
            "relu",
            a.slope,
            p,
        ],
        "channel_stats": lambda: [a.x],
        "dropout": lambda: [a.x, torch.randint(2**62, (2,)), 0.3],
    }[name]()


OPCHECK = [
    *(("fprop", mode) for mode in ("train", "no prologue", "everything")),
    *((name, m) for name in ("dgrad", "wgrad", "input_grad") for m in ("train", "no prologue", "dropout", "stride 2")),
    *(("bn_bwd_apply", mode) for mode in ("train", "eval", "no affine")),
    ("act_mask", "train"),
    ("act_mask", "no prologue"),
    ("channel_stats", "train"),
    ("dropout", "train"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, mode", OPCHECK)
def test_opcheck(name, mode, layout):
    opcheck(name, mode, layout, torch.float32)


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad", "act_mask", "input_grad", "channel_stats"])
def test_opcheck_of_bfloat16(name):
    """Statistics and sums are wider than the data."""
    opcheck(name, "train", "NCHW", torch.bfloat16)


def opcheck(name, mode, layout, dtype):
    arguments = [lay(v, layout) if isinstance(v, Tensor) else v for v in primitive_arguments(name, mode, dtype)]
    if name == "fprop":
        arguments = [
            v.detach().clone().requires_grad_() if isinstance(v, Tensor) and field in cases.GRADIENTS else v
            for field, v in zip(FpropArgs._fields, arguments)
        ]
    results = torch.library.opcheck(getattr(ops, name), arguments, raise_exception=False)
    assert set(results.values()) == {"SUCCESS"}, results


def test_schema_names_are_those_of_fprop_arguments():
    assert tuple(argument.name for argument in ops.fprop._schema.arguments) == FpropArgs._fields


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_and_filters_leave_in_channels_last(layout):
    call = build("everything", torch.float32, c=8, k=4, dense=True)
    leaves = {name: lay(v, layout) for name, v in call.leaves().items()}
    y = call.run(**leaves).y
    grads = torch.autograd.grad(y, [leaves["x"], leaves["w"], leaves["x_short"]], torch.randn_like(y).contiguous())
    for v in (y, *grads):
        assert v.is_contiguous(memory_format=torch.channels_last)


# Derivatives.


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradients_equal_plain_pytorch(mode):
    call = build(mode)
    leaves = call.leaves()
    y, want = call.run(**leaves).y, call.plain(**leaves)
    assert close(y, want)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, list(leaves.values()), dy)
    for name, a, b in zip(leaves, got, torch.autograd.grad(want, list(leaves.values()), dy)):
        assert close(a, b), name


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    call = build(mode)
    leaves = call.leaves()
    assert torch.autograd.gradcheck(lambda *v: call.run(**dict(zip(leaves, v))).y, tuple(leaves.values()))


@pytest.mark.parametrize("mode", MODES)
def test_gradgradcheck(mode):
    call = build(mode)
    leaves = call.leaves()
    function = lambda *v: call.run(**dict(zip(leaves, v))).y
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


ALONE = {"bn": False, "act": "silu", "bias": True, "residual": True, "short": "activated", "affine": False}


@pytest.mark.parametrize(
    "mode", ["everything", "no affine", "residual", ALONE], ids=lambda m: m if isinstance(m, str) else "few"
)
def test_gradient_of_one_input_alone(mode):
    """The engine is asked about the right input also where arguments before it are absent."""
    call = build(mode)
    leaves = call.leaves()
    y, want = call.run(**leaves).y, call.plain(**leaves)
    for name, v in leaves.items():
        (got,) = torch.autograd.grad(y, [v], torch.ones_like(y), retain_graph=True)
        assert close(got, torch.autograd.grad(want, [v], torch.ones_like(y), retain_graph=True)), name


def test_one_tensor_in_two_roles_gets_the_gradient_of_both():
    """In first and second order: the block's input is the residual or the shortcut's source as well."""
    call = build({"short": "raw", "residual": True, "act": "silu", "batch_stats": True}, c=2, k=2)
    x, w_short = call.tensors["x"].clone().requires_grad_(), call.tensors["w_short"]
    for run in (call.run, call.plain):
        y = run(x=x, x_short=x, residual=x, w_short=w_short)
        y = y if isinstance(y, Tensor) else y.y
        (dx,) = torch.autograd.grad(y.sin().sum(), [x], create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), [x])
        if run == call.run:
            first = dx.detach(), ddx
        else:
            assert close(first, (dx.detach(), ddx))


def test_second_derivative_of_some_inputs_only():
    call = build("train")
    leaves = call.leaves("x", "gamma")
    results = []
    for run in (lambda: call.run(**leaves).y, lambda: call.plain(**leaves)):
        (dx,) = torch.autograd.grad(run().sin().sum(), [leaves["x"]], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), list(leaves.values())))
    assert close(*results)


def test_statistics_handed_on_carry_their_gradient():
    """Two convolutions in a row; the second takes the statistics that the first took of its output."""
    first, second = build("train", c=2, k=2), build("train", c=2, k=2)
    names = ("w", "gamma", "beta")

    def chain(x, *v):
        a, b = dict(zip(names, v[:3])), dict(zip(names, v[3:]))
        y, stats, _ = bn_act_conv(x, stats=channel_stats(x), act="silu", batch_stats=True, want_stats=True, **a)
        return bn_act_conv(y, stats=stats, act="silu", batch_stats=True, residual=x, **b).y

    inputs = [first.leaves("x")["x"], *first.leaves(*names).values(), *second.leaves(*names).values()]
    assert torch.autograd.gradcheck(chain, inputs)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_gradients_of_filters_have_their_strides(memory_format):
    """A 1x1 filter's strides are ambiguous; DistributedDataParallel warns of any but the parameter's."""
    w = torch.randn(8, 6, 3, 3).to(memory_format=memory_format).requires_grad_()
    w_short = torch.randn(8, 6, 1, 1).to(memory_format=memory_format).requires_grad_()
    assert w_short.stride(2) == (6 if memory_format == torch.channels_last else 1)
    x = torch.randn(2, 6, 5, 5)
    y = bn_act_conv(x, w, x_short=x, w_short=w_short, pad=(1,) * 4)[0]
    y.square().sum().backward()
    assert w.grad.stride() == w.stride() and w_short.grad.stride() == w_short.stride()


def test_bias_and_affine_gradients_have_the_dtype_of_their_parameter():
    call = build({"bias": True, "batch_stats": True}, torch.float64)
    leaves = {name: call.tensors[name].to(torch.float32).requires_grad_() for name in ("gamma", "beta", "bias")}
    call.run(x=call.tensors["x"], **leaves).y.sum().backward()
    assert [v.grad.dtype for v in leaves.values()] == [torch.float32] * 3


# What a backward call runs.


def network(batch_stats=True):
    """Two convolutions, fp32, and the leaves of the first."""
    call = build({"batch_stats": batch_stats}, torch.float32, c=4, k=4, dense=True)
    leaves = call.leaves()

    def loss():
        y = call.run(**leaves).y
        return call.run(**{**leaves, "x": y}).y.square().sum()

    return leaves, loss


BACKWARD = {
    "backward": (lambda loss, v: loss.backward(), (2, 2, 2)),
    "grad of x": (lambda loss, v: torch.autograd.grad(loss, [v["x"]]), (2, 0, 2)),
    "grad of x and w": (lambda loss, v: torch.autograd.grad(loss, [v["x"], v["w"]]), (2, 2, 2)),
    "grad of w": (lambda loss, v: torch.autograd.grad(loss, [v["w"]]), (1, 2, 1)),
    "inputs=[gamma]": (lambda loss, v: loss.backward(inputs=[v["gamma"]]), (2, 0, 1)),
    "inputs=[x]": (lambda loss, v: loss.backward(inputs=[v["x"]]), (2, 0, 2)),
}


@pytest.mark.parametrize("way", BACKWARD)
def test_backward_runs_what_is_wanted_and_no_more(way, calls):
    run, expected = BACKWARD[way]
    leaves, loss = network()
    value = loss()
    calls.clear()
    run(value, leaves)
    assert (calls["dgrad"], calls["wgrad"], calls["bn_bwd_apply"]) == expected


def test_frozen_weights_need_no_wgrad(calls):
    leaves, loss = network()
    leaves["w"].requires_grad_(False)
    loss().backward()
    assert calls["wgrad"] == 0 and leaves["x"].grad is not None and leaves["w"].grad is None


def test_retained_graph_runs_wgrad_when_it_is_wanted_later(calls):
    leaves, loss = network()
    value = loss()
    torch.autograd.grad(value, [leaves["x"]], retain_graph=True)
    assert calls["wgrad"] == 0
    value.backward()
    assert calls["wgrad"] == 2
    assert parity.error(leaves["w"].grad, torch.autograd.grad(loss(), [leaves["w"]])[0]) == 0.0


def test_hook_on_a_weight_is_called_only_where_its_gradient_is_wanted():
    leaves, loss = network()
    seen = []
    leaves["w"].register_hook(lambda grad: seen.append(grad))
    torch.autograd.grad(loss(), [leaves["x"]])
    assert not seen
    loss().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("batch_stats", [True, False])
def test_input_gradient_asks_for_sums_only_where_statistics_move(batch_stats, monkeypatch):
    seen = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, problem: seen.append((op, problem)) or choose(op, problem))
    leaves, loss = network(batch_stats)
    torch.autograd.grad(loss(), [leaves["x"]])
    assert [problem.want_stats for op, problem in seen if op == "dgrad"] == [True] * 2 * batch_stats
    assert [op for op, _ in seen if op == "input_grad"] == ["input_grad"] * 2 * (not batch_stats)


def test_checkpoint_runs_forward_again_and_replays_the_mask(calls):
    call = build({"p": 0.5, "drop_at": "prologue", "batch_stats": True}, torch.float64, dense=True)
    del call.tensors["rng"]
    leaves = call.leaves()
    run = lambda *v: call.run(**dict(zip(leaves, v))).y
    torch.manual_seed(5)
    want = torch.autograd.grad(run(*leaves.values()).square().sum(), list(leaves.values()))
    calls.clear()
    torch.manual_seed(5)
    y = checkpoint(run, *leaves.values(), use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert calls["fprop"] == 2
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("mode", ["train", "everything", "dropout"])
def test_saved_for_backward_are_the_inputs_and_nothing_else(mode):
    """No activation, no mask, no copy of a filter; residual and bias not at all."""
    call = build(mode, torch.float32, dense=True)
    leaves = call.leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        call.run(**leaves)
    inputs = {**call.tensors, **leaves}
    pointers = {v.data_ptr(): name for name, v in inputs.items()}
    names = [pointers.get(v.data_ptr(), f"{list(v.shape)}") for v in saved]
    statistics = [f"{[2, c]}" for c in (call.tensors["x"].shape[1], 2)]
    allowed = set(inputs) - {"residual", "bias", "out_scale", "out_shift"} | set(statistics)
    assert set(names) <= allowed and len(names) == len(set(names)), names


def test_two_runs_are_bit_equal():
    call = build("everything", torch.float32, n=4, c=24, k=20, h=9, w=9, dense=True)
    runs = []
    for _ in range(3):
        leaves = call.leaves()
        y, stats, _ = call.run(**leaves)
        runs.append([y, stats, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("name", [name for name in dispatch.OPS if name != "fprop"])
def test_primitives_record_nothing(name):
    """Only fprop has a gradient; that of another one's inner calls would be wrong and hold memory."""
    arguments = [
        v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in primitive_arguments(name, "train", torch.float32)
    ]
    with wrn_fast.backend("aten"):
        outputs = getattr(ops, name)(*arguments)
    for v in [outputs] if isinstance(outputs, Tensor) else outputs:
        assert v.grad_fn is None or "NotImplemented" in v.grad_fn.name()


def test_inputs_stay_as_they_were():
    call = build("everything", torch.float32, dense=True)
    before = {name: v.clone() for name, v in call.tensors.items()}
    leaves = call.leaves()
    y = call.run(**leaves).y
    dy = torch.randn_like(y)
    kept = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, kept)
    for name, v in before.items():
        assert torch.equal(call.tensors[name], v) and (name not in leaves or torch.equal(leaves[name], v)), name


def test_backward_uses_the_backend_of_its_forward(monkeypatch):
    seen = []
    choose = dispatch.choose
    monkeypatch.setattr(
        dispatch, "choose", lambda op, problem: seen.append((op, dispatch.selection())) or choose(op, problem)
    )
    _, loss = network()
    with wrn_fast.backend("aten"):
        value = loss()
    value.backward()
    assert {names for _, names in seen} == {("aten",)} and {"dgrad", "wgrad"} <= {op for op, _ in seen}


def test_empty_batch_gives_empty_results_and_zero_gradients(calls):
    """And asks no backend: each primitive of an empty batch is the definition's."""
    call = build("everything", torch.float32, dense=True)
    leaves = call.leaves()
    for name in ("x", "residual", "x_short"):
        leaves[name] = leaves[name].detach()[:0].requires_grad_()
    y = call.run(**leaves).y
    y.sum().backward()
    assert y.shape[0] == 0 and not calls
    assert all(v.grad.shape == v.shape and not v.grad.any() for v in leaves.values())
