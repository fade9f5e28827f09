"""The operators under transforms, compilers and autocast."""

from __future__ import annotations

import copy
import io
import pickle

import operator_cases as cases
import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from operator_cases import build, close

from wrn_fast import ops
from wrn_fast.functional import bn_act_conv, channel_stats

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")


@pytest.fixture
def calls(monkeypatch):
    return cases.count_calls(monkeypatch)


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
    """With dropout, whose (seed, offset) the compiled graph draws as eager does where the compiler lets it."""
    block = Block(p=0.5)
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(fallback_random=True, compile_threads=1):
        for n in (2, 3, 5):
            x = torch.randn(n, 4, 5, 6, dtype=torch.float64)
            results = []
            for model in (compiled, block):
                torch.manual_seed(n)
                results.append(gradients(model, x))
            assert close(*results)


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
    torch._dynamo.reset()
    calls.clear()
    xr = x.clone().requires_grad_()
    torch.compile(block, backend="aot_eager", fullgraph=True)(xr).square().sum().backward()
    assert calls["wgrad"] == 0 and calls["dgrad"] == 2


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace grad")
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_attack_step_runs_no_wgrad(calls):
    block = Block()

    def attack(x):
        (dx,) = torch.autograd.grad(block(x).square().sum(), [x])
        return x.detach() + 0.1 * dx.sign()

    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    want = attack(x)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
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
