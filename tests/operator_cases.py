"""Small calls of `bn_act_conv` in every mode, and the same in plain PyTorch that knows nothing of the package."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wrn_fast import dispatch, parity
from wrn_fast.functional import bn_act_conv, channel_stats
from wrn_fast.random import keep_mask

GRADIENTS = ("x", "w", "gamma", "beta", "bias", "residual", "x_short", "w_short", "gamma_short", "beta_short")

# One entry per thing that the operator can do; "everything" has them at once.
MODES: dict[str, dict[str, Any]] = {
    "eval": {},
    "train": {"batch_stats": True},
    "identity": {"act": "identity", "batch_stats": True},
    "silu": {"act": "silu"},
    "leaky_relu": {"act": "leaky_relu", "slope": 0.2, "batch_stats": True},
    "no prologue": {"bn": False, "act": "identity"},
    "no affine": {"affine": False, "batch_stats": True},
    "residual": {"residual": True, "batch_stats": True},
    "raw shortcut": {"short": "raw", "batch_stats": True},
    "activated shortcut": {"short": "activated", "short_act": "relu", "short_batch_stats": True, "batch_stats": True},
    "shortcut in eval": {"short": "activated", "short_act": "silu", "short_stride": 2, "stride": 2},
    "dropout": {"p": 0.4, "drop_at": "prologue", "batch_stats": True},
    "dropout of the output": {"p": 0.4, "drop_at": "output", "residual": True, "bias": True},
    "bias": {"bias": True},
    "four-sided padding": {"pad": (0, 2, 1, 3), "batch_stats": True},
    "stride 2": {"stride": 2, "pad": (0, 1, 0, 1)},
    "everything": {
        "act": "silu", "batch_stats": True, "bias": True, "residual": True, "stride": 2, "pad": (0, 1, 1, 0),
        "short": "activated", "short_act": "leaky_relu", "short_stride": 2, "short_batch_stats": True, "slope": 0.3,
        "p": 0.3, "drop_at": "output",
    },
}  # fmt: skip
# Away from the kinks of relu and leaky_relu, by more than finite differences move anything.
KINK = 1e-3


class Call(NamedTuple):
    """Tensors by name, the other arguments, and the dtype's own eval statistics where they are not the batch's."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]

    def run(self, **replaced: Tensor) -> Any:
        """bn_act_conv with statistics taken from x where they are the batch's."""
        t = {**self.tensors, **replaced}
        for suffix in ("", "_short"):
            if self.scalars[f"{suffix.lstrip('_')}_batch_stats".lstrip("_")]:
                t[f"stats{suffix}"] = channel_stats(t[f"x{suffix}"])
        return bn_act_conv(**t, **self.scalars)

    def plain(self, **replaced: Tensor) -> Tensor:
        """y by F.batch_norm and F.conv2d."""
        t, s = {**self.tensors, **replaced}, self.scalars
        a = _drop(self, _act(_bn(t, "", s["eps"], s["batch_stats"]), s["act"], s["slope"]), "prologue")
        y = F.conv2d(F.pad(a, s["pad"]), t["w"], t.get("bias"), s["stride"])
        if "x_short" in t:
            a = _act(_bn(t, "_short", s["short_eps"], s["short_batch_stats"]), s["short_act"], s["slope"])
            y = y + F.conv2d(a, t["w_short"], stride=s["short_stride"])
        return _drop(self, y + t["residual"] if "residual" in t else y, "output")

    def leaves(self, *names: str) -> dict[str, Tensor]:
        """Fresh leaves that require a gradient, of all differentiable tensors or of those named."""
        return {
            name: self.tensors[name].detach().clone().requires_grad_()
            for name in names or GRADIENTS
            if name in self.tensors
        }


def _act(v: Tensor, act: str, slope: float) -> Tensor:
    return {"identity": lambda: v, "relu": lambda: F.relu(v), "silu": lambda: F.silu(v),
            "leaky_relu": lambda: F.leaky_relu(v, slope)}[act]()  # fmt: skip


