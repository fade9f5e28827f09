"""A small run of every kernel, for a sanitizer to watch: `python -m benchmarks.battery.small [cuda|cpu] [what]`.

`all` checks each operator of the Triton kernels on integers, `hand-written` those of the cuda backend, and runs what a
kernel can fuse. `graph` replays a network of the cuda backend as a CUDA graph. `reorder` compares two tiles bit for
bit, which holds only where a sanitizer has put integers in the place of floating-point numbers (Triton's FpSan).
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from types import ModuleType
from typing import Any

import torch

from benchmarks.battery import NOT_RUN, Result, result
from benchmarks.battery.models import graphs
from benchmarks.battery.passes import passes
from benchmarks.battery.rates import Layer, launching, problem_of
from benchmarks.battery.replaced import on_the_cpu
from wrn_fast import tune
from wrn_fast.backends import cuda, triton
from wrn_fast.kernels import configs, cuda_launch
from wrn_fast.problem import ConvProblem

ACT: dict[str, Any] = {"prologue": True, "affine": True, "act": "relu", "eps": 1e-5}
# Everything that an epilogue of fprop can do at once, and what excludes it.
FUSED: tuple[dict[str, Any], ...] = (
    {**ACT, "residual": True, "act_out": "relu", "want_stats": True},
    {"act_out": "silu", "want_y": False},
    {**ACT, "p": 0.3, "drop_at": "output"},
)
LAYERS = (Layer(80, 160, 9), Layer(160, 160, 7, short_C=80, short_stride=2), Layer(80, 160, 9, 2))
LAYERS_OF_CPU = (Layer(16, 32, 5, short_C=16, short_stride=2), Layer(32, 16, 5, 2))


def problems(device: str) -> list[tuple[str, ConvProblem]]:
    """Odd sizes, both strides, both tap sizes, with and without a prologue."""
    base = ConvProblem(device, torch.float16, torch.float16, 3, 9, 7, 40, 48, 3, 3, 1, (1, 1, 1, 1))
    kinds = (base, base._replace(**ACT), base._replace(stride=2, **ACT), base._replace(R=1, S=1, pad=(0,) * 4, **ACT))
    chosen = kinds if device == "cuda" else kinds[1:2]
    return [(op, problem) for problem in chosen for op in ("fprop", "dgrad", "wgrad")]


def integers(device: str) -> None:
    """Raises SystemExit where a kernel is wrong."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    for op, problem in problems(device):
        tile = triton.config(op, problem, place.index)
        sentence = triton.refused_tile(op, problem, dataclasses.replace(tile, cols=(32, 16)), place)
        if sentence:
            sys.exit(sentence)
    elementwise(triton, place)
    others = [sentence for sentence in special_tiles(place) if sentence]
    if others:
        sys.exit(others[0])
    masked(triton, place, problems(device)[0][1])
    print(f"{len(problems(device))} convolutions exact on {device}, elementwise kernels run")


def special_tiles(place: torch.device) -> list[str | None]:
    """What is wrong with tiles that the rule does not choose: boxes, and e4m3. Nothing where the GPU has neither."""
    problem = problems(place.type)[-1][1]._replace(N=3, H=8, W=8, R=3, S=3, stride=1, pad=(1, 1, 1, 1), C=32, K=32)
    found = []
    for op in ("fprop", "dgrad", "wgrad"):
        tile = dataclasses.replace(triton.config(op, problem, place.index), rows=64, red=32, box=True)
        if configs.legal(tile, op, problem, triton.arch(place.index)):
            found.append(triton.refused_tile(op, problem, tile, place))
    if triton.unsupported("fprop_fp8", problem) is None:
        found.append(triton.refused_tile("fprop_fp8", problem, triton.config("fprop_fp8", problem, place.index), place))
    return found


def masked(backend: ModuleType, place: torch.device, problem: ConvProblem) -> None:
    """One run of input_grad by a mask, with dropout where the problem has it."""
    p = problem._replace(prologue=False, affine=False, want_stats=False, act="relu")
    dy, x, w, *_ = tune.tensors("dgrad", p, place)
    assert dy is not None and x is not None and w is not None
    rng = torch.tensor([1, 2], device=place) if p.p > 0 else None
    backend.input_grad(p, dy, w, backend.act_mask(p, x, None, None, None), torch.ones(p.C, device=place), rng)


