"""The head as PyTorch sees it: registration, derivatives, transforms, errors, and the model that calls it."""

from __future__ import annotations

import head_cases as cases
import operator_cases
import pytest
import torch
import torch._dynamo.config
from head_cases import MODES, build
from operator_cases import close
from torch import nn

import wrn_fast
from wrn_fast import dispatch, ops, parity, reference
from wrn_fast.errors import WrnFastError
from wrn_fast.functional import head

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")


@pytest.fixture
def calls(monkeypatch):
    return operator_cases.count_calls(monkeypatch)


def lay(v, layout):
    if v.dim() != 4 or layout == "channels_last":
        return v
    return v.contiguous() if layout == "NCHW" else torch.cat([v, v], dim=3)[..., : v.shape[3]]


# Registration.


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "sliced"])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode, layout):
    opcheck(mode, layout, torch.float32)


@pytest.mark.parametrize("mode", ["classic in training", "cosine"])
def test_opcheck_of_bfloat16(mode):
    opcheck(mode, "NCHW", torch.bfloat16)


def opcheck(mode, layout, dtype):
    call = build(mode, dtype, dense=True)
    arguments = call.arguments()
    arguments[0] = lay(arguments[0], layout).detach()
    arguments = [v.requires_grad_() if name in cases.GRADIENTS and v is not None else v
                 for name, v in zip((*cases.TENSORS, *cases.SCALARS), arguments)]  # fmt: skip
    y, stats, gamma, beta, *_, act, slope, eps, batch_stats, _ = (
        v.detach() if isinstance(v, torch.Tensor) else v for v in arguments
    )
    dfeat = torch.randn(y.shape[:2])
    backward = [dfeat, y, stats, gamma, beta, act, slope, eps, batch_stats, stats is not None]
    for op, given in ((ops.head, arguments), (ops.head_bwd, backward)):
        results = torch.library.opcheck(op, given, raise_exception=False)
        assert set(results.values()) == {"SUCCESS"}, (op, results)


def test_the_backward_records_nothing():
    y, w = (build("no bias", torch.float32).tensors[name] for name in ("y", "w"))
    dfeat = torch.randn(y.shape[:2]).requires_grad_()
    for v in ops.head_bwd(dfeat, y, None, None, None, "silu", 0.0, 1e-5, False, False):
        assert v.grad_fn is None or "NotImplemented" in v.grad_fn.name()
    assert ops.head(y, None, None, None, w, None, "silu", 0.0, 1e-5, False, False)[0].grad_fn is None


# Derivatives.


def both(call, leaves, weights):
    """The weighted sum of both outputs, by the operator and in plain PyTorch."""
    for run in (call.run, call.plain):
        yield sum((v * a).sum() for v, a in zip(run(**leaves), weights))


@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_equal_plain_pytorch(mode):
    call = build(mode)
    leaves = call.leaves()
    got, want = call.run(**leaves), call.plain(**leaves)
    assert close(got, want)
    for of_out, of_feature in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        weights = of_out * torch.randn_like(want[0]), of_feature * torch.randn_like(want[1])
        found = [torch.autograd.grad(loss, list(leaves.values())) for loss in both(call, leaves, weights)]
        for name, a, b in zip(leaves, *found):
            assert close(a, b) and a.dtype == leaves[name].dtype, name


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    call = build(mode)
    leaves = call.leaves()
    function = lambda *v: call.run(**dict(zip(leaves, v)))
    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_one_input_alone(mode):
    """Of first and second order, and by one output alone."""
    call = build(mode)
    leaves = call.leaves()
    for name, v in leaves.items():
        found = []
        for out, feature in (call.run(**leaves), call.plain(**leaves)):
            (first,) = torch.autograd.grad(out.sin().sum(), [v], create_graph=True)
            grads = [first]
            if name in ("y", "gamma", "beta"):
                grads += torch.autograd.grad(feature.sin().sum(), [v], retain_graph=True)
            again = torch.autograd.grad(first.square().sum(), list(leaves.values()), materialize_grads=True)
            # Some are zero but for rounding.
            found.append([*grads, torch.cat([u.flatten() for u in again])])
        assert close(*found), name


def test_backward_runs_what_is_wanted_and_no_more(calls):
    call = build("classic in training")
    leaves = call.leaves()
    out, _ = call.run(**leaves)
    calls.clear()
    torch.autograd.grad(out.sum(), [leaves["w"], leaves["bias"]], retain_graph=True)
    assert not calls
    torch.autograd.grad(out.sum(), [leaves["y"]])
    assert dict(calls) == {"head_bwd": 1}


