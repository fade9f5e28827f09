"""A run of fprops in which a layer writes act(bn(y)) for the next one, so that its main loop reads plain values.

A prologue costs the reader: a pass over its tile in shared memory or registers for each fetch, or a pass of its own. A
second output costs the writer one more store, and nothing where nobody reads y itself, which is so inside a block. The
backends' measured times decide for each layer; without them a rule of the width does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from wrn_fast import dispatch, held
from wrn_fast.problem import ConvProblem
from wrn_fast.steps import NO_NORM, Norm, Second, Step

# From so many channels on a layer of 3x3 computes longer than it stores two outputs, by the rates of current GPUs.
WIDE = 128
# float32 keeps the prologue: it subtracts the mean first, which an output's scale and shift do not.
_HALVES = (torch.bfloat16, torch.float16)

# (the writer, its reader, is y itself read too?) -> is the activated copy the faster way?
Decision = Callable[[ConvProblem, ConvProblem, bool], bool]


def plan(steps: Sequence[Step], worthwhile: Decision) -> list[Step]:
    """The same run with second outputs wherever they can stand in for a prologue and are worth it.

    Dropout of a reader's prologue moves with it: the mask counts the same elements, and its number in the order of
    draws stays, so it keeps its bits.
    """
    out = list(steps)
    for i in range(len(steps)):
        main, shorts, raw = _readers(steps, i)
        if main is None or not _may_write(out[i], steps[main], [steps[j] for j in shorts]):
            continue
        reader, norm = steps[main].problem, steps[main].norm
        if worthwhile(out[i].problem, reader, raw):
            problem = _writing(out[i].problem, reader, raw)
            out[i] = out[i]._replace(problem=problem, second=Second(norm, reader.eps))
            out[main] = out[main]._replace(problem=_reading(out[main].problem), norm=NO_NORM, activated=True)
            for j in shorts:
                short = out[j].short
                assert short is not None
                short = short._replace(norm=NO_NORM, activated=True)
                out[j] = out[j]._replace(problem=_reading_short(out[j].problem), short=short)
    return out


def _readers(steps: Sequence[Step], i: int) -> tuple[int | None, list[int], bool]:
    """(the step that convolves what step i writes, those whose shortcut reads it, does anybody read y as it is?)"""
    slot, main, shorts, raw = steps[i].y, None, [], False
    for j in range(i + 1, len(steps)):
        step = steps[j]
        if step.x == slot:
            main = j
        if step.short is not None and step.short.x == slot:
            shorts.append(j)
        raw = raw or step.residual == slot
        if step.y == slot:
            break
    return main, shorts, raw


def _may_write(writer: Step, reader: Step, shorts: Sequence[Step]) -> bool:
    """Can one second output of the writer stand in for all of these prologues?"""
    w, r = writer.problem, reader.problem
    if w.dtype not in _HALVES or not r.prologue or (_drops(r) and (w.p > 0 or shorts)):
        return False
    # One slope a call: that of the second output must be that of what the writer applies itself.
    if r.act == "leaky_relu" and r.slope != w.slope and "leaky_relu" in (w.act, w.short_act):
        return False
    return all(_same_prologue(r, reader.norm, step) for step in shorts)


def _drops(reader: ConvProblem) -> bool:
    """Has its prologue a mask?"""
    return reader.p > 0 and reader.drop_at == "prologue"


def _same_prologue(reader: ConvProblem, norm: Norm, step: Step) -> bool:
    p = step.problem
    assert step.short is not None
    same_slope = reader.act != "leaky_relu" or p.slope == reader.slope
    mine = (p.short_prologue, p.short_act, p.short_eps)
    same_norm = all(a is b for a, b in zip(step.short.norm, norm, strict=True))
    return mine == (True, reader.act, reader.eps) and same_slope and same_norm


@lru_cache(maxsize=1024)
def _writing(writer: ConvProblem, reader: ConvProblem, raw: bool) -> ConvProblem:
    p = writer._replace(act_out=reader.act, want_y=raw)
    if reader.act == "leaky_relu":
        p = p._replace(slope=reader.slope)
    return p._replace(p=reader.p, drop_at="output_act") if _drops(reader) else p


@lru_cache(maxsize=1024)
def _reading(reader: ConvProblem) -> ConvProblem:
    p = reader._replace(prologue=False, affine=False, act="identity", eps=0.0)
    return p._replace(p=0.0, drop_at="none") if _drops(p) else p


@lru_cache(maxsize=1024)
def _reading_short(p: ConvProblem) -> ConvProblem:
    return p._replace(short_prologue=False, short_affine=False, short_act="identity", short_eps=0.0)


def by_time(writer: ConvProblem, reader: ConvProblem, raw: bool) -> bool:
    """By what `wrn-fast tune` measured of both layers on this GPU; where it did not, by the width."""
    return _by_time(writer, reader, raw, dispatch.selection())


# Asked of every layer at every call; `names` settles which backends' rows count.
@lru_cache(maxsize=1024)
def _by_time(writer: ConvProblem, reader: ConvProblem, raw: bool, names: tuple[str, ...]) -> bool:
    times = [_us(reader, names), _us(_reading(reader), names)]
    if raw:
        one = _reading(writer)
        times += [_us(_writing(one, reader, True), names), _us(one, names)]
    if None in times:
        return not raw or writer.K >= WIDE
    known = [t for t in times if t is not None]
    return known[0] - known[1] > (known[2] - known[3] if raw else 0.0)


def forget() -> None:
    """Ask for measured times again at the next call."""
    _by_time.cache_clear()


def _us(problem: ConvProblem, names: tuple[str, ...]) -> float | None:
    """Of the fastest backend that may serve. No backend is asked for a proof of what may never run."""
    asked = (getattr(dispatch.load(name), "measured_us", None) for name in names)
    found = [ask("fprop", problem) for ask in asked if ask is not None]
    return min((us for us in found if us is not None), default=None)


def serves(steps: Sequence[Step]) -> bool:
    """Can the backends of all steps write second outputs for a run?"""
    return all(hasattr(dispatch.choose("fprop", step.problem), "scale_shift") for step in steps)


def run(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """y of the last step.

    Args:
        x: [N, C, H, W], channels_last, the input of the first step.
        steps: what `plan` gave, with the generator's states drawn.
    """
    values: dict[tuple[int, bool], Tensor] = {(0, False): x}
    made: dict[tuple[int, int], Tensor] = {}

    def stats(norm: Norm, problem: ConvProblem) -> Tensor | None:
        if norm.mean is None or norm.var is None:
            return None
        key = id(norm.mean), id(norm.var)
        if key not in made:
            made[key] = held.stacked(norm.mean, norm.var, problem.stats_dtype)
        return made[key]

    for step, over in zip(steps, _last_reads(steps), strict=True):
        p, norm, short, second = step.problem, step.norm, step.short, step.second
        module = dispatch.choose("fprop", p)
        scale = shift = None
        if second is not None:
            vectors = stats(second.norm, p), second.norm.gamma, second.norm.beta
            scale, shift = module.scale_shift(*vectors, second.eps, x)
        of_short: tuple[Tensor | None, ...] = (None,) * 5
        if short is not None:
            of_short = values[short.x, short.activated], short.w, stats(short.norm, p), *short.norm[2:]
        y, _, y_act = module.fprop(
            p, values[step.x, step.activated], step.w, stats(norm, p), norm.gamma, norm.beta, step.bias,
            None if step.residual is None else values[step.residual, False], *of_short, step.rng, scale, shift,
        )  # fmt: skip
        for value in over:
            values.pop(value, None)
        for out, activated in ((y, False), (y_act, True)):
            if out.numel():
                values[step.y, activated] = out
    return values[steps[-1].y, False]


def _last_reads(steps: Sequence[Step]) -> list[set[tuple[int, bool]]]:
    """After each step, the values that no later one reads: kept, they would be memory that others need."""
    found, later = [], set[tuple[int, bool]]()
    for step in reversed(steps):
        later -= {(step.y, False), (step.y, True)}
        reads = {(step.x, step.activated)}
        if step.residual is not None:
            reads.add((step.residual, False))
        if step.short is not None:
            reads.add((step.short.x, step.short.activated))
        found.append(reads - later)
        later |= reads
    return found[::-1]
