"""`accelerate`, `restore`, `report`: a user's model, made fast where its blocks are what they look like."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from wrn_fast.block import FastBlock
from wrn_fast.checks import check_model
from wrn_fast.convert.proof import prove
from wrn_fast.convert.recipe import OWN, Recipe
from wrn_fast.convert.recognise import candidates, listener
from wrn_fast.convert.report import Report
from wrn_fast.convert.swap import (
    FastBottleneck,
    FastUserBlock,
    FastUserChain,
    Swapped,
    fast_class,
    recipe_of,
    unswappable,
)
from wrn_fast.convert.templates import Template
from wrn_fast.errors import WrnFastError

Model = TypeVar("Model", bound=nn.Module)
_BLOCKS = (FastUserBlock, FastBottleneck)
_CHAIN = "a Sequential whose blocks hand on layout and statistics"


def accelerate(model: Model, *, check: Tensor | None = None, require: bool = False) -> Model:
    """Make the pre-activation residual blocks of any model compute through the fused operator, in place.

        y = conv2(drop(act(bn2(conv1(act(bn1(x))))))) + shortcut

    Nothing else changes: module objects, parameters, state_dict keys, hooks, `isinstance`, copies and files stay, and
    a block computes the plain way while someone listens to a module inside it. A block is found by recording what its
    forward does, not by names; what is not recognised is left alone, and `report` names it.

    Args:
        model: any module: a network, or a wrapper round one.
        check: an input of the model. Copies of it then compute this input, and seven near it, with and without
            acceleration, in eval and in training mode (dropout off); all outputs must agree within the parity bound.
        require: raise if no block could be accelerated.

    Returns:
        The same object.

    Raises:
        WrnFastError: `model` is no module; `require` and nothing was recognised; `check` and the outputs differ. The
            model is then as it was.

    Numerics: see `docs/parity.md`: error against float64 at most 1.25 times that of the model's own forward. Dropout
    masks come from a counter-based generator, so they differ from PyTorch's for the same seed.
    Source: Zagoruyko and Komodakis, Wide Residual Networks (BMVC 2016), figure 1.
    """
    check_model(model)
    blocks = {name: module for name, (module, recipe) in _survey(model).items() if recipe.template is not None}
    if require and not blocks and not any(isinstance(m, (FastBlock, FastBottleneck)) for m in model.modules()):
        raise WrnFastError(f"`model`: expected at least one residual block that is recognised\n{report(model)}")
    fresh: list[nn.Module] = []
    try:
        for module in blocks.values():
            recipe = recipe_of(module)
            _swap(module, FastUserBlock if isinstance(recipe.template, Template) else FastBottleneck, fresh)
            module.__dict__["_fast_recipe"] = recipe
        for module in _chains(model):
            _swap(module, FastUserChain, fresh)
        if check is not None:
            prove(model, check, restore)
    except BaseException:
        for module in fresh:
            _plain(module)
        raise
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: every module has its own class again.

    Args:
        model: any module.

    Returns:
        The same object.

    Raises:
        WrnFastError: `model` is no module.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, Swapped):
            _plain(module)  # type: ignore[arg-type]
    return model


def report(model: nn.Module) -> Report:
    """What of this model is accelerated, what looks like a residual block and is not, and why.

    Args:
        model: any module.

    Returns:
        Report: accelerated, left, why; `print` it.

    Raises:
        WrnFastError: `model` is no module.
    """
    check_model(model)
    why: dict[str, str] = {}
    accelerated, left = [], []
    for name, module in model.named_modules():
        if isinstance(module, _BLOCKS) and "_fast_off" not in module.__dict__ and "_fast_recipe" in module.__dict__:
            heard = listener(module)  # type: ignore[arg-type]
            accelerated.append(name)
            why[name] = f"{module.__dict__['_fast_recipe']}{'; ' + heard if heard else ''}"
        elif isinstance(module, FastUserChain) and "_fast_off" not in module.__dict__:
            accelerated.append(name)
            why[name] = _CHAIN
        elif isinstance(module, FastBlock) and not isinstance(module, Swapped):
            accelerated.append(name)
            why[name] = "a block of wrn_fast's own"
    for name, (_, recipe) in _survey(model).items():
        if name not in why:
            left.append(name)
            why[name] = recipe.reason or f"recognised ({recipe}), but not accelerated: call accelerate(model)"
    notes = () if accelerated or left else ("no module here looks like a residual block",)
    return Report(tuple(accelerated), tuple(left), why, notes)


def _survey(model: nn.Module) -> dict[str, tuple[nn.Module, Recipe]]:
    """Every block with its recipe, and every look-alike with a recipe that has the reason."""
    found: dict[str, tuple[nn.Module, Recipe]] = {}
    done: set[int] = set()
    for name, module in candidates(model):
        # Blocks alone: two of them may share an activation or a convolution.
        if any(id(m) in done for m in module.modules()):
            continue
        if isinstance(module, FastBlock) and not isinstance(module, Swapped):
            done.add(id(module))
            continue
        recipe = _recipe(module)
        if recipe.template is not None:
            done.add(id(module))
            # What was tried inside it was a part of it.
            found = {n: pair for n, pair in found.items() if not n.startswith(f"{name}." if name else "")}
        inside = [n for n in found if not name or n.startswith(f"{name}.")]
        if recipe.template is None and inside and isinstance(module, nn.Sequential):
            continue
        for n in inside:
            del found[n]
        found[name] = (module, recipe)
    return found


def _recipe(module: nn.Module) -> Recipe:
    if isinstance(module, Swapped):
        # what fully_shard put its class in front of cannot be copied, so it cannot be recorded again
        kept = None if "_fast_plain" in type(module).__dict__ else module.__dict__.get("_fast_recipe")  # type: ignore[attr-defined]
        return recipe_of(module) if kept is None else kept  # type: ignore[arg-type]
    reason = unswappable(module)
    return Recipe((), (), None, frozenset(), (), reason) if reason else recipe_of(module)


def _chains(model: nn.Module) -> list[nn.Module]:
    """Sequentials that hold at least two fast blocks or one chain, innermost first."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None:
                walk(child)
        plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if not plain or isinstance(module, Swapped) or unswappable(module):
            return
        kinds = [isinstance(c, _BLOCKS) for c in module._modules.values()]
        inner = sum(c in found for c in module._modules.values())
        if (sum(kinds) >= 2 or inner >= 2) and module not in found:
            found.append(module)

    walk(model)
    return found


def _swap(module: nn.Module, mixin: type, fresh: list[nn.Module]) -> None:
    module.__dict__.pop("_fast_off", None)
    if isinstance(module, Swapped):
        return
    module.__class__ = fast_class(mixin, type(module))
    fresh.append(module)


def _plain(module: nn.Module) -> None:
    """The user's class again; where another class was put in front, the fast road is closed instead."""
    if "_fast_plain" in type(module).__dict__:
        module.__class__ = type(module)._fast_plain  # type: ignore[attr-defined]
        for name in OWN:
            module.__dict__.pop(name, None)
    else:
        module.__dict__["_fast_off"] = True
