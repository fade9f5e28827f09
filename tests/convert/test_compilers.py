"""Accelerated models under torch.compile, export, tracing and functorch."""

import copy

import pytest
import torch
from convert.networks import FAMILIES, twins
from families import family_x
from models import shake

from wrn_fast import parity
from wrn_fast.convert import accelerate

DOUBLE = torch.float64


def net(rate=0.0, depth=10):
    return shake(family_x.WideResNet(depth, 10, 1, rate)).double()


def image(n=2):
    return torch.randn(n, 3, 32, 32, dtype=DOUBLE)


@pytest.mark.parametrize(("name", "training"), [("x", False), ("m", True)])
def test_compiles_whole_with_any_batch_size(name, training):
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(sum("wrn_fast.fprop" in str(n.target) for n in graph.graph.nodes))
        return graph

    model = accelerate(shake(FAMILIES[name]()).double())
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True, dynamic=True)
    for n in (2, 3):
        x = image(n)
        compiled.train(training)
        model.train(training)
        assert parity.error(compiled(x), model(x)) <= parity.FLOAT64
    for (name, a), b in zip(model.named_buffers(), compiled.buffers()):
        assert parity.error(b, a) <= parity.FLOAT64, name
    assert found and set(found) == {12}


def test_compiled_training_step_with_aot_autograd():
    torch._dynamo.reset()
    model = accelerate(net())
    compiled, x = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True), image()
    for m in (model, compiled):
        m(x).square().sum().backward()
    for a, b in zip(model.parameters(), compiled.parameters()):
        assert a.grad is None or parity.error(b.grad, a.grad) <= parity.FLOAT64


def test_a_model_compiled_before_is_compiled_again():
    torch._dynamo.reset()
    model, x = net().eval(), image()
    graphs = []
    compiled = torch.compile(model, backend=lambda g, _: graphs.append(g) or g, fullgraph=True)
    want = compiled(x)
    accelerate(compiled)
    assert parity.error(compiled(x), want) <= parity.FLOAT64
    assert len(graphs) == 2 and "wrn_fast" in graphs[1].code and "wrn_fast" not in graphs[0].code


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    model, x = accelerate(net()).eval(), image()
    program = torch.export.export(model, (x,), strict=strict)
    assert "wrn_fast.fprop" in str(program.graph)
    assert parity.error(program.module()(x), model(x)) <= parity.FLOAT64


def test_is_traced():
    model, x = accelerate(net()).eval(), image()
    assert parity.error(torch.jit.trace(model, x)(x), model(x)) <= parity.FLOAT64
    assert parity.error(torch.fx.symbolic_trace(model)(x), model(x)) <= parity.FLOAT64


def test_functional_call_and_transforms():
    plain, fast = (m.eval() for m in twins(net()))
    x = image(3)
    values = {k: v * 1.5 for k, v in plain.state_dict().items() if v.dtype.is_floating_point}
    want = torch.func.functional_call(plain, values, (x,))
    assert parity.error(torch.func.functional_call(fast, values, (x,)), want) <= parity.FLOAT64
    per_sample = [torch.vmap(torch.func.grad(lambda v, m=m: m(v[None]).square().sum()))(x) for m in (fast, plain)]
    assert parity.error(*per_sample) <= parity.FLOAT64
    tangents = [torch.func.jvp(m, (x,), (x,))[1] for m in (fast, plain)]
    assert parity.error(*tangents) <= parity.FLOAT64


def test_stacked_models_under_vmap():
    """An ensemble by torch.func.stack_module_state."""
    models = [accelerate(net()).eval() for _ in range(2)]
    x = image()
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def one(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    got = torch.vmap(one)(parameters, buffers)
    for i, model in enumerate(models):
        assert parity.error(got[i], model(x)) <= parity.FLOAT64


@pytest.mark.long
def test_compiled_ahead_of_time(tmp_path):
    """AOTInductor: a package whose C++ calls the operators; it runs in a process that has imported this library."""
    plain, fast = (m.eval() for m in twins(net().float()))
    x = image().float()
    program = torch.export.export(fast, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for _ in range(3):
        x = image().float()
        with torch.no_grad():
            want = copy.deepcopy(plain).double()(x.double())
            bound = parity.one_seed_bound(parity.error(plain(x), want), torch.float32)
            assert parity.error(loaded(x), want) <= bound
