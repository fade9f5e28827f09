"""Adapter to the C++ extension `_cpu`: fp32 and bf16 on the CPU, one C++ call an operator.

Every argument is checked before it gets here; this file makes pointers of tensors, allocates outputs and keeps packed
filters (`wrn_fast.packing`). Which algorithm runs is csrc/cpu/policy.cpp's choice, narrowed by `wrn_fast.precision`.

Numerics: products and sums are float32, cut every 16 channels (of wgrad: tiles or pixels); statistics merge in
float64. bfloat16 is converted in the transforms, so its convolution is rounded once, at the store. Bits do not depend
on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wrn_fast import masks, measured, packing
from wrn_fast.native import extension, floats, isa, load, threads
from wrn_fast.precision import current, pinned
from wrn_fast.problem import ConvProblem
from wrn_fast.steps import NO_NORM, Step

NAME = "cpu"

_DTYPES = (torch.float32, torch.bfloat16)
# A convolution does as many in the time that a pass takes for one element.
_FLOPS_AN_ELEMENT = 64
# A chain's activations beyond this are given back after the call.
KEPT_BYTES = 64 << 20


def unsupported(op: str, problem: ConvProblem) -> str | None:
    """A sentence if the problem is not for this backend."""
    if problem.device != "cpu":
        return f"tensors are on {problem.device}, this backend is for the CPU"
    if problem.dtype not in _DTYPES:
        return f"needs float32 or bfloat16, got {problem.dtype}"
    if problem.w_dtype not in _DTYPES:
        return f"needs float32 or bfloat16 filters, got {problem.w_dtype}"
    module, reason = load()
    if module is not None and problem.R * problem.S > module.MAX_TAPS:
        return f"needs filters of at most {module.MAX_TAPS} taps, got {problem.R}x{problem.S}"
    return reason


def algorithm(op: str, problem: ConvProblem) -> str | None:
    """What an operator would run now, `f4`, `f2` or `direct`; None where there is no choice (`wrn-fast info`)."""
    return getattr(_plan(problem), f"{op}_algo", None)


def packed_bytes(problem: ConvProblem) -> int:
    """Bytes of the packed filter of an fprop."""
    return 4 * _plan(problem).packed_size(False)


def _plan(problem: ConvProblem) -> Any:
    """The problem's scalars on the C++ side, with the algorithms that the settings of this moment choose."""
    pin = pinned()
    pins = pin, pin, pin
    if pin == "measured":
        where = str(isa()), torch.get_num_threads()
        pins = measured.lookup("fprop", problem, *where), measured.lookup("dgrad", problem, *where), ""
    return _plan_for(problem, current(), pins)


@functools.lru_cache(maxsize=1024)
def _plan_for(problem: ConvProblem, exactness: str, pins: tuple[str, str, str]) -> Any:
    left, right, top, bottom = problem.pad
    return extension().Plan(
        bf16=problem.dtype == torch.bfloat16, N=problem.N, H=problem.H, W=problem.W, C=problem.C, K=problem.K,
        R=problem.R, S=problem.S, stride=problem.stride, pad_left=left, pad_right=right, pad_top=top,
        pad_bottom=bottom, act=problem.act, slope=problem.slope, eps=problem.eps, p=problem.p,
        drop_at=problem.drop_at, short_C=problem.short_C, short_stride=problem.short_stride,
        short_act=problem.short_act, short_eps=problem.short_eps, act_out=problem.act_out, precision=exactness,
        pin_fprop=pins[0], pin_dgrad=pins[1], pin_wgrad=pins[2],
    )  # fmt: skip


