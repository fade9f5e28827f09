"""What was found out about a block, as data that copies and replicas of it share, and whether it still holds."""

from __future__ import annotations

from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from wrn_fast.convert.templates import Template

INTERNAL = frozenset(nn.Module().__dict__) | {"_former_parameters", "_is_replica"}
# What a swapped block carries beside its owner's attributes.
OWN = frozenset({"_fast_recipe", "_fast_off"})
SIMPLE = (bool, int, float, str, type(None))
# What a Conv2d's forward depends on; a BatchNorm2d's attributes are read at each call.
_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class Held(NamedTuple):
    """An attribute that may change without being replaced: a list, a dict, an object such as a configuration."""

    kind: type
    content: tuple


class Recipe(NamedTuple):
    """A recognised block, without references to its modules, so that copies and replicas share it.

    Submodules are numbered in the order of `inner`. `template` is None for a block that was not recognised; `reason`
    says why.
    """

    types: tuple[type, ...]
    watched: tuple[tuple[int, str, Any], ...]  # (submodule or -1, attribute, value)
    forward: Any
    defaults: frozenset[str]  # names that the block's classes define and the block does not
    classes: tuple[tuple[type, dict[str, Any]], ...]  # what the block's class and its bases define
    reason: str = ""
    template: Any = None  # Template, or bottleneck.Bottleneck
    roles: tuple[int, int, int, int, int | None] = (0, 0, 0, 0, None)

    def __str__(self) -> str:
        t = self.template
        if t is None:
            return self.reason
        if not isinstance(t, Template):
            return str(t)
        words = ["pre-activation", t.act1.name + (f" {t.act1.slope:g}" if t.act1.slope else "")]
        if self.roles[4] is not None:
            words.append(f"1x1 shortcut of {'raw x' if t.shortcut_reads_x else 'the activated tensor'}")
        if t.conv1_reads_x:
            words.append("conv1 reads raw x")
        if any(t.extra1) or any(t.extra2):
            words.append("padded by hand")
        if t.drop is not None:
            where = "after the second activation" if t.drop.at == "prologue" else "before the second BatchNorm"
            words.append(f"dropout {t.drop.p:g} {where}" + (", in eval too" if t.drop.follows == "always" else ""))
        return ", ".join(words)


def made_for(block: nn.Module, forward: Any, modules: list[nn.Module | None]) -> Recipe:
    """What a block is by everything but its data flow; no template yet."""
    types, watched, defined = tuple(map(type, modules)), attributes([block, *modules], False), classes(block)
    defaults = {name for _, names in defined for name in names} - block.__dict__.keys()
    return Recipe(types, watched, forward, frozenset(defaults), defined)


def inner(module: nn.Module) -> list[nn.Module | None]:
    """Everything inside a module, depth first, empty places included."""
    found: list[nn.Module | None] = []
    for child in module._modules.values():
        found.append(child)
        if child is not None and child._modules:
            found += inner(child)
    return found


def content(value: Any, depth: int = 2) -> tuple | None:
    """What is in a list, a dict or an object, as ids of what has no value of its own; None for anything else."""
    if isinstance(value, (dict, list, set)):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
    elif isinstance(value, (torch.Tensor, nn.Module, type, ModuleType, FunctionType, MethodType)):
        return None
    else:
        try:
            items = list(vars(value).items())
        except TypeError:
            return None
        if not items:  # functools.partial, say, which keeps what it has elsewhere
            return None
    found = []
    for key, v in items:
        within = content(v, depth - 1) if depth > 1 else None
        found.append((key, v if type(v) in SIMPLE else id(v), within))
    return tuple(found)


def _watched(value: Any) -> Any:
    within = content(value)
    return value if within is None else Held(type(value), within)


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, Held):
        return type(a) is b.kind and content(a) == b.content
    return a is b or (isinstance(a, (*SIMPLE, tuple)) and type(a) is type(b) and a == b)


def attributes(modules: list[nn.Module | None], everything: bool) -> tuple[tuple[int, str, Any], ...]:
    """(index, name, value) of the attributes that a forward may depend on; tensors and training flags aside."""
    return tuple(
        (i, name, _watched(value))
        for i, module in enumerate(modules, -1)
        if module is not None and (everything or type(module) is not nn.BatchNorm2d)
        for name, value in module.__dict__.items()
        if name not in INTERNAL and name not in OWN and not isinstance(value, torch.Tensor)
        if type(module) is not nn.Conv2d or name in _CONV
    )


def classes(block: nn.Module) -> tuple[tuple[type, dict[str, Any]], ...]:
    """The user's classes of a block, below nn.Module, each with its methods and flags: they may be exchanged."""
    plain: type = getattr(type(block), "_fast_plain", type(block))
    return tuple((c, dict(vars(c))) for c in plain.__mro__ if c not in nn.Module.__mro__)


def fits(recipe: Recipe, block: nn.Module, modules: list[nn.Module | None]) -> bool:
    """Is the block what it was when the recipe was made?"""
    # A compiler traces what follows, but cannot trace this.
    if not torch.compiler.is_compiling() and (
        not recipe.defaults.isdisjoint(block.__dict__) or any(vars(c) != names for c, names in recipe.classes)
    ):
        return False
    if recipe.types != tuple(map(type, modules)):
        return False
    for i, name, value in recipe.watched:
        now = (block if i < 0 else modules[i]).__dict__  # type: ignore[union-attr]
        if name not in now or not _same(now[name], value):
            return False
    return True
