"""Small calls of `head` in every mode, and the same in plain PyTorch that knows nothing of the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from operator_cases import KINK
from torch import Tensor

from wrn_fast.functional import channel_stats, head

GRADIENTS = ("y", "gamma", "beta", "w", "bias")
TENSORS = ("y", "stats", "gamma", "beta", "w", "bias")
SCALARS = ("act", "slope", "eps", "batch_stats", "cosine")

MODES: dict[str, dict[str, Any]] = {
    "classic": {},
    "classic in training": {"batch_stats": True},
    "cosine": {"bn": False, "act": "identity", "cosine": True, "bias": False},
    "cosine after silu": {"act": "silu", "cosine": True, "batch_stats": True},
    "leaky_relu": {"act": "leaky_relu", "slope": 0.2, "batch_stats": True},
    "no affine": {"affine": False, "act": "identity", "batch_stats": True},
    "no bias": {"bn": False, "act": "silu", "bias": False},
}


class Call(NamedTuple):
    """Tensors by name and the other arguments."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]

    def given(self, **replaced: Tensor) -> dict[str, Tensor]:
        """The tensors, with y's own statistics where they are the batch's."""
        t = {**self.tensors, **replaced}
        return t | {"stats": channel_stats(t["y"])} if self.scalars["batch_stats"] else t

    def run(self, **replaced: Tensor) -> tuple[Tensor, Tensor]:
        """(out, feature) by the operator."""
        return tuple(head(**self.given(**replaced), **self.scalars))

    def arguments(self) -> list[Any]:
        """Those of the raw operator."""
        t = self.given()
        return [*(t.get(name) for name in TENSORS), *(self.scalars[name] for name in SCALARS)]

    def normal(self, t: dict[str, Tensor]) -> Tensor:
        """bn(y)."""
        y, stats, gamma, beta = (t.get(name) for name in TENSORS[:4])
        if self.scalars["batch_stats"]:
            return F.batch_norm(y, None, None, gamma, beta, True, 0.0, self.scalars["eps"])
        return y if stats is None else F.batch_norm(y, *stats, gamma, beta, False, 0.0, self.scalars["eps"])

    def plain(self, **replaced: Tensor) -> tuple[Tensor, Tensor]:
        """(out, feature) by F.batch_norm, F.avg_pool2d, F.linear and F.normalize, in the tensors' dtype."""
        t, s = {**self.tensors, **replaced}, self.scalars
        v = self.normal(t)
        v = {"identity": lambda: v, "relu": lambda: F.relu(v), "silu": lambda: F.silu(v),
             "leaky_relu": lambda: F.leaky_relu(v, s["slope"])}[s["act"]]()  # fmt: skip
        feature = F.avg_pool2d(v, tuple(v.shape[2:])).flatten(1)
        bias = t.get("bias")
        if s["cosine"]:
            return F.linear(F.normalize(feature, dim=1, p=2), t["w"], bias).abs(), feature
        return F.linear(feature, t["w"], bias), feature

    def leaves(self, *names: str) -> dict[str, Tensor]:
        """Fresh leaves that require a gradient, of all differentiable tensors or of those named."""
        wanted = [name for name in names or GRADIENTS if name in self.tensors]
        return {name: self.tensors[name].detach().clone().requires_grad_() for name in wanted}

    def to(self, dtype: torch.dtype) -> Call:
        """The same values in another dtype."""
        return Call({name: v.to(dtype) for name, v in self.tensors.items()}, self.scalars)


def build(
    mode: str | dict[str, Any], dtype: torch.dtype = torch.float64, n: int = 3, c: int = 5, k: int = 4, h: int = 4,
    w: int = 3, dense: bool = False, apart: float = KINK,
) -> Call:  # fmt: skip
    """A call in `mode`, its values drawn from the default generator; away from the kinks unless `dense`.

    `apart`: how far from 0 the cosine head's values are before the absolute value is taken.
    """
    m = dict(MODES[mode] if isinstance(mode, str) else mode)
    bn, affine, bias = m.pop("bn", True), m.pop("affine", True), m.pop("bias", True)
    scalars = {"act": "relu", "slope": 0.01, "eps": 1e-5, "batch_stats": False, "cosine": False, **m}
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def vector(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(wide)

    while True:
        y = torch.randn(n, c, h, w, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
        t = {"y": y, "w": (torch.randn(k, c, dtype=torch.float64) / 2).to(dtype)}
        if bn and not scalars["batch_stats"]:
            t["stats"] = torch.stack([vector(c), vector(c).abs() + 0.5])
        if bn and affine:
            t |= {"gamma": vector(c) + 0.2, "beta": vector(c)}
        if bias:
            t["bias"] = vector(k)
        call = Call(t, scalars)
        if dense or _away_from_kinks(call, apart):
            return call


def _away_from_kinks(call: Call, apart: float) -> bool:
    if call.scalars["act"] in ("relu", "leaky_relu") and call.normal(call.tensors).abs().min() <= KINK:
        return False
    return not call.scalars["cosine"] or bool(call.plain()[0].min() > apart)
