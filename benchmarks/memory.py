"""Memory: bytes saved between forward and backward, and peak resident memory of inference.

Saved bytes are those of unique storages that autograd keeps (`torch.autograd.graph.saved_tensors_hooks`), parameters
excluded. Resident memory is that of a process of its own for each variant: `python -m benchmarks.memory --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.cases import Case, Network
from benchmarks.machine import ROOT
from benchmarks.peers import EAGER, FAST, OURS
from benchmarks.tasks import Variant, make_inputs

# The project's own claim: x and h instead of four activations a block.
SAVED_LIMIT = 0.55
DROP_RATES = (0.0, 0.1)


def saved_bytes(forward: Callable[[], Any], module: nn.Module) -> int:
    """Bytes that autograd keeps after `forward` for the backward pass; also of tensors on meta, where only sizes are.

    Args:
        forward: a call that records a graph; its result is held while the bytes are counted.
        module: its parameters' storages do not count.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(saved: Tensor) -> Tensor:
        # The storage itself is held, so that no other can come to lie at its address.
        storage = saved.untyped_storage()
        storages[storage._cdata] = storage
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        result = forward()
    for p in module.parameters():
        storages.pop(p.untyped_storage()._cdata, None)
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def training_bytes(peer_name: str, network: Network, batch: int) -> int:
    """Saved bytes of one training forward of a variant (`wrn_fast` or `eager-channels-last`)."""
    case = Case(network, "training_step", batch)
    torch.manual_seed(0)
    module = network.reference()
    inputs = make_inputs(case, module, 0, "cpu")
    variant = {FAST: OURS, EAGER.name: EAGER}[peer_name].variant(case, module, inputs)
    assert variant.module is not None
    return saved_bytes(lambda: variant.call(variant.x), variant.module)


def resident(peer_name: str, network: Network, batch: int) -> dict[str, float]:
    """Peak resident MiB of inference in a new process, and how much of it came with the forward passes. Linux only."""
    words = ["--variant", peer_name, "--depth", str(network.depth), "--width", str(network.width)]
    words += ["--batch", str(batch), "--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status_mib(field: str) -> float:
    """A line of /proc/self/status in MiB. (The peak of getrusage is inherited from the process that started this.)"""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) / 1024


def _measure_resident(variant: Variant, runs: int = 3) -> dict[str, float]:
    before = _status_mib("VmRSS")
    # Forgets the peak of building the model; a sandbox that has no such file keeps it in the figure.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(runs):
        variant.run(variant.prepare())
    peak = _status_mib("VmHWM")
    return {"peak_mib": peak, "over_model_mib": peak - before}


def report(network: Network, batch: int, tick: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Both measures of the drop-in beside the reference's; the schema is in `benchmarks/report.py`."""
    saved = []
    for rate in DROP_RATES:
        with_dropout = Network(network.depth, network.width, rate)
        tick(f"saved bytes, dropRate {rate}")
        ours, eager = (training_bytes(name, with_dropout, batch) for name in (FAST, EAGER.name))
        saved.append({"drop_rate": rate, "fast_bytes": ours, "eager_bytes": eager, "ratio": ours / eager})
    found: dict[str, Any] = {}
    if sys.platform == "linux":
        tick("resident memory")
        found = {name: resident(name, network, batch) for name in (FAST, EAGER.name)}
    return {"subject": str(network), "batch": batch, "saved": saved, "resident": found}


def main() -> None:
    """One variant's resident memory as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=main.__doc__)
    parser.add_argument("--variant", choices=(FAST, EAGER.name), default=FAST, help="default: %(default)s")
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = Network(args.depth, args.width)
    case = Case(network, "inference", args.batch)
    module = network.reference()
    inputs = make_inputs(case, module, 0, "cpu")
    peer = {FAST: OURS, EAGER.name: EAGER}[args.variant]
    variant = peer.variant(case, module, inputs)
    del module
    gc.collect()
    print(json.dumps(_measure_resident(variant)))


if __name__ == "__main__":
    main()