def _conv_threads(problem: ConvProblem) -> int:
    return threads(problem.flops // _FLOPS_AN_ELEMENT)


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _vector(t: Tensor | None) -> Tensor | None:
    """A per-channel array as the extension reads it: dense float32."""
    if t is None or (t.dtype is torch.float32 and t.is_contiguous()):
        return t
    return t.to(torch.float32).contiguous()


def _empty(
    *shape: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Memory that C++ writes: never of the default dtype or on the default device, which are the user's."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)


def _new(problem: ConvProblem, *shape: int) -> Tensor:
    return _empty(*shape, dtype=problem.dtype, memory_format=torch.channels_last)


def _absent(dtype: torch.dtype = torch.float32) -> Tensor:
    return _empty(0, dtype=dtype)


def _nhwc(v: Tensor, dtype: torch.dtype) -> Tensor:
    """`v` in `dtype` with the dense channels_last strides that the fake kernels promise."""
    out = _empty(*v.shape, dtype=dtype, memory_format=torch.channels_last)
    return v if v.dtype == dtype and v.stride() == out.stride() else out.copy_(v)


# Filters: how they lie in memory, and their packs.


def _code(w: Tensor | None) -> int:
    """FilterLayout's code in csrc/cpu/plan.h."""
    if w is None:
        return 0
    return (0 if w.is_contiguous() else 1) + (2 if w.dtype is torch.bfloat16 else 0)


@functools.lru_cache(maxsize=1024)
def _sampling(count: int) -> tuple[int, int]:
    return packing.sample_step(count), min(count, packing.SAMPLES)


def _fingerprint(w: Tensor) -> int:
    count = w.numel()
    step, samples = _sampling(count)
    return extension().fingerprint(w.data_ptr(), count, w.element_size(), step, samples)


def _packed(plan: Any, w: Tensor, for_dgrad: bool) -> Tensor | None:
    algo = plan.dgrad_algo if for_dgrad else plan.fprop_algo

    def make(w: Tensor) -> Tensor:
        out = floats(plan.packed_size(for_dgrad))
        plan.pack(threads(out.numel()), for_dgrad, w.data_ptr(), _code(w), out.data_ptr())
        return out

    return packing.lookup(w, (algo, "dgrad" if for_dgrad else "fprop", isa()), _fingerprint, make)


def _packed_short(plan: Any, w: Tensor) -> Tensor | None:
    def make(w: Tensor) -> Tensor:
        out = floats(plan.packed_size_short())
        plan.pack_short(threads(out.numel()), w.data_ptr(), _code(w), out.data_ptr())
        return out

    return packing.lookup(w, ("direct", "fprop", isa()), _fingerprint, make)


def _pointers(*values: int) -> Any:
    return extension().FpropPointers(*values)


def _halves(stats: Tensor | None) -> tuple[int, int]:
    """Pointers to mean and variance in [2, C] float32."""
    if stats is None:
        return 0, 0
    p = stats.data_ptr()
    return p, p + 4 * stats.shape[1]


# The primitives.


def fprop(
    problem: ConvProblem,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    x_short: Tensor | None,
    w_short: Tensor | None,
    stats_short: Tensor | None,
    gamma_short: Tensor | None,
    beta_short: Tensor | None,
    rng: Tensor | None,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N,K,P,Q], stats_y [2,K], y_act [N,K,P,Q]); an absent output has 0 elements."""
    plan = _plan(problem)
    stats, gamma, beta, bias = _vector(stats), _vector(gamma), _vector(beta), _vector(bias)
    stats_short, gamma_short, beta_short = _vector(stats_short), _vector(gamma_short), _vector(beta_short)
    out_scale, out_shift = _vector(out_scale), _vector(out_shift)
    shape = problem.N, problem.K, problem.P, problem.Q
    y = _new(problem, *shape) if problem.want_y else None
    stats_y = _empty(2, problem.K) if problem.want_stats else None
    y_act = _new(problem, *shape) if problem.act_out != "none" else None
    packed = _packed(plan, w, False)
    packed_short, short_H, short_W = None, 0, 0
    if x_short is not None:
        assert w_short is not None
        packed_short = _packed_short(plan, w_short)
        short_H, short_W = x_short.shape[2:]
    plan.fprop(
        _conv_threads(problem),
        _pointers(
            _ptr(x), _ptr(w), _code(w), _ptr(packed), *_halves(stats), _ptr(gamma), _ptr(beta), _ptr(bias),
            _ptr(residual), _ptr(x_short), short_H, short_W, _ptr(w_short), _code(w_short), _ptr(packed_short),
            *_halves(stats_short), _ptr(gamma_short), _ptr(beta_short), _ptr(rng), _ptr(out_scale), _ptr(out_shift),
            _ptr(y), _ptr(stats_y), _ptr(y_act),
        ),
    )  # fmt: skip
    dtype = problem.dtype
    return (
        _absent(dtype) if y is None else y,
        _absent() if stats_y is None else stats_y,
        _absent(dtype) if y_act is None else y_act,
    )


def chain(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """fprops in a row in one C++ call: the y of the last. Intermediate activations share one block of memory."""
    size = x.element_size()
    sizes: dict[int, int] = {}
    for step in steps:
        problem = step.problem
        elements = problem.N * problem.P * problem.Q * problem.K
        sizes[step.y] = max(sizes.get(step.y, 0), (elements * size + 63) // 64 * 16)
    last = steps[-1].problem
    y = _new(last, last.N, last.K, last.P, last.Q)
    del sizes[steps[-1].y]
    slots = {0: x.data_ptr(), steps[-1].y: y.data_ptr()}
    count = sum(sizes.values())
    memory = floats(count) if 4 * count > KEPT_BYTES else None
    at = extension().activations(4 * count) if memory is None else memory.data_ptr()
    for slot, count in sizes.items():
        slots[slot] = at
        at += 4 * count
    program, kept = extension().Chain(), []
    for step in steps:
        plan = _plan(step.problem)
        packed, packed_short = _packed(plan, step.w, False), None
        norm, short = step.norm, step.short
        residual = 0 if step.residual is None else slots[step.residual]
        x_short, w_short, short_H, short_W, norm_short = 0, None, 0, 0, NO_NORM
        if short is not None:
            x_short, w_short, norm_short = slots[short.x], short.w, short.norm
            short_H, short_W = short.image
            packed_short = _packed_short(plan, w_short)
        kept += [packed, packed_short]
        program.add(
            plan, _conv_threads(step.problem),
            _pointers(
                slots[step.x], _ptr(step.w), _code(step.w), _ptr(packed), _ptr(norm.mean), _ptr(norm.var),
                _ptr(norm.gamma), _ptr(norm.beta), _ptr(step.bias), residual, x_short, short_H, short_W, _ptr(w_short),
                _code(w_short), _ptr(packed_short), _ptr(norm_short.mean), _ptr(norm_short.var),
                _ptr(norm_short.gamma), _ptr(norm_short.beta), _ptr(step.rng), 0, 0, slots[step.y], 0, 0,
            ),
        )  # fmt: skip
    program.run()
    return y


def dgrad(
    problem: ConvProblem,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(g [N,C,H,W], sums_g [2,C]): the gradient before the activation, and the sums of g and g*xhat."""
    plan = _plan(problem)
    stats, gamma, beta = _vector(stats), _vector(gamma), _vector(beta)
    g = torch.empty_like(x, memory_format=torch.channels_last)
    sums = _empty(2, problem.C) if problem.want_stats else None
    packed = _packed(plan, w, True)
    plan.dgrad(
        _conv_threads(problem), _ptr(dy), _ptr(x), _ptr(w), _code(w), _ptr(packed), _ptr(stats), _ptr(gamma),
        _ptr(beta), _ptr(rng), _ptr(g), _ptr(sums),
    )  # fmt: skip
    return g, _absent() if sums is None else sums


def wgrad(
    problem: ConvProblem,
    dy: Tensor,
    x: Tensor,
    stats: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rng: Tensor | None,
) -> Tensor:
    """dw [K,C,R,S]: the activation is made again from x."""
    plan = _plan(problem)
    stats, gamma, beta = _vector(stats), _vector(gamma), _vector(beta)
    dw = _empty(problem.K, problem.C, problem.R, problem.S, memory_format=torch.channels_last)
    plan.wgrad(
        _conv_threads(problem), _ptr(dy), _ptr(x), _ptr(stats), _ptr(gamma), _ptr(beta), _ptr(rng), _ptr(dw),
    )  # fmt: skip
    return _nhwc(dw, problem.w_dtype)


def act_mask(
    problem: ConvProblem, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """uint8 [N,H,W,ceil(C/8)]: one bit an element, set where act'(bn(x)) is 1."""
    stats, gamma, beta = _vector(stats), _vector(gamma), _vector(beta)
    mask = _empty(*masks.shape(x.shape), dtype=torch.uint8)
    _plan(problem).act_mask(threads(x.numel()), _ptr(x), _ptr(stats), _ptr(gamma), _ptr(beta), _ptr(mask))
    return mask


def input_grad(
    problem: ConvProblem, dy: Tensor, w: Tensor, mask: Tensor | None, scale: Tensor | None, rng: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] = scale * act' * dropout'(dgrad(dy, w)), where only x wants a gradient and BatchNorm is in eval."""
    plan = _plan(problem)
    scale = _vector(scale)
    dx = _new(problem, problem.N, problem.C, problem.H, problem.W)
    packed = _packed(plan, w, True)
    plan.input_grad(
        _conv_threads(problem), _ptr(dy), _ptr(w), _code(w), _ptr(packed), _ptr(mask), _ptr(scale), _ptr(rng), _ptr(dx),
    )  # fmt: skip
    return dx


def bn_bwd_apply(
    problem: ConvProblem, g: Tensor, x: Tensor, stats: Tensor, gamma: Tensor | None, sums_g: Tensor | None
) -> Tensor:
    """dx [N,C,H,W] from the gradient before the activation: BatchNorm's own backward, in one pass."""
    dx = torch.empty_like(g, memory_format=torch.channels_last)
    sums = _vector(sums_g) if problem.batch_stats else None
    stats, gamma = _vector(stats), _vector(gamma)  # type: ignore[assignment]
    _plan(problem).bn_bwd_apply(threads(g.numel()), _ptr(g), _ptr(x), _ptr(stats), _ptr(gamma), _ptr(sums), _ptr(dx))
    return dx


def channel_stats(problem: ConvProblem, x: Tensor) -> Tensor:
    """[2, C]: mean and biased variance of x, read once."""
    stats = _empty(2, problem.C)
    _plan(problem).channel_stats(threads(x.numel()), _ptr(x), _ptr(stats))
    return stats


def dropout(problem: ConvProblem, x: Tensor, rng: Tensor) -> Tensor:
    """x * mask / (1 - p)."""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    _plan(problem).drop(threads(x.numel()), _ptr(x), _ptr(rng), _ptr(y))
    return y
