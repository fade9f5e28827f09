"""What runs in the interpreting process: captured graphs of the triton backend, played on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backends import tape
from kernels import whole_model
from models import Blocks
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import wrn_fast
from wrn_fast import graphs
from wrn_fast.kernels.bound import Bound


class _Launches:
    """In the place of an extension: tells the tape of every launch."""

    listener: Callable | None = None


@contextmanager
def _playing() -> Iterator[list[tape.Tape]]:
    made: list[tape.Tape] = []
    launches, call = _Launches(), Bound.__call__

    def launch(self: Bound, *args: Any, **kwargs: Any) -> None:
        if launches.listener is not None:
            again = lambda: call(self, *args, **kwargs)
            again.__name__ = self.kernel.fn.__name__
            launches.listener(again, (), {})
        with _disable_current_modes():  # the interpreter itself runs operators of torch
            call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, whole_model.chosen(), torch.no_grad():
        patch.setattr(Bound, "__call__", launch)
        patch.setattr(graphs, "_DEVICE", "cpu")
        patch.setattr(graphs, "_capture", tape.capture(launches, patch, made))
        yield made


def net(seed: int, w_dtype: str = "float16", norm_dtype: str = "float32") -> Blocks:
    torch.manual_seed(seed)
    model = Blocks().eval()
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)):
            m.to(getattr(torch, w_dtype if isinstance(m, nn.Conv2d) else norm_dtype))
    return model


def image() -> Tensor:
    return torch.randn(1, 16, 6, 6).half().contiguous(memory_format=torch.channels_last)


def _follows(fast: Callable, model: Blocks) -> bool:
    """Is the replay bit-equal to the model without a graph, as the model is now?"""
    x = image()
    return torch.equal(fast(x), copy.deepcopy(model)(x))


def kernels(seed: int, w_dtype: str, norm_dtype: str) -> tuple[list[str], bool]:
    """The launches of a graph, and whether its replay is right."""
    with _playing() as made:
        model = net(seed, w_dtype, norm_dtype)
        fast = wrn_fast.graphed(model, image())
        return made[0].names, _follows(fast, model)


def changed(seed: int, name: str, hidden: bool) -> list[bool]:
    """What changes of every tensor of that name, there and back, do.

    (Did it move the output, are the replays after it right, those after the way back, are statistics side by side what
    they were made of?)
    """
    with _playing():
        model = net(seed)
        fast = wrn_fast.graphed(model, image())
        x = image()
        before = fast(x)
        found = []
        for factor in (2.0, 0.5):
            for m in model.modules():
                v = getattr(m, name, None) if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) else None
                if v is not None:
                    (v.data if hidden else v).mul_(factor)
            found += [torch.equal(fast(x), before) == (factor < 1), _follows(fast, model), _follows(fast, model)]
            found += [torch.equal(made, torch.stack(of)) for made, *of in fast._held._pairs.values()]
        return found


def left_alone(seed: int) -> tuple[bool, bool]:
    """Does a replay leave the pack of an unchanged filter as it is, and make that of a changed one again?"""
    with _playing():
        model = net(seed)
        fast = wrn_fast.graphed(model, image())
        fast(image())
        packs = [made for made, _ in fast._held._made.values() if made.dim() == 4]
        for pack in packs:
            pack.zero_()
        fast(image())
        alone = not any(pack.any() for pack in packs)
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.data.mul_(2)
        fast(image())
        return alone, len(packs) == 4 and all(pack.any() for pack in packs)


def single_elements(seed: int) -> list[bool]:
    """Are hidden writes to single elements of a filter followed after `refresh`?"""
    with _playing():
        model = net(seed)
        fast = wrn_fast.graphed(model, image())
        w = model.blocks[0].conv1.weight.data.view(-1)
        found = []
        for i in range(12):
            w[i * 211 % w.numel()] += 8
            wrn_fast.refresh(model)
            found.append(_follows(fast, model))
        return found


def strided(seed: int) -> bool:
    """Is a BatchNorm of strided vectors followed?"""
    with _playing():
        model = net(seed)
        bn = model.blocks[0].bn1
        bn.weight = nn.Parameter(torch.rand(32)[::2])
        fast = wrn_fast.graphed(model, image())
        bn.weight.data.mul_(2)
        return _follows(fast, model)