def test_the_cosine_head_keeps_no_activation_and_writes_none(calls):
    call = build("cosine", torch.float32)
    leaves = call.leaves("y")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        out, feature = call.run(**leaves)
    assert {v.data_ptr() for v in saved} <= {call.tensors["w"].data_ptr(), feature.data_ptr()}
    calls.clear()
    out.sum().backward()
    assert not calls and leaves["y"].grad.any()


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-13])
def test_a_feature_without_a_direction(length):
    """Shorter than 1e-12 it is divided by that, as in the reference: no NaN, value and gradients equal."""
    call = build("cosine", dense=True)
    y = (call.tensors["y"] * length).requires_grad_()
    w = call.tensors["w"].clone().requires_grad_()
    found = []
    for out, _ in (call.run(y=y, w=w), call.plain(y=y, w=w)):
        found.append([out, *torch.autograd.grad(out.sum(), [y, w])])
        assert all(v.isfinite().all() for v in found[-1])
    assert close(*found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["classic", "cosine", "no bias"])
def test_special_values_reach_what_they_reach_in_eager(mode, value):
    call = build(mode, torch.float32, dense=True)
    call.tensors["y"][1, 2, 0, 0] = value
    for got, want in zip(call.run(), call.plain()):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert got[0].isfinite().all()


def test_empty_batch(calls):
    call = build("classic", torch.float32)
    leaves = call.leaves()
    leaves["y"] = leaves["y"].detach()[:0].requires_grad_()
    out, feature = call.run(**leaves)
    (out.sum() + feature.sum()).backward()
    assert out.shape == (0, 4) and feature.shape == (0, 5) and not calls
    assert all(v.grad.shape == v.shape and not v.grad.any() for v in leaves.values())


# Transforms, compilers, autocast.


@pytest.mark.parametrize("mode", ["classic in training", "cosine after silu"])
def test_transforms(mode):
    call = build(mode)
    leaves = {name: v.detach() for name, v in call.leaves().items()}
    tangents = tuple(torch.randn_like(v) for v in leaves.values())
    runs = [lambda *v, run=run: run(**dict(zip(leaves, v))) for run in (call.run, call.plain)]
    found = [torch.func.jvp(run, tuple(leaves.values()), tangents) for run in runs]
    assert close([*found[0][0], *found[0][1]], [*found[1][0], *found[1][1]])
    samples = torch.randn(3, 2, *call.tensors["y"].shape[1:], dtype=torch.float64)
    found = [torch.vmap(torch.func.grad(lambda y, run=run: run(y=y)[0].square().sum()))(samples)
             for run in (call.run, call.plain)]  # fmt: skip
    assert close(*found)


@pytest.mark.parametrize("mode", ["classic in training", "cosine"])
def test_compiled_without_graph_breaks_for_any_batch(mode):
    torch._dynamo.reset()
    call = build(mode)
    constants = {name: v for name, v in call.tensors.items() if name != "y"}

    def step(y):
        stats = {"stats": wrn_fast.channel_stats(y)} if call.scalars["batch_stats"] else {}
        out, feature = head(y, **constants, **stats, **call.scalars)
        return out.square().sum() + feature.sin().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (2, 3, 5):
        y = torch.randn(n, 5, 4, 3, dtype=torch.float64, requires_grad=True)
        found = [[run(y), *torch.autograd.grad(run(y), [y])] for run in (compiled, step)]
        assert close(*found)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations_and_keeps_parameters(dtype):
    call = build("classic", torch.float32)
    leaves = call.leaves()
    with torch.autocast("cpu", dtype=dtype):
        out, feature = call.run(**leaves)
    assert out.dtype == feature.dtype == dtype
    out.float().square().sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in leaves.values())


# Errors.


