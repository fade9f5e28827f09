"""The same cases and peers under pytest-benchmark, for watching one of them over time:

    pytest benchmarks/ --benchmark-only --benchmark-autosave -k "layer-160-160 and wrn_fast"

Parity is checked first here too: a variant out of bounds fails.
"""

import re
from typing import Any

import pytest
import torch

from benchmarks.cases import BLOCK_TASKS, LAYER_TASKS, Case, network_cases, part_cases
from benchmarks.peers import PEERS, Peer
from benchmarks.runner import build, prepare_case

CASES = [
    *part_cases([10], LAYER_TASKS, [8], ["fp32"], "layers"),
    *part_cases([10], BLOCK_TASKS, [8], ["fp32"], "blocks"),
    *network_cases([(28, 10)], ["inference", "training_step", "input_grad"], [8], ["fp32"]),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^\w.]+", "-", case.name))
def test_speed(benchmark: Any, case: Case, peer: Peer) -> None:
    reason = peer.unsupported(case, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    module, inputs = prepare_case(case, DEVICE, seed=0)
    variants, verdicts, missing = build(case, [peer], module, inputs)
    assert not missing, missing[0]["reason"]
    benchmark.extra_info["parity"] = str(verdicts[peer.name])
    variant = variants[peer.name]

    def run(state: Any) -> None:
        variant.run(state)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=lambda: ((variant.prepare(),), {}), rounds=7, warmup_rounds=2)
