"""Inference in eight bits, by explicit choice: ranges from a few batches, then `with wrn_fast.precision("fp8")`.

    from wrn_fast.fp8 import calibrate

    print(calibrate(model.eval(), batches))                  # what it costs in accuracy
    with torch.no_grad(), wrn_fast.precision("fp8"):
        y = model(x)

Filters are scaled channel by channel at each call, so they may change; activations by one number a convolution, which
calibration finds. Sums stay float32, and so do BatchNorm, residual and shortcut additions and what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wrn_fast import ops, scales
from wrn_fast.backends import aten
from wrn_fast.errors import WrnFastError
from wrn_fast.parity import error
from wrn_fast.precision import FP8, precision
from wrn_fast.problem import FpropArgs


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found: the range of each convolution's input, and what e4m3 costs on the same batches.

    `ranges` is by the filter's name. `error` is the relative L2 distance of the outputs in e4m3 to those without;
    `agreement` the share of images whose largest output stays the same.
    """

    ranges: dict[str, float]
    images: int
    error: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"{len(self.ranges)} convolutions in e4m3, calibrated on {self.images} images: outputs differ by "
            f"{self.error:.2%} (relative L2), the largest output is the same for {self.agreement:.2%} of them"
        )


class _Ranges(TorchDispatchMode):
    """Watches fprop: the largest |act(bn(x))| before each filter."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is ops.fprop:
            self._see(FpropArgs(*args))
        return func(*args, **(kwargs or {}))

    def _see(self, a: FpropArgs) -> None:
        kept = 1.0 / (1.0 - a.p) if a.drop_at == "prologue" and a.p < 1 else 1.0
        self._source(a.w, a.x, a.stats, a.gamma, a.beta, a.eps, a.act, a.slope, kept)
        if a.x_short is not None and a.w_short is not None:
            self._source(
                a.w_short, a.x_short, a.stats_short, a.gamma_short, a.beta_short, a.short_eps, a.short_act, a.slope
            )

    def _source(
        self, w: Tensor, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float,
        act: str, slope: float, kept: float = 1.0,
    ) -> None:  # fmt: skip
        v = aten.activate(aten.normalize(x.float(), stats, gamma, beta, eps), act, slope)
        most = v.abs().amax().mul(kept).reshape(1)
        before = self.largest.get(id(w))
        self.largest[id(w)] = (w, most if before is None else torch.maximum(before[1], most))


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> Calibration:
    """Find the range of every convolution's input, keep it for `precision("fp8")`, and measure what that costs.

        range = max over the batches of |act(bn(x))|

    Args:
        model: in eval mode, on a GPU that multiplies e4m3; any model of the package or accelerated by it.
        batches: images [N, C, H, W] on the model's device; a few hundred images that look like those to come.

    Returns:
        The ranges, and the error of the model in e4m3 on the same batches.

    Raises:
        WrnFastError: the model is in training mode or has no convolution of ours, there is no batch, a range is not
            finite, or the device has no e4m3.

    Numerics: values beyond the range become the largest e4m3 number; NaN stays NaN.
    """
    if model.training:
        raise WrnFastError("`model`: expected eval mode (model.eval()), got training mode")
    images = list(batches)
    if not images:
        raise WrnFastError("`batches`: expected at least one batch, got none")
    names = {id(p): name for name, p in model.named_parameters()}
    with torch.no_grad():
        with _Ranges() as seen:
            plain = [_output(model(x)) for x in images]
        found = {names[key]: pair for key, pair in seen.largest.items() if key in names}
        if not found:
            raise WrnFastError("`model`: expected convolutions of wrn_fast, got none (wrn_fast.accelerate(model)?)")
        ranges = {name: most.item() for name, (_, most) in found.items()}
        for name, most in ranges.items():
            if not 0.0 < most < float("inf"):
                raise WrnFastError(f"`batches`: expected inputs of {name} that are finite and not all zero, got {most}")
        with _kept(found), precision(FP8):
            coarse = [_output(model(x)) for x in images]
    fast, want = torch.cat(coarse), torch.cat(plain)
    same = (fast.flatten(1).argmax(1) == want.flatten(1).argmax(1)).double().mean().item()
    return Calibration(ranges, sum(len(x) for x in images), error(fast, want), same)


@contextmanager
def _kept(found: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Keeps the ranges, and takes them back where the model cannot run by them."""
    for w, most in found.values():
        scales.keep(w, most)
    try:
        yield
    except BaseException:
        for w, _ in found.values():
            scales.drop(w)
        raise


def _output(y: Any) -> Tensor:
    """The first tensor of what a model gives: (logits, features) of the reference's head."""
    while not isinstance(y, Tensor):
        y = next(iter(y.values())) if isinstance(y, dict) else y[0]
    return y.float()
