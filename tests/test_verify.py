"""`verify` passes what is right and finds what is planted: faults of the drop-in that a user would meet end to end."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import wrn_fast
from wrn_fast import WrnFastError, block, parity, reference
from wrn_fast.verify import reference_of, verify
from wrn_fast.verify.trace import Task, Tracer, tensors_in

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def drop_in(width=1, **options):
    return wrn_fast.WideResNet(10, 7, width, options.pop("dropRate", 0.0), pool="global", **options)


def small(model, plain=None, **options):
    """A verification that takes a second or two."""
    options = {"dtypes": (F32,), "steps": 2, "batch": 3, "size": 12} | options
    return verify(model, plain, **options)


@pytest.mark.parametrize("options", [{}, {"head": "classic", "act": "silu", "dropRate": 0.3}], ids=["cosine", "silu"])
def test_the_drop_in_is_within_the_bounds(options, seed):
    with wrn_fast.backend("aten"):
        report = small(drop_in(**options), dtypes=(F32, F64, BF16), first_seed=seed)
    assert report.ok, str(report)
    quantities = {cell.name.rsplit("/", 1)[0] for cell in report.cells}
    assert quantities == {
        "eval/outputs", "eval/gradients", "eval/input gradient, weights frozen", "train/outputs", "train/gradients",
        "train/statistics", "steps/updates", "steps/statistics", "steps/outputs afterwards",
    }  # fmt: skip
    assert {cell.dtype for cell in report.cells} == {F32, F64, BF16}
    rules = {cell.rule for cell in report.cells if cell.name.startswith("train/gradients")}
    assert rules == {"pooled" if options else "median"}


@pytest.mark.native
def test_the_native_backend_is_within_the_bounds(seed):
    report = small(drop_in(4), dtypes=(F32, BF16), steps=1, batch=2, size=32, first_seed=seed)
    assert report.ok, str(report)


# Faults. Each takes the candidate and monkeypatch and plants itself; the reference is made before.


def wrong_eps(model, monkeypatch):
    model.block2.layer[0].bn1.eps = 2e-5


def wrong_eps_of_one_late_layer(model, monkeypatch):
    model.block3.layer[0].bn2.eps = 1e-4


def momentum_swapped(model, monkeypatch):
    model.block1.layer[0].bn2.momentum = 0.9


def statistics_not_updated(model, monkeypatch):
    monkeypatch.setattr(block, "update_running", lambda *args: None)


def counter_not_updated(model, monkeypatch):
    real = block.update_running

    def update(bn, stats, x):
        real(bn, stats, x)
        bn.num_batches_tracked.zero_()

    monkeypatch.setattr(block, "update_running", update)


def biased_running_variance(model, monkeypatch):
    real = block.update_running

    def update(bn, stats, x):
        n = x.numel() // x.shape[1]
        real(bn, torch.stack([stats[0], stats[1] * ((n - 1) / n)]), x)

    monkeypatch.setattr(block, "update_running", update)


def stale_statistics(model, monkeypatch):
    """Eval keeps the statistics that it saw first."""
    real, seen = block.batch_norm, {}

    def batch_norm(bn, x, stats):
        prologue = real(bn, x, stats)
        return prologue if prologue.batch_stats else seen.setdefault(bn, prologue)

    monkeypatch.setattr(block, "batch_norm", batch_norm)


def operator(monkeypatch, change):
    """`change(x, w, args, kwargs)` gives the arguments that the operator then gets."""
    real = block.bn_act_conv

    def bn_act_conv(x, w, *args, **kwargs):
        x, w, args, kwargs = change(x, w, args, kwargs)
        return real(x, w, *args, **kwargs)

    monkeypatch.setattr(block, "bn_act_conv", bn_act_conv)


def stale_weights(model, monkeypatch):
    """Inference keeps a copy of each filter, and only a version counter says when it is old: fused SGD moves none."""
    kept = {}

    def change(x, w, args, kwargs):
        if not torch.is_grad_enabled():
            # The weight itself is kept as well, or another could get its address.
            w = kept.setdefault((id(w), w._version), (w.detach().clone(), w))[0]
        return x, w, args, kwargs

    operator(monkeypatch, change)


def gradient_dropped(model, monkeypatch):
    operator(monkeypatch, lambda x, w, a, k: (x, w.detach() if w.shape[:2] == (32, 32) else w, a, k))


def gradient_through_statistics_dropped(model, monkeypatch):
    operator(monkeypatch, lambda x, w, a, k: (x, w, a[:4] + a[4:], {**k, "batch_stats": False}))


def residual_missing(model, monkeypatch):
    operator(monkeypatch, lambda x, w, a, k: (x, w, a, {**k, "residual": None}))


def shortcut_reads_raw_x(model, monkeypatch):
    raw = {"stats_short": None, "gamma_short": None, "beta_short": None, "short_act": "identity"}
    operator(monkeypatch, lambda x, w, a, k: (x, w, a, k | raw if "x_short" in k else k))


def a_slope_below_zero(model, monkeypatch):
    operator(monkeypatch, lambda x, w, a, k: (x, w, a, k | {"act": "leaky_relu", "slope": 1e-3} if "act" in k else k))


def frozen_weight_trained(model, monkeypatch):
    model.fc.weight.requires_grad_(True)


def output_off_by_a_few_roundings(model, monkeypatch):
    model.register_forward_hook(lambda module, args, out: tuple(t * (1 + 2.0**-18) for t in out))


FAULTS = [
    wrong_eps, wrong_eps_of_one_late_layer, momentum_swapped, statistics_not_updated, counter_not_updated,
    biased_running_variance, stale_statistics, stale_weights, gradient_dropped, gradient_through_statistics_dropped,
    residual_missing, shortcut_reads_raw_x, a_slope_below_zero, frozen_weight_trained, output_off_by_a_few_roundings,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant, dtype, seed, monkeypatch):
    model = wrn_fast.WideResNet(16 if plant is residual_missing else 10, 7, pool="global")
    plain = reference_of(model)
    plant(model, monkeypatch)
    with wrn_fast.backend("aten"):
        report = small(model, plain, dtypes=(dtype,), seeds=8 if dtype == F32 else 1, batch=2, first_seed=seed)
    assert not report.ok and report.failed()[0].verdict == parity.OUT_OF_BOUNDS


@pytest.mark.parametrize("plant", [gradient_dropped, frozen_weight_trained], ids=lambda plant: plant.__name__)
def test_a_gradient_must_be_there_exactly_where_the_oracle_has_one(plant, seed, monkeypatch):
    model = drop_in()
    plain = reference_of(model)
    plant(model, monkeypatch)
    with wrn_fast.backend("aten"):
        report = small(model, plain, dtypes=(F64,), seeds=1, first_seed=seed)
    name = "block2.layer.0.conv2.weight" if plant is gradient_dropped else "fc.weight"
    infinite = {cell.name for cell in report.failed() if cell.err_fast == float("inf")}
    assert infinite == {f"{part}/{name}" for part in ("eval/gradients", "train/gradients", "steps/updates")}


def test_a_wrong_dropout_is_found(seed):
    model = drop_in(dropRate=0.3)
    plain = reference_of(model)
    with wrn_fast.backend("aten"):
        assert small(model, plain, dtypes=(F64,), seeds=1, first_seed=seed).ok
        model.block2.layer[0].droprate = 0.25
        assert not small(model, plain, dtypes=(F64,), seeds=1, first_seed=seed).ok


def test_neither_model_nor_the_generator_is_changed(seed):
    model = drop_in(dropRate=0.3).train()
    model.block1.layer[0].bn1.eval()
    plain = reference_of(model)
    before = [copy.deepcopy(m.state_dict()) for m in (model, plain)]
    flags = [m.training for m in (*model.modules(), *plain.modules())]
    state = torch.get_rng_state()
    with wrn_fast.backend("aten"):
        small(model, plain, dtypes=(F64,), seeds=1, first_seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in (*model.modules(), *plain.modules())] == flags
    for m, old in zip((model, plain), before):
        assert all(torch.equal(v, old[k]) for k, v in m.state_dict().items())
    assert all(w.grad is None for m in (model, plain) for w in m.parameters())
    assert not plain.block1.layer[0].conv2._forward_pre_hooks


def test_trained_statistics_are_kept_where_asked(seed):
    """randomize=False: a fault that default statistics hide is found through the model's own, and only so."""
    model = drop_in()
    plain = reference_of(model)
    model.block1.layer[0].bn1.eps = 1e-3

    def verified(randomize):
        with wrn_fast.backend("aten"):
            return small(model, plain, dtypes=(F64,), seeds=1, randomize=randomize, first_seed=seed)

    assert not verified(True).ok
    # So wide a distribution that eps does not count, in eval: only train, whose batch statistics are near 1, shows it.
    with torch.no_grad():
        model.block1.layer[0].bn1.running_var.fill_(1e12)
    bad = {cell.name.rsplit("/", 1)[0] for cell in verified(False).failed()}
    assert "train/outputs" in bad and "eval/outputs" not in bad


