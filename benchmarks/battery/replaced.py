"""Another extension in the place of `_cuda`: one that launches in another way, or the one that a dry run has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.battery import NOT_RUN, Result, result, tests_on_path
from wrn_fast import dispatch, graphs
from wrn_fast.backends import cuda


class Changed:
    """The extension but for some of its functions."""

    def __init__(self, extension: Any, **functions: Any) -> None:
        self._extension, self._functions = extension, functions

    def __getattr__(self, name: str) -> Any:
        return self._functions[name] if name in self._functions else getattr(self._extension, name)


def unsplit(extension: Any) -> Changed:
    """No reduction is split, however small the call."""
    return Changed(extension, splits=lambda *_: 1)


def waiting(extension: Any) -> Changed:
    """No kernel fetches its filters before the one in front of it has ended."""
    convolutions = {name: getattr(extension, name) for name in ("fprop", "dgrad")}

    def late(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: call(*args, **{**kwargs, "early": False})

    return Changed(extension, **{name: late(call) for name, call in convolutions.items()})


@contextmanager
def extension(found: Any) -> Iterator[None]:
    """Inside, `found` is the extension; what was chosen with another one is forgotten before and after."""

    def forget() -> None:
        dispatch.forget()
        cuda.forget()

    with mock.patch.object(cuda, "_load", lambda: (found, None)):
        forget()
        try:
            yield
        finally:
            forget()


def _call_again(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """In place of a capture: a replay calls again and writes where the first output was."""
    output = function()

    def replay() -> None:
        torch.utils._pytree.tree_map(lambda old, new: old.copy_(new), output, function())

    return replay, output


def on_the_cpu(run: Callable[[float], Result], seconds: float) -> Result:
    """A step with `_cuda` built for the CPU, as the tests have it; not run where that cannot be built."""
    tests_on_path()
    import pytest
    from backends import cuda_on_cpu

    try:
        built = cuda_on_cpu.build()
    except pytest.skip.Exception as reason:
        return result(NOT_RUN, str(reason))
    with ExitStack() as stack:
        stack.enter_context(extension(built))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        stack.enter_context(mock.patch.object(graphs, "_DEVICE", "cpu"))
        stack.enter_context(mock.patch.object(graphs, "_capture", _call_again))
        stack.enter_context(mock.patch.object(torch.cuda, "make_graphed_callables", lambda module, *_: module))
        return run(seconds)
