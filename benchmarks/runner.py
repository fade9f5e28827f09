"""A case from start to end: build every variant, check its parity, time all interleaved, give a row of the report.

The rows are plain dictionaries, the ones that `--json` writes (schema in `benchmarks/report.py`).
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import timing
from benchmarks.cases import Case, settle, twin
from benchmarks.peers import EAGER, EAGER_NCHW, FAST, Peer, Verdict, errors, judge
from benchmarks.tasks import Inputs, Variant, flops, make_inputs
from wrn_fast.errors import FallbackWarning

Row = dict[str, Any]
Tick = Callable[[str], None]


# Dropout runs and drops nothing: no mask word is below floor(p * 2^32), and 1 / (1 - p) is 1 in float32.
DROPS_NOTHING = 2.0**-40


@contextlib.contextmanager
def no_dropout(module: nn.Module | None) -> Iterator[None]:
    """Dropout that keeps everything: masks of different generators cannot be compared."""
    blocks: list[Any] = [m for m in module.modules() if getattr(m, "droprate", 0.0)] if module is not None else []
    rates = [block.droprate for block in blocks]
    for block in blocks:
        block.droprate = DROPS_NOTHING
    try:
        yield
    finally:
        for block, rate in zip(blocks, rates):
            block.droprate = rate


def prepare_case(case: Case, device: str, seed: int) -> tuple[nn.Module, Inputs]:
    """The reference module with statistics as after training, and the inputs. The same on every device for a seed."""
    torch.manual_seed(seed)
    module = case.subject.reference()
    inputs = make_inputs(case, module, seed, "cpu")
    settle(module, inputs.x)
    return module.to(device), inputs.map(lambda t: t.to(device))


def results(variant: Variant) -> dict[str, torch.Tensor]:
    """The variant's results, without dropout."""
    with no_dropout(variant.module):
        return variant.results()


def oracle(case: Case, module: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The results of the reference in float64; the feature of mc_dropout without dropout is every sample's."""
    wide = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
    exact = twin(module, dtype=torch.float64)
    call = (lambda x: exact(x)[1]) if case.task == "mc_dropout" else exact
    return results(Variant(case, call, exact, wide, channels_last=False))


def build(
    case: Case, peers: Sequence[Peer], module: nn.Module, inputs: Inputs, tick: Tick = lambda what: None
) -> tuple[dict[str, Variant], dict[str, Verdict], list[Row]]:
    """(variants that may be timed, their verdicts, why the others may not: name, reason, refused)."""
    device = inputs.x.device.type
    tick("float64 oracle")
    want = oracle(case, module, inputs)
    eager = []
    for peer in (EAGER_NCHW, EAGER):
        tick(f"error of {peer.name}")
        eager.append(errors(results(peer.variant(case, module, inputs)), want))
    dtype = case.amp or torch.float32
    variants: dict[str, Variant] = {}
    verdicts: dict[str, Verdict] = {}
    missing: list[Row] = []
    for peer in peers:
        reason = peer.unsupported(case, device)
        if reason is not None:
            missing.append({"name": peer.name, "reason": reason, "refused": False})
            continue
        tick(f"building {peer.name}")
        try:
            variant = peer.variant(case, module, inputs)
            verdict = judge(errors(results(variant), want), eager, dtype)
        except Exception as error:  # of someone else's compiler or converter: its absence is a finding, not our failure
            if peer.name == FAST:
                raise
            first = (str(error).strip().splitlines() or [""])[0][:120]
            reason = f"failed: {type(error).__name__}: {first}"
            missing.append({"name": peer.name, "reason": reason, "refused": False})
            continue
        if verdict.ok:
            variants[peer.name], verdicts[peer.name] = variant, verdict
        else:
            missing.append({"name": peer.name, "reason": f"refused, another result: {verdict}", "refused": True})
    return variants, verdicts, missing


def optimizer_ms(variant: Variant, clock: timing.WallClock | timing.CudaClock) -> float:
    """Milliseconds of an SGD step with momentum: the same for every variant, so it stands apart. Moves the weights."""
    assert variant.module is not None
    params = [p for p in variant.module.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(params, lr=1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4)
    variant.results()

    class Step:
        def prepare(self) -> None:
            return None

        def run(self, state: None) -> None:
            sgd.step()

    return 1e3 * timing.interleave({"step": Step()}, clock)["step"].median


def run_case(
    case: Case,
    peers: Sequence[Peer],
    device: str,
    matmul: float,
    *,
    reps: int = timing.REPS,
    budget_s: float = 0.0,
    seed: int = 0,
    tick: Tick = lambda what: None,
) -> Row:
    """One row.

    Args:
        case: what is measured.
        peers: who competes.
        device: cpu or cuda.
        matmul: FLOP/s of a matrix product in the case's dtype, measured in this process.
        reps: rounds at least. budget_s: seconds that more rounds may take.
        seed: of weights, inputs and the order in the rounds.
        tick: told what is going on.
    """
    module, inputs = prepare_case(case, device, seed)
    flop = flops(case, module)
    clock = timing.clock_for(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Where our kernels do not serve a case the reader must know that plain PyTorch is timed.
        warnings.simplefilter("default", FallbackWarning)
        variants, verdicts, missing = build(case, peers, module, inputs, tick)
        with timing.Neighbours() as neighbours:
            times = timing.interleave(variants, clock, reps, budget_s, lambda name: tick(f"timing {name}"), seed)
        apart = None
        if case.task == "training_step" and EAGER.name in variants:
            apart = optimizer_ms(variants[EAGER.name], clock)
    variants.clear()
    gc.collect()
    return _row(case, flop, matmul, times, verdicts, missing, neighbours.cores, apart)


def _row(
    case: Case,
    flop: int,
    matmul: float,
    times: dict[str, timing.Times],
    verdicts: dict[str, Verdict],
    missing: list[Row],
    neighbours: float | None,
    apart: float | None,
) -> Row:
    rivals = {name: t for name, t in times.items() if name != FAST}
    fastest = min(rivals, key=lambda name: rivals[name].median) if rivals else None
    return {
        "case": case.name,
        "subject": str(case.subject),
        "task": case.task,
        "batch": case.batch,
        "images": case.images,
        "dtype": case.dtype,
        "gflop": flop / 1e9,
        "matmul_gflops": matmul / 1e9,
        "fastest_peer": fastest,
        "neighbours_cores": neighbours,
        "optimizer_ms": apart,
        "variants": [
            {
                "name": name,
                "ms": 1e3 * t.median,
                "p20_ms": 1e3 * t.p20,
                "p80_ms": 1e3 * t.p80,
                "rounds": len(t.seconds),
                "ratio": t.speedup_over(times[fastest]) if fastest else None,
                "quantity": verdicts[name].quantity,
                "error": verdicts[name].error,
                "bound": verdicts[name].bound,
            }
            for name, t in times.items()
        ],
        "missing": missing,
    }
