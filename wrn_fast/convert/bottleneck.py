"""Post-activation bottlenecks (torchvision's and timm's wide_resnet50_2, wide_resnet101_2), in inference only.

    h1 = relu(bn1(conv1(x)));  h2 = relu(bn2(conv2(h1)));  y = relu(bn3(conv3(h2)) + (x, or bn_s(conv_s(x))))

Three operator calls a block. BatchNorm with running statistics is a scale and a shift of each channel: those of the
first two are in the operator's epilogue, those of conv3 and of the shortcut in their filters, so that sum and ReLU are
conv3's epilogue. What is folded is made again when a weight, a statistic or an eps changes (`packing.derived`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wrn_fast import dispatch, packing
from wrn_fast.block import padding, plain_conv
from wrn_fast.chain import plain_inference
from wrn_fast.convert.recipe import Recipe, inner
from wrn_fast.convert.recording import Book, record, set_flags, skeleton
from wrn_fast.functional import bn_act_conv

# (images, height and width) of the recordings
_SIZES = ((2, 8), (3, 32))


class Pair(NamedTuple):
    """A convolution and the BatchNorm behind it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d


class Bottleneck(NamedTuple):
    """The data flow as a template: indices of the pairs' modules in `inner`'s order."""

    pairs: tuple[tuple[int, int], ...]  # conv1, conv2, conv3 and perhaps the shortcut

    def __str__(self) -> str:
        short = "1x1 shortcut, " if len(self.pairs) == 4 else ""
        return f"post-activation bottleneck, relu, {short}BatchNorm folded: in eval and no_grad on the CPU, in float32"


def looks_like(modules: list[nn.Module | None]) -> bool:
    """Has it the submodules of a bottleneck?"""
    convs = [m for m in modules if isinstance(m, nn.Conv2d)]
    sizes = sorted(m.kernel_size for m in convs)
    norms = sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in modules)
    return norms == len(convs) and sizes in ([(1, 1)] * 2 + [(3, 3)], [(1, 1)] * 3 + [(3, 3)])


def recognise_bottleneck(block: nn.Module, forward: Any, modules: list[nn.Module | None], empty: Recipe) -> Recipe:
    """The recipe of a block that `looks_like` one: its eval forward is recorded and compared with the template's."""
    for m in modules:
        if isinstance(m, nn.Conv2d) and (not plain_conv(m) or m.bias is not None):
            return empty._replace(reason=f"a convolution is not plain: {type(m).__name__}({m.extra_repr()})")
        if isinstance(m, nn.modules.batchnorm._NormBase) and type(m) is not nn.BatchNorm2d:
            return empty._replace(reason=f"a normalisation is {type(m).__name__}, not BatchNorm2d")
        if m is not None and "forward" in m.__dict__:
            return empty._replace(reason=f"the forward of a {type(m).__name__} inside is replaced on the instance")
    book, twin = Book(), skeleton(block)
    set_flags(twin, False, False)
    copies = inner(twin)
    stem = next(m for m in copies if type(m) is nn.Conv2d)
    names = {f"{name}.weight": i for i, name in enumerate(_names(twin))}

    def recorded(run: Callable[[Tensor], Any]) -> list[Any]:
        shapes = [(n, stem.in_channels, side, side) for n, side in _SIZES]
        return [record(book, twin, run, shape, stem.weight.dtype, False) for shape in shapes]

    users = recorded(lambda x: forward(twin, x))
    wrong = next((r for r in users if isinstance(r, str)), None)
    if wrong:
        return empty._replace(reason=wrong)
    pairs = _pairs(book, names)
    if pairs is not None:
        own = [Pair(copies[c], copies[b]) for c, b in pairs]  # type: ignore[arg-type]
        if recorded(lambda x: _template(own, x)) == users:
            return empty._replace(template=Bottleneck(pairs))
    words = " ".join(str(line[0]) for line in book.lines if line[0] not in ("input", "part"))
    short = words.replace("native_batch_norm", "bn").replace("convolution", "conv")
    return empty._replace(reason=f"its data flow in eval is not that of a post-activation bottleneck: {short[:160]}")


def _template(pairs: list[Pair], x: Tensor) -> Tensor:
    first, second, third = (lambda v, pair=pair: pair.bn(pair.conv(v)) for pair in pairs[:3])  # type: ignore[misc]
    y = third(F.relu(second(F.relu(first(x)))))
    return F.relu(y + (pairs[3].bn(pairs[3].conv(x)) if len(pairs) == 4 else x))


def _names(module: nn.Module, prefix: str = "") -> list[str]:
    """Names in `inner`'s order."""
    found = []
    for name, child in module._modules.items():
        found.append(prefix + name)
        if child is not None and child._modules:
            found += _names(child, f"{prefix}{name}.")
    return found


