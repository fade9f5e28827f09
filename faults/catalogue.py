"""The 48 faults, and where each can be planted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from faults import aten, cpu, cuda, shared, triton
from faults.patch import Absent, Patch

GROUPS = {
    "Halo and tails": range(1, 11),
    "Arithmetic": range(11, 24),
    "Statistics": range(24, 32),
    "Backward": range(32, 42),
    "System": range(42, 49),
}
NAMES = {
    1: "a padded tap keeps act(shift)",
    2: "a padded tap keeps act(shift), at the right border only",
    3: "the last tile of K is not written",
    4: "the last tile of pixels is not written",
    5: "the last tile of C is skipped",
    6: "the last tap is missing",
    7: "taps are transposed",
    8: "the phase of stride 2 is off by one",
    9: "the 1x1 shortcut reads another tap",
    10: "two of the last tiles are swapped",
    11: "the shortcut takes raw x",
    12: "the residual is activated",
    13: "the residual is missing in the last tile",
    14: "eps outside the root",
    15: "eps is 1e-3",
    16: "beta is lost where gamma is 0",
    17: "the scale of the last channel is another's",
    18: "a negative gamma loses its sign",
    19: "SiLU for ReLU in the last channels",
    20: "rounded twice where the residual is added",
    21: "sums are kept in bfloat16",
    22: "TF32 where nobody asked",
    23: "a Winograd point is off by 1 %",
    24: "the running variance is the biased one",
    25: "the momentum is swapped",
    26: "the variance is taken in one pass",
    27: "the running mean is not moved",
    28: "tiles of unequal size merge with equal weight",
    29: "the statistics are those of the call before",
    30: "the sums of y leave out the residual",
    31: "frozen statistics are moved",
    32: "relu'(0) is 1",
    33: "the mask comes from x instead of bn(x)",
    34: "the mean of g is not subtracted",
    35: "the xhat term is not subtracted",
    36: "dgrad does not rotate the filter",
    37: "wgrad reads raw x",
    38: "dgamma loses the last tile",
    39: "the scale of dropout is missing in the backward pass",
    40: "the backward pass draws another mask",
    41: "a frozen weight gets a gradient",
    42: "ReLU swallows NaN",
    43: "denormals are flushed",
    44: "the order of a sum differs from call to call",
    45: "an element is written behind the output",
    46: "an input is changed in place",
    47: "another stream or device",
    48: "a barrier is missing",
}
SHARED = "shared"
BACKENDS = ("aten", "cpu", "triton", "cuda")
_PATCHES: Mapping[str, Mapping[int, Patch | Absent]] = {
    "aten": aten.PATCHES, "cpu": cpu.PATCHES, "triton": triton.PATCHES, "cuda": cuda.PATCHES, SHARED: shared.PATCHES
}  # fmt: skip


class Cell(NamedTuple):
    """One fault in one backend, or in the code that all share."""

    fault: int
    backend: str

    def __str__(self) -> str:
        return f"{self.fault} {NAMES[self.fault]} ({self.backend})"


def entry(fault: int, backend: str) -> Patch | Absent:
    """The patch, or why there is none. What is in shared code is there for every backend."""
    return shared.PATCHES.get(fault) or _PATCHES[backend][fault]


def patch_of(cell: Cell) -> Patch:
    """The patch of a cell that has one."""
    found = _PATCHES[cell.backend][cell.fault]
    assert isinstance(found, Patch)
    return found


def cells(*backends: str) -> Iterator[Cell]:
    """Every fault that can be planted here."""
    for backend in backends or (SHARED, *BACKENDS):
        for fault, found in sorted(_PATCHES[backend].items()):
            if isinstance(found, Patch):
                yield Cell(fault, backend)
