"""A choice made by `with` blocks, and how a backward pass keeps the one of its forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class _Block(Generic[T]):
    """An open block. Two with equal values differ, so that each closes itself, whatever the order."""

    def __init__(self, value: T) -> None:
        self.value = value


class Setting(Generic[T]):
    """The process's, so that DataParallel's threads see it; of blocks that are open at once the latest counts.

    What `take_over` sets is the thread's and goes first: the engine runs backward passes in threads of its own, and
    two of them must not change each other's.
    """

    def __init__(self) -> None:
        self._open: list[_Block[T]] = []
        self._thread = threading.local()

    def get(self) -> T | None:
        """The value in force; None where no block is open."""
        taken = getattr(self._thread, "value", None)
        if taken is not None:
            return taken
        return self._open[-1].value if self._open else None

    @contextmanager
    def block(self, value: T) -> Iterator[None]:
        """`value` for the process inside a `with` block."""
        block = _Block(value)
        self._open.append(block)
        try:
            yield
        finally:
            self._open.remove(block)

    @contextmanager
    def take_over(self, value: T | None) -> Iterator[None]:
        """`value` for this thread, whatever blocks are open; None leaves everything as it is."""
        before = getattr(self._thread, "value", None)
        self._thread.value = before if value is None else value
        try:
            yield
        finally:
            self._thread.value = before
