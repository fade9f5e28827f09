"""How large a convolution's activated input gets, kept beside its filter: what `fp8.calibrate` found.

Kept by the filter's identity, like packs, and gone with it. In-place changes of the filter's values leave it, because
the range is that of the input.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from wrn_fast.errors import WrnFastError

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


def needed(w: Tensor, w_short: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What calibration saw before the filters of a call.

    Raises:
        WrnFastError: nothing is kept for one of them.
    """
    found: list[Tensor | None] = []
    for name, v in (("w", w), ("w_short", w_short)):
        found.append(None if v is None else of(v))
        if v is not None and found[-1] is None:
            raise WrnFastError(
                f"`{name}`: expected a filter whose input's range is known (wrn_fast.fp8.calibrate), got one of shape "
                f"{list(v.shape)} without"
            )
    assert found[0] is not None
    return found[0], found[1]


def drop(w: Tensor) -> None:
    """Forget what is kept for w."""
    _ranges.pop(id(w), None)
