"""CUDA graphs: a small batch is bound by the host's launches, and a graph replays them all with one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wrn_fast.errors import WrnFastError
from wrn_fast.held import Held

_DEVICE = "cuda"
# Before a capture: kernels are compiled and proved, memory is reserved, libraries have chosen.
_WARMUP = 3


class Graphed:
    """What `graphed` gives: calls like the model, on inputs of the example's shape."""

    def __init__(self, model: nn.Module, example: Tensor, run: Callable[[Tensor], Any], held: Held) -> None:
        self.model, self.training, self._held = model, model.training, held
        self._shape, self._dtype, self._device = example.shape, example.dtype, example.device
        self._run = run

    def __call__(self, x: Tensor) -> Any:
        """The model's output for x, in tensors of its own.

        Raises:
            WrnFastError: x differs from the example in shape, dtype or device, or the model from its mode at capture;
                a parameter, buffer or module of the model was replaced or moved since.
        """
        if (x.shape, x.dtype, x.device) != (self._shape, self._dtype, self._device):
            raise WrnFastError(
                f"`x`: expected {self._dtype} {list(self._shape)} on {self._device} as captured, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
        if self.model.training != self.training:
            was, now = ("train", "eval") if self.training else ("eval", "train")
            raise WrnFastError(f"`model`: expected {was}() mode as captured, got {now}(): capture it again")
        self._held.renew()
        return self._run(x)


class _Whole(nn.Module):
    """A module of its own around the model, because `make_graphed_callables` replaces its module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """The model as a CUDA graph: one launch a call instead of a hundred, for latency at small batches.

    In eval mode under `torch.no_grad()` (or with no parameter that requires a gradient) the forward pass is captured;
    else forward and backward are, and the result is differentiable. Dropout masks are drawn at each replay.

    Weights and statistics may be changed in place between replays, by `load_state_dict` or training, and are followed.
    In eval mode packed filters and folded BatchNorms are made outside of the graph: a call looks at the version
    counters first and makes them again if one has moved; for writes that no counter shows (fused
    optimizers, `.data`) it folds anew in any case and compares samples of the filters on the device. After such a write
    to a few elements of a filter call `refresh(model)`. A parameter, buffer or module that was replaced or moved makes
    the next call raise.

    Args:
        model: on a CUDA device, in the mode in which it will run.
        example: an input [N, C, H, W] on the same device; later inputs must have its shape and dtype.

    Returns:
        A callable of one tensor. The model itself is left as it was, statistics and counters too.

    Raises:
        WrnFastError: the example is not on a CUDA device.

    Numerics: bit-equal to the model without a graph, given the same random state.
    """
    if not isinstance(example, Tensor):
        raise WrnFastError(f"`example`: expected a tensor, got {type(example).__name__}")
    if example.device.type != _DEVICE:
        raise WrnFastError(f"`example`: expected a tensor on a CUDA device, got one on {example.device}")
    gradients = torch.is_grad_enabled() and (example.requires_grad or any(p.requires_grad for p in model.parameters()))
    held = Held(model)
    with _buffers_kept(model):
        if gradients:
            run = torch.cuda.make_graphed_callables(
                _Whole(model), (example.detach().clone().requires_grad_(example.requires_grad),), _WARMUP
            )
        else:
            with contextlib.nullcontext() if model.training else held.collecting():
                run = _inference(model, example)
    held.settle()
    return Graphed(model, example, run, held)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics and counters after the block are those from before: warming up is no training."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` of every tensor of an output: a tensor, or tuples, lists and dictionaries of them."""
    return torch.utils._pytree.tree_map(lambda v: function(v) if isinstance(v, Tensor) else v, value)


def _inference(model: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    static = example.detach().clone()
    with torch.no_grad():
        replay, output = _capture(lambda: model(static))

    def run(x: Tensor) -> Any:
        with torch.no_grad():
            static.copy_(x)
            replay()
            return _map(torch.clone, output)

    return run


def _capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(replay, the output that a replay writes)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph.replay, output
