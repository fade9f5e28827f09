"""The door: what it accepts, what it returns, autocast, and what it refuses before the operator is called."""

from __future__ import annotations

import numpy as np
import operator_cases as cases
import pytest
import torch
import torch.nn.functional as F
from operator_cases import build

from wrn_fast import ops, parity
from wrn_fast.errors import WrnFastError
from wrn_fast.functional import ConvOutput, autocast_dtype, bn_act_conv, channel_stats

pytestmark = pytest.mark.filterwarnings("ignore::wrn_fast.FallbackWarning")


def test_outputs_that_were_not_asked_for_are_empty():
    call = build("eval")
    output = call.run()
    assert isinstance(output, ConvOutput) and output.y.numel() and not output.stats.numel() and not output.y_act.numel()
    with torch.no_grad():
        alone = bn_act_conv(**call.tensors, act_out="relu", want_y=False)
        both = bn_act_conv(**call.tensors, act_out="relu", want_stats=True)
    assert not alone.y.numel() and torch.equal(alone.y_act, both.y_act)
    assert parity.error(both.y_act, torch.relu(both.y)) <= parity.FLOAT64
    var, mean = torch.var_mean(both.y, (0, 2, 3), correction=0)
    assert parity.error(both.stats, torch.stack([mean, var])) <= parity.FLOAT64


def test_one_number_pads_all_sides():
    x, w = torch.randn(1, 2, 5, 6, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    for pad in (0, 2):
        y = bn_act_conv(x, w, pad=pad, act="identity").y
        assert torch.equal(y, bn_act_conv(x, w, pad=(pad,) * 4, act="identity").y)
        assert parity.error(y, F.conv2d(x, w, padding=pad)) <= parity.FLOAT64


def test_numbers_of_numpy_are_numbers():
    x, w = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    y = bn_act_conv(x, w, stride=np.int64(2), slope=np.float32(0.5), eps=np.float64(1e-5), act="leaky_relu").y
    assert torch.equal(y, bn_act_conv(x, w, stride=2, slope=0.5, act="leaky_relu").y)


def test_second_output_with_folded_batchnorm_and_its_dropout():
    """conv1 of the reference's evaluation: y_act = drop(relu(bn2(h)))."""
    call = build("eval", k=5)
    scale, shift, rng = torch.randn(5).double(), torch.randn(5).double(), torch.tensor([5, 6])
    with torch.no_grad():
        out = bn_act_conv(**call.tensors, out_scale=scale, out_shift=shift, act_out="relu", p=0.5,
                          drop_at="output_act", rng=rng)  # fmt: skip
    want = torch.relu(call.plain() * scale[:, None, None] + shift[:, None, None])
    want = want * cases.keep_mask(want.shape, rng, 0.5) * 2
    assert parity.error(out.y_act, want) <= parity.FLOAT64
    assert parity.error(out.y, call.plain()) <= parity.FLOAT64


@pytest.mark.parametrize("name", ["x", "w", "gamma", "bias"])
def test_second_output_refuses_what_requires_a_gradient(name):
    call = build({"bias": True})
    leaves = {**call.tensors, **call.leaves(name)}
    with pytest.raises(WrnFastError, match=r"`act_out`.*no gradient"):
        bn_act_conv(**leaves, act_out="relu")
    with torch.no_grad():
        bn_act_conv(**leaves, act_out="relu")


def test_statistics_that_require_a_gradient_are_refused():
    """Their gradient would be silently missing."""
    call = build("eval")
    stats = call.tensors["stats"].clone().requires_grad_()
    with pytest.raises(WrnFastError, match=r"`stats`.*channel_stats"):
        bn_act_conv(**{**call.tensors, "stats": stats})
    with torch.no_grad():
        bn_act_conv(**{**call.tensors, "stats": stats})


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_argument_without_a_part_in_y_gets_no_gradient(create_graph):
    call = build({})
    scale = torch.ones(call.tensors["w"].shape[0], requires_grad=True)
    bn_act_conv(**call.tensors, out_scale=scale).y.sum().backward(create_graph=create_graph)
    assert scale.grad is None


def test_channel_stats_has_no_gradient_and_is_wide():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    stats = channel_stats(x)
    assert not stats.requires_grad and stats.shape == (2, 3) and stats.dtype == torch.float32
    assert channel_stats(x.bfloat16()).dtype == torch.float32 and channel_stats(x.double()).dtype == torch.float64
    assert channel_stats(torch.empty(0, 3, 4, 4)).shape == (2, 3)
    under_transform = torch.func.vmap(channel_stats)(x[None].bfloat16())
    assert under_transform.shape == (1, 2, 3) and under_transform.dtype == torch.float32


@pytest.mark.parametrize("x", [None, [1.0], np.ones((1, 2, 3, 3)), torch.ones(2, 3), torch.ones(1, 2, 3, 3).long()])
def test_channel_stats_names_x(x):
    with pytest.raises(WrnFastError, match="`x`: expected"):
        channel_stats(x)


def test_meta_tensors_give_shapes():
    call = build("everything", n=3, c=4, k=6, h=9, w=7, dense=True)
    meta = {name: v.to("meta") for name, v in call.tensors.items()}
    meta["stats"], meta["stats_short"] = channel_stats(meta["x"]), channel_stats(meta["x_short"])
    y, stats, _ = bn_act_conv(**meta, **call.scalars, want_stats=True)
    want = call.run().y
    assert y.device.type == "meta" and y.shape == want.shape and y.stride() == want.stride() and stats.shape == (2, 6)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (13, 8), (31, 33)])
