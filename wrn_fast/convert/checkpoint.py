"""`load_checkpoint`: weights of any known repository into a fast model, with a report of what did not fit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from wrn_fast.convert import archive
from wrn_fast.convert.entry import accelerate
from wrn_fast.convert.keys import Names, translate
from wrn_fast.convert.network import ACTS, FamilyNet, Plan
from wrn_fast.convert.report import Report
from wrn_fast.errors import WrnFastError
from wrn_fast.model import WideResNet
from wrn_fast.reference import BLOCKS

FAMILIES: dict[str, dict[str, Any]] = {
    "x": {},
    "dm": {"act": "silu", "pad_right": True, "momentum": 0.01},
    "ssl": {"act": "leaky_relu", "conv1_reads_x": True, "momentum": 0.001},
    "m": {"shortcut_reads_x": True, "stride_on_conv2": True, "drop_at": "output"},
    "residual": {"shortcut_reads_x": True, "dropRate": 0.5},
}
_OPTIONS = ("family", "act", "head", "dropRate", "dropout_in_eval", "eps", "momentum", "pad_right")


@dataclass(frozen=True)
class LoadReport(Report):
    """Result of `load_checkpoint`.

    Args:
        loaded: how many of the file's tensors are in the model.
        left: names in the file that are not, each with its reason in `why`.
        plan: the network that was inferred, as text.
        notes: what the tensors could not say and was assumed, and what was done on the way.
    """

    loaded: int = 0
    plan: str = ""
    why: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.plan}: {self.loaded} tensors loaded, {len(self.left)} left"]
        lines += [f"  left: {name}: {self.why[name]}" for name in self.left]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def load_checkpoint(
    src: str | os.PathLike | bytes | BinaryIO | Mapping[str, Any], arch: str | Mapping[str, Any] | None = None
) -> tuple[nn.Module, LoadReport]:
    """A fast model in eval mode with the weights of a checkpoint, whatever repository wrote it.

    Depth, widths, classes, family and head are read from the tensors; `wrn_fast.WideResNet` where it computes that
    family, else a network of the family, accelerated.

    Args:
        src: a file (torch.save's or safetensors), its bytes, or a dict: the weights, or what contains them. Prefixes
            such as `module.` and containers such as `state_dict` are seen through.
        arch: what tensors cannot say. A family ("x", "dm", "ssl", "m", "residual"), or a dict with some of family,
            act, head ("classic", "cosine"), dropRate, dropout_in_eval, eps, momentum, pad_right.

    Returns:
        (model, LoadReport): print the report: it lists every assumption and every tensor that did not fit.

    Raises:
        WrnFastError: the file is damaged or hostile (nothing in it is run, and nothing is allocated that it does not
            hold), of no known family, a weight is missing or has the wrong shape, or values are not finite.

    Numerics: weights are float32 in the model, whatever the file has.
    """
    options = _options(arch)
    loaded = src if isinstance(src, Mapping) else archive.read(src)
    tensors, notes = archive.state_dict(loaded)
    names = translate(tensors)
    # What is left in the file may be anything: the counters and queues of a trainer are.
    archive.check_tensors({key: tensors[key] for key in (*names.canonical, names.mean, names.std) if key})
    plan = infer(names, {name: tensors[key] for key, name in names.canonical.items()}, options, notes)
    model = build(plan)
    count, left = _fill(model, plan, names, tensors)
    if isinstance(model, FamilyNet):
        accelerate(model, require=True)
    notes.append(f"names of the scheme {names.scheme.name}" + (f", prefix {names.prefix!r}" if names.prefix else ""))
    report = LoadReport((), tuple(left), left, tuple(notes), count, str(plan))
    return model.eval(), report


def _options(arch: str | Mapping[str, Any] | None) -> dict[str, Any]:
    options = {"family": arch} if isinstance(arch, str) else dict(arch or {})
    for key in options:
        if key not in _OPTIONS:
            raise WrnFastError(f"`arch`: expected some of {', '.join(_OPTIONS)}, got {key!r}")
    if options.get("family", "x") not in FAMILIES:
        raise WrnFastError(f"`arch`: expected a family out of {', '.join(FAMILIES)}, got {options['family']!r}")
    if options.get("act", "relu") not in ACTS:
        raise WrnFastError(f"`arch`: expected act out of {', '.join(ACTS)}, got {options['act']!r}")
    if options.get("head", "classic") not in ("classic", "cosine"):
        raise WrnFastError(f"`arch`: expected head 'classic' or 'cosine', got {options['head']!r}")
    return options


def _need(weights: Mapping[str, Tensor], name: str, dim: int) -> Tensor:
    if name not in weights:
        raise WrnFastError(f"`src`: a weight is missing: {name}")
    if weights[name].dim() != dim:
        raise WrnFastError(f"`src`: {name}: expected {dim} dimensions, got shape {list(weights[name].shape)}")
    return weights[name]


def infer(names: Names, weights: dict[str, Tensor], options: dict[str, Any], notes: list[str]) -> Plan:
    """The plan behind canonical weights; what is assumed goes to `notes`."""
    blocks: dict[int, set[int]] = {}
    for name in weights:
        match = re.match(r"(\d+)\.(\d+)\.", name)
        if match:
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    groups = sorted(blocks)
    if groups != list(range(1, len(groups) + 1)) or any(b != set(range(len(b))) for b in blocks.values()):
        raise WrnFastError(
            f"`src`: expected blocks numbered without gaps, got { ({g: sorted(blocks[g]) for g in groups}) }"
        )
    counts = tuple(len(blocks[g]) for g in groups)
    stem, fc = _need(weights, "conv1.weight", 4), _need(weights, "fc.weight", 2)
    widths = (stem.shape[0], *(_need(weights, f"{g}.0.conv1.weight", 4).shape[0] for g in groups))
    shortcuts = frozenset(
        (g - 1, i) for g in groups for i in range(counts[g - 1]) if f"{g}.{i}.convShortcut.weight" in weights
    )
    family = options.get("family") or _family(names, weights, len(groups), notes)
    known = dict(FAMILIES[family])
    head_bias = "fc.bias" in weights
    if "head" not in options:
        known["head"] = "cosine" if not head_bias and _orthonormal(fc) else "classic"
        if known["head"] == "cosine":
            known["dropout_in_eval"] = True
            notes.append("fc has orthonormal rows and no bias: the cosine head; its last bn1 is not used")
    if family == "dm" and "act" not in options:
        notes.append("the activation of family dm cannot be read from tensors: silu assumed, or arch={'act': 'relu'}")
    if "dropRate" not in options and not known.get("dropRate"):
        notes.append("the dropout rate cannot be read from tensors: 0 assumed, or arch={'dropRate': ...}")
    first = next((f"{g + 1}.{i}" for g, i in sorted(shortcuts)), "")
    sizes = [weights[name].shape[2:] for i in range(1, 5) if (name := f"1.0.conv{i}.weight") in weights]
    block = f"B({','.join('x'.join(map(str, set(size))) for size in sizes)})"
    if block not in BLOCKS:
        raise WrnFastError(f"`src`: expected a block type out of {', '.join(BLOCKS)}, got {block}")
    return Plan(
        counts, tuple(widths), fc.shape[0], family, head_bias=head_bias, stem_bias="conv1.bias" in weights,
        conv_bias="1.0.conv1.bias" in weights, short_bias=f"{first}.convShortcut.bias" in weights,
        shortcuts=shortcuts, normalised=names.mean is not None and names.std is not None, block=block,
    )._replace(**known | {k: v for k, v in options.items() if k != "family"})  # fmt: skip


def _family(names: Names, weights: Mapping[str, Tensor], groups: int, notes: list[str]) -> str:
    """X and SSL share their names; but a bn1 that the output does not depend on keeps its initial 1 and 0."""
    if names.scheme.name != "X":
        return names.scheme.family

    def untouched(g: int) -> bool:
        w, b = weights.get(f"{g}.0.bn1.weight"), weights.get(f"{g}.0.bn1.bias")
        return w is not None and b is not None and bool((w == 1).all()) and not b.any()

    later = [untouched(g) for g in range(2, groups + 1)]
    if later and all(later) and not untouched(1):
        notes.append("bn1 of the first blocks of groups 2 and 3 was never trained: family ssl; else arch='x'")
        return "ssl"
    return "x"


def _orthonormal(fc: Tensor) -> bool:
    rows = fc.double() @ fc.double().T
    # rows were made orthonormal in float32, or stored in 16 bits
    return bool((rows - torch.eye(len(rows), dtype=rows.dtype)).abs().max() < 2.0**-7)


def build(plan: Plan) -> nn.Module:
    """`wrn_fast.WideResNet` where it computes the plan, else the family's network. Its weights are not drawn."""
    own = {(0, 0)} if plan.widths[0] != plan.widths[1] else set()
    same = plan._replace(family="x", act="relu", num_classes=10, widths=(), counts=(), dropRate=0.0, head="classic",
                         head_bias=True, shortcuts=frozenset(), dropout_in_eval=False, block=BLOCKS[0])  # fmt: skip
    usual = same == Plan((), (), 10, "x") and plan.shortcuts == own | {(1, 0), (2, 0)}
    head = plan.head_bias == (plan.head == "classic")
    with torch.device("meta"):
        if usual and head and plan.depth is not None and plan.widen_factor is not None:
            model: nn.Module = WideResNet(
                plan.depth, plan.num_classes, plan.widen_factor, plan.dropRate, head=plan.head, act=plan.act,
                dropout_in_eval=plan.dropout_in_eval, block=plan.block,
            )  # fmt: skip
        elif plan.block != BLOCKS[0]:
            raise WrnFastError(f"`src`: expected the plain network round blocks other than {BLOCKS[0]}, got {plan}")
        else:
            model = FamilyNet(plan)
    return model.float()


def _fill(model: nn.Module, plan: Plan, names: Names, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, str]]:
    """Weights into the model; (how many, what was left and why)."""
    left = dict(names.left)
    state: dict[str, Tensor] = {}
    wanted = model.state_dict()
    sources = dict(names.canonical)
    if plan.normalised:
        sources |= {names.mean: "mean", names.std: "std"}  # type: ignore[dict-item]
    for key, name in sources.items():
        name = re.sub(r"^(\d+)\.(\d+)\.", r"block\1.layer.\2.", name)
        if name not in wanted:
            left[key] = "the model has no such weight"
            continue
        value = tensors[key]
        if plan.normalised and name in ("mean", "std") and value.numel() == 3:
            value = value.reshape(1, 3, 1, 1)
        if value.shape != wanted[name].shape:
            expected = list(wanted[name].shape)
            raise WrnFastError(f"`src`: {key!r}: expected shape {expected} for {plan}, got {list(value.shape)}")
        state[name] = value.detach().to(wanted[name].dtype).clone(memory_format=torch.contiguous_format)
    count = len(state)
    missing = []
    for name, like in wanted.items():
        if name in state:
            continue
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64, device="cpu")
        elif plan.head == "cosine" and name.startswith("bn1."):
            state[name] = torch.full_like(like, float(name.endswith(("weight", "var"))), device="cpu")
        else:
            missing.append(name)
    if missing:
        raise WrnFastError(f"`src`: {len(missing)} weights are missing for {plan}: {', '.join(missing[:6])}")
    model.load_state_dict(state, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.device.type == "meta":
            _rebuild(model, name, buffer)
    for name, p in model.named_parameters():
        p.requires_grad_(not (plan.head == "cosine" and name.startswith("fc.")))
    return count, left


def _rebuild(model: nn.Module, name: str, buffer: Tensor) -> None:
    """A buffer that no file has: the reference's ID_mat."""
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner).register_buffer(
        last, torch.eye(buffer.shape[0], dtype=buffer.dtype, device="cpu"), persistent=False
    )