class Pair(nn.Module):
    """A model of somebody else: two outputs in a dictionary, one of them a list, and an integer beside them."""

    def __init__(self, slip=0.0, keys=("a", "b"), random=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.unused = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)
        self.slip, self.keys, self.random = slip, keys, random

    def forward(self, x):
        y = self.drop(nn.functional.gelu(self.bn(self.conv(x))))
        if self.random:
            y = nn.functional.dropout(y, 0.1)
        return {self.keys[0]: y.mean((2, 3)) * (1 + self.slip), self.keys[1]: [y.square().mean(), y.argmax()]}


def test_a_model_of_somebody_else(seed):
    report = small(Pair(), Pair(), dtypes=(F32, F64), first_seed=seed)
    assert report.ok, str(report)
    assert {"eval/outputs/a", "eval/outputs/b.0", "train/gradients/unused.bias"} <= {cell.name for cell in report.cells}
    assert not small(Pair(slip=1e-5), Pair(), first_seed=seed).ok


def test_what_does_not_fit_together_is_an_error(seed):
    with pytest.raises(WrnFastError, match="only one of them has eval/outputs/"):
        small(Pair(keys=("a", "c")), Pair(), first_seed=seed)
    with pytest.raises(WrnFastError, match="output a is random"):
        small(Pair(), Pair(random=True), first_seed=seed)
    with pytest.raises(WrnFastError, match=r"`b`: .* it lacks bn.bias, bn.num_batches_tracked"):
        small(drop_in(), Pair())
    with pytest.raises(WrnFastError, match="`b`: expected the plain model to compare a Pair with"):
        small(Pair())
    with pytest.raises(WrnFastError, match="`seeds`: expected at least 8"):
        small(drop_in(), seeds=7)
    with pytest.raises(WrnFastError, match=r"`dtypes`: .*int8"):
        small(drop_in(), dtypes=(torch.int8,))
    with pytest.raises(WrnFastError, match="`dtypes`: expected at least one"):
        small(drop_in(), dtypes=())
    with pytest.raises(WrnFastError, match="`steps`"):
        small(drop_in(), steps=0)


