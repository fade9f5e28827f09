"""How large a convolution's activated input gets, kept beside its filter: what `fp8.calibrate` found.

Kept by the filter's identity, like packs, and gone with it. In-place changes of the filter's values leave it, because
the range is that of the input.
"""

from __future__ import annotations

import weakref

from torch import Tensor

_ranges: dict[int, tuple[weakref.ref, Tensor]] = {}


def keep(w: Tensor, largest: Tensor) -> None:
    """Remember `largest`, one float32 element on w's device, for the filter w."""
    key = id(w)

    def forget(ref: weakref.ref) -> None:
        if key in _ranges and _ranges[key][0] is ref:
            del _ranges[key]

    _ranges[key] = (weakref.ref(w, forget), largest)


def of(w: Tensor) -> Tensor | None:
    """The largest |act(bn(x))| that calibration saw before the filter w, or None."""
    found = _ranges.get(id(w))
    return found[1] if found is not None and found[0]() is w else None


def drop(w: Tensor) -> None:
    """Forget what is kept for w."""
    _ranges.pop(id(w), None)
