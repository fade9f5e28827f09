"""Whole models on the device: outputs, gradients, statistics, optimizer steps, graphs, Monte-Carlo dropout, e4m3."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import wrn_fast
from benchmarks.battery import FAILED, NOT_RUN, OK, Result, Step, Steps, result
from benchmarks.battery.parity import HALVES, extensions
from benchmarks.battery.replaced import on_the_cpu
from benchmarks.cases import MC_DROP_RATE, Network, settle, twin
from wrn_fast import dispatch, parity
from wrn_fast.checks import channel_stats_problem
from wrn_fast.verify import verify

# Those that run whole, with the expected seconds in a dtype; with dropout the head is the cosine one.
MODELS = {Network(16, 4): 20, Network(28, 10): 45, Network(16, 4, MC_DROP_RATE): 20}
GRAPH_BATCHES = (1, 8)
SAMPLES = 8
MEMORY = 1 << 40  # bytes: all samples in one batch, so that every dtype draws the same masks


def cuda_steps(dry: bool) -> Steps:
    """Of the hand-written kernels."""
    if dry:
        tiny = {
            "graphs": partial(graphs, (10, 1), torch.float16, "cuda", "cpu"),
            "mc_predict": partial(monte_carlo, (10, 1), torch.float16, "cuda", "cpu"),
        }
        return {name: Step(partial(on_the_cpu, run), 10) for name, run in tiny.items()}
    found = {"extensions": extensions()}
    found |= of_backend("cuda", HALVES)
    return found | {"e4m3 WRN-28-10": Step(partial(eight_bits, (28, 10), "cuda", "cuda", torch.bfloat16), 15)}


def triton_steps(dry: bool) -> Steps:
    """Of the Triton kernels."""
    if dry:
        return {"model WRN-10-1": Step(partial(model, Network(10, 1), torch.float64, "aten", "cpu"), 10)}
    found = of_backend("triton", {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16})
    return found | {
        "e4m3 WRN-28-10": Step(partial(eight_bits, (28, 10), "cuda", "triton", torch.float32), 25, compiles=True)
    }


def of_backend(backend: str, dtypes: dict[str, torch.dtype]) -> Steps:
    """Every model in every dtype, then what else a model does."""
    step = partial(Step, compiles=backend == "triton")
    found: Steps = {}
    for network, seconds in MODELS.items():
        dropping = " dropout" if network.drop_rate else ""
        for name, dtype in dtypes.items():
            found[f"model {network}{dropping} {name}"] = step(partial(model, network, dtype, backend, "cuda"), seconds)
    for name, dtype in dtypes.items():
        if dtype.itemsize == 2:
            found[f"graphs WRN-28-10 {name}"] = step(partial(graphs, (28, 10), dtype, backend, "cuda"), 25)
            found[f"mc_predict WRN-28-10 {name}"] = step(partial(monte_carlo, (28, 10), dtype, backend, "cuda"), 15)
    return found


def refused(backend: str, dtype: torch.dtype, device: str) -> str | None:
    """Why the backend has no convolution of this dtype here, or None."""
    x = torch.empty(1, 16, 4, 4, dtype=dtype, device=device)
    reason: str | None = dispatch.load(backend).unsupported("fprop", channel_stats_problem(x))
    return reason


def model(network: Network, dtype: torch.dtype, backend: str, device: str, seconds: float) -> Result:
    """Outputs, features, gradients, statistics and optimizer steps of a whole model."""
    reason = refused(backend, dtype, device)
    if reason:
        return result(NOT_RUN, reason)
    small = device == "cpu"
    fast = network.fast()
    with wrn_fast.backend(backend):
        report = verify(
            fast, seeds=1 if small else parity.SEEDS, dtypes=(dtype,), steps=1 if small else 3, batch=2 if small else 8,
            device=device,
        )  # fmt: skip
    worst = next(iter(report.failed()), None)
    return result(OK if report.ok else FAILED, str(worst or "every quantity within its bound"), report=report.as_dict())


def drawn(network: Network, dtype: torch.dtype, device: str) -> nn.Module:
    """A network with statistics as after training."""
    torch.manual_seed(0)
    found: Any = network.fast()
    found.pool = "global"
    with wrn_fast.backend("aten"):
        settle(found, torch.randn(8, 3, 32, 32))
    moved: nn.Module = found.to(device, dtype)
    return moved


def graphs(network: tuple[int, int], dtype: torch.dtype, backend: str, device: str, seconds: float) -> Result:
    """A replay equals the model without a graph, bit for bit, also after the weights have changed; in training too."""
    reason = refused(backend, dtype, device)
    if reason:
        return result(NOT_RUN, reason)
    wrong = []
    with wrn_fast.backend(backend):
        for n in GRAPH_BATCHES if device == "cuda" else GRAPH_BATCHES[:1]:
            wrong += [f"batch {n}: {found}" for found in in_eval(drawn(Network(*network), dtype, device), n, device)]
        wrong += in_training(drawn(Network(*network), dtype, device), device)
    return result(FAILED if wrong else OK, "; ".join(wrong) or "every replay equals the model", wrong=wrong)


def images(n: int, model: nn.Module, device: str) -> Tensor:
    """In the model's dtype; small ones on the CPU."""
    side = 32 if device == "cuda" else 8
    return torch.randn(n, 3, side, side, device=device).to(next(model.parameters()).dtype)


