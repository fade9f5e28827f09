"""The one place that picks a backend, once per (operator, problem), and can say why.

The first backend of `BACKENDS` without a reason against the problem serves it. `WRN_FAST_BACKEND=cuda,aten` and
`with wrn_fast.backend("cuda,aten")` narrow the list; one name alone must serve, or the call raises with its reason.
Without such a list the backends of `OPT_IN` come last, which means never, unless they measured faster on this GPU.
An automatic choice that ends on `aten` on a device for which a faster backend exists warns, once a reason.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from contextlib import AbstractContextManager
from types import ModuleType

import torch

from wrn_fast.backends import BACKENDS, OPT_IN
from wrn_fast.errors import FallbackWarning, WrnFastError
from wrn_fast.problem import ConvProblem
from wrn_fast.setting import Setting

OPS = ("fprop", "dgrad", "wgrad", "bn_bwd_apply", "act_mask", "input_grad", "channel_stats", "dropout")
# Small ones that a backend may leave to `aten`, named alone or not, without a warning.
SMALL_OPS = ("head", "head_bwd")
# Devices that a backend was written for: only there is its refusal worth a warning.
_DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "aten": ()}
DEFAULT = (*(name for name in BACKENDS if name not in OPT_IN), *OPT_IN)
_CACHE_LIMIT = 4096

_modules: dict[str, ModuleType] = {}
_chosen: dict[tuple[str, ConvProblem, tuple[str, ...]], ModuleType] = {}
_warned: set[tuple[str, str]] = set()
_setting: Setting[tuple[str, ...]] = Setting()
_parsed: dict[str, tuple[str, ...]] = {}


def load(name: str) -> ModuleType:
    """The backend's module, imported on first use."""
    if name not in _modules:
        _modules[name] = importlib.import_module(f"wrn_fast.backends.{name}")
    return _modules[name]


def parse(names: str) -> tuple[str, ...]:
    """'cuda, aten' as a tuple; an empty text means all. Unknown names raise."""
    if not isinstance(names, str):
        raise WrnFastError(f"`backend`: expected names with commas between them, got {type(names).__name__}")
    if names not in _parsed:
        wanted = tuple(name.strip() for name in names.split(",") if name.strip())
        for name in wanted:
            if name not in BACKENDS:
                raise WrnFastError(f"`backend`: expected names out of {', '.join(BACKENDS)}, got {name!r}")
        _parsed[names] = tuple(name for name in BACKENDS if name in wanted) or DEFAULT
    return _parsed[names]


def selection() -> tuple[str, ...]:
    """The backends that may serve now, in order."""
    names = _setting.get()
    if names is not None:
        return names
    wanted = os.environ.get("WRN_FAST_BACKEND")
    return parse(wanted) if wanted else DEFAULT


def backend(names: str) -> AbstractContextManager[None]:
    """Narrow the choice inside a `with` block: `with wrn_fast.backend("triton,aten"): ...`.

    The setting is the process's. A backward pass uses the backends of its forward pass, whatever is set when it runs.

    Args:
        names: one name or several of cuda, triton, cpu, aten, with commas; their order does not matter.

    Raises:
        WrnFastError: an unknown name here; inside, where no backend of the list can serve a call.
    """
    return _setting.block(parse(names))


take_over = _setting.take_over


def explain(op: str, problem: ConvProblem) -> dict[str, str | None]:
    """Each backend's reason against the problem; None where it can serve."""
    return {name: _reason(name, op, problem) for name in selection()}


def _reason(name: str, op: str, problem: ConvProblem) -> str | None:
    """Of a backend, against one of `OPS` or an operator that only some backends have."""
    module = load(name)
    return module.unsupported(op, problem) if op in OPS or hasattr(module, op) else f"has no {op}"


def choose(op: str, problem: ConvProblem) -> ModuleType:
    """The backend that serves `op` on `problem`.

    Raises:
        WrnFastError: no backend of the selection can; the message has each one's reason.
    """
    names = selection()
    key = (op, problem, names)
    found = _chosen.get(key)
    return found if found is not None else _choose(key)


def beyond_aten(op: str, device: str, dtype: torch.dtype) -> bool:
    """Is there a backend beside `aten` for a small operator, by the least problem of its kind?

    If not, an operator call costs more than it saves: on a CPU 40 us of the 20 to 60 that the head's modules take.
    """
    if torch.compiler.is_compiling():  # a compiler cannot look it up, and on a CPU fuses the modules itself
        return device != "cpu"
    return choose(op, _least(device, dtype)).NAME != "aten"


@functools.cache
def _least(device: str, dtype: torch.dtype) -> ConvProblem:
    return ConvProblem(device, dtype, dtype, 1, 1, 1, 1, 1, 1, 1)


def _choose(key: tuple[str, ConvProblem, tuple[str, ...]]) -> ModuleType:
    op, problem, names = key
    reasons: list[tuple[str, str]] = []
    candidates = (*_measured_faster(op, problem, names), *names)
    if op in SMALL_OPS:
        candidates = tuple(name for name in candidates if hasattr(load(name), op)) or ("aten",)
    for name in candidates:
        module = load(name)
        reason = _reason(name, op, problem)
        if reason is None:
            if name == "aten" and len(names) > 1:
                _warn(problem, reasons)
            if len(_chosen) >= _CACHE_LIMIT:
                _chosen.clear()
            _chosen[key] = module
            return module
        reasons.append((name, reason))
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    raise WrnFastError(f"no backend of {', '.join(names)} can serve {op} on {problem.device} {problem.dtype}: {listed}")


def _measured_faster(op: str, problem: ConvProblem, names: tuple[str, ...]) -> list[str]:
    """The opt-in backends that go first for `problem` though nobody named them."""
    if names != DEFAULT:
        return []
    return [name for name in OPT_IN if problem.device in _DEVICES[name] and load(name).faster(op, problem)]


def _warn(problem: ConvProblem, reasons: list[tuple[str, str]]) -> None:
    for name, reason in reasons:
        if problem.device in _DEVICES[name] and (name, reason) not in _warned:
            _warned.add((name, reason))
            warnings.warn(
                f"wrn_fast runs on plain PyTorch here, because {name}: {reason}", FallbackWarning, stacklevel=5
            )


def forget() -> None:
    """Drop cached choices and said warnings (for tests, and after a rebuild of an extension)."""
    _chosen.clear()
    _warned.clear()
