"""The operators as PyTorch sees them: registration, derivatives, what backward runs, transforms and compilers."""

from __future__ import annotations

import collections
import copy
import io
import pickle

import operator_cases as cases
import pytest
import torch
from operator_cases import MODES, build
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import wrn_fast
from wrn_fast import dispatch, ops, parity
from wrn_fast.functional import bn_act_conv, channel_stats
from wrn_fast.problem import FpropArgs

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")

LAYOUTS = ("NCHW", "channels_last", "sliced")


def close(got, want):
    """Within the bound of float64, tensor by tensor."""
    got, want = ([v] if isinstance(v, Tensor) else list(v) for v in (got, want))
    assert len(got) == len(want)
    return all(parity.error(a, b) <= parity.FLOAT64 for a, b in zip(got, want))


def lay(v, layout):
    if v is None or v.dim() != 4 or layout == "channels_last":
        return v
    if layout == "NCHW":
        return v.contiguous()
    wide = torch.cat([v, v], dim=3)
    return wide[..., : v.shape[3]]


@pytest.fixture
def calls(monkeypatch):
    """A Counter of the primitives that a backend was asked for."""
    counter = collections.Counter()
    choose = dispatch.choose

    def counted(op, problem):
        counter[op] += 1
        return choose(op, problem)

    monkeypatch.setattr(dispatch, "choose", counted)
    return counter


# Registration.


def fprop_arguments(call):
    """The raw operator's arguments."""
    defaults = dict.fromkeys(ops.TENSORS) | {"act_out": "none", "want_y": True, "want_stats": True}
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
        "channel_stats": lambda: [a.x],
        "dropout": lambda: [a.x, torch.randint(2**62, (2,)), 0.3],
    }[name]()


OPCHECK = [
    *(("fprop", mode) for mode in ("train", "no prologue", "everything")),
    *((name, mode) for name in ("dgrad", "wgrad") for mode in ("train", "no prologue", "dropout", "stride 2")),
    *(("bn_bwd_apply", mode) for mode in ("train", "eval", "no affine")),
    ("channel_stats", "train"),
    ("dropout", "train"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, mode", OPCHECK)
def test_opcheck(name, mode, layout):
    arguments = [lay(v, layout) if isinstance(v, Tensor) else v for v in primitive_arguments(name, mode, torch.float32)]
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
    assert [problem.want_stats for op, problem in seen if op == "dgrad"] == [batch_stats] * 2


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
    leaves, loss = network()
    with wrn_fast.backend("aten"):
        value = loss()
    value.backward()
    assert {names for _, names in seen} == {("aten",)} and {"dgrad", "wgrad"} <= {op for op, _ in seen}


# Transforms.


def test_vmap_of_grad():
    call = build("eval")
    samples = torch.randn(3, *call.tensors["x"].shape[1:], dtype=torch.float64)
    loss = lambda run: lambda x: run(x=x[None]).square().sum()
    got = torch.vmap(torch.func.grad(loss(lambda **v: call.run(**v).y)))(samples)
    assert close(got, torch.vmap(torch.func.grad(loss(call.plain)))(samples))


@pytest.mark.parametrize("mode", ["train", "silu", "everything"])
def test_jvp_and_forward_mode(mode):
    call = build(mode)
    leaves = {name: v.detach() for name, v in call.leaves().items()}
    tangents = tuple(torch.randn_like(v) for v in leaves.values())
    fast = lambda *v: call.run(**dict(zip(leaves, v))).y
    plain = lambda *v: call.plain(**dict(zip(leaves, v)))
    want = torch.func.jvp(plain, tuple(leaves.values()), tangents)
    assert close(torch.func.jvp(fast, tuple(leaves.values()), tangents), want)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(v, t) for v, t in zip(leaves.values(), tangents)]
        assert close(tuple(torch.autograd.forward_ad.unpack_dual(fast(*duals))), want)


def test_hessian():
    call = build("silu", n=1, c=2, k=1, h=3, w=3)
    loss = lambda run: lambda x: run(x=x).sin().sum()
    got = torch.func.hessian(loss(lambda **v: call.run(**v).y))(call.tensors["x"])
    assert close(got, torch.func.hessian(loss(call.plain))(call.tensors["x"]))


def test_make_fx_shows_the_operators():
    from torch.fx.experimental.proxy_tensor import make_fx

    call = build("train", dense=True)
    leaves = call.leaves()

    def step(*v):
        y = call.run(**dict(zip(leaves, v))).y
        return torch.autograd.grad(y.square().sum(), v)

    graph = make_fx(step, tracing_mode="fake")(*leaves.values())
    targets = [node.target for node in graph.graph.nodes]
    for op in (ops.fprop, ops.dgrad, ops.wgrad, ops.bn_bwd_apply, ops.channel_stats):
        assert op in targets, op
    assert all(map(torch.equal, graph(*leaves.values()), step(*leaves.values())))


def test_inference_mode_and_no_grad():
    call = build("everything", torch.float32, dense=True)
    with torch.no_grad():
        want = call.run().y
    with torch.inference_mode():
        got = call.run().y
    assert got.is_inference() and torch.equal(got, want) and not want.requires_grad


# Compilers.


class Block(torch.nn.Module):
    """bn-act-conv twice with a residual, float64, dropout from the default generator in training."""

    def __init__(self, channels=4, p=0.0):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.rand(2, channels, dtype=torch.float64) + 0.5)
        self.beta = torch.nn.Parameter(torch.randn(2, channels, dtype=torch.float64))
        self.w = torch.nn.Parameter(torch.randn(2, channels, channels, 3, 3, dtype=torch.float64) / 6)
        self.p = p

    def forward(self, x):
        h, stats, _ = bn_act_conv(
            x, self.w[0], channel_stats(x), self.gamma[0], self.beta[0], act="silu", batch_stats=True, want_stats=True
        )
        return bn_act_conv(h, self.w[1], stats, self.gamma[1], self.beta[1], None, x, batch_stats=True, p=self.p).y


