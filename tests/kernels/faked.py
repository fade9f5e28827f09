"""What runs in the compiling process: launches with a driver that launches nothing, to see what would be launched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from kernels import aot, shipped
from kernels.interpreted import FPROP, PROLOGUE
from torch import Tensor

from wrn_fast.kernels.configs import ARCHS, heuristic
from wrn_fast.problem import ConvProblem

ACT = shipped.ACT | {"want_stats": True}
SMALL = ConvProblem(
    "cuda", torch.bfloat16, torch.bfloat16, 1, 8, 8, 16, 16, 3, 3, 1, (1, 1, 1, 1), residual=True, **ACT
)


class Seen(NamedTuple):
    """One launch: the compiled kernel, the grid, all arguments, and the places of those that stand at run time."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple
    at_run_time: tuple[int, ...]
    stream: int

    def numbers(self) -> list[Any]:
        """What stands at run time and is no tensor."""
        return [self.arguments[i] for i in self.at_run_time if not isinstance(self.arguments[i], Tensor)]


class _Driver:
    """As much of an sm_90's driver as a launch asks for. Each device has a stream of its own."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.utils = self
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 10 + device

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": ARCHS["sm_90"].smem_bytes}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Triton's launcher reads constants from the source; so do we, to know what is left for run time."""
        kinds = list(source.signature.values())
        left = tuple(i for i, kind in enumerate(kinds) if (i,) not in source.constants and kind != "constexpr")

        def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, more: Any, enter: Any, leave: Any,
                   *arguments: Any) -> None:  # fmt: skip
            assert len(arguments) == len(kinds), (len(arguments), kinds)
            self.seen.append(Seen(metadata.hash, (x, y, z), arguments, left, stream))

        return launch


@contextmanager
def driver() -> Iterator[list[Seen]]:
    """The launches inside the block. What is bound is forgotten before and after: it belongs to the driver."""
    from triton.runtime import driver as drivers

    fake = _Driver()
    drivers.set_active(fake)
    forget()
    try:
        yield fake.seen
    finally:
        forget()
        drivers._active = None


def kernels() -> list[Any]:
    """Every bound kernel."""
    from wrn_fast.kernels import bn_bwd_apply, conv, dropout, fp8, head, masks, stats, wgrad
    from wrn_fast.kernels.bound import Bound

    modules = (bn_bwd_apply, conv, dropout, fp8, head, masks, stats, wgrad)
    return [v for module in modules for v in vars(module).values() if isinstance(v, Bound)]


def forget() -> None:
    """Nothing is bound, and Triton has no kernel of an earlier driver."""
    for bound in kernels():
        bound._kept.clear()
        bound.kernel.device_caches.clear()


def memory(problem: ConvProblem) -> dict[str, Tensor | None]:
    """Tensors of the CPU that fit the problem, uninitialised."""
    return {n: None if v is None else torch.empty_strided(v.shape, v.stride(), dtype=v.dtype)
            for n, v in aot.tensors(problem).items()}  # fmt: skip


def call(problem: ConvProblem, t: dict[str, Tensor | None], op: str = "fprop") -> Any:
    from wrn_fast.kernels import dgrad, fprop, wgrad

    tile = heuristic(op, problem, ARCHS["sm_90"]), "ieee"
    if op == "fprop":
        return fprop.fprop(problem, *tile, *[t[n] for n in FPROP])
    vectors = [t[n] for n in PROLOGUE]
    if op == "dgrad":
        return dgrad.dgrad(problem, *tile, t["dy"], t["x"], t["w"], *vectors)
    return wgrad.wgrad(problem, *tile, t["dy"], t["x"], *vectors)


class Again(NamedTuple):
    """What a second and a third call of an operator did."""

    dispatched: list[int]  # launches that asked Triton, a call
    launched: list[list[tuple]]  # (kernel, grid, numbers, stream), a call


def _count(calls: list[Any]) -> Again:
    from unittest import mock

    from triton.runtime.jit import JITFunction

    asked: list[int] = []
    run = JITFunction.run
    dispatched, launched = [], []
    with driver() as seen, mock.patch.object(JITFunction, "run", lambda *a, **k: asked.append(1) or run(*a, **k)):
        for one in calls:
            asked.clear()
            seen.clear()
            one()
            dispatched.append(len(asked))
            launched.append([(s.kernel, s.grid, s.numbers(), s.stream) for s in seen])
    return Again(dispatched, launched)


def repeated(op: str) -> Again:
    """Three calls of one problem, on tensors of their own; the last at another batch."""
    first, larger = SMALL, SMALL._replace(N=2)
    return _count([lambda p=p: call(p, memory(p), op) for p in (first, first, larger)])


