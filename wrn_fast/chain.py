"""Inference through a run of blocks in one call of the backend, where nothing needs Python between the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wrn_fast import dispatch, random
from wrn_fast.problem import ConvProblem
from wrn_fast.steps import Norm, Short, Step

_DTYPES = (torch.float32, torch.bfloat16)
# Slots: the input, what conv1 of a block gives, two that blocks' outputs take in turns, the last block's output.
_INPUT, _INNER, _PING, _PONG, _OUTPUT = range(5)


def run_blocks(blocks: Sequence[Any], x: Tensor) -> Tensor | None:
    """y of the last block, or None where the blocks have to run one operator at a time.

    Args:
        blocks: `block.BlockParts`, in a row, without listeners.
        x: [N, C, H, W].

    Returns:
        [N, K, P, Q], equal bit for bit to the blocks' own operators, masks of dropout included; None under autograd, a
        compiler, autocast or a dispatch mode, where BatchNorm uses the batch, and where the backend has no chain.
    """
    if not _plain_inference(x):
        return None
    steps = _steps(blocks, x)
    if steps is None:
        return None
    modules = {dispatch.choose("fprop", step.problem) for step in steps}
    run = getattr(modules.pop(), "chain", None) if len(modules) == 1 else None
    if run is None:
        return None
    drawn = [step._replace(rng=random.draw(x.device)) if step.problem.p > 0 else step for step in steps]
    return run(x.contiguous(memory_format=torch.channels_last), drawn)


def _plain_inference(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.dtype in _DTYPES
        and x.layout == torch.strided
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled(x.device.type)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def _norm(bn: nn.BatchNorm2d, channels: int) -> Norm | None:
    """BatchNorm's running statistics and parameters if they are plain float32 vectors of this process's memory."""
    p, b = bn._parameters, bn._buffers
    mean, var, gamma, beta = b["running_mean"], b["running_var"], p["weight"], p["bias"]
    if bn.training or mean is None or var is None:
        return None
    for v in (mean, var, gamma, beta):
        if v is not None and not (v.dtype is torch.float32 and v.is_contiguous() and v.shape == (channels,)):
            return None
    return Norm(mean, var, gamma, beta)


def _filter(conv: nn.Conv2d, x: Tensor, channels: int) -> Tensor | None:
    """The weight if it is dense, of x's device, and of x's dtype or float32."""
    w: Any = conv._parameters.get("weight")
    if w is None or w.dim() != 4 or w.shape[1] != channels or w.device != x.device:
        return None
    if w.dtype not in (x.dtype, torch.float32):
        return None
    dense = w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last)
    return w if dense else None


def _steps(blocks: Sequence[Any], x: Tensor) -> list[Step] | None:
    steps: list[Step] = []
    n, c, h, w = x.shape
    here, free = _INPUT, [_PING, _PONG]
    for block in blocks:
        if (
            block.conv1_reads_x
            or block.shortcut_reads_x
            or block.conv1.bias is not None
            or block.conv2.bias is not None
        ):
            return None
        norm1, w1 = _norm(block.bn1, c), _filter(block.conv1, x, c)
        if norm1 is None or w1 is None:
            return None
        k1, _, r, s = w1.shape
        inner = block.p > 0 and block.drop_at == "prologue"
        outer = block.p > 0 and not inner
        first = ConvProblem(
            x.device.type, x.dtype, w1.dtype, n, h, w, c, k1, r, s, block.conv1.stride[0], block.pad1, block.act1[0],
            block.act1[1], block.bn1.eps, True, norm1.gamma is not None or norm1.beta is not None,
            p=block.p if outer else 0.0, drop_at="output" if outer else "none",
        )  # fmt: skip
        norm2, w2 = _norm(block.bn2, k1), _filter(block.conv2, x, k1)
        if norm2 is None or w2 is None or first.P < 1 or first.Q < 1:
            return None
        k2, _, r, s = w2.shape
        short: Short | None = None
        residual: int | None = here
        fields: dict[str, Any] = {"residual": True}
        if block.shortcut is not None:
            w_short = _filter(block.shortcut, x, c)
            if w_short is None or w_short.shape[2:] != (1, 1) or block.shortcut.bias is not None:
                return None
            short, residual = Short(here, (h, w), w_short, norm1), None
            fields = {
                "short_C": c, "short_stride": block.shortcut.stride[0], "short_prologue": True,
                "short_affine": first.affine, "short_act": block.act1[0], "short_eps": block.bn1.eps,
            }  # fmt: skip
        second = ConvProblem(
            x.device.type, x.dtype, w2.dtype, n, first.P, first.Q, k1, k2, r, s, block.conv2.stride[0], block.pad2,
            block.act2[0], block.act2[1], block.bn2.eps, True, norm2.gamma is not None or norm2.beta is not None,
            p=block.p if inner else 0.0, drop_at="prologue" if inner else "none", **fields,
        )  # fmt: skip
        stride = block.shortcut.stride[0] if block.shortcut is not None else 1
        if (second.P, second.Q) != ((h - 1) // stride + 1, (w - 1) // stride + 1) or (short is None and k2 != c):
            return None
        there = free[0]
        steps.append(Step(first, here, _INNER, w1, norm1))
        steps.append(Step(second, _INNER, there, w2, norm2, None, residual, short))
        free = [free[1], there]
        n, c, h, w, here = n, k2, second.P, second.Q, there
    if steps:
        steps[-1] = steps[-1]._replace(y=_OUTPUT)
    return steps or None
