"""What a module computes, written down without computing it: ATen operators on a copy that has no data.

Every parameter and buffer of the copy is a meta tensor, so no byte is copied, no arithmetic is done, and the original's
statistics, random numbers and hooks cannot move. Values are numbered by what defines them (operator and operands), so
the order of independent lines, in-place spellings and code whose result nobody reads make no difference. Two
recordings on one `Book` are equal exactly if the same operators run on the same parameters in the same data flow,
forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# In-place spellings of operators that make a new value of their first operand.
_IN_PLACE = {"relu_", "leaky_relu_", "silu_", "add_", "mul_", "div_", "bernoulli_"}
_ALIAS = {"detach", "alias"}
_COMMUTES = {"add", "mul"}


class Recording(NamedTuple):
    """Numbers of the value, of the gradients to x and each parameter, and the set of effects, all on one Book."""

    value: int
    gradients: tuple[int | None, ...]
    effects: frozenset[int]


class Book:
    """Definitions of values; equal definitions share a number."""

    def __init__(self) -> None:
        self.numbers: dict[tuple, int] = {}
        self.lines: list[tuple] = []

    def number(self, definition: tuple) -> int:
        """The definition's number."""
        if definition not in self.numbers:
            self.numbers[definition] = len(self.lines)
            self.lines.append(definition)
        return self.numbers[definition]


class _Recorder(TorchDispatchMode):
    """Numbers what passes; `named` are the tensors that exist before."""

    def __init__(self, book: Book, named: dict[str, Tensor]) -> None:
        super().__init__()
        self.book = book
        self.known = {id(t): book.number(("input", name)) for name, t in named.items()}
        self.outside = set(self.known)
        self.effects: set[int] = set()
        self.alive: list[Any] = []  # ids stay unique while recording

    def token(self, v: Any) -> Any:
        """A number for a tensor, text for everything else."""
        if isinstance(v, Tensor):
            if id(v) not in self.known:
                # A tensor from elsewhere equals nothing that another recording can have.
                self.known[id(v)] = self.book.number(("foreign", len(self.book.lines)))
            return self.known[id(v)]
        if isinstance(v, (list, tuple)):
            return ("list", *map(self.token, v))
        return repr(v)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.alive.append((args, kwargs, out))
        op = func.overloadpacket.__name__
        if op in _ALIAS:
            self.known[id(out)] = self.token(args[0])
            return out
        operands = [self.token(a) for a in args]
        operands += [(k, self.token(v)) for k, v in sorted(kwargs.items()) if v is not None and k != "pin_memory"]
        writes = func._schema.is_mutable and bool(args)
        plain = op[:-1] if op in _IN_PLACE else op
        if plain in _COMMUTES:
            operands[:2] = sorted(operands[:2], key=repr)
        number = self.book.number((plain, *operands))
        if ("batch_norm" in op and "backward" not in op and _moves_statistics(op, args)) or (
            writes and (op not in _IN_PLACE or id(args[0]) in self.outside)
        ):
            self.effects.add(number)
        outs = out if isinstance(out, (list, tuple)) else (out,)
        for i, o in enumerate(outs):
            if isinstance(o, Tensor):
                self.known[id(o)] = number if len(outs) == 1 else self.book.number(("part", i, number))
        return out


def _moves_statistics(op: str, args: tuple) -> bool:
    return "with_update" in op or any(a is True for a in args)


def skeleton(module: nn.Module) -> nn.Module:
    """A copy without data and without hooks; parameters ask for gradients, so that the backward can be recorded."""
    memo: dict[int, Any] = {}
    for t in [*module.parameters(), *module.buffers()]:
        m = torch.empty_like(t, device="meta", requires_grad=False)
        is_parameter = isinstance(t, nn.Parameter)
        memo[id(t)] = nn.Parameter(m, t.dtype.is_floating_point) if is_parameter else m
    twin = copy.deepcopy(module, memo)
    for inner in twin.modules():
        for key, value in inner.__dict__.items():
            if key.endswith("_hooks") and hasattr(value, "clear"):
                value.clear()
    return twin


def set_flags(twin: nn.Module, own: bool, inner: bool) -> None:
    """The module in train (or eval) mode, with everything inside it in another."""
    twin.train(inner)
    twin.training = own


def record(
    book: Book,
    twin: nn.Module,
    forward: Callable[[Tensor], Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backward: bool,
) -> Recording | str:
    """One call of `forward` over the skeleton's tensors, as it stands: with its backward, or in no_grad.

    Returns:
        The recording, or a sentence if the result is not one tensor.
    """
    leaf = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
    x = leaf.clone()  # no leaf, so that a forward that edits its input can be seen to
    parameters = dict(twin.named_parameters())
    named = {"x": x, **parameters, **dict(twin.named_buffers())}
    with _Recorder(book, named) as recorder, torch.set_grad_enabled(backward):
        y = forward(x)
        if not isinstance(y, Tensor):
            return f"its forward returns {type(y).__name__}, not one tensor"
        value, effects = recorder.token(y), frozenset(recorder.effects)
        if not backward:
            return Recording(value, (), effects)
        book.number(("backward",))  # what was recorded before it is forward
        dy = torch.empty(y.shape, device="meta", dtype=y.dtype)
        recorder.known[id(dy)] = book.number(("input", "dy"))
        gradients = torch.autograd.grad(y, [leaf, *parameters.values()], dy, allow_unused=True)
        tokens = tuple(None if g is None else recorder.token(g) for g in gradients)
    return Recording(value, tokens, effects)


def custom_functions(forward: Callable[[Tensor], Any], shape: tuple[int, ...], dtype: torch.dtype) -> list[type]:
    """Custom autograd functions in a forward: a recording of a template has to go through the same ones."""
    y = forward(torch.empty(shape, device="meta", dtype=dtype, requires_grad=True))
    seen: set[Any] = set()
    todo = [y.grad_fn]
    found: dict[type, None] = {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [f for f, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found[node._forward_cls] = None  # type: ignore[attr-defined]
    return list(found)
