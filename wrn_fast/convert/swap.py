"""Fast blocks by `__class__`: the user's object, names, hooks and files stay; only how a block computes changes.

Each of the user's classes gets a subclass of its own, the mixin first among the bases, so `isinstance`, the type's name
and `repr` stay. Files and other processes see the user's class: a pickle loads plain, without this package.
"""

from __future__ import annotations

import copy
import copyreg
from abc import ABCMeta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from wrn_fast.block import BlockParts, FastBlock, Stage, hooked, padding, run_block, run_chain
from wrn_fast.convert.bottleneck import Bottleneck, Pair, run_bottleneck
from wrn_fast.convert.recipe import OWN, Recipe, fits, inner
from wrn_fast.convert.recognise import recognise
from wrn_fast.convert.templates import Template
from wrn_fast.errors import WrnFastError

_fast_classes: dict[tuple[type, type], type] = {}
_known: dict[tuple, Recipe] = {}


class Swapped:
    """What every swapped class shares: pickling as the user's class, copies that stay fast."""

    _fast_plain: type  # the user's class; each fast class has its own

    def __init_subclass__(cls, **_: Any) -> None:
        """Nothing: what a user's class does with its subclasses (registries) is not meant for a fast one."""

    def _plain_class(self) -> Any:
        # parametrize and fully_shard put a class of their own in front
        return next(c for c in type(self).__mro__ if "_fast_plain" in c.__dict__)._fast_plain  # type: ignore[attr-defined]

    def _recipe(self, modules: list[nn.Module | None]) -> Recipe | None:
        """What the block is now; None where it is switched off or nothing that is known."""
        recipe = self.__dict__.get("_fast_recipe")
        if recipe is None or "_fast_off" in self.__dict__:
            return None
        plain = self._plain_class().forward
        if recipe.forward is not plain or not fits(recipe, self, modules):  # type: ignore[arg-type]
            if torch.compiler.is_compiling():
                return None
            recipe = self.__dict__["_fast_recipe"] = recognise(self, plain, _known)  # type: ignore[arg-type]
        return None if recipe.template is None else recipe

    def _as_plain(self) -> Any:
        cls = self._plain_class()
        plain: Any = cls.__new__(cls)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in OWN})
        return plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *rest = self._as_plain().__reduce_ex__(protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle insists that __newobj__ names type(self); this older function may name another class
            function, arguments = copyreg._reconstructor, (arguments[0], object, None)  # type: ignore[attr-defined]
        return (function, arguments, *rest)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks first."""
        raise WrnFastError(
            "`model`: expected plain blocks for torch.jit.script, got accelerated ones: wrn_fast.restore(model) first"
        )

    def __copy__(self) -> Any:
        new = copy.copy(self._as_plain())
        new.__class__ = type(self)
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k in OWN})
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in OWN}, memo))
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k in OWN})
        return new


def _suits(parts: BlockParts, x: Any) -> bool:
    """Is x what the block's weights expect? Else the plain forward raises its own error, or promotes as it does."""
    weight = parts.stages[0].conv.weight
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != weight.shape[1] or x.device != weight.device:
        return False
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # PyTorch raises for meta
        # a wider x keeps its dtype in the plain sum with the shortcut
        return x.dtype == torch.get_autocast_dtype(kind) or (parts.shortcut is not None and x.dtype == weight.dtype)
    return x.dtype == weight.dtype


def _as_given(y: Tensor, x: Tensor) -> Tensor:
    """y in x's layout, as the library's convolutions keep it: callers `view` what they get."""
    return y.contiguous() if x.is_contiguous() else y


class FastUserBlock(Swapped, FastBlock):
    """A user's block through the fused operator where its recipe still fits and nobody listens inside."""

    def parts(self) -> BlockParts | None:
        """The block as data; None where only the user's own forward is right."""
        modules = inner(self)  # type: ignore[arg-type]
        if any(m is not None and hooked(m) for m in modules):
            return None
        recipe = self._recipe(modules)
        return blockparts(recipe, self, modules) if recipe and isinstance(recipe.template, Template) else None  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The user's forward."""
        if len(args) == 1 and not kwargs and not _has_any_global_hook():
            parts = self.parts()
            if parts is not None and _suits(parts, args[0]):
                return _as_given(run_block(parts, args[0], None)[0], args[0])
        return self._plain_class().forward(self, *args, **kwargs)  # type: ignore[attr-defined]


class FastBottleneck(Swapped):
    """A user's post-activation bottleneck: fused in inference, else its own forward."""

    def fused(self, x: Any) -> Tensor | None:
        """y [N, K, P, Q] channels_last; None where only the user's own forward is right or fast."""
        if self.training:  # type: ignore[attr-defined]
            return None
        modules = inner(self)  # type: ignore[arg-type]
        if any(m is not None and (m.training or hooked(m)) for m in modules):
            return None
        recipe = self._recipe(modules)
        if recipe is None or not isinstance(recipe.template, Bottleneck):
            return None
        return run_bottleneck([Pair(modules[c], modules[b]) for c, b in recipe.template.pairs], x)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The user's forward."""
        if len(args) == 1 and not kwargs and not _has_any_global_hook():
            y = self.fused(args[0])
            if y is not None:
                return _as_given(y, args[0])
        return self._plain_class().forward(self, *args, **kwargs)  # type: ignore[attr-defined]


def blockparts(recipe: Recipe, block: nn.Module, modules: list[nn.Module | None]) -> BlockParts:
    """The recipe over this block's modules, with the flags that they have now."""
    template = recipe.template
    assert template is not None
    bn1, conv1, bn2, conv2 = (modules[i] for i in recipe.roles[:4])
    short = recipe.roles[4]
    drop, p, at = template.drop, 0.0, "prologue"
    if drop is not None:
        at = drop.at
        owner = block if drop.follows == "block" else None if drop.follows == "always" else modules[drop.follows]  # type: ignore[index]
        p = drop.p if owner is None or owner.training else 0.0
    act1, act2 = (template.act1.name, template.act1.slope), (template.act2.name, template.act2.slope)
    return BlockParts(
        (
            Stage(bn1, conv1, act1, _sum(padding(conv1), template.extra1)),  # type: ignore[arg-type]
            Stage(bn2, conv2, act2, _sum(padding(conv2), template.extra2)),  # type: ignore[arg-type]
        ),
        None if short is None else modules[short],  # type: ignore[arg-type]
        p, at, template.conv1_reads_x, template.shortcut_reads_x,
    )  # fmt: skip


def _sum(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


class FastUserChain(Swapped):
    """A Sequential whose fast blocks hand statistics to each other."""

    def units(self) -> list[nn.Module]:
        """Its children, those of chains inside it in their place."""
        found: list[nn.Module] = []
        for child in self._modules.values():  # type: ignore[attr-defined]
            found += child.units() if isinstance(child, FastUserChain) and not hooked(child) else [child]  # type: ignore[arg-type, list-item]
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The Sequential's forward."""
        if len(args) != 1 or kwargs or "_fast_off" in self.__dict__ or _has_any_global_hook():
            return self._plain_class().forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        x = args[0]
        units = self.units()
        if any(isinstance(unit, FastBottleneck) for unit in units):
            return _in_a_row(units, x)
        first = 0
        for unit in units:
            # What comes before the first block, or before the first that x suits, runs as it is.
            parts = unit.parts() if isinstance(unit, FastUserBlock) else None
            if parts is not None and _suits(parts, x):
                return _as_given(run_chain(units[first:], x), x)
            x = unit(x)
            first += 1
        return x


def _in_a_row(units: list[nn.Module], x: Any) -> Any:
    """Bottlenecks hand on channels_last; who else reads a tensor between them gets it in the layout of the first."""
    given, ours = x, False
    for unit in units:
        y = unit.fused(x) if isinstance(unit, FastBottleneck) and not hooked(unit) else None  # type: ignore[arg-type]
        if y is not None:
            x, ours = y, True
        else:
            x, ours = unit(_as_given(x, given) if ours else x), False
    return _as_given(x, given) if ours else x


def fast_class(mixin: type, cls: type) -> type:
    """The fast subclass of a user's class."""
    if (mixin, cls) not in _fast_classes:
        body = {
            "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_fast_plain": cls,
        }  # fmt: skip
        _fast_classes[mixin, cls] = type(cls.__name__, (mixin, cls), body)
    return _fast_classes[mixin, cls]


def unswappable(module: nn.Module) -> str:
    """Why the class of this module cannot be exchanged; an empty text if it can."""
    cls = type(module)
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return f"it is a {cls.__name__}: accelerate the model before it is scripted or traced"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if type(cls) not in (type, ABCMeta):
        return f"its class is made by a metaclass, {type(cls).__name__}"
    for name in ("__call__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__", "__getstate__"):
        if getattr(cls, name, None) is not getattr(nn.Module, name, None):
            return f"its class defines {name}"
    # what is sharded cannot be copied, so nothing round it can be recorded either
    kinds = (type(m) for m in module.modules())
    sharded = next((kind for kind in kinds if any(c.__name__ == "FSDPModule" for c in kind.__mro__)), None)
    return f"it is sharded ({sharded.__name__}): accelerate before fully_shard" if sharded else ""


def recipe_of(module: nn.Module) -> Recipe:
    """What the module is, by recording its class's own forward."""
    plain: Any = module._plain_class() if isinstance(module, Swapped) else type(module)
    return recognise(module, plain.forward, _known)
