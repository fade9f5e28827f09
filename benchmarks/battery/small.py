"""A small run of every kernel, for a sanitizer to watch: `python -m benchmarks.battery.small [cuda|cpu] [what]`.

`all` checks each operator of the Triton kernels on integers, `hand-written` those of the cuda backend. `reorder`
compares two tiles bit for bit, which holds only where a sanitizer has put integers in the place of floating-point
numbers (Triton's FpSan).
"""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import torch

from wrn_fast import tune
from wrn_fast.backends import cuda, triton
from wrn_fast.kernels import configs
from wrn_fast.problem import ConvProblem

ACT = {"prologue": True, "affine": True, "act": "relu", "eps": 1e-5}


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
    for op in ("channel_stats", "bn_bwd_apply", "dropout", "act_mask", "head", "head_bwd"):
        elementwise(triton, op, place)
    others = [sentence for sentence in special_tiles(place) if sentence]
    if others:
        sys.exit(others[0])
    masked(place)
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


def masked(place: torch.device) -> None:
    """One run of input_grad by a mask."""
    problem = ConvProblem(place.type, torch.float16, torch.float16, 3, 9, 7, 40, 48, 3, 3, 1, (1, 1, 1, 1), act="relu")
    dy, x, w, *_ = tune.tensors("dgrad", problem, place)
    assert dy is not None and x is not None and w is not None
    triton.input_grad(problem, dy, w, triton.act_mask(problem, x, None, None, None), None, None)


def hand_written(device: str) -> None:
    """Raises SystemExit where a kernel of `_cuda` is wrong; convolutions only where there is a Hopper GPU."""
    place = torch.device(device, 0)
    count = 0
    for op, problem in problems(device):
        wide = problem._replace(C=80, K=160, dtype=torch.bfloat16, w_dtype=torch.bfloat16)
        for kind in (op, "fprop_fp8") if op == "fprop" else (op,):
            if cuda.refused(kind, wide):
                continue
            for tile in cuda.tiles(kind, wide):
                sentence = cuda.wrong(kind, wide, tile, place)
                if sentence:
                    sys.exit(sentence)
                count += 1
    for op in ("channel_stats", "bn_bwd_apply", "dropout", "act_mask", "head", "head_bwd"):
        elementwise(cuda, op, place)
    print(f"{count} convolutions of the cuda backend exact, its passes run")


def elementwise(backend: ModuleType, op: str, place: torch.device) -> None:
    """One run of a kernel without a tile."""
    problem = ConvProblem(place.type, torch.float16, torch.float16, 3, 9, 7, 40, 40, 1, 1, p=0.3, drop_at="output")
    x = torch.randn(3, 40, 9, 7, device=place).half().contiguous(memory_format=torch.channels_last)
    if op == "channel_stats":
        backend.channel_stats(problem, x)
    elif op == "act_mask":
        backend.act_mask(problem._replace(act="relu"), x, None, None, None)
    elif op == "dropout":
        backend.dropout(problem, x, torch.tensor([1, 2], device=place))
    else:
        stats = torch.rand(2, 40, device=place) + 0.5
        batch = problem._replace(prologue=True, affine=True, batch_stats=True, act="relu")
        if op == "bn_bwd_apply":
            backend.bn_bwd_apply(batch, x, x, stats, stats[0], stats)
        elif op == "head":
            backend.head(
                batch._replace(K=10, bias=True), x, stats, *stats, stats[0].expand(10, 40).contiguous(), stats[0, :10]
            )
        else:
            backend.head_bwd(batch._replace(want_stats=True), stats[:1].expand(3, 40).contiguous(), x, stats, *stats)


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


if __name__ == "__main__":
    device, what = (sys.argv[1:] + ["cuda", "all"])[:2] if len(sys.argv) < 3 else sys.argv[1:3]
    {"all": integers, "hand-written": hand_written, "reorder": reorder}[what](device)
