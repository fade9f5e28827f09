"""What few calls do not show: a fence that is missing between the blocks of a split sum, an index that wraps at 2^31.

Whole numbers make every sum exact in float32 in any order, so a split call equals the unsplit one, and the library's
convolution of the same numbers in float64, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.battery import FAILED, NOT_RUN, OK, Result, result
from benchmarks.battery.rates import Layer, problem_of
from benchmarks.battery.replaced import extension, unsplit
from wrn_fast import dispatch
from wrn_fast.backends import cuda
from wrn_fast.kernels import cuda_launch
from wrn_fast.kernels.cuda_launch import Tile
from wrn_fast.problem import ConvProblem

# Small images too, in which few blocks share a sum: the more often the last one comes right behind the one before.
LAYERS = (
    Layer(160, 160, 32), Layer(320, 320, 16), Layer(640, 640, 8), Layer(640, 640, 4), Layer(320, 640, 16, 2),
    Layer(640, 640, 8, short_C=320, short_stride=2), Layer(64, 16, 4),
)  # fmt: skip
BATCHES = (1, 2, 8)
REPEATS = 400
# The first batch of which a tensor of 160 channels on 32x32 has 2^31 elements, and one more.
FAR = 13_109
# Different ones in turn: the memory of partial sums is the same each time, and stale sums must be wrong sums.
INPUTS = 4


def whole_numbers(shape: tuple[int, ...], most: int, dtype: torch.dtype, device: str) -> Tensor:
    """Between -most and most, in channels_last memory."""
    drawn = torch.randint(-most, most + 1, shape, device=device).to(dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, ConvProblem]]:
    """fprop of every layer and batch, dgrad of those at stride 1, which alone is split."""
    for layer in LAYERS if device == "cuda" else LAYERS[-1:]:
        for n in BATCHES if device == "cuda" else BATCHES[:1]:
            problem = problem_of(layer, n, device, act="identity")._replace(dtype=dtype, w_dtype=dtype)
            yield "fprop", problem
            if layer.stride == 1 and not layer.short_C:
                yield "dgrad", problem


def calls(op: str, p: ConvProblem) -> list[tuple[Callable[[], Tensor], Tensor]]:
    """INPUTS launches of one problem, and what each gives exactly before its one rounding."""
    w = whole_numbers((p.K, p.C, p.R, p.S), 1, p.dtype, p.device)
    w_short = whole_numbers((p.K, p.short_C, 1, 1), 1, p.dtype, p.device) if p.short_C else None
    found: list[tuple[Callable[[], Tensor], Tensor]] = []
    for _ in range(INPUTS):
        if op == "dgrad":
            dy = whole_numbers((p.N, p.K, p.P, p.Q), 2, p.dtype, p.device)
            x = whole_numbers((p.N, p.C, p.H, p.W), 2, p.dtype, p.device)
            given: list[Any] = [dy, x, w, *[None] * 4]
            exact = F.conv_transpose2d(dy.double(), w.double(), padding=p.pad[0])
        else:
            x = whole_numbers((p.N, p.C, p.H, p.W), 2, p.dtype, p.device)
            exact = F.conv2d(x.double(), w.double(), stride=p.stride, padding=p.pad[0])
            given = [x, w, *[None] * 13]
            if w_short is not None:
                x_short = whole_numbers(
                    (p.N, p.short_C, p.P * p.short_stride, p.Q * p.short_stride), 2, p.dtype, p.device
                )
                given[7:9] = x_short, w_short
                exact = exact + F.conv2d(x_short.double(), w_short.double(), stride=p.short_stride)
        found.append((partial(_first, op, p, given), exact))
    return found


def _first(op: str, problem: ConvProblem, given: list[Any]) -> Tensor:
    output: Tensor = cuda.launch(op, problem, Tile(0), *given)[0]
    return output


def split_reductions(dtype: torch.dtype, device: str, seconds: float) -> Result:
    """Every split call many times while another stream keeps the memory busy, against the unsplit one."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    noise = torch.cuda.Stream() if device == "cuda" else None
    busy = torch.empty(1 << 26, device=device) if noise else None
    wrong, ran, repeats, most = [], 0, REPEATS if noise else 2, 0
    for op, problem in cases(dtype, device):
        reason = cuda.refused(op, problem)
        if reason:
            return result(NOT_RUN, reason)
        built, index = cuda.extension(), torch.cuda.current_device() if noise else None
        pieces = cuda_launch.splits_of(built, problem, op == "dgrad", index)
        if noise and pieces == 1:
            continue
        prepared = calls(op, problem)
        with extension(unsplit(built)):
            whole = [call() for call, _ in prepared]
        bad = torch.zeros((), dtype=torch.int64, device=device)
        for (_, exact), y in zip(prepared, whole, strict=True):
            bad += (y != exact.to(dtype)).any()
        for i in range(repeats):
            if noise and busy is not None and i % 8 == 0:
                with torch.cuda.stream(noise):
                    busy.add_(1.0)
            call, _ = prepared[i % INPUTS]
            bad += (call() != whole[i % INPUTS]).any()
        ran, most = ran + 1, max(most, pieces)
        if noise:
            noise.synchronize()
        if int(bad):
            wrong.append(f"{op} of {problem.N}x{problem.C}x{problem.H}x{problem.W}: {int(bad)} of {repeats} calls")
    if not ran:
        return result(FAILED, "no reduction was split")
    if wrong:
        return result(FAILED, f"{len(wrong)} of {ran} problems: {wrong[0]}", wrong=wrong)
    return result(OK, f"{ran} problems, {repeats} calls each, up to {most} pieces: bit-equal to the unsplit sums")


