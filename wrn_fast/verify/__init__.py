"""Parity of two models from end to end: is the fast one as near to the truth as plain PyTorch is?

The protocol and every bound are in `wrn_fast/parity.py`. A weight-sharing candidate and reference go through the same
work (`trace.py`) on the same weights and images; the reference in float64 is the oracle, in the tested dtype the peer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wrn_fast import machine, parity, random, reference
from wrn_fast.block import FastBlock
from wrn_fast.checks import check_model
from wrn_fast.convert import restore
from wrn_fast.convert.swap import Swapped
from wrn_fast.errors import WrnFastError
from wrn_fast.model import WideResNet
from wrn_fast.precision import current
from wrn_fast.verify.report import COLUMNS, Report, Row, markdown
from wrn_fast.verify.trace import Task, Trace, Tracer, tensors_in

__all__ = ["COLUMNS", "DTYPES", "Report", "Row", "markdown", "misfit", "reference_of", "verify"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_ACTS: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.LeakyReLU: "leaky_relu"}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_KINKED = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Threshold)
_SMOOTH = (nn.SiLU, nn.GELU, nn.Softplus, nn.Mish, nn.ELU, nn.Tanh, nn.Sigmoid)


def verify(
    a: nn.Module,
    b: nn.Module | None = None,
    *,
    seeds: int = parity.SEEDS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    steps: int = 3,
    batch: int = 4,
    size: int = 32,
    channels: int = 3,
    device: str | torch.device = "cpu",
    randomize: bool = True,
    first_seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare a model with a plain PyTorch one that has the same weights, against a float64 oracle.

        rms(||a - oracle|| / ||oracle||) <= 1.25 * rms(||eager - oracle|| / ||oracle||) + u       over the seeds

    Compared are, in eval: outputs (every floating tensor of a pair, list or dictionary), the gradient of every
    parameter and of the images, and the latter again with the weights frozen; in training: the same, running
    statistics, the change of every weight after the optimizer steps, and the outputs of the same object afterwards.

    Args:
        a: the candidate. Neither model is changed: copies are run.
        b: its plain PyTorch counterpart, whose float64 copy is the oracle and whose own-dtype copy is eager. It takes
            a's weights by `load_state_dict(strict=True)`. None: `reference_of(a)`, for a
            `wrn_fast.WideResNet` and for what `accelerate` made fast.
        seeds: how many draws of images, statistics and affine parameters; at least 8 unless float64 is alone.
        dtypes: float32, float64; bfloat16 and float16 are autocast over float32 weights.
        steps: SGD steps with momentum 0.9 and weight decay, at least 1.
        batch, channels, size: of the images, drawn from a normal distribution.
        device: where all of it runs.
        randomize: draw BatchNorm's affine parameters and running statistics anew; False keeps those of `a`, as is right
            for trained weights.
        first_seed: replays a run; None draws one, and the report has it.
        progress: called with (models run, models to run).

    Returns:
        A `Report`; `report.ok` is the verdict, `print(report)` the table, `report.to_json()` everything.

    Raises:
        WrnFastError: the models do not fit together (weights, outputs), are random with dropout off, or an argument is
            outside what is listed here.

    Numerics:
        Errors are computed in float64. Dropout is off in both copies, except for the built-in pair: there the reference
        drops by the masks that the drop-in draws.

    Source: `wrn_fast/parity.py`.
    """
    _check_arguments(seeds, dtypes, steps, batch)
    check_model(a, "a")
    if b is not None:
        check_model(b, "b")
    began = time.perf_counter()
    device = torch.device(device)
    base = copy.deepcopy(a).to(device, torch.float32)
    plain = (reference_of(a) if b is None else copy.deepcopy(b)).to(device, torch.float32)
    masks = isinstance(base, WideResNet) and type(plain) is reference.WideResNet
    if not masks:
        _no_dropout(base)
        _no_dropout(plain)
    _check_fit(base, plain)
    plain.load_state_dict(base.state_dict(), strict=True)
    rule = "pooled" if _smooth(plain) else "median"
    first_seed = int(torch.randint(2**31, ())) if first_seed is None else first_seed
    pools: dict[tuple[torch.dtype, str], parity.Pool] = {}
    total, done = seeds * (1 + sum(2 if dtype == torch.float64 else 3 for dtype in dtypes)), 0

    def ran(trace: Trace) -> Trace:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)
        return trace

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for seed in range(first_seed, first_seed + seeds):
            generator = torch.Generator().manual_seed(seed)
            images = [torch.randn(batch, channels, size, size, generator=generator).double() for _ in range(steps)]
            if randomize:
                _randomize(plain, images[0], generator)
                base.load_state_dict(plain.state_dict(), strict=True)
            task = Task(images, seed)
            oracle = _masked(copy.deepcopy(plain).double())
            if seed == first_seed and not masks:
                _check_repeats(copy.deepcopy(oracle), task)
            want = ran(Tracer(oracle, None, False, False).run(task))
            del oracle
            for dtype in dtypes:
                wide = dtype if dtype == torch.float64 else torch.float32
                autocast = dtype if dtype.itemsize == 2 else None
                peer = ran(Tracer(_masked(copy.deepcopy(plain).to(wide)), autocast, True, False).run(task))
                nchw = None
                if dtype != torch.float64:
                    nchw = ran(Tracer(_masked(copy.deepcopy(plain)), autocast, False, False).run(task))
                # Both layouts are given to the candidate, one after the other.
                fast = ran(Tracer(copy.deepcopy(base).to(wide), autocast, bool(seed % 2), True).run(task))
                for name in want:
                    key = (dtype, name)
                    if key not in pools:
                        pools[key] = parity.Pool(name, dtype, _rule(name, rule), _algorithm(name, want[name]))
                    _compare(pools[key], fast.get(name), peer[name], want[name], nchw[name] if nchw else None)
                _check_outputs(want, fast)
    settings = {
        "candidate": _title(a), "reference": _title(plain), "seeds": seeds, "first seed": first_seed, "batch": batch,
        "size": size, "steps": steps, "gradients": rule, "BatchNorm": "drawn" if randomize else "the model's own",
        "precision": current(),
    }  # fmt: skip
    cells = tuple(pool.judge() for pool in pools.values())
    return Report(cells, settings, machine.head(device), time.perf_counter() - began)


