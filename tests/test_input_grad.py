"""Where of a source only x wants a gradient: one bit an element is kept, and one fused primitive runs."""

from __future__ import annotations

from functools import partial

import operator_cases as cases
import pytest
import torch
from operator_cases import MODES, build, close

import wrn_fast
from benchmarks.memory import saved_bytes
from wrn_fast import masks, parity, reference

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")

# Batch statistics move with x, so that these modes need the whole x.
EVAL = {
    name: {key: v for key, v in mode.items() if not key.endswith("batch_stats")}
    for name, mode in MODES.items()
    if name not in ("train", "no prologue")
} | {"no prologue": MODES["no prologue"]}
FROZEN = {
    "silu": {"": False},
    "everything": {"": False, "_short": True},
    "shortcut in eval": {"": True, "_short": False},
    "raw shortcut": {"": True, "_short": True},
}


def leaves_of(call):
    return call.leaves(*(name for name in ("x", "x_short", "residual") if name in call.tensors))


@pytest.mark.parametrize("mode", EVAL)
def test_gradient_by_x_equals_plain_pytorch(mode):
    call = build(EVAL[mode], c=11, k=9)
    leaves = leaves_of(call)
    y, want = call.run(**leaves).y, call.plain(**leaves)
    kept = FROZEN.get(mode, {"": True, "_short": True})
    assert set(y.grad_fn.masked) == {suffix for suffix, masked in kept.items() if masked and f"x{suffix}" in leaves}
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(map(close, got, torch.autograd.grad(want, list(leaves.values()), dy)))


@pytest.mark.parametrize("mode", EVAL)
def test_gradcheck_by_x(mode):
    call = build(EVAL[mode])
    leaves = leaves_of(call)
    function = lambda *v: call.run(**dict(zip(leaves, v))).y
    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_what_is_kept():
    """Of x 1 bit an element, of BatchNorm a factor a channel, of a convolution without a prologue nothing."""
    call = build({"residual": True, "short": "raw"}, torch.float32, c=11, k=9, dense=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        call.run(**leaves_of(call))
    weights = {call.tensors[name].data_ptr() for name in ("w", "w_short")}
    others = {(v.dtype, tuple(v.shape)) for v in saved if v.data_ptr() not in weights}
    assert others == {(torch.uint8, masks.shape(call.tensors["x"].shape)), (torch.float32, (11,))}


def test_batch_statistics_and_weights_that_want_a_gradient_keep_x():
    call = build("train")
    assert not call.run(**call.leaves("x")).y.grad_fn.masked
    call = build("eval")
    for name in ("w", "gamma", "beta"):
        leaves = call.leaves("x", name)
        y = call.run(**leaves).y
        assert not y.grad_fn.masked
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, list(leaves.values()), dy)
        want = torch.autograd.grad(call.plain(**leaves), list(leaves.values()), dy)
        assert all(map(close, got, want))


def test_source_that_nobody_differentiates_keeps_nothing():
    call = build({"residual": True}, torch.float32)
    y = call.run(**call.leaves("residual")).y
    assert y.grad_fn.masked and not any(v is not None and v.dtype == torch.uint8 for v in y.grad_fn.saved_tensors)


def test_an_attack_step_runs_the_fused_primitive_alone(monkeypatch):
    model = wrn_fast.classic(10, 10).eval().requires_grad_(False)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    counts = cases.count_calls(monkeypatch)
    torch.autograd.grad(model(x).square().sum(), [x])
    assert counts["dgrad"] == counts["wgrad"] == counts["bn_bwd_apply"] == 0
    assert counts["input_grad"] == 9 and counts["act_mask"] == 8, counts


@pytest.mark.parametrize("kind", ["WideResNet", "classic"])
def test_saved_bytes_of_a_frozen_model_are_at_most_an_eighth(kind):
    """WRN-28-10 at batch 16, unique storages, parameters excluded; on meta tensors, since only sizes count."""
    sizes = []
    for home in (reference, wrn_fast):
        with torch.device("meta"):
            model = getattr(home, kind)(28, 10, 10).eval().requires_grad_(False)
            x = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
        sizes.append(saved_bytes(partial(model, x), model))
    eager, fast = sizes
    print(f"saved bytes with frozen weights, {kind}: {fast / eager:.4f} of the reference's")
    assert 1 / 100 < fast / eager <= 1 / 8


def test_compiled_attack_step_equals_eager():
    model = wrn_fast.classic(10, 10).double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def step(x):
        return model(x).square().sum()

    grads = []
    for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(leaf), [leaf])[0])
    assert parity.error(*grads) <= parity.FLOAT64