def misaligned() -> Again:
    """A vector that begins 4 bytes past a multiple of 16, twice, between calls with aligned ones."""

    def vectors(first: int) -> dict[str, Tensor | None]:
        return memory(SMALL) | {"gamma": torch.empty(SMALL.C + first)[first:]}

    return _count([lambda first=first: call(SMALL, vectors(first)) for first in (0, 1, 1, 0)])


def other_dtypes() -> Again:
    """A bias in float32 and one in bfloat16."""
    problem = SMALL._replace(bias=True)
    bias = {dtype: {"bias": torch.empty(SMALL.K, dtype=dtype)} for dtype in (torch.float32, torch.bfloat16)}
    order = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
    return _count([lambda d=d: call(problem, memory(problem) | bias[d]) for d in order])


def devices() -> Again:
    """On the first GPU, on the second, and on each again."""
    from triton.runtime import driver as drivers

    def on(device: int) -> None:
        drivers.active.device = device
        call(SMALL, memory(SMALL))

    return _count([lambda device=device: on(device) for device in (0, 1, 0, 1)])


def patterns(seeds: list[int], choices: list[dict]) -> int:
    """How many kernels random problems ask for: what is None follows from what is compiled in, numbers do not."""
    from unittest import mock

    from kernels import interpreted, oracle

    from wrn_fast.kernels.bound import Bound

    known: dict[tuple, tuple] = {}

    def record(self, grid, tensors, numbers, constants, warps=4, stages=None):
        values = (*tensors, *numbers)
        assert [p.is_constexpr for p in self.kernel.params] == [False] * len(values) + [True] * len(constants)
        for parameter, v in zip(self.kernel.params, values):
            assert not isinstance(v, int | float) or parameter.do_not_specialize, (self.kernel, parameter.name)
        absent = tuple(v is None for v in values)
        assert known.setdefault((self.kernel.__name__, constants), absent) == absent, (self.kernel, constants)

    with mock.patch.object(Bound, "__call__", record):
        for seed, fixed in zip(seeds, choices, strict=True):
            case = oracle.draw(seed, torch.float32, **fixed)
            case.tensors["x_grad"] = case.tensors["x"]
            interpreted.outputs(case, ("fprop", "dgrad", "wgrad", "elementwise"))
    return len(known)


def cost(op: str, problem: ConvProblem, rounds: int = 300) -> tuple[int, float]:
    """(launches, microseconds of host time) of a call whose kernels are compiled."""
    with driver() as seen:
        t = memory(problem)
        for _ in range(2):
            seen.clear()
            call(problem, t, op)
        launches = len(seen)
        best = float("inf")
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(rounds):
                call(problem, t, op)
            seen.clear()
            best = min(best, (time.perf_counter() - begin) / rounds)
    return launches, best * 1e6


if __name__ == "__main__":
    for name in ("160 eval", "160 conv1", "160 dgrad", "160 wgrad"):
        case = shipped.cases()[f"sm_90 bf16 n128 {name}"]
        launches, us = cost(case.op, case.problem._replace(N=1))
        print(f"{name}: {launches} launches, {us:.0f} us of host time")


def head_launches() -> dict[str, int]:
    """How many kernels a call of the head launches, by kind; of a batch whose sums one step adds."""
    from wrn_fast.kernels.head import head, head_bwd

    base = ConvProblem("cuda", torch.bfloat16, torch.float32, 16, 8, 8, 640, 10, 1, 1, bias=True, **shipped.ACT)
    plain = base._replace(act="identity", prologue=False, affine=False, bias=False, cosine=True)
    forward = {"classic": base, "cosine": plain, "1000 classes": base._replace(K=1000)}
    backward = {
        "eval": base, "eval with sums": base._replace(want_stats=True),
        "training": base._replace(want_stats=True, batch_stats=True),
    }  # fmt: skip
    found = {}
    with driver() as seen:
        for name, problem in (forward | backward).items():
            seen.clear()
            y = torch.empty((16, 640, 8, 8), dtype=torch.bfloat16, memory_format=torch.channels_last)
            vectors = [torch.empty(2, 640), torch.empty(640), torch.empty(640)] if problem.prologue else [None] * 3
            if name in forward:
                bias = torch.empty(problem.K) if problem.bias else None
                head(problem, y, *vectors, torch.empty(problem.K, 640), bias)
            else:
                head_bwd(problem, torch.empty(16, 640), y, *vectors)
            found[name] = len(seen)
    return found