def _check_arguments(seeds: int, dtypes: Sequence[torch.dtype], steps: int, batch: int) -> None:
    least = 1 if set(dtypes) == {torch.float64} else parity.SEEDS
    if seeds < least:
        raise WrnFastError(f"`seeds`: expected at least {least} (fewer fail right code by luck), got {seeds}")
    for dtype in dtypes:
        if dtype != torch.float64 and dtype not in parity.UNIT:
            raise WrnFastError(f"`dtypes`: expected float64, float32, float16 or bfloat16, got {dtype}")
    if not dtypes:
        raise WrnFastError("`dtypes`: expected at least one dtype, got none")
    if steps < 1 or batch < 1:
        raise WrnFastError(f"`steps` and `batch`: expected at least 1, got {steps} and {batch}")


def reference_of(model: nn.Module) -> nn.Module:
    """The plain PyTorch counterpart of a fast model, with the same weights.

    For a `wrn_fast.WideResNet` the reference with its arguments, for an accelerated model a copy with its own forward.

    Raises:
        WrnFastError: `model` is neither, so its counterpart has to be given.
    """
    if not isinstance(model, reference.WideResNet):
        plain = restore(copy.deepcopy(model))
        if not _is_fast(model) or _is_fast(plain):
            raise WrnFastError(f"`b`: expected the plain model to compare a {type(model).__name__} with, got None")
        return plain
    block: Any = model.block1.layer[0]
    built = reference.WideResNet(
        _depth(model), model.fc.out_features, model.nChannels // 64, block.droprate, head=model.head,
        dropout_in_eval=block.dropout_in_eval, pool=model.pool, act=_ACTS[type(block.relu1)], block=model.block,
    )  # fmt: skip
    built.load_state_dict(model.state_dict(), strict=True)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return built.train(model.training)


def _is_fast(model: nn.Module) -> bool:
    """Is something in it computed by this package?"""
    return any(isinstance(m, (FastBlock, Swapped)) for m in model.modules())


def _depth(model: reference.WideResNet) -> int:
    return 3 * len(reference.kernel_sizes(model.block)) * len(model.block1.layer) + 4


def _title(model: nn.Module) -> str:
    text = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, reference.WideResNet):
        block: Any = model.block1.layer[0]
        text = "wrn_fast.WideResNet" if isinstance(model, WideResNet) else "the reference"
        shape = _depth(model), model.fc.out_features, model.nChannels // 64, block.droprate
        kind = f", block={model.block!r}" if model.block != reference.BLOCKS[0] else ""
        text += f"({', '.join(map(str, shape))}, head={model.head!r}, act={_ACTS[type(block.relu1)]!r}{kind})"
    if isinstance(model, WideResNet) or not _is_fast(model):
        return text
    return f"accelerate({text})"


def _smooth(model: nn.Module) -> bool:
    """Are all activations that the model shows known to be smooth? Then a gradient is no lottery."""
    kinds = [type(m) for m in model.modules()]
    return any(issubclass(k, _SMOOTH) for k in kinds) and not any(issubclass(k, _KINKED) for k in kinds)


def _rule(name: str, gradients: str) -> str:
    """What the sign of one pre-activation can move is judged as gradients are."""
    mode, quantity, _ = name.split("/", 2)
    return gradients if mode == "steps" or "gradient" in quantity else "pooled"


