"""A run of fprops as data, for a backend that executes it without Python between them.

Activations are numbered slots: 0 is the input of the run; a slot is written before it is read and may be written again;
the last step writes a slot that no other step has.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from wrn_fast.problem import ConvProblem


class Norm(NamedTuple):
    """BatchNorm with given statistics: [C] each, in a backend's own chain float32; the eps is the problem's."""

    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


NO_NORM = Norm(None, None, None, None)


class Short(NamedTuple):
    """The 1x1 shortcut of a step."""

    x: int  # slot
    image: tuple[int, int]  # its height and width
    w: Tensor
    norm: Norm
    activated: bool = False  # reads the second output of who wrote the slot


class Second(NamedTuple):
    """The BatchNorm of a step's second output, written for the reader of its slot; the problem has its activation."""

    norm: Norm
    eps: float


class Step(NamedTuple):
    """One fprop: y = conv(prologue(x), w) + bias + residual or shortcut."""

    problem: ConvProblem
    x: int  # slot
    y: int  # slot, none that the step reads
    w: Tensor
    norm: Norm
    bias: Tensor | None = None
    residual: int | None = None  # slot
    short: Short | None = None
    rng: Tensor | None = None
    second: Second | None = None
    activated: bool = False  # reads the second output of who wrote slot x, without a prologue
