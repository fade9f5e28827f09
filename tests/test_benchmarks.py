"""The benchmark suite on small models: what a case runs and counts, timing on a fake clock, the parity gate."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from benchmarks import peers, runner, timing
from benchmarks.cases import (
    BLOCK_TASKS,
    LAYER_TASKS,
    MC_SAMPLES,
    NETWORK_TASKS,
    PRESETS,
    TASKS,
    Block,
    Case,
    Layer,
    Network,
    layers,
    network_cases,
    twin,
)
from benchmarks.tasks import Variant, flops, make_inputs

TINY = Network(10, 1)
EAGER = [peers.EAGER_NCHW, peers.EAGER]


# Cases and what they count.


def test_layers_are_the_convolutions_of_the_network():
    sizes = {}
    net = Network(16, 2).reference()
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda m, args, y: sizes.update({m: args[0].shape[2]}))
    net(torch.randn(1, 3, 32, 32))
    seen = {(m.in_channels, m.out_channels, size, m.stride[0]) for m, size in sizes.items()}
    assert {(layer.C, layer.K, layer.H, layer.stride) for layer in layers(2)} == seen


def test_presets_hold_what_the_readme_promises():
    names = [case.name for case in PRESETS["readme"]()]
    for wanted in (
        *(f"WRN-28-10 inference batch {n} fp32" for n in (1, 8, 32)),
        "WRN-28-10 training_step batch 32 fp32",
        "WRN-28-10 input_grad batch 8 fp32",
        "WRN-28-10 inference batch 8 bf16",
        "WRN-16-4 inference batch 32 fp32",
        "WRN-40-2 inference batch 32 fp32",
    ):
        assert wanted in names
    assert {case.subject for case in PRESETS["layers"]() if isinstance(case.subject, Layer)} >= {
        *layers(10), *layers(16), *layers(4), *layers(2)
    }  # fmt: skip


def test_stochastic_forwards_are_at_batch_one():
    cases = network_cases([(10, 1)], ["mc_dropout", "inference"], [4, 8], ["fp32"])
    assert [(case.task, case.batch, case.images) for case in cases] == [
        ("mc_dropout", 1, MC_SAMPLES), ("inference", 4, 4), ("inference", 8, 8)
    ]  # fmt: skip


def test_flops_of_wrn_28_10():
    case = Case(Network(28, 10), "inference", 1)
    assert flops(case, case.subject.reference()) / 1e9 == pytest.approx(10.49, abs=0.01)


@pytest.mark.parametrize("task", ["dgrad", "wgrad", "fprop_eval", "fprop_train"])
def test_flops_of_a_layer_are_those_of_the_timed_part(task):
    case = Case(Layer(8, 24, 6, 2), task, 2, "bf16")
    assert flops(case, case.subject.reference()) == 2 * 2 * 3 * 3 * 24 * 9 * 8


def test_flops_of_the_gradient_modes():
    """The image needs no gradient in a training step: conv1 has a wgrad and no dgrad. Frozen weights: no wgrad."""
    module = TINY.reference()
    forward, step, x_only, frozen = (
        flops(Case(TINY, task, 2), module) for task in ("inference", "training_step", "input_grad", "input_grad_frozen")
    )
    stem = 2 * 2 * 32 * 32 * 16 * 27
    assert step == 3 * forward - stem
    assert x_only == frozen == 2 * forward


@pytest.mark.parametrize(
    "subject, tasks", [(TINY, NETWORK_TASKS), (Block(4, 8, 6, 2), BLOCK_TASKS), (Layer(4, 8, 6, 1), LAYER_TASKS)]
)
def test_tasks_make_the_gradients_that_they_name(subject, tasks):
    for task in tasks:
        case = Case(subject, task, 2)
        module = subject.reference()
        found = set(Variant(case, module, module, make_inputs(case, module, 0, "cpu")).results())
        parameters = {f"grad {name}" for name, p in subject.reference().named_parameters() if p.requires_grad}
        filters = {f"grad {name}" for name, p in subject.reference().named_parameters() if p.dim() == 4}
        wanted = {
            "dgrad": {"grad x"},
            "wgrad": filters,
            "input_grad": {"grad x"},
            "input_grad_frozen": {"grad x"},
            "backward": {"grad x"} | parameters,
            "training_step": parameters,
        }
        assert found == {"y"} | wanted.get(task, set()), task


def test_gradients_do_not_add_up_over_runs():
    module = TINY.reference()
    case = Case(TINY, "training_step", 2)
    variant = Variant(case, module, module, make_inputs(case, module, 0, "cpu"))
    first = {name: v.clone() for name, v in variant.results().items()}
    second = variant.results()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_of_an_attack_keep_requiring_gradients():
    module = TINY.reference()
    case = Case(TINY, "input_grad", 2)
    Variant(case, module, module, make_inputs(case, module, 0, "cpu"))
    assert module.block1.layer[0].conv1.weight.requires_grad
    case = dataclasses.replace(case, task="input_grad_frozen")
    Variant(case, module, module, make_inputs(case, module, 0, "cpu"))
    assert not any(p.requires_grad for p in module.parameters())


# Timing on a fake clock.


class Scripted:
    """Takes the next of its durations at each run; notes who ran."""

    def __init__(self, name, durations, world):
        self.name, self.durations, self.world = name, itertools.cycle(durations), world

    def prepare(self):
        self.world["now"] += 1000.0  # never counted
        return self.name

    def run(self, state):
        assert state == self.name
        self.world["now"] += next(self.durations)
        self.world["ran"].append(self.name)


@pytest.fixture
def world():
    return {"now": 0.0, "ran": []}


def fake_clock(world):
    return timing.WallClock(lambda: world["now"])


def test_percentiles():
    times = timing.Times((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert (times.median, times.p20, times.p80) == (3.5, 2.0, 5.0)
    assert timing.percentile([7.0], 0.2) == 7.0
    assert timing.percentile([0.0, 1.0], 0.2) == pytest.approx(0.2)


def test_rounds_are_interleaved_in_changing_order(world):
    names = ["a", "b", "c"]
    timing.interleave({n: Scripted(n, [1.0], world) for n in names}, fake_clock(world), reps=12)
    timed = world["ran"][len(names) * timing.WARMUP :]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 12 and all(sorted(r) == names for r in rounds)
    assert len(set(rounds)) > 1


def test_only_run_is_timed_and_warm_up_is_not_a_sample(world):
    slow_start = [50.0, 50.0] + [2.0] * timing.REPS
    times = timing.interleave({"a": Scripted("a", slow_start, world)}, fake_clock(world))
    assert times["a"].seconds == (2.0,) * timing.REPS


def test_short_runs_are_repeated_and_divided(world):
    times = timing.interleave({"a": Scripted("a", [timing.MIN_SAMPLE_S / 4], world)}, fake_clock(world), reps=2)
    assert len(world["ran"]) == timing.WARMUP + 2 * (1 + 4), "each round begins with an untimed run"
    assert times["a"].median == pytest.approx(timing.MIN_SAMPLE_S / 4)


@pytest.mark.parametrize("budget, rounds", [(0.0, 7), (20.0, 10), (1e9, timing.MAX_REPS)])
def test_a_budget_buys_rounds_and_never_takes_any(world, budget, rounds):
    times = timing.interleave({"a": Scripted("a", [2.0], world)}, fake_clock(world), reps=7, budget_s=budget)
    assert len(times["a"].seconds) == rounds


def test_speedup_is_paired_by_round():
    """A neighbour that slows whole rounds does not move the ratio; the ratio of the medians would be 10."""
    ours = timing.Times((1.0, 1.0, 10.0, 10.0, 10.0))
    theirs = timing.Times((2.0, 2.0, 20.0, 20.0, 20.0))
    assert ours.speedup_over(theirs) == 2.0
    drift = timing.Times((20.0, 2.0, 2.0))
    assert timing.Times((10.0, 1.0, 1.0)).speedup_over(drift) == 2.0


def test_neighbours_are_what_this_process_did_not_use(monkeypatch):
    readings = iter([(0.0, 10.0, 4.0), (2.0, 14.0, 5.0)])
    monkeypatch.setattr(timing.Neighbours, "_read", staticmethod(lambda: next(readings)))
    with timing.Neighbours() as neighbours:
        pass
    assert neighbours.cores == 1.5


# The parity gate.


def tampered(name, change, channels_last=True):
    """A peer whose module was changed before it runs."""

    def build(module, x, case):
        copy = twin(module)
        with torch.no_grad():
            change(copy)
        return copy, copy

    return peers.Peer(name, peers._anything, build, channels_last)


def scale(module):
    module.block2.layer[0].conv2.weight.mul_(1.001)


def poison(module):
    module.fc.bias.fill_(math.nan)


def freeze_one(module):
    module.block1.layer[0].bn2.bias.requires_grad_(False)


def backwards_wrong(module):
    module.block2.layer[0].conv1.weight.register_hook(lambda g: -g)


@pytest.mark.parametrize(
    "task, change",
    [("inference", scale), ("inference", poison), ("training_step", freeze_one), ("training_step", backwards_wrong)],
)
def test_a_wrong_peer_is_refused_and_not_timed(task, change, seed):
    wrong = tampered("wrong", change)
    row = runner.run_case(Case(TINY, task, 2), [*EAGER, wrong], "cpu", 1e9, reps=1, seed=seed)
    assert {v["name"] for v in row["variants"]} == {peer.name for peer in EAGER}
    (absent,) = row["missing"]
    assert absent["name"] == "wrong" and absent["refused"] and "error" in absent["reason"]


def test_eager_that_is_nan_passes_nobody(seed):
    """Were the bound taken from eager's own infinite error, everything would be within it."""
    eager = [{"y": math.inf}, {"y": math.inf}]
    assert not peers.judge({"y": math.inf}, eager, torch.float32).ok
    assert not peers.judge({"y": 1.0}, eager, torch.float32).ok


