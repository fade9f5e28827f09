"""Which block is this? Found out by recording it and every template over the same submodules, never by names.

What equal recordings prove: the same operators on the same parameters in the same flow, forward and backward, with the
same constants, for every mix of training flags and two image sizes. What they do not: a branch on a size, dtype or
device that was not recorded (`accelerate(model, check=x)` is for that). Attributes are watched: a block whose plain
attributes or submodules are not what they were is recognised again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from wrn_fast.block import hooked, plain_conv
from wrn_fast.convert.bottleneck import looks_like, recognise_bottleneck
from wrn_fast.convert.recipe import INTERNAL, SIMPLE, Recipe, attributes, classes, content, inner, made_for
from wrn_fast.convert.recording import Book, Recording, custom_functions, record, set_flags, skeleton
from wrn_fast.convert.templates import Drop, Roles, Template, acts, templates

# (the block's training flag, that of everything inside), (images, height and width), with backward or in no_grad
_SCENES = (
    ((True, True), (2, 8), True),
    ((False, False), (2, 8), True),
    ((True, False), (2, 8), False),
    ((False, True), (2, 8), False),
    ((True, True), (3, 32), False),
    ((False, False), (3, 32), False),
)
# Operators of the known families, and bookkeeping beside them, by their names in a recording.
_USUAL = {"convolution", "native_batch_norm", "add", "relu", "leaky_relu", "silu", "sigmoid", "mul"}
_SILENT = {"input", "part", "foreign", "empty", "empty_like", "zeros_like", "bernoulli", "div", "constant_pad_nd"}


def _key(block: nn.Module, forward: Any, modules: list[nn.Module | None]) -> tuple | None:
    """Blocks of equal key are recorded once; None where something compares by identity only."""
    everything = attributes([block, *modules], True)
    if not all(isinstance(v, (*SIMPLE, tuple)) for _, _, v in everything):
        return None
    shapes = tuple((k, tuple(t.shape), t.dtype, t.requires_grad) for k, t in block.named_parameters())
    # by identity: the recipe under the key keeps them alive
    defined = tuple((c, tuple(map(id, names.values()))) for c, names in classes(block))
    key = (forward, tuple(map(type, modules)), everything, shapes, defined)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def recognise(block: nn.Module, forward: Any, known: dict[tuple, Recipe]) -> Recipe:
    """The block's recipe.

    Args:
        block: any module.
        forward: its class's own forward, a function of (block, x).
        known: recipes by key, filled here.
    """
    modules = inner(block)
    key = _key(block, forward, modules)
    if key is not None and key in known:
        return known[key]
    empty = made_for(block, forward, modules)
    try:
        if looks_like(modules):
            recipe = recognise_bottleneck(block, forward, modules, empty)
        else:
            recipe = _Recogniser(block, forward, modules).run(empty)
    except Exception as error:  # a user's forward may raise anything on tensors without data
        text = (str(error).strip().splitlines() or [""])[0][:120]
        recipe = empty._replace(reason=f"its forward cannot be recorded: {type(error).__name__}: {text}")
    if key is not None:
        known[key] = recipe
    return recipe


class _Recogniser:
    """One block's recognition: recordings on one book."""

    def __init__(self, block: nn.Module, forward: Any, modules: list[nn.Module | None]) -> None:
        self.block = block
        self.forward = forward
        self.modules = modules
        self.book = Book()

    def run(self, empty: Recipe) -> Recipe:
        reason = self.counts()
        if reason:
            return empty._replace(reason=reason)
        self.twin = skeleton(self.block)
        self.inner = inner(self.twin)
        weight = next(m for m in self.inner if type(m) is nn.Conv2d).weight  # type: ignore[union-attr]
        self.dtype = weight.dtype
        self.channels = next(m for m in self.inner if type(m) is nn.BatchNorm2d).num_features  # type: ignore[union-attr]

        def forward(x: torch.Tensor) -> Any:
            return self.forward(self.twin, x)

        before = self.attributes()
        users: list[Recording] = []
        lines: list[tuple] = []
        for scene in _SCENES:
            recording = self.record(forward, *scene)
            if isinstance(recording, str):
                return empty._replace(reason=recording)
            users.append(recording)
            lines = lines or self.book.lines[: self.book.lines.index(("backward",))]
        stored = sorted({key[1] for key, at in self.attributes().items() if before.get(key) != at})
        if stored:
            return empty._replace(reason=f"its forward stores {', '.join(stored[:4])} on the module")
        roles = self.roles()
        if isinstance(roles, str):
            return empty._replace(reason=roles)
        with torch.enable_grad():
            custom = custom_functions(forward, self.shape(_SCENES[0][1]), self.dtype)
        found = acts(lines, custom)
        for template in templates(found, self.drops(lines), self.pads(lines), roles[4] is not None):
            if self.equals(template, roles, users):
                return empty._replace(template=template, roles=roles)
        return empty._replace(reason=self.mismatch(lines, custom, found))

    def counts(self) -> str:
        """Why it cannot be a block, by its submodules alone."""
        convs = [m for m in self.modules if isinstance(m, nn.Conv2d)]
        norms = [m for m in self.modules if isinstance(m, nn.modules.batchnorm._NormBase)]
        threes = [m for m in convs if m.kernel_size == (3, 3)]
        ones = [m for m in convs if m.kernel_size == (1, 1)]
        if (len(norms), len(threes)) != (2, 2) or len(ones) > 1 or len(convs) > 3:
            return (
                "expected 2 BatchNorm2d, 2 3x3 and at most 1 1x1 convolution, "
                f"found {len(norms)}, {len(threes)} and {len(ones)}"
            )
        for conv in convs:
            if not plain_conv(conv):
                return f"a convolution is not plain: {type(conv).__name__}({conv.extra_repr()})"
        for norm in norms:
            if type(norm) is not nn.BatchNorm2d:
                return f"a normalisation is {type(norm).__name__}, not BatchNorm2d"
        for module in self.modules:
            if module is not None and "forward" in module.__dict__:
                return f"the forward of a {type(module).__name__} inside is replaced on the instance"
        return ""

    def attributes(self) -> dict[tuple[int, str], tuple]:
        """Identity and content of every attribute of the copy, but for PyTorch's own."""
        return {
            (i, name): (id(value), content(value))
            for i, module in enumerate([self.twin, *self.inner])
            if module is not None
            for name, value in module.__dict__.items()
            if name not in INTERNAL
        }

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        n, side = size
        return n, self.channels, side, side

    def record(self, forward: Any, mode: tuple[bool, bool], size: tuple[int, int], backward: bool) -> Recording | str:
        set_flags(self.twin, *mode)
        return record(self.book, self.twin, forward, self.shape(size), self.dtype, backward)

    def roles(self) -> tuple[int, int, int, int, int | None] | str:
        """Indices of bn1, conv1, bn2, conv2, shortcut: in the order of first use."""
        names = {name: i for i, name in enumerate(self.names())}
        order: list[int] = []
        inputs = {n: line[1] for line, n in self.book.numbers.items() if line[0] == "input"}
        for line in self.book.lines:
            if line[0] in ("input", "part", "foreign") or "backward" in line[0]:
                continue
            for operand in line[1:]:
                owner = inputs.get(operand, "") if isinstance(operand, int) else ""
                i = names.get(owner.rpartition(".")[0])
                if i is not None and i not in order:
                    order.append(i)
        norms = [i for i in order if type(self.inner[i]) is nn.BatchNorm2d]
        convs = [i for i in order if type(self.inner[i]) is nn.Conv2d]
        threes = [i for i in convs if self.inner[i].kernel_size == (3, 3)]  # type: ignore[union-attr]
        ones = [i for i in convs if i not in threes]
        if len(norms) != 2 or len(threes) != 2:
            return f"its forward uses {len(norms)} BatchNorm2d and {len(threes)} 3x3 convolutions, expected 2 and 2"
        if ones and self.inner[ones[0]].padding != (0, 0):  # type: ignore[union-attr]
            return "its 1x1 shortcut is padded"
        return norms[0], threes[0], norms[1], threes[1], ones[0] if ones else None

    def names(self) -> Iterator[str]:
        """Names of the inner modules in `inner`'s order."""

        def walk(module: nn.Module, prefix: str) -> Iterator[str]:
            for name, child in module._modules.items():
                yield prefix + name
                if child is not None and child._modules:
                    yield from walk(child, f"{prefix}{name}.")

        return walk(self.twin, "")

    def drops(self, lines: list[tuple]) -> list[Drop | None]:
        """Dropouts that the recorded lines may come from."""
        kept = {float(line[2]) if len(line) > 2 else 0.5 for line in lines if line[0] == "bernoulli"}
        if not kept:
            return [None]
        modules = [(i, m) for i, m in enumerate(self.inner) if type(m) is nn.Dropout]
        rates = {m.p for _, m in modules} | {
            v for v in self.block.__dict__.values() if isinstance(v, float) and 0.0 < v < 1.0
        }
        p = next((r for r in sorted(rates) if 1.0 - r in kept), 1.0 - max(kept))
        follows: list[str | int] = [*[i for i, m in modules if m.p == p], "block", "always"]
        return [Drop(p, at, f) for at in ("prologue", "output") for f in follows]

    def pads(self, lines: list[tuple]) -> tuple[tuple, tuple]:
        """What is padded by hand before each of the two 3x3 convolutions."""
        by_number = {n: line for line, n in self.book.numbers.items()}
        extra: dict[str, tuple] = {}
        for line in lines:
            if line[0] != "convolution":
                continue
            source, weight = by_number[line[1]], by_number[line[2]]
            if source[0] == "constant_pad_nd" and len(source[2]) == 5 and source[3:] in ((), ("0",), ("0.0",)):
                extra[weight[1]] = tuple(int(v) for v in source[2][1:])
        names = list(self.names())
        roles = self.roles()
        assert not isinstance(roles, str)
        none = (0, 0, 0, 0)
        return extra.get(f"{names[roles[1]]}.weight", none), extra.get(f"{names[roles[3]]}.weight", none)

    def equals(self, template: Template, roles: tuple, users: list[Recording]) -> bool:
        modules = Roles(*[None if i is None else self.inner[i] for i in roles])  # type: ignore[arg-type]

        def dropping(d: Drop) -> bool:
            if d.follows == "always":
                return True
            owner = self.twin if d.follows == "block" else self.inner[d.follows]  # type: ignore[index]
            return owner.training  # type: ignore[union-attr]

        forward = template.forward(modules, dropping)
        return all(self.record(forward, *scene) == user for scene, user in zip(_SCENES, users, strict=True))

    def mismatch(self, lines: list[tuple], custom: list[type], found: list) -> str:
        """Why no template fitted, as far as can be said."""
        strange = [f.__name__ for f in custom if all(a.function != f.apply for a in found)]  # type: ignore[attr-defined]
        if strange:
            return f"the custom gradient of {strange[0]} is not that of a known activation"
        others = sorted({line[0] for line in lines} - _USUAL - _SILENT)
        if others:
            return f"its data flow is of no known family: it also computes {', '.join(others[:4])}"
        short = {"native_batch_norm": "bn", "convolution": "conv"}
        counters = {n for line, n in self.book.numbers.items() if str(line[-1]).endswith("num_batches_tracked")}
        words = [short.get(line[0], line[0]) for line in lines if line[0] in _USUAL and not counters & set(line[1:])]
        return f"its data flow is of no known family: {' '.join(words)}"


def candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that look like residual blocks: at least one BatchNorm and two convolutions inside, innermost first.

    A block may sit inside containers that look the same (a Sequential of one block), and a part of a block may too (its
    body without the shortcut), so a candidate is followed by the ones round it; who recognises one skips those.
    """
    found: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, name: str) -> tuple[int, int]:
        norms, convs = 0, 0
        start = len(found)
        for key, child in module._modules.items():
            if child is None:
                continue
            a, b = walk(child, f"{name}.{key}" if name else key)
            norms, convs = norms + a, convs + b
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return 1, 0
        if isinstance(module, nn.Conv2d):
            return 0, 1
        if norms >= 1 and convs >= 2 and (start == len(found) or (norms <= 2 and convs <= 3)):
            found.append((name, module))
        return norms, convs

    walk(model, "")
    return found


def listener(block: nn.Module) -> str:
    """A sentence about the first inner module that someone listens to, or an empty text."""
    for name, module in block.named_modules():
        if name and hooked(module):
            return f"runs plainly while {name} has a hook or a parametrization"
    return ""
