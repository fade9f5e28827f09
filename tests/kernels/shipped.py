"""The launches that the package ships, defined once: layers of every width, by operator, dtype route and GPU.

A layer's tile is what the written rule gives; what is compiled for it follows. All forms of all widths are there in
bfloat16 at batch 128. The other routes compile the same loops with other tensor instructions, and batch 1 smaller tiles
of them, so there every width has one form, in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from wrn_fast.problem import ConvProblem

TARGETS = ("sm_80", "sm_90", "gfx942")
FP8_TARGETS = ("sm_89", "sm_90", "gfx942")
# Width and the image that it is met at: WRN-d-k for k of 1 to 16, and widths off every multiple.
IMAGES = {
    16: 32, 32: 32, 48: 32, 64: 32, 96: 32, 128: 16, 160: 32, 192: 16, 256: 8, 320: 16, 512: 8, 640: 8, 1024: 8,
    7: 32, 20: 32, 100: 16,
}  # fmt: skip
RAW = {"prologue": False, "affine": False, "act": "identity"}
ACT = {"prologue": True, "affine": True, "act": "relu", "eps": 1e-5}


class Route(NamedTuple):
    """A dtype and how its products are made."""

    dtype: torch.dtype
    nvidia: str = "ieee"  # Triton's input_precision
    amd: str = "ieee"
    batch: int = 128


ROUTES = {
    "bf16 n128": Route(torch.bfloat16),
    "bf16 n1": Route(torch.bfloat16, batch=1),
    "fp16 n128": Route(torch.float16),
    "fp32 n128": Route(torch.float32, "tf32x3", "bf16x6"),
    "tf32 n128": Route(torch.float32, "tf32", "tf32"),
    "ieee n128": Route(torch.float32),
}


class Shipped(NamedTuple):
    """One call of an operator on a target."""

    op: str
    problem: ConvProblem
    target: str
    precision: str
    box: bool = False  # the rule's tile, its pixels by boxes: what only a tuned row asks for


def layer(c: int, k: int, h: int, route: Route, taps: int = 3, stride: int = 1, **parts) -> ConvProblem:
    """A convolution of a square image, padded to keep its size."""
    return ConvProblem(
        "cuda", route.dtype, route.dtype, route.batch, h, h, c, k, taps, taps, stride, (taps // 2,) * 4, **parts
    )


def forms(width: int, route: Route) -> dict[str, tuple[str, ConvProblem]]:
    """(operator, problem) by name: inside a group of this width, and from half of it at twice the image into it."""
    h, half = IMAGES[width], max(1, width // 2)
    same = partial(layer, width, width, h, route)
    down = partial(layer, half, width, 2 * h, route, stride=2)
    short = {"short_C": half, "short_stride": 2, "short_prologue": True, "short_affine": True, "short_act": "relu"}
    return {
        "conv1": ("fprop", same(**ACT, want_stats=True)),
        "eval": ("fprop", same(residual=True, bias=True, act_out="relu")),
        "dgrad": ("dgrad", same(**ACT, want_stats=True)),
        "wgrad": ("wgrad", same(**ACT)),
        "down conv1": ("fprop", down(**ACT, want_stats=True)),
        "down conv2": ("fprop", same(**ACT, **short, want_stats=True)),
        "down dgrad": ("dgrad", down(**ACT, want_stats=True)),
        "down wgrad": ("wgrad", down(**ACT)),
    }


def _others(route: Route) -> Iterator[tuple[str, str, ConvProblem]]:
    """(name, operator, problem) of what a network has once, and of kernels without a tile."""
    yield "3-16 conv1", "fprop", layer(3, 16, 32, route, want_stats=True)
    yield "3-16 wgrad", "wgrad", layer(3, 16, 32, route)
    yield "160 conv2", "fprop", layer(160, 160, 32, route, **ACT, residual=True, want_stats=True)
    yield "16-160 short dgrad", "dgrad", layer(16, 160, 32, route, 1, **ACT, want_stats=True)
    yield "160-320 short dgrad", "dgrad", layer(160, 320, 32, route, 1, 2, **ACT, want_stats=True)
    for width in (16, 64, 160, 320, 640):
        same = partial(layer, width, width, IMAGES[width], route)
        yield f"{width} input_grad", "input_grad", same(prologue=True, act="relu")
    yield "160-320 input_grad", "input_grad", layer(160, 320, 32, route, 3, 2, prologue=True, act="relu")
    for width in (16, 160):
        same = partial(layer, width, width, IMAGES[width], route, 1)
        yield f"{width} act_mask", "act_mask", same(**ACT)
        yield f"{width} bn_bwd_apply", "bn_bwd_apply", same(prologue=True, affine=True, batch_stats=True)
        yield f"{width} channel_stats", "channel_stats", same()
        yield f"{width} dropout", "dropout", same(p=0.3, drop_at="output")
    for taps in (1, 3):
        filters = layer(160, 160, 32, route, taps)
        yield f"160 renew {taps}x{taps}", "renew", filters
        if route.dtype != torch.float32:
            yield f"160 renew {taps}x{taps} of float32", "renew", filters._replace(w_dtype=torch.float32)
    for width in (64, 128, 256, 640):
        head = ConvProblem("cuda", route.dtype, torch.float32, route.batch, 8, 8, width, 10, 1, 1, bias=True, **ACT)
        yield f"{width} head", "head", head
        yield f"{width} head_bwd", "head_bwd", head._replace(batch_stats=True, want_stats=True)
    yield "640 cosine head", "head", head._replace(**RAW, bias=False, cosine=True)
    yield "640 head of 1000", "head", head._replace(K=1000)
    yield "640 eval head_bwd", "head_bwd", head


def _activated(route: Route) -> Iterator[tuple[str, str, ConvProblem]]:
    """(name, operator, problem) of layers that write the next one's activation, some of them nothing else."""
    alone = {"act_out": "relu", "want_y": False}
    for width in (16, 32, 64, 160, 320, 640):
        yield f"{width} inner", "fprop", layer(width, width, IMAGES[width], route, **alone)
    for width in (32, 160):
        dropped = alone | {"p": 0.3, "drop_at": "output_act"}
        yield f"{width} inner dropped", "fprop", layer(width, width, IMAGES[width], route, **dropped)
    yield "160-320 inner", "fprop", layer(160, 320, 32, route, 3, 2, **alone)
    raw_short = {"short_C": 160, "short_stride": 2}
    yield "160-320 both", "fprop", layer(320, 320, 16, route, **raw_short, act_out="relu")


