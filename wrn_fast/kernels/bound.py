"""Launches at the least cost: a compiled kernel is kept by what it was compiled for and called straight.

Triton's own dispatch looks at type, alignment and value of every argument and writes out all compile-time values, at
each launch. Bound, and with absent tensors left out, a call takes half the host time: an eval convolution 20 us for 41,
a training one with four launches 45 for 85 (2 cores of Zen 4, a driver that launches nothing). Two launches of one key
differ in pointers and in numbers that Triton was told not to specialise. Only a pointer off a multiple of 16 bytes can
change what has to be compiled: such a call takes Triton's way.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wrn_fast.kernels.tile import INTERPRETED

# What a pointer must be a multiple of for the 16-byte loads that the kernel was compiled with.
_ALIGNMENT = 16


def options(warps: int, stages: int | None) -> dict[str, Any]:
    """Of a compilation. Triton 3.9 warns that a*b + c will no longer become one instruction by itself."""
    found = {"num_warps": warps, "enable_fp_fusion": True}
    return found if stages is None else found | {"num_stages": stages}


class Bound:
    """A jitted kernel whose parameters are, in order: tensors, numbers in `do_not_specialize`, compile-time values."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._kept: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor | TensorDescriptor | None, ...],
        numbers: tuple[float | None, ...],
        constants: tuple[Hashable, ...],
        warps: int = 4,
        stages: int | None = None,
    ) -> None:
        """Runs the kernel on the current stream. `constants` must settle which of `tensors` and `numbers` are None."""
        if INTERPRETED:
            self.kernel[grid](*tensors, *numbers, *constants)
            return
        bits = 0
        dtypes: list[torch.dtype | None] = []
        for t in tensors:
            if t is None:
                dtypes.append(None)
            else:
                base = t.base if isinstance(t, TensorDescriptor) else t
                bits |= base.data_ptr()
                dtypes.append(base.dtype)
        key = (triton.runtime.driver.active.get_current_device(), warps, stages, *dtypes, *constants)
        aligned = bits % _ALIGNMENT == 0
        found = self._kept.get(key) if aligned else None
        if found is not None:
            found[grid](*tensors, *numbers, *constants)
            return
        compiled = self.kernel[grid](*tensors, *numbers, *constants, **options(warps, stages))
        if aligned and compiled is not None:
            self._kept[key] = compiled
