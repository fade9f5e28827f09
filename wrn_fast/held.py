"""What a captured graph reads and does not make: packed filters, folded BatchNorms, statistics side by side.

A graph that made these would make them at every replay. While `Held.collecting` a backend asks `get` for what it would
make of the model's own parameters and buffers; the capture finds it made and holds no kernel for it. `Held.renew`,
called before each replay, sees to it that nothing is stale:

    a filter changed in place, by its version counter, or     everything is made again, in the same memory
    `refresh`
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


# A module's tables of submodules, parameters and buffers.
_Table = dict[str, Any]

_local = threading.local()


class Held:
    """What one captured graph reads and does not make."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lasting = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._made: dict[Hashable, tuple[Tensor, Callable[[Tensor], object] | None]] = {}
        self._pairs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._covered: set[int] = set()
        self._watched: set[int] = set()
        self._renewers: dict[Hashable, Renewer] = {}
        self.settle()

    def settle(self) -> None:
        """What the model is made of now is what the graph reads: call it after the capture."""
        modules = list(self._model.modules())
        tables = [table for m in modules for table in (m._modules, m._parameters, m._buffers)]
        self._tables: list[_Table] = [table for table in tables if table]
        self._known = [dict(table) for table in self._tables]
        rows = [(table, name, value) for table in self._tables for name, value in table.items()]
        # Equality of tables looks at the identity of each value first and is faster than any loop. It is not enough for
        # a value that may be equal to another one.
        loose = [row for row in rows if _may_equal_another(row[2])]
        self._loose = [row[0] for row in loose], [row[1] for row in loose], [row[2] for row in loose]
        self._tensors = [value for _, _, value in rows if isinstance(value, Tensor)]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._counted = [t for t in self._tensors if id(t) in self._watched and not t.is_inference()]
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
        if self._replaced():
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

    def _replaced(self) -> bool:
        tables, names, values = self._loose
        if any(map(operator.is_not, map(dict.get, tables, names), values)):
            return True
        try:
            return not self._tables == self._known
        except (RuntimeError, TypeError, ValueError):  # two tensors, whose comparison has no truth value
            return True

    def _refuse(self, what: str) -> None:
        moved = {id(t) for t, was in zip(self._tensors, self._pointers, strict=True) if t.data_ptr() != was}
        rows = [(table, known, name) for table, known in zip(self._tables, self._known) for name in {**known, **table}]
        name = next(
            name for table, known, name in rows
            if table.get(name, table) is not known.get(name, table) or id(table.get(name)) in moved
        )  # fmt: skip
        raise WrnFastError(
            f"`model`: expected the modules and tensors that were captured, changed in place at most; {name} {what}: "
            "capture it again"
        )


def _may_equal_another(value: Any) -> bool:
    """Tensors of one element compare by value, modules as their class says; other tensors have no truth value."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is not None and type(value).__eq__ is not object.__eq__


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
        # Vectors that a renewer reads are read before each replay, changed or not.
        here._watched |= {id(t) for t in sources if t is not None and (again is not None or t.dim() > 1)}
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


def stacked(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, C] of two vectors: ready-made for a graph that is being captured, else made now."""
    found = None if torch.compiler.is_compiling() else side_by_side(a, b, dtype)
    return torch.stack([a, b]).to(dtype) if found is None else found


def norm_of(stats: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor, torch.dtype] | None:
    """What a `Renewer` can fold anew: (mean, var, dtype of gamma and beta); None if that is not at hand and dense."""
    pair, given = pair_of(stats), [v for v in (gamma, beta) if v is not None]
    dtypes = {v.dtype for v in given} or {torch.float32}
    if pair is None or pair[0].dtype != pair[1].dtype or len(dtypes) > 1:
        return None
    return (*pair, dtypes.pop()) if all(v.is_contiguous() for v in (*pair, *given)) else None


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
