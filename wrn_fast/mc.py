"""Monte-Carlo dropout: many stochastic forwards of the same images, as few operator calls as memory allows."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wrn_fast import reference
from wrn_fast.block import BlockParts, FastBlock, enter_block, hooked, leave_block, run_parts
from wrn_fast.checks import check_model
from wrn_fast.convert.swap import FastUserBlock
from wrn_fast.errors import WrnFastError
from wrn_fast.model import NetworkBlock, WideResNet

MEMORY = 1 << 30
# Activations of a block that live at once: x, h, y, and one on the way.
_ALIVE = 4


class MCPrediction(NamedTuple):
    """What many stochastic forwards say, images first except where said.

    Fields:
        mean: [N, K], the mean over samples of p = softmax(output).
        variance: [N, K], the variance of p over samples (divided by their number).
        entropy: [N], predictive entropy H(mean), in nats.
        mutual_information: [N], H(mean) - mean(H(p)): how much the samples disagree.
        features: [samples, N, F], each sample's feature; None where the model gives logits only.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor
    mutual_information: Tensor
    features: Tensor | None


@torch.no_grad()
def mc_predict(
    model: nn.Module,
    x_or_loader: Tensor | Iterable,
    samples: int,
    *,
    generator: torch.Generator | None = None,
    memory: int | None = None,
) -> MCPrediction:
    """Predictions under dropout: `samples` stochastic forwards an image, BatchNorm in eval.

        p_t = softmax(model_t(x)),  mean = 1/T sum p_t,  H(p) = -sum p log p,  MI = H(mean) - 1/T sum H(p_t)

    Equal in distribution to `samples` separate forwards. A `wrn_fast.WideResNet` computes what lies before the first
    dropout once; any other model gets its images repeated.

    Args:
        model: with dropout inside: a WideResNet of this package, an accelerated model, or any with dropout modules. Its
            training flags are as before afterwards. A compiled model runs uncompiled.
        x_or_loader: images [N, 3, H, W], or an iterable of them (of tuples that start with them), such as a DataLoader,
            which shows a progress bar on a terminal.
        samples: forwards an image, at least 1.
        generator: a CPU generator; the same state gives the same result (for equal `memory`), and the default
            generators stay untouched. None: the default generators draw.
        memory: bytes that the activations of one batch of samples may take; 1 GiB by default.

    Returns:
        MCPrediction, on the device of the outputs.

    Raises:
        WrnFastError: an argument is of another type, `samples` or `memory` is not positive, the model has no dropout,
            or it returns no [N, K] outputs.

    Numerics: probabilities, entropies and moments in float32 (float64 for float64 outputs), two passes.
    Source: Gal and Ghahramani, Dropout as a Bayesian Approximation (ICML 2016); Houlsby et al., Bayesian Active
    Learning (2011) for the mutual information.
    """
    check_model(model)
    if not isinstance(samples, Integral) or samples < 1:
        raise WrnFastError(f"`samples`: expected an integer of at least 1, got {samples!r}")
    budget = MEMORY if memory is None else memory
    if not isinstance(budget, Real) or budget < 1:
        raise WrnFastError(f"`memory`: expected a positive number of bytes, got {memory!r}")
    if not isinstance(x_or_loader, Iterable):
        raise WrnFastError(f"`x_or_loader`: expected images or batches of them, got {type(x_or_loader).__name__}")
    model = getattr(model, "_orig_mod", model)  # flags and the measured run below would only make it compile again
    with _dropping(model), _drawing(model, generator):
        batches = [x_or_loader] if isinstance(x_or_loader, Tensor) else _tracked(x_or_loader)
        parts = [_summary(*_sampled(model, _images(batch), samples, budget)) for batch in batches]
    if not parts:
        raise WrnFastError("`x_or_loader`: expected at least one batch, got none")
    samples_of = [p.features for p in parts if p.features is not None]
    return MCPrediction(
        torch.cat([p.mean for p in parts]),
        torch.cat([p.variance for p in parts]),
        torch.cat([p.entropy for p in parts]),
        torch.cat([p.mutual_information for p in parts]),
        torch.cat(samples_of, 1) if samples_of else None,
    )


def _images(batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, Tensor):
        raise WrnFastError(f"`x_or_loader`: expected batches of tensors, got {type(x).__name__}")
    return x


def _tracked(loader: Iterable) -> Iterator:
    """The loader with a progress bar, where there is a terminal to show it."""
    progress = importlib.import_module("rich.progress")
    console = importlib.import_module("rich.console").Console(stderr=True)
    total = len(loader) if isinstance(loader, Sized) else None
    yield from progress.track(
        loader, "Monte-Carlo dropout", total, console=console, disable=not console.is_terminal, transient=True
    )