IMAGE = (2, 5, 4, 3)
WRONG = {
    "y": [
        None,
        torch.ones(2, 5),
        torch.ones(2, 5, 0, 3),
        torch.ones(IMAGE, dtype=torch.int32),
        torch.ones(IMAGE).to_sparse(),
    ],
    "w": [
        None,
        torch.ones(4, 6),
        torch.ones(5),
        torch.ones(0, 5),
        torch.ones(4, 5, dtype=torch.float64),
        torch.ones(4, 5, device="meta"),
    ],
    "bias": [3.0, torch.ones(5), torch.ones(4, dtype=torch.int32)],
    "stats": [torch.ones(5), torch.ones(2, 5, dtype=torch.float16), torch.ones(2, 5).requires_grad_()],
    "gamma": [torch.ones(4), "gamma"],
    "beta": [torch.ones(5, 1)],
    "act": ["gelu", 3],
    "eps": [-1.0, float("nan"), "small"],
    "slope": [float("inf")],
    "cosine": ["yes"],
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_are_named(name, calls):
    call = build("classic", torch.float32, n=2)
    for value in WRONG[name]:
        given = {**call.tensors, **call.scalars, name: value}
        with pytest.raises(WrnFastError, match=rf"^`{name}`: expected .*got ") as e:
            head(**given)
        assert "\n" not in str(e.value)
    assert not calls


def test_affine_without_statistics_and_wrong_gradients_are_named():
    t = build("classic", torch.float32, n=2).tensors
    with pytest.raises(WrnFastError, match="`stats`: expected"):
        head(t["y"], t["w"], gamma=t["gamma"])
    for dfeat in (torch.ones(2, 4), torch.ones(2, 5, dtype=torch.float64)):
        with pytest.raises(WrnFastError, match="`dfeat`: expected"):
            ops.head_bwd(dfeat, t["y"], None, None, None, "relu", 0.0, 0.0, False, False)
    with pytest.raises(WrnFastError, match="`want_sums`: expected False"):
        ops.head_bwd(torch.ones(2, 5), t["y"], None, None, None, "relu", 0.0, 0.0, False, True)


def test_a_backend_without_a_head_leaves_it_to_aten(recwarn, monkeypatch):
    call = build("classic", torch.float32)
    for op in dispatch.SMALL_OPS:
        monkeypatch.delattr(dispatch.load("cpu"), op, raising=False)
    dispatch.forget()
    with wrn_fast.backend("aten"):
        want = call.run()
    for names in ("cpu", "cpu,aten"):
        with wrn_fast.backend(names):
            assert all(map(torch.equal, call.run(), want))
    dispatch.forget()
    assert not [w for w in recwarn if issubclass(w.category, wrn_fast.FallbackWarning)]


# The model.


@pytest.fixture
def served(monkeypatch):
    """As if a backend had a kernel for the CPU."""
    monkeypatch.setattr(dispatch, "beyond_aten", lambda *_: True)


def test_what_only_aten_would_serve_stays_modules(monkeypatch):
    """An operator call costs more than it saves, then. Once a backend has a kernel, it is asked."""
    ran = []
    monkeypatch.setattr(wrn_fast.model, "head", lambda *args, **kwargs: ran.append(args) or head(*args, **kwargs))
    _, fast = (model.eval() for model in pair("classic"))
    fast.float()
    y = torch.randn(2, 64, 8, 8)
    dispatch.forget()
    with wrn_fast.backend("aten"):
        fast.finish(y)
    assert not ran
    for op in dispatch.SMALL_OPS:
        monkeypatch.setattr(dispatch.load("cpu"), op, getattr(dispatch.load("aten"), op), raising=False)
    monkeypatch.setattr(dispatch.load("cpu"), "unsupported", lambda op, problem: None)
    with wrn_fast.backend("cpu"):
        fast.finish(y)
    dispatch.forget()
    assert len(ran) == 1


def pair(head, **options):
    models = [kind.WideResNet(10, 4, 1, head=head, **options).double() for kind in (reference, wrn_fast)]
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.mark.parametrize("name", reference.HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_calls_the_operator(name, training, calls, served):
    ref, fast = (model.train(training) for model in pair(name))
    y = torch.randn(3, 64, 8, 8, dtype=torch.float64)
    calls.clear()
    got, want = fast.finish(y), ref.finish(y)
    assert calls["head"] == 1 and type(got) is type(want)
    assert close(got, want)
    for a, b in zip(fast.bn1.buffers(), ref.bn1.buffers()):
        assert close(a.double(), b.double())


@pytest.mark.parametrize("part", ["bn1", "relu", "fc", "pooled", "nn.Module", "global", "pool"])
def test_who_listens_or_changes_a_part_gets_the_plain_head(part, calls, served):
    ref, fast = (model.eval() for model in pair("classic", pool="global" if part == "global" else "window"))
    seen = []
    y = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    handle = None
    if part == "pooled":
        fast.pooled = lambda v: seen.append(part) or reference.WideResNet.pooled(fast, v)
    elif part == "nn.Module":
        fast.fc = nn.Sequential(fast.fc)
        seen.append(part)
    elif part == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    elif part == "pool":
        y = torch.randn(2, 64, 16, 8, dtype=torch.float64)
        seen.append(part)
    else:
        getattr(fast, part).register_forward_hook(lambda m, i, o: seen.append(part))
    calls.clear()
    got = fast.finish(y)
    if handle is not None:
        handle.remove()
    assert seen and not calls and close(got, ref.finish(y))


@pytest.mark.parametrize("mode", ["classic", "classic in training", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_as_near_as_eager(mode, dtype):
    pools = {}
    for _ in range(parity.SEEDS):
        call = build(mode, torch.float64, n=4, c=24, k=5, h=4, w=4, apart=4 * parity.UNIT[dtype]).to(dtype)
        exact = call.to(torch.float64)
        fast = call._replace(
            tensors={n: v.float() if n in ("stats", "gamma", "beta", "bias") else v for n, v in call.tensors.items()}
        )
        weights = torch.randn(4, 5), torch.randn(4, 24)
        found = []
        for one, run in ((fast, fast.run), (call, call.plain), (exact, exact.plain)):
            leaves = one.leaves("y", "w")
            result = run(**leaves)
            loss = sum((v * a.to(dtype).to(v.dtype)).sum() for v, a in zip(result, weights))
            found.append([*result, *torch.autograd.grad(loss, list(leaves.values()))])
        for name, got, eager, want in zip(("out", "feature", "dy", "dw"), *found):
            pools.setdefault(name, parity.Pool(name, dtype)).add(got, eager, want)
    for pool in pools.values():
        assert pool.judge().ok, pool.judge()
