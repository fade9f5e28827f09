"""Pre-activation blocks as plain forwards over a user's own submodules: what a recording is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wrn_fast.parity import FLOAT64, error

Function = Callable[[Tensor], Tensor]


class Act(NamedTuple):
    """An activation of the operator, and one way of spelling it."""

    name: str
    slope: float
    function: Function


class Drop(NamedTuple):
    """Dropout: its probability, its place, and whose `training` flag it follows."""

    p: float
    at: str = "prologue"
    follows: str | int = "block"  # "block", "always", or the index of the dropout module


class Roles(NamedTuple):
    """The submodules of a block by what they do."""

    bn1: nn.Module
    conv1: nn.Module
    bn2: nn.Module
    conv2: nn.Module
    shortcut: nn.Module | None


class Template(NamedTuple):
    """One data flow."""

    act1: Act
    act2: Act
    conv1_reads_x: bool
    shortcut_reads_x: bool
    drop: Drop | None
    extra1: tuple[int, int, int, int]  # pixels padded by hand before conv1: left, right, top, bottom
    extra2: tuple[int, int, int, int]

    def forward(self, roles: Roles, dropping: Callable[[Drop], bool]) -> Function:
        """The template over these submodules. `dropping` reads the flag that the dropout follows."""

        def drop(v: Tensor, at: str) -> Tensor:
            d = self.drop
            return F.dropout(v, d.p, dropping(d)) if d is not None and d.at == at else v

        def run(x: Tensor) -> Tensor:
            a = self.act1.function(roles.bn1(x))
            source = x if self.conv1_reads_x else a
            h = drop(roles.conv1(F.pad(source, self.extra1) if any(self.extra1) else source), "output")
            b = drop(self.act2.function(roles.bn2(h)), "prologue")
            y = roles.conv2(F.pad(b, self.extra2) if any(self.extra2) else b)
            if roles.shortcut is None:
                return y + x
            return y + roles.shortcut(x if self.shortcut_reads_x else a)

        return run


def acts(lines: list[tuple], custom: list[type]) -> list[Act]:
    """Every spelling of an activation that the recorded lines may come from."""
    ops = {line[0] for line in lines}  # an argument at its default is not in a line
    found = []
    for function in custom:
        match = probe(function)
        if match is not None:
            found.append(Act(*match, function.apply))  # type: ignore[attr-defined]
    if "relu" in ops:
        found.append(Act("relu", 0.0, F.relu))
    for slope in sorted({float(line[2]) if len(line) > 2 else 0.01 for line in lines if line[0] == "leaky_relu"}):
        for inplace in (False, True):
            found.append(Act("leaky_relu", slope, lambda v, s=slope, i=inplace: F.leaky_relu(v, s, i)))  # type: ignore[misc]
    if "silu" in ops:
        found += [Act("silu", 0.0, lambda v, i=i: F.silu(v, i)) for i in (False, True)]  # type: ignore[misc]
    if "sigmoid" in ops:
        found.append(Act("silu", 0.0, lambda v: v * torch.sigmoid(v)))
    return found


_KNOWN: dict[tuple[str, float], Function] = {("relu", 0.0): F.relu, ("silu", 0.0): F.silu}


def probe(function: type) -> tuple[str, float] | None:
    """The activation that a custom autograd function is, by values and derivatives in float64; None for any other."""
    at = torch.linspace(-8.0, 8.0, 65, dtype=torch.float64).add(0.01).requires_grad_()
    try:
        value = function.apply(at)  # type: ignore[attr-defined]
        (slope,) = torch.autograd.grad(value.sum(), [at])
    except Exception:  # a user's code: whatever it raises, it is not an activation of one argument
        return None
    for name, known in _KNOWN.items():
        want = known(at)
        (want_slope,) = torch.autograd.grad(want.sum(), [at])
        if max(error(value, want), error(slope, want_slope)) <= FLOAT64:
            return name
    return None


def templates(
    found: list[Act], drops: list[Drop | None], pads: tuple[tuple, tuple], has_shortcut: bool
) -> Iterator[Template]:
    """Every data flow of the known families that fits what was seen."""
    pairs = sorted(itertools.product(found, found), key=lambda pair: pair[0] is not pair[1])
    shorts = (False, True) if has_shortcut else (False,)
    for (act1, act2), first, short, drop in itertools.product(pairs, (False, True), shorts, drops):
        if act1.name == act2.name and act1.slope != act2.slope and has_shortcut and not short:
            continue  # the operator has one slope
        yield Template(act1, act2, first, short, drop, *pads)