def _pairs(book: Book, names: dict[str, int]) -> tuple[tuple[int, int], ...] | None:
    """(convolution, BatchNorm) of conv1, conv2, conv3 and the shortcut, by what feeds what in the recording."""

    def source(number: Any) -> tuple:
        """The last convolution before a value; an empty line before the first."""
        while isinstance(number, int) and book.lines[number][0] != "convolution":
            line = book.lines[number]
            number = line[2] if line[0] == "part" else line[1] if len(line) > 1 else None
        return book.lines[number] if isinstance(number, int) else ()

    def owner(line: tuple) -> int:
        return names[book.lines[line[2]][1]]

    convs = [line for line in book.lines if line[0] == "convolution"]
    norms = {source(line[1]): line for line in book.lines if line[0] == "native_batch_norm"}
    chains = [(source(source(c[1])[1]), source(c[1]), c) for c in convs if source(c[1]) and source(source(c[1])[1])]
    if len(chains) != 1 or len(norms) != len(convs):
        return None
    ordered = [*chains[0], *(c for c in convs if c not in chains[0])]
    return tuple((owner(c), owner(norms[c])) for c in ordered)


def run_bottleneck(pairs: list[Pair], x: Tensor) -> Tensor | None:
    """y [N, K, P, Q] channels_last in three operator calls; None where only the user's own forward is right or fast.

    Args:
        pairs: conv1, conv2, conv3 and perhaps the shortcut, each with its BatchNorm, all in eval mode.
        x: anything; float32 [N, C, H, W] on the CPU is served.
    """
    if not isinstance(x, Tensor) or not plain_inference(x) or x.dtype is not torch.float32 or not _served(x):
        return None
    if x.shape[1] != pairs[0].conv.in_channels or not all(_plain_pair(pair, x) for pair in pairs):
        return None
    return _run(pairs, x)


def _served(x: Tensor) -> bool:
    """By the kernels that were measured to be faster than the library's: the cpu backend's."""
    return x.device.type == "cpu" and "cpu" in dispatch.selection() and dispatch.load("cpu").isa() is not None


def _plain_pair(pair: Pair, x: Tensor) -> bool:
    bn, w = pair.bn, pair.conv.weight
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return (
        bn.running_mean is not None
        and bn.running_var is not None
        and all(v is None or (v.dtype is torch.float32 and v.is_contiguous()) for v in vectors)
        and w.dtype is x.dtype
        and w.device == x.device
        and (w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last))
    )


def _affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) [K] of BatchNorm with its running statistics, float64."""
    mean, var = bn.running_mean.double(), bn.running_var.double()  # type: ignore[union-attr]
    scale = (var + bn.eps).rsqrt() * (1.0 if bn.weight is None else bn.weight.double())
    return scale, (0.0 if bn.bias is None else bn.bias.double()) - mean * scale


def _fold(pairs: list[Pair]) -> tuple[Tensor, ...]:
    """scale and shift of bn1 and bn2, conv3's filter and bias, and the shortcut's filter where there is one."""
    first, second, third, *short = (_affine(pair.bn) for pair in pairs)
    bias = third[1] + short[0][1] if short else third[1]
    filters = [
        (pair.conv.weight.double() * scale[:, None, None, None]).float()
        for pair, (scale, _) in zip(pairs[2:], [third, *short], strict=True)
    ]
    return tuple(v.float() for v in (*first, *second, bias)) + tuple(filters)


def _run(pairs: list[Pair], x: Tensor) -> Tensor:
    sources = [t for conv, bn in pairs for t in (conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var)]
    made = packing.derived(
        [t for t in sources if t is not None], tuple(pair.bn.eps for pair in pairs), lambda: _fold(pairs)
    )
    scale1, shift1, scale2, shift2, bias, w3, *w_short = made
    h = x = x.contiguous(memory_format=torch.channels_last)  # once for both of its readers
    for pair, scale, shift in ((pairs[0], scale1, shift1), (pairs[1], scale2, shift2)):
        h = bn_act_conv(
            h, pair.conv.weight, act="identity", stride=pair.conv.stride[0], pad=padding(pair.conv), act_out="relu",
            out_scale=scale, out_shift=shift, want_y=False,
        ).y_act  # fmt: skip
    short: dict[str, Any] = {"residual": x}
    if w_short:
        short = {"x_short": x, "w_short": w_short[0], "short_stride": pairs[3].conv.stride[0]}
    conv = pairs[2].conv
    return bn_act_conv(
        h,
        w3,
        bias=bias,
        act="identity",
        stride=conv.stride[0],
        pad=padding(conv),
        act_out="relu",
        want_y=False,
        **short,
    ).y_act
