"""More networks and batches of the benchmark suite's cases against eager and torch.compile."""

from __future__ import annotations

from functools import partial

from benchmarks.battery import Step, Steps
from benchmarks.battery.parity import extensions
from benchmarks.battery.targets import AUTOTUNED, EAGER, HAND_WRITTEN, WIDE, measure
from benchmarks.cases import Case, Network

DEFAULT = "triton,aten"
RIVALS = {HAND_WRITTEN: (EAGER, AUTOTUNED), DEFAULT: (EAGER, "compile", AUTOTUNED)}
SUFFIX = {HAND_WRITTEN: ", cuda backend", DEFAULT: ""}
NARROW = (Network(28, 2), Network(16, 4), Network(40, 2))
# (case, backends, expected seconds).
WIDE_CASES = (
    (Case(WIDE, "inference", 128, "bf16"), HAND_WRITTEN, 35),
    (Case(Network(34, 10), "inference", 512, "bf16"), HAND_WRITTEN, 50),
    (Case(Network(70, 16), "inference", 128, "bf16"), HAND_WRITTEN, 90),
    (Case(WIDE, "inference", 128, "bf16"), DEFAULT, 50),
    (Case(WIDE, "training_step", 128, "bf16"), DEFAULT, 75),
    (Case(WIDE, "input_grad", 128, "bf16"), DEFAULT, 70),
    (Case(WIDE, "inference", 1, "bf16"), DEFAULT, 40),
)  # fmt: skip
NARROW_CASES = (
    *((Case(network, "inference", 512, "bf16"), DEFAULT, 40) for network in NARROW),
    *((Case(network, "training_step", 512, "bf16"), DEFAULT, 60) for network in NARROW),
    (Case(WIDE, "inference", 1024, "bf16"), DEFAULT, 60),
    (Case(WIDE, "inference", 128, "fp32"), DEFAULT, 70),
)


def wide_steps(dry: bool) -> Steps:
    """WRN-28-10 and what is larger."""
    if dry:
        tiny = Case(Network(10, 1), "inference", 2, "fp32")
        return {tiny.name: Step(partial(measure, tiny, "cpu", (EAGER,), "aten", None), 5)}
    return {"extensions": extensions(), **_steps(WIDE_CASES)}


def narrow_steps(dry: bool) -> Steps:
    """Networks that are bound by memory, and what else was asked for."""
    return wide_steps(dry) if dry else _steps(NARROW_CASES)


def _steps(cases: tuple[tuple[Case, str, float], ...]) -> Steps:
    return {
        f"{case.name}{SUFFIX[backends]}": Step(
            partial(measure, case, "cuda", RIVALS[backends], backends, None), seconds, compiles=True
        )
        for case, backends, seconds in cases
    }