def gradients(model, x):
    x = x.detach().clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_without_graph_breaks_for_any_batch(backend):
    block = Block()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, 4, 5, 6, dtype=torch.float64)
        assert close(gradients(compiled, x), gradients(block, x))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_dropout_draws_and_replays():
    block = Block(p=0.5)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    first = gradients(compiled, x)
    second = gradients(compiled, x)
    torch.manual_seed(1)
    assert all(map(torch.equal, gradients(compiled, x), first))
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(1)
    assert close(gradients(block, x), first)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_backward_is_made_of_the_primitives(calls):
    block = Block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    gradients(compiled, x)
    calls.clear()
    gradients(compiled, x)
    assert dict(calls) == {"channel_stats": 1, "fprop": 2, "dgrad": 2, "wgrad": 2, "bn_bwd_apply": 2}
    block.requires_grad_(False)
    calls.clear()
    xr = x.clone().requires_grad_()
    compiled(xr).square().sum().backward()
    assert calls["wgrad"] == 0 and calls["dgrad"] == 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_attack_step_runs_no_wgrad(calls, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    block = Block()

    def attack(x):
        (dx,) = torch.autograd.grad(block(x).square().sum(), [x])
        return x.detach() + 0.1 * dx.sign()

    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    want = attack(x)
    compiled = torch.compile(attack, backend="aot_eager", fullgraph=True)
    compiled(x)
    calls.clear()
    assert close(compiled(x), want)
    assert calls["wgrad"] == 0 and calls["dgrad"] == 2


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.usefixtures("fresh_dynamo")
def test_export_with_dynamic_batch(strict):
    block = Block().eval()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert ops.fprop in [node.target for node in program.graph.nodes]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for n in (2, 7):
        x = torch.randn(n, 4, 5, 6, dtype=torch.float64)
        assert torch.equal(torch.export.load(file).module()(x), block(x))
        file.seek(0)


def test_deepcopy_and_pickle_of_a_module_and_of_an_output():
    block = Block()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    want = gradients(block, x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert all(map(torch.equal, gradients(twin, x), want))
    output = bn_act_conv(x, block.w[0], want_stats=True)
    output = type(output)(*(v.detach() for v in output))
    loaded = pickle.loads(pickle.dumps(output))
    assert type(loaded) is type(output) and all(map(torch.equal, loaded, output))


# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations_and_keeps_parameters(dtype):
    call = build({"residual": True, "short": "raw", "batch_stats": True}, torch.float32, dense=True)
    leaves = call.leaves()
    with torch.autocast("cpu", dtype=dtype):
        y, stats, _ = bn_act_conv(
            **leaves, stats=channel_stats(leaves["x"].to(dtype)), batch_stats=True, want_stats=True
        )
    assert y.dtype == dtype and stats.dtype == torch.float32
    y.float().square().sum().backward()
    for name, v in leaves.items():
        assert v.grad.dtype == torch.float32, name


def test_autocast_hands_the_parameter_itself_to_the_backend(monkeypatch):
    """A cast filter would be a new tensor at each call, and no cache of packed filters would ever hit."""
    seen = []
    run = ops._run
    monkeypatch.setattr(ops, "_run", lambda op, problem, *v: seen.append(v[1]) or run(op, problem, *v))
    call = build("eval", torch.float32, dense=True)
    w = torch.nn.Parameter(call.tensors["w"])
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, torch.autocast("cpu", dtype=torch.bfloat16):
            call.run(w=w)
    assert [v.data_ptr() for v in seen] == [w.data_ptr()] * 2
    assert seen[0] is w


def test_autocast_leaves_float64_alone():
    call = build("train", dense=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call.run().y
    assert y.dtype == torch.float64 and close(y, call.plain())


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
