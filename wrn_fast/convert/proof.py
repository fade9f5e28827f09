"""`accelerate(model, check=x)`: copies of the model compute x with and without acceleration, and must agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from wrn_fast import parity
from wrn_fast.convert.swap import FastUserBlock
from wrn_fast.errors import WrnFastError


class _NoDropout(TorchFunctionMode):
    """Element-wise dropout is the identity: masks of two generators cannot be compared."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.dropout, torch.dropout, torch.dropout_):
            return args[0]
        return function(*args, **(kwargs or {}))


def prove(model: nn.Module, x: Tensor, restore: Callable[[nn.Module], nn.Module]) -> None:
    """Compare an accelerated model with its own forward: outputs, and in training the buffers it leaves.

    Args:
        model: accelerated; only copies of it run.
        x: an input, floating.
        restore: makes a copy plain.

    Raises:
        WrnFastError: an output is out of bounds, or x is not what the model takes; the message has the cells.
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise WrnFastError(f"`check`: expected a floating tensor that the model takes, got {type(x).__name__}")
    noise = torch.Generator(device="cpu").manual_seed(0)
    inputs = [x.detach()] + [
        x.detach() * (1 + 0.05 * torch.randn(x.shape, generator=noise, device="cpu")).to(x)
        for _ in range(parity.SEEDS - 1)
    ]
    for training in (False, True) if x.shape[0] > 1 else (False,):
        eager, fast = restore(copy.deepcopy(model)).train(training), copy.deepcopy(model).train(training)
        eager = eager.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        oracle = restore(copy.deepcopy(model)).double().train(training)
        for module in fast.modules():
            if isinstance(module, FastUserBlock) and "_fast_recipe" in module.__dict__:
                recipe = module.__dict__["_fast_recipe"]
                template = recipe.template._replace(drop=None)
                module.__dict__["_fast_recipe"] = recipe._replace(template=template)
        _compare(fast, eager, oracle, inputs, "training" if training else "eval")


def _compare(fast: nn.Module, eager: nn.Module, oracle: nn.Module, inputs: list[Tensor], mode: str) -> None:
    pools: dict[str, parity.Pool] = {}
    for x in inputs:
        results = []
        for module, v in ((fast, x), (eager, x), (oracle, x.double())):
            layout = torch.channels_last if v.dim() == 4 else torch.preserve_format
            try:
                results.append(_observe(module, v.contiguous(memory_format=layout)))
            except WrnFastError:
                raise
            except Exception as error:
                raise WrnFastError(f"`check`: expected an input that the model takes, got {error!r}") from error
        names = set(results[0]) & set(results[1]) & set(results[2])
        if any(set(result) != names for result in results):
            raise WrnFastError("`check`: the accelerated model returns another structure; it is restored")
        for name in results[0]:
            got, plain, want = (result[name] for result in results)
            # convolutions with fewer multiplications have a bound of their own
            own = "f4" if got.dtype == torch.float32 else None
            pool = pools.setdefault(name, parity.Pool(f"{mode}, {name}", got.dtype, algorithm=own))
            pool.add(got, plain, want)
    # An output that is mostly zero (a feature after ReLU) is no reason to distrust the model.
    cells = [pool.judge() for pool in pools.values()]
    bad = [str(cell) for cell in cells if cell.verdict == parity.OUT_OF_BOUNDS]
    if bad:
        listed = "\n".join(bad)
        raise WrnFastError(f"`check`: the accelerated model differs from its own forward; it is restored\n{listed}")


@torch.no_grad()
def _observe(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with _NoDropout():
        leaves = [v for v in tree_leaves(module(x)) if isinstance(v, Tensor) and v.dtype.is_floating_point]
    seen = {f"output {i}": v for i, v in enumerate(leaves)}
    if module.training:
        seen |= {f"buffer {k}": v.clone() for k, v in module.named_buffers() if v.dtype.is_floating_point}
    return seen