def hand_written(device: str) -> None:
    """Raises SystemExit where a kernel of `_cuda` is wrong; convolutions only where there is a Hopper GPU."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    count = split = 0
    for dtype in (torch.bfloat16, torch.float16):
        for op, problem in problems("cuda"):
            wide = problem._replace(device=device, C=80, K=160 if device == "cuda" else 16, dtype=dtype, w_dtype=dtype)
            for kind in (op, "fprop_fp8") if op == "fprop" else (op,):
                if cuda.refused(kind, wide):
                    continue
                if op != "wgrad":
                    split += cuda_launch.splits_of(cuda.extension(), wide, op == "dgrad", place.index) > 1
                for tile in cuda.tiles(kind, wide):
                    sentence = cuda.wrong(kind, wide, tile, place)
                    if sentence:
                        sys.exit(sentence)
                    count += 1
    if count and device == "cuda" and not split:
        sys.exit("no reduction was split")
    fused = [call() for call in with_epilogues(device)] if count else []
    elementwise(cuda, place)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} convolutions of the cuda backend exact, {len(fused)} with all that they fuse and its passes run")


def with_epilogues(device: str) -> list[Any]:
    """fprop with every epilogue, by every tile and split, with a shortcut; gradients with sums, dropout, by a mask."""
    found = []
    for layer in LAYERS if device == "cuda" else LAYERS_OF_CPU:
        for fields in FUSED:
            fields = {k: v for k, v in fields.items() if k != "residual" or not layer.short_C}
            problem = problem_of(layer, 3, device, **fields)
            found += [launching(cuda, "fprop", problem, tile) for tile in cuda.tiles("fprop", problem)]
        sums = problem_of(layer._replace(short_C=0), 3, device, **ACT, want_stats=True)
        found += [launching(cuda, "dgrad", sums, tile) for tile in cuda.tiles("dgrad", sums)]
        dropping = sums._replace(p=0.3, drop_at="prologue")
        found += [launching(cuda, op, dropping) for op in ("dgrad", "wgrad")]
        found.append(partial(masked, cuda, torch.device(device), dropping))
    return found


def graph(device: str) -> None:
    """Raises SystemExit where a replay of a whole network differs from the network."""
    found = graphs((10, 1), torch.bfloat16 if device == "cuda" else torch.float16, "cuda", device, 0.0)
    if found["status"] == "failed":
        sys.exit(found["text"])
    print(found["text"])


def elementwise(backend: ModuleType, place: torch.device) -> None:
    """One run of every kernel without a tile."""
    for call, _, _ in passes(backend, place, torch.float16, 3, 40, 9).values():
        call()


def reorder(device: str) -> None:
    """Two tiles of fprop, which add in different orders."""
    problem = ConvProblem(device, torch.float16, torch.float16, 2, 8, 8, 64, 64, 3, 3, 1, (1, 1, 1, 1))
    arguments = tune.tensors("fprop", problem, torch.device(device))
    tile = triton.config("fprop", problem, 0 if device == "cuda" else None)
    outputs = [
        triton.launch("fprop", problem, dataclasses.replace(tile, red=red, cols=cols, stages=1), *arguments)[0]
        for red, cols in ((32, (64, 0)), (16, (32, 16)))
    ]
    if not torch.equal(*outputs):
        sys.exit("two tiles give different bits")
    print("two tiles give the same bits")


def main(device: str, what: str) -> None:
    """Run; on the CPU the cuda backend is the one that the tests have."""
    runs = {"all": integers, "hand-written": hand_written, "graph": graph, "reorder": reorder}
    run = partial(runs[what], device)
    if device == "cuda" or what not in ("hand-written", "graph"):
        run()
        return

    def step(seconds: float) -> Result:
        run()
        return result("ok", "")

    found = on_the_cpu(step, 0.0)
    if found["status"] == NOT_RUN:
        print(found["text"])


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0] if words else "cuda", words[1] if len(words) > 1 else "all")
