"""What a captured graph reads and does not make: packed filters, folded BatchNorms, statistics side by side.

A graph that made these would make them at every replay. While `Held.collecting` a backend asks `get` for what it would
make of the model's own parameters and buffers; the capture finds it made and holds no kernel for it. `Held.renew`,
called before each replay, sees to it that nothing is stale:

    changed in place, by the version counter, or `refresh`    everything is made again, in the same memory
    changed in place where no version shows it                vectors are copied or folded anew in any case; filters are
                                                              compared by samples on the device
    another tensor or other memory in its place               WrnFastError, the graph reads the old one

`WRN_FAST_PACK_CACHE=0` holds nothing: the graph makes everything itself.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wrn_fast import packing
from wrn_fast.errors import WrnFastError


class Renewer(Protocol):
    """A backend's way to make all that it made again, by a launch or two."""

    def renew(self, everything: bool) -> None:
        """Everything, or vectors and what a comparison on the device finds changed; on the current stream."""


_local = threading.local()


class Held:
    """What one captured graph reads and does not make."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lasting = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._made: dict[Hashable, tuple[Tensor, Callable[[Tensor], object] | None]] = {}
        self._pairs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._covered: set[int] = set()
        self._renewers: dict[Hashable, Renewer] = {}
        self.settle()

    def settle(self) -> None:
        """What the model is made of now is what the graph reads: call it after the capture."""
        rows: list[tuple[dict[str, Any], str, Any]] = [
            (owner, name, value)  # type: ignore[misc]
            for module in self._model.modules()
            for owner in (module._modules, module._parameters, module._buffers)
            for name, value in owner.items()
            if value is not None
        ]
        self._owners = [owner for owner, _, _ in rows]
        self._names = [name for _, name, _ in rows]
        self._values = [value for _, _, value in rows]
        self._tensors = [v for v in self._values if isinstance(v, Tensor)]
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._seen = self._state()
        pairs = [pair for key, pair in self._pairs.items() if key not in self._covered]
        self._copies = [v for made, _, _ in pairs for v in made.unbind()], [v for _, *both in pairs for v in both]

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, this thread's calls of `get` are answered from here."""
        before = getattr(_local, "held", None)
        _local.held = self if packing.enabled() else None
        try:
            yield
        finally:
            _local.held = before

    def _state(self) -> list[int]:
        return [packing.generation(), *map(_version, self._counted)]

    def renew(self) -> None:
        """Makes what is stale again, on the current stream.

        Raises:
            WrnFastError: a parameter, buffer or module of the model was replaced, or moved to other memory.
        """
        if any(map(operator.is_not, map(dict.get, self._owners, self._names), self._values)):
            self._refuse("has been replaced")
        if list(map(Tensor.data_ptr, self._tensors)) != self._pointers:
            self._refuse("lies in other memory")
        state = self._state()
        changed = state != self._seen
        if changed:
            for tensor, again in self._made.values():
                if again is not None:
                    again(tensor)
        if self._copies[0]:
            with torch.no_grad():
                torch._foreach_copy_(*self._copies)
        for renewer in self._renewers.values():
            renewer.renew(changed)
        self._seen = state

    def _refuse(self, what: str) -> None:
        moved = {id(t) for t, was in zip(self._tensors, self._pointers, strict=True) if t.data_ptr() != was}
        rows = zip(self._owners, self._names, self._values, strict=True)
        name = next(name for owner, name, value in rows if owner.get(name) is not value or id(value) in moved)
        raise WrnFastError(
            f"`model`: expected the modules and tensors that were captured, changed in place at most; {name} {what}: "
            "capture it again"
        )


_version = operator.attrgetter("_version")


def _here(sources: Sequence[Tensor | None]) -> Held | None:
    """This thread's collection, if all sources last as long as the graph."""
    found: Held | None = getattr(_local, "held", None)
    if found is None or not all(t is None or id(t) in found._lasting for t in sources):
        return None
    return found


def get(
    key: Hashable,
    sources: Sequence[Tensor | None],
    make: Callable[[], Tensor],
    again: Callable[[Tensor], object] | None,
) -> Tensor | None:
    """`make()`, held for the graph that is being captured; None where the caller has to make it himself.

    Args:
        key: what it is; with the sources it says what the result is made of.
        sources: what it is made of: parameters and buffers of the model, or what is held itself.
        make: makes a new tensor, outside of a capture.
        again: makes the same in place; None where a `Renewer` does.
    """
    here = _here(sources)
    if here is None:
        return None
    whole = (key, *map(id, sources))
    found = here._made.get(whole)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return None
        found = here._made[whole] = make(), again
        here._lasting.add(id(found[0]))
    return found[0]


def side_by_side(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[2, C] of two vectors, held; copied before each replay unless a `Renewer` covers it."""
    here = _here([a, b])
    made = get(("pair", dtype), [a, b], lambda: torch.stack([a, b]).to(dtype), None)
    if here is not None and made is not None:
        here._pairs[id(made)] = made, a, b
    return made


def pair_of(made: Tensor) -> tuple[Tensor, Tensor] | None:
    """What `side_by_side` made a tensor of, for this thread's graph; None for any other."""
    here = _here([made])
    found = None if here is None else here._pairs.get(id(made))
    return None if found is None else found[1:]


def cover(made: Tensor) -> None:
    """From now on a `Renewer` writes this pair."""
    here = _here([made])
    if here is not None:
        here._covered.add(id(made))


def renewer(key: Hashable, make: Callable[[], Renewer]) -> Renewer | None:
    """The graph's own renewer under `key`, made if need be; None where nothing is collected."""
    here = _here([])
    if here is None:
        return None
    if key not in here._renewers:
        here._renewers[key] = make()
    return here._renewers[key]
