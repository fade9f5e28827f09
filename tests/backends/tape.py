"""A CUDA graph played on the CPU: kernels and pointers as they were at the capture, whatever Python would do now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wrn_fast import ops

_NO_KERNEL = ("empty", "detach", "alias", "new_empty", "empty_like", "empty_strided")


class Tape(TorchDispatchMode):
    """Keeps the extension's calls and torch's own kernels of a call of `function`, and all memory that they touch."""

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self.recorder, self.kernels, self.names, self._alive = recorder, [], [], []
        self.active = False

    def record(self, function: Callable[[], Any]) -> Any:
        self.recorder.listener = self._extension_call
        self.active = True
        try:
            with self:
                return function()
        finally:
            self.active, self.recorder.listener = False, None

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel()

    def _extension_call(self, function: Callable, args: tuple, kwargs: dict) -> None:
        self.names.append(function.__name__)
        self.kernels.append(lambda: function(*args, **kwargs))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "wrn_fast":
            with self:
                return getattr(ops, f"_{func._schema.name.partition('::')[2]}")(*args, **kwargs)
        out = func(*args, **kwargs)
        self._alive.append((args, kwargs, out))
        name = func._schema.name.partition("::")[2]
        if name in _NO_KERNEL or (func.is_view and _shares(out, args)):
            return out
        self.names.append(name)
        if func._schema.is_mutable:
            self.kernels.append(lambda: func(*args, **kwargs))
        else:
            self.kernels.append(lambda: _over(out, func(*args, **kwargs)))
        return out


def _shares(out: Any, args: tuple) -> bool:
    """Is it a view, and not a cast or a copy that might have been one?"""
    first = out if isinstance(out, Tensor) else out[0]
    return any(
        isinstance(v, Tensor) and v.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for v in args
    )


def _over(old: Any, new: Any) -> None:
    for a, b in zip(*(v if isinstance(v, (tuple, list)) else (v,) for v in (old, new)), strict=True):
        if isinstance(a, Tensor):
            a.copy_(b)


def capture(recorder: Any, monkeypatch: Any, tapes: list[Tape]) -> Callable:
    """In place of `graphs._capture`: warm up, record, and hand out the replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: any(tape.active for tape in tapes))
    # A capture is no dispatch mode: what asks for one is not to see the tape.
    modes = torch._C._len_torch_dispatch_stack
    monkeypatch.setattr(
        torch._C, "_len_torch_dispatch_stack", lambda: modes() - any(tape.active and modes() for tape in tapes)
    )

    def _capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        for _ in range(3):
            function()
        tape = Tape(recorder)
        tapes.append(tape)
        output = tape.record(function)
        return tape.replay, output

    return _capture