def cases() -> dict[str, Shipped]:
    """By name: target, route, width and form."""
    found = {}
    for target in TARGETS:
        for name, route in ROUTES.items():
            precision = route.amd if target.startswith("gfx") else route.nvidia
            for i, width in enumerate(IMAGES):
                here = forms(width, route)
                # Neighbouring widths share a tile, so the turn moves by 3: coprime to the number of forms.
                wanted = list(here) if name == "bf16 n128" else [list(here)[3 * i % len(here)]]
                for form in wanted:
                    found[f"{target} {name} {width} {form}"] = Shipped(*here[form], target, precision)
            if name in ("bf16 n128", "fp32 n128"):
                for what, op, problem in _others(route):
                    found[f"{target} {name} {what}"] = Shipped(op, problem, target, precision)
            if name == "bf16 n128":
                for what, op, problem in _activated(route):
                    found[f"{target} {name} {what}"] = Shipped(op, problem, target, precision)
    fp8 = ROUTES["bf16 n128"]
    for target in FP8_TARGETS:
        for width in (32, 64, 160, 320, 640):
            for form in ("eval", "down conv2") if width == 160 else ("eval",):
                found[f"{target} fp8 n128 {width} {form}"] = Shipped(*forms(width, fp8)[form], target, "fp8")
    for width in (160, 320, 640):
        for form in ("conv1", "eval", "dgrad", "wgrad"):
            name = f"sm_90 bf16 n128 {width} {form}"
            found[f"{name} box"] = found[name]._replace(box=True)
    return found