def test_the_reference_of_a_drop_in_is_the_same_network():
    model = wrn_fast.WideResNet(16, 5, 2, 0.2, head="classic", dropout_in_eval=False, pool="global", act="leaky_relu")
    model.conv1.weight.requires_grad_(False)
    plain = reference_of(model.eval())
    assert type(plain) is reference.WideResNet and not plain.training
    assert list(plain.state_dict()) == list(model.state_dict())
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in model.parameters()]
    for name in ("droprate", "dropout_in_eval", "relu1"):
        assert str(getattr(plain.block3.layer[1], name)) == str(getattr(model.block3.layer[1], name))


def test_the_report_in_all_its_forms(seed):
    calls = []
    report = small(Pair(slip=1e-5), Pair(), first_seed=seed, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 32) for i in range(32)]
    data = json.loads(report.to_json())
    assert data["ok"] is False and data["settings"]["first seed"] == seed and len(data["cells"]) == len(report.cells)
    assert {c["verdict"] for c in data["cells"]} == {parity.OK, parity.OUT_OF_BOUNDS}
    assert "cells" not in report.as_dict(cells=False)
    rows = {(row.quantity, row.dtype): row for row in report.rows()}
    row = rows["eval: outputs", "float32"]
    assert (row.tensors, row.bad, row.worst, row.verdict) == (2, 1, "a", parity.OUT_OF_BOUNDS)
    assert sum(row.tensors for row in rows.values()) == len(report.cells)
    text = str(report)
    assert "NOT ok" in text and "eval/outputs/a float32: out of bounds" in text
    infinite = dataclasses.replace(report.cells[0], err_fast=float("inf"))
    broken = dataclasses.replace(report, cells=(infinite,))
    assert json.loads(broken.to_json())["cells"][0]["err_fast"] is None
    assert not dataclasses.replace(report, cells=()).ok


def test_tensors_of_an_output_are_named():
    t = torch.ones(1)
    named = dict(tensors_in({"x": (t, [t, None, 3]), "n": t.long()}))
    assert set(named) == {"x.0", "x.1.0"} and list(dict(tensors_in(t))) == ["0"]


def test_a_trace_replays(seed):
    model = drop_in(dropRate=0.5)
    task = Task([torch.randn(2, 3, 12, 12).double() for _ in range(2)], seed)
    with wrn_fast.backend("aten"):
        first, second = (Tracer(copy.deepcopy(model), None, True, True).run(task) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first.values(), second.values()))
    assert task.lr is not None and first["steps/updates/conv1.weight"].norm() > 0