@contextmanager
def _dropping(model: nn.Module) -> Iterator[None]:
    """Eval, with dropout on; every flag is put back."""
    modules = list(model.modules())
    flags = [(m, "training", m.training) for m in modules]
    switches: list[tuple[nn.Module, str]] = []
    # the reference has a dropout module that its forward does not use
    unused = {id(m.dropout) for m in modules if isinstance(m, reference.WideResNet)}
    for m in modules:
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and id(m) not in unused:
            switches.append((m, "training"))
        elif isinstance(m, reference.BasicBlock) and m.droprate > 0:
            switches.append((m, "dropout_in_eval"))
        elif isinstance(m, FastUserBlock) and "_fast_recipe" in m.__dict__:
            template = m.__dict__["_fast_recipe"].template
            if template is not None and template.drop is not None and template.drop.follows in ("block", "always"):
                switches.append((m, "training"))  # type: ignore[arg-type]
    if not switches:
        raise WrnFastError(
            "`model`: expected dropout with a probability above 0; dropout by F.dropout is found in accelerated blocks"
        )
    before = flags + [(m, name, getattr(m, name)) for m, name in switches if name != "training"]
    try:
        model.eval()
        for m, name in switches:
            setattr(m, name, True)
        yield
    finally:
        for m, name, value in before:
            setattr(m, name, value)


@contextmanager
def _drawing(model: nn.Module, generator: torch.Generator | None) -> Iterator[None]:
    """Draws from `generator` through the default generators, which are put back."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(0, 2**63 - 1, (), generator=generator))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        with torch.random.fork_rng([device.index or 0], device_type=device.type):
            torch.manual_seed(seed)
            yield


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes inside."""

    nbytes = 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(o, Tensor):
                self.nbytes = max(self.nbytes, o.nbytes)
        return out


def _sampled(model: nn.Module, x: Tensor, samples: int, budget: int) -> tuple[Tensor, Tensor | None]:
    """(outputs [S, N, K], features [S, N, F] or None)."""
    stage = _stage(model, x)
    runs, left = [], samples
    largest = stage.largest
    if not largest:
        with _Largest() as seen:
            runs.append(stage.finish(1))
        largest, left = seen.nbytes, samples - 1
    room = max(1, int(budget // (_ALIVE * largest)))
    while left > 0:
        count = min(room, left)
        runs.append(stage.finish(count))
        left -= count
    outputs, features = zip(*runs, strict=True)
    return torch.cat(outputs), None if features[0] is None else torch.cat(features)


class _Stage:
    """A model with its input: `finish(s)` gives s samples as ([s, N, K], [s, N, F] or None)."""

    largest = 0  # bytes of the largest activation of one sample; 0: a first sample has to tell

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    def finish(self, count: int) -> list[Tensor | None]:
        """Everything, on repeated images."""
        result = self.model(torch.cat([self.x] * count))
        if isinstance(result, Mapping):
            values = list(result.values())
            named = [result.get("logits"), result.get("feat")]
            found = named if isinstance(named[0], Tensor) else values
        else:
            found = list(result) if isinstance(result, (tuple, list)) else [result]
        return _split(found[0], found[1] if len(found) > 1 else None, count)


def _split(out: Any, feature: Any, count: int) -> list[Tensor | None]:
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise WrnFastError(f"`model`: expected outputs [N, K] first, got {got}")
    usable = isinstance(feature, Tensor) and feature.dim() == 2 and feature.shape[0] == out.shape[0]
    return [v.unflatten(0, (count, -1)) if v is not None else None for v in (out, feature if usable else None)]


class _SharedStage(_Stage):
    """This package's WideResNet: what lies before the first dropout is computed once."""

    def __init__(self, model: WideResNet, x: Tensor, parts: list[BlockParts]) -> None:
        super().__init__(model, x)
        model._check(x)
        y = model.conv1(x)
        at = next(i for i, p in enumerate(parts) if p.p > 0)
        y = run_parts(parts[:at], y)
        self.first, self.rest, self.y = parts[at], parts[at + 1 :], y
        self.entered = enter_block(self.first, y, None)
        # groups halve each side and double the width: what comes later is smaller
        self.largest = max(y.nbytes, self.entered[1].nbytes)

    def finish(self, count: int) -> list[Tensor | None]:
        """From the first dropout on."""
        first, h, norm = self.entered
        y, _ = leave_block(self.first, torch.cat([self.y] * count), first, torch.cat([h] * count), norm, False)
        y = run_parts(self.rest, y)
        model = self.model
        assert isinstance(model, WideResNet)
        result = model.finish(y)
        # The cosine head has made the feature already.
        out, feature = result if isinstance(result, tuple) else (result, model.pooled(y))
        return _split(out, feature, count)


def _stage(model: nn.Module, x: Tensor) -> _Stage:
    """The shared road where the model is our own and nobody listens to its parts."""
    if not isinstance(model, WideResNet) or hooked(model):
        return _Stage(model, x)
    found: list[BlockParts] = []
    for group in (model.block1, model.block2, model.block3):
        for unit in group.units() if isinstance(group, NetworkBlock) else [group]:
            parts = unit.parts() if isinstance(unit, FastBlock) and not hooked(unit) else None  # type: ignore[arg-type]
            if parts is None:
                return _Stage(model, x)
            found.append(parts)
    return _SharedStage(model, x, found) if any(p.p > 0 for p in found) else _Stage(model, x)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def _summary(outputs: Tensor, features: Tensor | None) -> MCPrediction:
    p = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).softmax(-1)
    mean = p.mean(0)
    variance = (p - mean).square().mean(0)
    entropy = _entropy(mean)
    return MCPrediction(mean, variance, entropy, entropy - _entropy(p).mean(0), features)
