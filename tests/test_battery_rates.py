"""What the GPU battery measures and says: goals, predictions, yardsticks, experiments, stress, without a GPU."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.battery import hopper, layers, rates, replaced, stress, targets
from benchmarks.cases import Case
from wrn_fast import reference
from wrn_fast.backends import cuda
from wrn_fast.kernels import cuda_launch

H100 = 132  # multiprocessors


def test_goals_of_a_layer_are_of_the_rate_and_the_time_of_its_fused_roads():
    times = {"library": 1.3, "cuda plain": 0.5, "cuda training": 1.0, "triton training": 0.1}
    rates_of = {"square product": 100.0, "cuda training": 74.0, "cuda plain": 99.0, "triton training": 999.0}
    of_product, of_library = layers.goals_of(layers.REGULAR[0], 128, times, rates_of)
    assert (of_product.got, of_product.want, of_product.met) == (0.74, 0.75, False)
    assert (of_library.got, of_library.want, of_library.met) == (1.3, 1.2, True)
    assert [goal.want for goal in layers.goals_of(layers.WIDENING[0], 128, times, rates_of)] == [1.2]
    assert layers.goals_of(layers.WIDENING[1], 128, times, rates_of) == []
    assert layers.goals_of(layers.SHORTCUTS[0], 128, times, rates_of) == []
    assert layers.goals_of(layers.REGULAR[0], 127, times, rates_of) == []


def test_images_a_second_count_the_optimizer_and_a_missing_rival_is_not_beaten():
    variants = [{"name": "wrn_fast", "ms": 15.0}, {"name": targets.AUTOTUNED, "ms": 31.0}]
    row = {"optimizer_ms": 1.0, "images": 256, "variants": variants}
    speeds = targets.speeds_of(row)
    assert speeds == {"wrn_fast": 16_000.0, targets.AUTOTUNED: 8_000.0}
    target = targets.Target(14_000, 1.4, 15_000)
    assert [(goal.got, goal.met) for goal in targets.goals_of(speeds, target)] == [(16_000.0, True), (2.0, True)]
    assert [goal.met for goal in targets.goals_of({"wrn_fast": 20_000.0}, target)] == [True, False]
    assert targets.speeds_of(row | {"optimizer_ms": None})["wrn_fast"] == 256 / 0.015


def test_the_targets_are_those_that_were_set():
    set_ = {(case.task, case.batch, case.dtype): target[:2] for case, target in targets.TARGETS.items()}
    assert set_ == {("inference", 512, "bf16"): (50_000, 1.6), ("training_step", 256, "bf16"): (14_000, 1.4)}
    assert targets.LATENCY_US == 170 and (layers.OF_PRODUCT, layers.OF_LIBRARY) == (0.75, 1.2)
    assert all(isinstance(case, Case) and str(case.subject) == "WRN-28-10" for case in targets.TARGETS)


def test_layers_add_up_to_a_pass_of_the_network():
    """28 convolutions and the 3 shortcuts, which is what the network has: FLOPs in the place of times."""
    found = {}
    for op, layer, n in layers.rows():
        flops = rates.problem_of(layer, n, "cuda").flops
        us = dict.fromkeys(("cuda inference", "cuda training"), flops / 1e6)
        found[f"{op} {layer} batch {n}"] = {"us": us, "predicted_us": 2 * flops / 1e6}
    model = reference.WideResNet(28, 10, 10, 0.0, head="classic").to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    head, stem = 2 * 640 * 10, rates.problem_of(layers.STEM, 1, "cuda").flops
    convolutions = counter.get_total_flops() - head
    sums = {"inference, batch 512": 512 * convolutions, "dgrad, batch 256": 256 * (convolutions - stem),
            "wgrad, batch 256": 256 * convolutions}  # fmt: skip
    assert layers.totals(found) == [
        f"convolutions of {name}: {flops / 1e9:.2f} ms, predicted {2 * flops / 1e9:.2f} ms"
        for name, flops in sums.items()
    ]
    del found[f"dgrad {layers.SHORTCUTS[0]} batch 256"]
    assert [line.split(",")[0] for line in layers.totals(found)] == [
        "convolutions of inference",
        "convolutions of wgrad",
    ]
    found[f"fprop {layers.REGULAR[0]} batch 512"]["us"] = {"triton inference": 1.0}
    assert len(layers.totals(found)) == 1


# The plan's table for the 3x3 convolutions at stride 1, microseconds at batch 128, 256 and 512.
PLANNED = {160: (87, 171, 340), 320: (83, 165, 328), 640: (82, 162, 321)}


@pytest.mark.parametrize("layer", layers.REGULAR, ids=str)
def test_predictions_are_the_plans(layer):
    for n, us in zip((128, 256, 512), PLANNED[layer.C], strict=True):
        problem = rates.problem_of(layer, n, "cuda")
        assert round(1e6 * rates.predicted("fprop", layer, problem, H100)) == us
        one = rates.problem_of(layer, 1, "cuda")
        assert 4e-6 <= rates.predicted("fprop", layer, one, H100) <= 6e-6
        for op, rate in (("dgrad", 560e12), ("wgrad", 500e12)):
            assert math.isclose(problem.flops / rates.predicted(op, layer, problem, H100), rate)


@pytest.mark.parametrize("op, layer, n", layers.rows(), ids=str)
def test_yardsticks_have_the_shape_and_work_of_the_layer(op, layer, n):
    """On meta tensors, of every layer that is measured."""
    p = rates.problem_of(layer, n, "meta")
    call = rates.library(op, p)
    with FlopCounterMode(display=False) as counter:
        got = call()
    shape = {"fprop": (p.N, p.K, p.P, p.Q), "dgrad": (p.N, p.C, p.H, p.W), "wgrad": (p.K, p.C, p.R, p.S)}[op]
    outputs = [v for v in (got if isinstance(got, tuple) else (got,)) if isinstance(v, torch.Tensor)]
    assert outputs and all(tuple(v.shape) == shape for v in outputs)
    assert counter.get_total_flops() == p.flops
    with FlopCounterMode(display=False) as counter:
        rates.product(op, p)()
    assert counter.get_total_flops() == p.flops


@pytest.fixture
def hand_written():
    """The cuda backend, with the extension for the CPU, whose plans are those of the GPU."""
    from backends import cuda_on_cpu

    with replaced.extension(cuda_on_cpu.build()):
        yield cuda


def test_the_hand_written_kernels_serve_every_layer_that_is_measured(hand_written):
    for op, layer, n in layers.rows():
        plain = rates.problem_of(layer, n, "cpu")
        for parts in ({}, *layers.variants(op, layer).values()):
            assert hand_written.refused(op, plain._replace(**parts)) is None, (op, layer, parts)
    for layer in layers.REGULAR:
        for parts in hopper.PARTS.values():
            problem = rates.problem_of(layer, 128, "cpu", **parts)
            assert all(hand_written.legal("fprop", problem, tile) for tile in hopper.TILES.values())


def test_the_stress_is_of_sums_that_are_split(hand_written):
    pieces = [
        hand_written.extension().splits(
            cuda_launch.shape_of(hand_written.extension(), problem), problem.short_C, op == "dgrad", H100, False
        )
        for op, problem in stress.cases(torch.bfloat16, "cuda")
    ]
    assert len(pieces) > 30 and min(sorted(pieces)[len(pieces) // 4 :]) > 1 and max(pieces) >= 16


def test_the_prediction_of_a_layer_with_much_output_is_bound_by_memory():
    layer = layers.SHORTCUTS[0]
    problem = rates.problem_of(layer, 512, "cuda")
    assert rates.predicted("fprop", layer, problem, H100) > problem.flops / rates.REST_FLOPS + rates.LAUNCH_S


# Experiments.


def test_a_product_is_slowed_by_fills_only_beyond_what_shared_memory_has():
    clocks = [hopper.expected_clocks(fill) for fill in (0, 38, 60, 128)]
    assert clocks[:2] == [80, 80] and 105 < clocks[2] < 106 and clocks[3] == math.inf


@pytest.mark.parametrize("clk, verdict", [(81.0, "do not compete"), (104.0, "compete")])
def test_what_the_supply_experiment_says(clk, verdict):
    rows = [{"filled B/clk": 0.0, "clk per m64n160k16": 80.5}, {"filled B/clk": 60.0, "clk per m64n160k16": clk}]
    found = hopper.told("supply", rows)
    assert found["status"] == "ok" and found["text"].startswith(f"fills {verdict} with")
    assert "predicted clk 105.4" in found["text"]


def test_fills_that_never_came_tell_nothing():
    rows = [{"filled B/clk": fill, "clk per m64n160k16": 80.5} for fill in (0.0, 30.0)]
    assert "too slow to tell" in hopper.told("supply", rows)["text"]


def test_a_layout_that_the_kernels_use_must_be_right():
    rows = [{"layout": "used", "wrong": 0}, {"layout": "other", "unused wrong": 3}]
    found = hopper.told("multiply", rows)
    assert found["status"] == "ok" and "not as the model has it: other" in found["text"]
    assert hopper.told("multiply", [{"layout": "used", "wrong": 1}])["status"] == "failed"


def test_what_the_shifted_starts_say():
    row = {"rows": 1, "wrong with base offset 0": 0, "wrong with base offset rows": 4}
    assert "work with base offset 0:" in hopper.told("shift", [row])["text"]
    assert "no start" in hopper.told("shift", [row | {"wrong with base offset 0": 1}])["text"]


def test_what_the_boxes_say():
    rates_of = {(64, 1): 18.0, (64, 2): 30.0, (128, 1): 36.0, (128, 2): 63.0, (288, 1): 27.0}
    rows = [{"row bytes": size, "blocks": blocks, "B/clk": rate} for (size, blocks), rate in rates_of.items()]
    found = hopper.told("boxes", rows)
    assert "64 B 0.50, 288 B 0.75; shared by two blocks 1.75" in found["text"]
    assert [row["predicted B/clk"] for row in found["rows"]] == [36, 72, 36, 72, 36]


def test_a_writer_and_a_reader_are_added_up():
    us = {"store, t": 1.0, "residual, t": 2.0, "residual, second output, t": 2.5, "prologue, t": 1.25,
          "pass and store, t": 3.0, "second output alone, t": 0.75}  # fmt: skip
    assert hopper.activations(us, "t") == {
        "prologue": 3.25, "second output": 3.5, "pass of its own": 5.0, "prologue inside": 2.25,
        "second output inside": 1.75, "pass of its own inside": 4.0,
    }  # fmt: skip
    assert hopper.activations(us, "another tile") == {}


def test_another_extension_changes_what_it_says_and_nothing_else():
    class Extension:
        def splits(self, *sizes):
            return 8

        def fprop(self, *sizes, **words):
            return words

        dgrad = fprop

        def pack(self):
            return "packed"

    assert replaced.unsplit(Extension()).splits(1, 2) == 1 and replaced.unsplit(Extension()).pack() == "packed"
    late = replaced.waiting(Extension())
    assert late.fprop(1, early=True, tile=1) == {"early": False, "tile": 1} == late.dgrad(early=True, tile=1)
    assert late.splits() == 8


def test_stale_sums_of_another_input_would_be_seen():
    """The stress step compares bits; its inputs must give different bits, or a stale sum would pass."""
    op, problem = next(iter(stress.cases(torch.float16, "cpu")))
    outputs = [exact for _, exact in stress.calls(op, problem)]
    assert all(not torch.equal(a, b) for a, b in zip(outputs, outputs[1:] + outputs[:1], strict=True))
    assert max(float(v.abs().max()) for v in outputs) < 2**24


def broken(monkeypatch, outputs):
    """Changes the convolutions of the stress steps: `outputs` gets each call's number and what it gave."""
    count, first = iter(range(10**6)), stress._first
    monkeypatch.setattr(stress, "_first", lambda *given: outputs(next(count), first(*given)))


@pytest.mark.parametrize("wrong, status", [((), "ok"), ((0,), "failed"), ((5,), "failed"), (range(99), "failed")])
def test_one_wrong_sum_in_many_is_found(monkeypatch, wrong, status):
    """The first calls are the unsplit ones, which the library's convolution is compared with."""
    broken(monkeypatch, lambda i, y: y + 1 if i in wrong else y)
    found = replaced.on_the_cpu(lambda s: stress.split_reductions(torch.float16, "cpu", s), 60)
    assert found["status"] in (status, "not run")