@pytest.mark.parametrize("task", [*NETWORK_TASKS, *BLOCK_TASKS, *LAYER_TASKS])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_drop_in_passes_every_task(task, dtype, seed):
    network = Network(10, 1, 0.3) if task == "mc_dropout" else TINY
    subject = network if task in NETWORK_TASKS else Block(16, 32, 8, 2) if task in BLOCK_TASKS else Layer(16, 32, 8, 1)
    case = Case(subject, task, 1 if task == "mc_dropout" else 2, dtype, samples=5)
    module, inputs = runner.prepare_case(case, "cpu", seed)
    variants, verdicts, missing = runner.build(case, [peers.OURS, *EAGER], module, inputs)
    assert not missing and set(variants) == {peers.FAST, *(peer.name for peer in EAGER)}
    assert all(verdict.ok for verdict in verdicts.values())


def test_dropout_is_off_for_parity_and_on_for_timing(seed):
    case = Case(Network(10, 1, 0.5), "mc_dropout", 1, samples=5)
    module, inputs = runner.prepare_case(case, "cpu", seed)
    batched = next(peer for peer in peers.PEERS if peer.name == "eager-batched")
    variants, _, missing = runner.build(case, [peers.OURS, peers.EAGER, batched], module, inputs)
    assert set(variants) == {peers.FAST, "eager-channels-last", "eager-batched"} and not missing
    for variant in variants.values():
        assert torch.equal(runner.results(variant)["y"], runner.results(variant)["y"])
        assert not torch.equal(variant.run(None)[1], variant.run(None)[1])