def far(backend: str, device: str, seconds: float, n: int = FAR) -> Result:
    """Tensors of more than 2^31 elements: what is made of the last image is what is made of it alone."""
    module: Any = dispatch.load(backend)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    layer = LAYERS[0] if device == "cuda" else Layer(16, 16, 4)
    whole = problem_of(layer, n, device, act="identity")._replace(dtype=dtype, w_dtype=dtype)
    alone = whole._replace(N=1)
    normal: dict[str, Any] = {"prologue": True, "affine": True, "act": "relu"}
    for op in ("fprop", "dgrad", "wgrad"):
        reason = module.unsupported(op, whole)
        if reason:
            return result(NOT_RUN, reason)
    w = whole_numbers((whole.K, whole.C, whole.R, whole.S), 1, dtype, device)
    # Zero but for the last image, so that a sum over images is that of the last one.
    x, dy = (torch.zeros(n, c, whole.H, whole.W, dtype=dtype, device=device) for c in (whole.C, whole.K))
    x, dy = (v.contiguous(memory_format=torch.channels_last) for v in (x, dy))
    for v in (x, dy):
        v[-1:] = whole_numbers((1, *v.shape[1:]), 2, dtype, device)
    stats = torch.stack([torch.zeros(whole.C, device=device), torch.ones(whole.C, device=device)])
    runs: dict[str, Callable[[ConvProblem, Tensor, Tensor], Tensor]] = {
        "fprop": lambda p, x, dy: module.fprop(p, x, w, *[None] * 13)[0],
        "dgrad": lambda p, x, dy: module.dgrad(p, dy, x, w, *[None] * 4)[0],
        "wgrad": lambda p, x, dy: module.wgrad(p, dy, x, *[None] * 4),
        "bn_bwd_apply": lambda p, x, dy: module.bn_bwd_apply(p._replace(**normal), dy, x, stats, stats[1], None),
    }
    wrong = []
    for name, run in runs.items():
        got, want = run(whole, x, dy), run(alone, x[-1:], dy[-1:])
        if not torch.equal(got if name == "wgrad" else got[-1:], want):
            wrong.append(name)
        del got
    text = f"{', '.join(wrong)} of the last image differ" if wrong else f"the last of {n} images is right"
    return result(FAILED if wrong else OK, text, elements=x.numel())
