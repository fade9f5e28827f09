"""Inference through a run of blocks in one call of the backend, where nothing needs Python between the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wrn_fast import activated, dispatch, random
from wrn_fast.precision import FP8, current
from wrn_fast.problem import ConvProblem
from wrn_fast.steps import Norm, Short, Step

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Slots: the input, two for what is inside a block, two that blocks' outputs take in turns, the last block's output.
_INPUT, _INNER, _OTHER, _PING, _PONG, _OUTPUT = range(6)


def run_blocks(blocks: Sequence[Any], x: Tensor) -> Tensor | None:
    """y of the last block, or None where the blocks have to run one operator at a time.

    A backend's own chain runs it, or operators that write the next layer's activations (`activated`).

    Args:
        blocks: `block.BlockParts`, in a row, without listeners.
        x: [N, C, H, W].

    Returns:
        [N, K, P, Q], equal to the blocks' own operators, masks of dropout included: bit for bit by a backend's chain,
        but for the rounding of y before an activation by `activated`. None under autograd, a compiler, autocast to
        another dtype, a dispatch mode or precision("fp8"), where BatchNorm uses the batch, and where the backend has
        neither.
    """
    if not plain_inference(x):
        return None
    steps = _steps(blocks, x)
    if steps is None:
        return None
    first = dispatch.choose("fprop", steps[0].problem)
    run = getattr(first, "chain", None)
    if run is None:
        return _run_activated(steps, x) if hasattr(first, "scale_shift") else None
    if len({dispatch.choose("fprop", step.problem) for step in steps}) > 1:
        return None
    if not all(v is None or v.dtype is torch.float32 for step in steps for v in step.norm):
        return None
    return run(x.contiguous(memory_format=torch.channels_last), _drawn(steps, x))


def _drawn(steps: list[Step], x: Tensor) -> list[Step]:
    return [step._replace(rng=random.draw(x.device)) if step.problem.p > 0 else step for step in steps]


def _run_activated(steps: list[Step], x: Tensor) -> Tensor | None:
    """None where no layer would write a second output: the operators do the same then."""
    planned = activated.plan(steps, activated.by_time)
    if all(step.second is None for step in planned) or not activated.serves(planned):
        return None
    return activated.run(x.contiguous(memory_format=torch.channels_last), _drawn(planned, x))


def plain_inference(x: Tensor) -> bool:
    """Is x a plain batch of images, and does nobody but the caller look: autograd, a compiler, a cast, a mode?"""
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.dtype in _DTYPES
        and x.layout == torch.strided
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and current() != FP8
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type != "meta"
        and not (torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def _norm(bn: nn.BatchNorm2d, x: Tensor, channels: int) -> Norm | None:
    """Running statistics and parameters where they are plain vectors in float32 or x's dtype on its device."""
    p, b = bn._parameters, bn._buffers
    mean, var, gamma, beta = b["running_mean"], b["running_var"], p["weight"], p["bias"]
    if bn.training or mean is None or var is None:
        return None
    for v in (mean, var, gamma, beta):
        if v is not None and not (
            v.dtype in (torch.float32, x.dtype)
            and v.is_contiguous()
            and v.shape == (channels,)
            and v.device == x.device
        ):
            return None
    return Norm(mean, var, gamma, beta)


def _affine(norm: Norm) -> bool:
    return norm.gamma is not None or norm.beta is not None


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
        found = _block_steps(block, x, (n, c, h, w), here, free[0])
        if found is None:
            return None
        last = found[-1].problem
        steps += found
        free = [free[1], free[0]]
        n, c, h, w, here = n, last.K, last.P, last.Q, found[-1].y
    if steps:
        steps[-1] = steps[-1]._replace(y=_OUTPUT)
    return steps or None


def _block_steps(block: Any, x: Tensor, shape: tuple[int, int, int, int], here: int, there: int) -> list[Step] | None:
    """A block that reads slot `here` of the given shape and writes slot `there`; None where it has no steps."""
    if block.conv1_reads_x or block.shortcut_reads_x:
        return None
    steps: list[Step] = []
    n, c0, h0, w0 = shape
    c, h, w, source, final = c0, h0, w0, here, len(block.stages) - 1
    for i, stage in enumerate(block.stages):
        norm, weight = _norm(stage.bn, x, c), _filter(stage.conv, x, c)
        if norm is None or weight is None or stage.conv.bias is not None or h < 1 or w < 1:
            return None
        k, _, r, s = weight.shape
        p, drop_at = 0.0, "none"
        if block.p > 0 and i == (final if block.drop_at == "prologue" else final - 1):
            p, drop_at = block.p, block.drop_at
        residual: int | None = None
        short: Short | None = None
        fields: dict[str, Any] = {}
        if i == final and block.shortcut is None:
            residual, fields = here, {"residual": True}
        elif i == final:
            first_norm = steps[0].norm if steps else norm
            w_short = _filter(block.shortcut, x, c0)
            if w_short is None or w_short.shape[2:] != (1, 1) or block.shortcut.bias is not None:
                return None
            short = Short(here, (h0, w0), w_short, first_norm)
            fields = {
                "short_C": c0, "short_stride": block.shortcut.stride[0], "short_prologue": True,
                "short_affine": _affine(first_norm), "short_act": block.stages[0].act[0],
                "short_eps": block.stages[0].bn.eps,
            }  # fmt: skip
        slope = block.slope if i == final else stage.act[1]
        problem = ConvProblem(
            x.device.type, x.dtype, weight.dtype, n, h, w, c, k, r, s, stage.conv.stride[0], stage.pad, stage.act[0],
            slope, stage.bn.eps, True, _affine(norm), p=p, drop_at=drop_at, **fields,
        )  # fmt: skip
        target = there if i == final else (_INNER, _OTHER)[i % 2]
        steps.append(Step(problem, source, target, weight, norm, None, residual, short))
        c, h, w, source = k, problem.P, problem.Q, target
    stride = block.shortcut.stride[0] if block.shortcut is not None else 1
    if (h, w) != ((h0 - 1) // stride + 1, (w0 - 1) // stride + 1) or (block.shortcut is None and c != c0):
        return None
    return steps
