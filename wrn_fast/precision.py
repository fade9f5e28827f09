"""How exact float32 convolutions have to be: which algorithms a backend may use.

    fast    whatever is fastest within the operator's bound: Winograd F(4x4,3x3) where it pays (1.0e-6 relative L2),
            F(3x3,3x3) in networks of 32 to 63 channels (6e-7)
    f2      at most Winograd F(2x2,3x3), at stride 2 its polyphase form (4e-7); wgrad as in fast (1.2e-6)
    direct  no Winograd: the sums of the definition, in float32
    fp8     inference in e4m3, by ranges that `wrn_fast.fp8.calibrate` found: only inside a `with` block

`WRN_FAST_PRECISION` sets it for the process, `with wrn_fast.precision("direct")` for a block of code.
`WRN_FAST_PIN_ALGO=1` keeps the choice of algorithm from looking at the batch size, so that an image's bits do not
depend on its neighbours; `f4`, `f3`, `f2` or `direct` runs that algorithm wherever it can run, whatever the policy
says; `measured` runs what `wrn-fast tune` found to be the fastest here, and the policy where it measured nothing.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from wrn_fast.errors import WrnFastError
from wrn_fast.setting import Setting

PRECISIONS = ("fast", "f2", "direct")
FP8 = "fp8"
PINS = ("", "1", "f4", "f3", "f2", "direct", "measured")

_setting: Setting[str] = Setting()
_pin: Setting[str] = Setting()


def _checked(name: str, source: str, choices: tuple[str, ...]) -> str:
    if name not in choices:
        raise WrnFastError(f"`{source}`: expected one of {', '.join(choices)}, got {name!r}")
    return name


def current() -> str:
    """The precision in force: `fast`, `f2`, `direct` or `fp8`.

    Raises:
        WrnFastError: WRN_FAST_PRECISION holds another word.
    """
    chosen = _setting.get()
    if chosen is not None:
        return chosen
    name = os.environ.get("WRN_FAST_PRECISION")
    return _checked(name, "WRN_FAST_PRECISION", PRECISIONS) if name else "fast"


def pinned() -> str:
    """What the innermost `pin_algorithm`, else WRN_FAST_PIN_ALGO asks for: one of `PINS`.

    Raises:
        WrnFastError: it holds another word.
    """
    chosen = _pin.get()
    if chosen is not None:
        return chosen
    name = os.environ.get("WRN_FAST_PIN_ALGO", "")
    if name not in PINS:
        if name != "0":
            raise WrnFastError(f"`WRN_FAST_PIN_ALGO`: expected one of 0, {', '.join(PINS[1:])}, got {name!r}")
        return ""
    return name


def pin_algorithm(name: str) -> AbstractContextManager[None]:
    """One of `PINS` inside a `with` block, whatever WRN_FAST_PIN_ALGO says: for measuring.

    Raises:
        WrnFastError: an unknown name.
    """
    return _pin.block(_checked(name, "pin_algorithm", PINS))


def precision(name: str) -> AbstractContextManager[None]:
    """Set the precision inside a `with` block: `with wrn_fast.precision("direct"): ...`.

    The setting is the process's. A backward pass uses the precision of its forward pass, whatever is set when it runs.

    Args:
        name: `fast`, `f2`, `direct` or `fp8`.

    Raises:
        WrnFastError: an unknown name.
    """
    return _setting.block(_checked(name, "precision", (*PRECISIONS, FP8)))


take_over = _setting.take_over