def _bn(t: dict[str, Tensor], suffix: str, eps: float, batch_stats: bool) -> Tensor:
    x, stats, gamma, beta = (t.get(name + suffix) for name in ("x", "stats", "gamma", "beta"))
    if batch_stats:
        return F.batch_norm(x, None, None, gamma, beta, True, 0.0, eps)
    return x if stats is None else F.batch_norm(x, stats[0], stats[1], gamma, beta, False, 0.0, eps)


def _drop(call: Call, v: Tensor, where: str) -> Tensor:
    p = call.scalars["p"]
    if p == 0.0 or call.scalars["drop_at"] != where:
        return v
    return v * keep_mask(v.shape, call.tensors["rng"], p).to(v.dtype) / (1 - p)


def build(
    mode: str | dict[str, Any], dtype: torch.dtype = torch.float64, n: int = 2, c: int = 3, k: int = 2, h: int = 4,
    w: int = 5, taps: int = 3, dense: bool = False,
) -> Call:  # fmt: skip
    """A call in `mode`, its values drawn from the default generator, pre-activations away from the kinks."""
    m = dict(MODES[mode] if isinstance(mode, str) else mode)
    bn, affine, short = m.pop("bn", True), m.pop("affine", True), m.pop("short", None)
    bias, residual = m.pop("bias", False), m.pop("residual", False)
    scalars = {
        "stride": 1, "pad": (1, 1, 1, 1), "act": "relu", "slope": 0.01, "eps": 1e-5, "batch_stats": False, "p": 0.0,
        "drop_at": "prologue", "short_stride": 1, "short_act": "identity", "short_eps": 1e-3,
        "short_batch_stats": False, **m,
    }  # fmt: skip
    left, right, top, bottom = scalars["pad"]
    p = (h + top + bottom - taps) // scalars["stride"] + 1
    q = (w + left + right - taps) // scalars["stride"] + 1
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def image(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)

    def prologue(suffix: str, channels: int, batch: bool) -> dict[str, Tensor]:
        found = {} if batch else {
            f"stats{suffix}": torch.stack([torch.randn(channels), torch.rand(channels) + 0.5]).to(wide)
        }  # fmt: skip
        if affine:
            found[f"gamma{suffix}"] = (torch.randn(channels, dtype=torch.float64) + 0.2).to(wide)
            found[f"beta{suffix}"] = torch.randn(channels, dtype=torch.float64).to(wide)
        return found

    def draw() -> dict[str, Tensor]:
        t = {"x": image(n, c, h, w), "w": (torch.randn(k, c, taps, taps, dtype=torch.float64) / 3).to(dtype)}
        t |= prologue("", c, scalars["batch_stats"]) if bn else {}
        if bias:
            t["bias"] = torch.randn(k, dtype=torch.float64).to(wide)
        if residual:
            t["residual"] = image(n, k, p, q)
        if short:
            st = scalars["short_stride"]
            t["x_short"] = image(n, 2, (p - 1) * st + 1, (q - 1) * st + 1)
            t["w_short"] = torch.randn(k, 2, 1, 1, dtype=torch.float64).to(dtype)
            t |= prologue("_short", 2, scalars["short_batch_stats"]) if short == "activated" else {}
        if scalars["p"] > 0:
            t["rng"] = torch.randint(2**62, (2,))
        return t

    while True:
        call = Call(draw(), scalars)
        values = [_bn(call.tensors, "", scalars["eps"], scalars["batch_stats"])]
        if short:
            values.append(_bn(call.tensors, "_short", scalars["short_eps"], scalars["short_batch_stats"]))
        if dense or all(v.abs().min() > KINK for v in values):
            return call


def close(got, want):
    """Within the bound of float64, tensor by tensor."""
    got, want = ([v] if isinstance(v, Tensor) else list(v) for v in (got, want))
    assert len(got) == len(want)
    return all(parity.error(a, b) <= parity.FLOAT64 for a, b in zip(got, want))


def count_calls(monkeypatch):
    """A Counter of the primitives that a backend is asked for from now on."""
    counter = collections.Counter()
    choose = dispatch.choose

    def counted(op, problem):
        counter[op] += 1
        return choose(op, problem)

    monkeypatch.setattr(dispatch, "choose", counted)
    return counter