def test_any_image_size(size):
    call = build({"batch_stats": True, "residual": True}, h=size[0], w=size[1], dense=True)
    assert parity.error(call.run().y, call.plain()) <= parity.FLOAT64


def test_errors_of_the_operator_itself_are_not_hidden(monkeypatch):
    """Only a bad argument becomes a WrnFastError."""

    def broken(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ops, "fprop", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        bn_act_conv(torch.randn(1, 2, 3, 3), torch.randn(2, 2, 3, 3))


# Autocast.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_dtype(dtype, low):
    x = torch.ones(1, dtype=dtype)
    assert autocast_dtype(x) == dtype
    with torch.autocast("cpu", dtype=low):
        assert autocast_dtype(x) == low
        assert autocast_dtype(x.double()) == torch.float64
        assert autocast_dtype(x.to("meta")) == dtype
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype(x) == dtype


def test_autocast_casts_whatever_activation_is_left_in_float32():
    """x comes from an earlier operator in bfloat16, the residual from a float32 one."""
    call = build({"residual": True, "short": "raw"}, torch.float32, dense=True)
    mixed = {**call.tensors, "x": call.tensors["x"].bfloat16()}
    low = {n: v.bfloat16() if n in ("x", "residual", "x_short") else v for n, v in call.tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = bn_act_conv(**mixed).y
        assert torch.equal(got, bn_act_conv(**call.tensors).y)
    assert got.dtype == torch.bfloat16 and torch.equal(got, bn_act_conv(**low).y)
    with pytest.raises(WrnFastError, match=r"`residual`: expected torch\.bfloat16"):
        bn_act_conv(**mixed)


def test_autocast_casts_a_half_precision_filter_to_its_dtype():
    x, w = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bn_act_conv(x, w).y, bn_act_conv(x, w.bfloat16()).y)


def test_autocast_error_is_eagers_own():
    """bfloat16 autocast over 10 seeds against eager under autocast, float32 parameters on both sides."""
    pools = {name: parity.Pool(name, torch.bfloat16) for name in ("y", "w", "gamma", "beta", "residual")}
    for _ in range(10):
        call = build(
            {"batch_stats": True, "residual": True, "act": "silu"}, torch.float32, c=16, k=24, h=7, w=9, dense=True
        )
        runs = []
        exact = {name: v.double() for name, v in call.tensors.items()}
        for run, tensors, low in (
            (lambda call=call, **v: call.run(**v).y, call.tensors, True),
            (call.plain, call.tensors, True),
            (call.plain, exact, False),
        ):
            leaves = {n: v.clone().requires_grad_() for n, v in tensors.items() if n in cases.GRADIENTS}
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                y = run(**leaves)
            y.double().square().sum().backward()
            runs.append({"y": y, **{name: leaves[name].grad for name in pools if name != "y"}})
        for name, pool in pools.items():
            pool.add(*(run[name] for run in runs))
    for pool in pools.values():
        assert pool.judge().ok, pool.judge()