# Absent peers.


@pytest.mark.parametrize(
    "name, package", [("openvino", "openvino"), ("onnxruntime", "onnxruntime"), ("onnxruntime", "onnxscript")]
)
def test_a_missing_package_is_a_sentence(monkeypatch, name, package):
    find = peers.importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda m: None if m == package else find("json"))
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    assert f"{package} is not installed" in peer.unsupported(Case(TINY, "inference", 1), "cpu")


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_every_peer_either_runs_a_case_or_says_why_not(peer):
    for task in TASKS:
        subject = TINY if task in NETWORK_TASKS else Layer(4, 8, 6, 1)
        for device, dtype in itertools.product(("cpu", "cuda"), ("fp32", "bf16")):
            reason = peer.unsupported(Case(subject, task, 1, dtype), device)
            assert reason is None or len(reason.split()) > 3


def test_a_peer_that_fails_to_build_is_reported_and_the_rest_runs():
    def explode(module, x, case):
        raise RuntimeError("cannot convert aten::something\nlong story")

    broken = peers.Peer("broken", peers._anything, explode)
    row = runner.run_case(Case(TINY, "inference", 1), [*EAGER, broken], "cpu", 1e9, reps=1)
    assert row["missing"] == [
        {"name": "broken", "reason": "failed: RuntimeError: cannot convert aten::something", "refused": False}
    ]
    assert len(row["variants"]) == 2
    with pytest.raises(RuntimeError, match="cannot convert"):
        runner.run_case(Case(TINY, "inference", 1), [dataclasses.replace(broken, name=peers.FAST)], "cpu", 1e9, reps=1)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_inference_engines_agree(name, seed):
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    case = Case(TINY, "inference", 2)
    reason = peer.unsupported(case, "cpu")
    if reason is not None:
        pytest.skip(reason)
    module, inputs = runner.prepare_case(case, "cpu", seed)
    _, _, missing = runner.build(case, [peer], module, inputs)
    assert not missing