def _algorithm(name: str, want: Tensor | None) -> str | None:
    """A filter's gradient comes straight out of one wgrad, whose own bound holds for it."""
    filters = want is not None and want.dim() == 4 and not name.endswith("/input")
    return "wgrad" if filters and "/gradients/" in name else None


def _no_dropout(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, _DROPOUT):
            m.p = 0.0
        for name in ("droprate", "dropRate", "drop_rate", "dropout_rate"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)


def _masked(model: nn.Module) -> nn.Module:
    """The reference with its dropout drawn as the drop-in draws it: before the last convolution of each block."""
    for block in model.modules():
        if type(block) is reference.BasicBlock and block.droprate > 0:
            _mask_block(block)
    return model


def _mask_block(block: reference.BasicBlock) -> None:
    p, block.droprate = block.droprate, 0.0

    def drop(module: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        if not (module.training or block.dropout_in_eval):
            return None
        return random.dropout(args[0], random.draw(args[0].device), p)

    block.get_submodule(f"conv{block.deepening}").register_forward_pre_hook(drop)


@torch.no_grad()
def _randomize(plain: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """BatchNorm away from 1, 0, 0, 1, at the scale of a trained network.

    Affine parameters are drawn, a few scales negative and one zero; statistics are those of `images`, then moved.
    Statistics that do not belong to the activations would let them grow from block to block, and the outputs would
    show the last blocks only.
    """

    def draw(low: float, high: float, like: Tensor) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like.device)

    layers: list[Any] = [m for m in plain.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in layers]
    for m in layers:
        m.reset_running_stats()
        m.momentum = None
        if m.affine:
            scale = draw(0.5, 1.5, m.weight) * torch.where(draw(0.0, 1.0, m.weight) < 0.125, -1.0, 1.0)
            scale[0] = 0.0
            m.weight.copy_(scale)
            m.bias.copy_(draw(-0.5, 0.5, m.bias))
    weight = next(plain.parameters())
    plain.train()(images.to(weight.device, weight.dtype))
    for m, momentum in zip(layers, momenta):
        m.momentum = momentum
        if m.running_mean is not None and m.running_var is not None:
            m.running_mean.add_(draw(-0.5, 0.5, m.running_mean) * m.running_var.sqrt())
            m.running_var.mul_(draw(0.5, 2.0, m.running_var))


def misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """What keeps `given` from being loaded strictly where `wanted` is, in one sentence; None if nothing does."""
    parts = []
    for verb, names in (("lacks", wanted.keys() - given.keys()), ("has", given.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"it {verb} {', '.join(sorted(names)[:3])}{more}")
    for name in sorted(wanted.keys() & given.keys()):
        if wanted[name].shape != given[name].shape:
            parts.append(f"{name} is {list(given[name].shape)} for {list(wanted[name].shape)}")
            break
    return "; ".join(parts) or None


def _check_fit(base: nn.Module, plain: nn.Module) -> None:
    reason = misfit(plain.state_dict(), base.state_dict())
    if reason is not None:
        raise WrnFastError(f"`b`: expected a model that loads the weights of a, got a state_dict where {reason}")


def _check_repeats(model: nn.Module, task: Task) -> None:
    """The oracle must give the same outputs whatever the generator says, or there is nothing to compare with."""
    x = task.images[0].to(next(model.parameters()).device)
    seen = []
    for seed in (task.seed, task.seed + 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            seen.append(dict(tensors_in(model.train()(x))))
    for name, first in seen[0].items():
        if parity.error(seen[1][name], first) > parity.FLOAT64:
            raise WrnFastError(f"`b`: expected equal outputs for equal inputs, but output {name} is random (dropout?)")


def _check_outputs(want: Trace, fast: Trace) -> None:
    missing = sorted(set(want) ^ set(fast))
    if missing:
        raise WrnFastError(f"`a`: expected the outputs and parameters of b, but only one of them has {missing[0]}")


def _compare(
    pool: parity.Pool, fast: Tensor | None, eager: Tensor | None, want: Tensor | None, nchw: Tensor | None
) -> None:
    """One seed of one tensor. A gradient must be there exactly where the oracle has one."""
    if want is None and fast is None:
        pool.add_errors(0.0, 0.0, 0.0)
    elif want is None or fast is None or eager is None:
        pool.add_errors(float("inf"), 0.0, 0.0)
    elif "/statistics/" in pool.name:
        # Exactly zero is right for the buffers of a layer that forward does not run.
        beside = None if nchw is None else parity.error(nchw, want)
        pool.add_errors(parity.error(fast, want), parity.error(eager, want), beside)
    else:
        pool.add(fast, eager, want, nchw)