@torch.no_grad()
def in_eval(model: nn.Module, n: int, device: str) -> list[str]:
    """What was wrong, after each kind of change: counted, past the version counter, a checkpoint."""
    model.eval()
    fast = wrn_fast.graphed(model, images(n, model, device))
    checkpoint = {name: v * 1.01 if v.is_floating_point() else v for name, v in model.state_dict().items()}

    def counted() -> None:
        for p in model.parameters():
            p.mul_(0.99)

    def hidden() -> None:
        for p in model.parameters():
            p.data.mul_(0.99)

    changes: dict[str, Any] = {
        "as captured": lambda: None, "weights changed": counted, "weights changed unseen": hidden,
        "a checkpoint": lambda: model.load_state_dict(checkpoint),
    }  # fmt: skip
    wrong = []
    for name, change in changes.items():
        change()
        x = images(n, model, device)
        if not torch.equal(fast(x), model(x)):
            wrong.append(f"{name}: a replay differs from the model")
    return wrong


def in_training(model: nn.Module, device: str) -> list[str]:
    """The same of forward and backward with the batch's statistics: outputs, gradients, running statistics."""
    model.train()
    plain = copy.deepcopy(model)
    x = images(GRAPH_BATCHES[-1], model, device)
    fast = wrn_fast.graphed(model, x)
    got, want = fast(x), plain(x)
    got.float().square().sum().backward()
    want.float().square().sum().backward()
    pairs = {"output": (got, want)}
    pairs |= {name: (p.grad, q.grad) for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True)}
    pairs |= {name: pair for (name, *_), pair in zip(model.named_buffers(), zip(model.buffers(), plain.buffers()))}
    return [f"training: {name} differs" for name, (a, b) in pairs.items() if not torch.equal(a, b)]


def monte_carlo(network: tuple[int, int], dtype: torch.dtype, backend: str, device: str, seconds: float) -> Result:
    """mc_predict: the same bits for the same generator, as near to float64 under the same masks as plain PyTorch."""
    reason = refused(backend, dtype, device)
    if reason:
        return result(NOT_RUN, reason)
    model = drawn(Network(*network, MC_DROP_RATE), dtype, device).eval()
    x = images(2, model, device)

    def predict(model: nn.Module, x: Tensor, backend: str) -> Tensor:
        with wrn_fast.backend(backend):
            generator = torch.Generator().manual_seed(1)
            features = wrn_fast.mc_predict(model, x, SAMPLES, generator=generator, memory=MEMORY).features
        assert features is not None
        return features

    got, again, eager = (predict(model, x, name) for name in (backend, backend, "aten"))
    want = predict(twin(model, dtype=torch.float64), x.double(), "aten")
    error, peer = parity.error(got, want), parity.error(eager, want)
    bound = parity.one_seed_bound(peer, dtype)
    text = f"error {error:.2g}, bound {bound:.2g}"
    if not torch.equal(got, again):
        return result(FAILED, f"two runs differ; {text}")
    return result(OK if error <= bound else FAILED, text, error=error, eager=peer)


def eight_bits(network: tuple[int, int], device: str, backend: str, dtype: torch.dtype, seconds: float) -> Result:
    """A network calibrated on normal images: how far its outputs in e4m3 are from those without."""
    from wrn_fast.fp8 import calibrate

    torch.manual_seed(0)
    model = wrn_fast.classic(network[0], 10, network[1]).to(device, dtype).eval()
    batches = [torch.randn(64, 3, 32, 32, device=device, dtype=dtype) for _ in range(4)]
    with wrn_fast.backend(backend):
        found = calibrate(model, batches)
    return result(OK if found.error < parity.MEANINGLESS else FAILED, str(found), ranges=found.ranges)
