"""`wrn-fast verify`: parity of the drop-in, or of a model of yours, against plain PyTorch in float64."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from wrn_fast import parity, reference
from wrn_fast.convert import accelerate, archive, load_checkpoint
from wrn_fast.errors import WrnFastError
from wrn_fast.model import WideResNet
from wrn_fast.verify import COLUMNS, DTYPES, Report, markdown, misfit, verify
from wrn_fast.verify.training import train_briefly

NAME = "verify"
HELP = "parity of the drop-in, or of a model of yours, against plain PyTorch in float64"
_NAMES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILT_IN: dict[str, Any] = {
    "depth": 16, "width": 2, "classes": 10, "head": "cosine", "act": "relu", "dropout": 0.0, "block": "B(3,3)",
}  # fmt: skip
# What docs/parity.md shows: what differs from BUILT_IN, batch, steps, dtypes, and whether it is trained before.
PAGE: tuple[tuple[dict[str, Any], int, int, Sequence[torch.dtype], bool], ...] = (
    ({"width": 4}, 4, 3, DTYPES, False),
    ({"width": 4, "head": "classic"}, 4, 1, (torch.float32,), True),
    ({"width": 4, "head": "classic", "act": "silu", "dropout": 0.3}, 4, 2, (torch.float32, torch.bfloat16), False),
    ({"depth": 28, "width": 10, "head": "classic"}, 2, 1, (torch.float32,), False),
)


def options(parser: argparse.ArgumentParser) -> None:
    """The model, the work, the output."""
    model = parser.add_argument_group("the built-in pair: wrn_fast.WideResNet against the reference")
    model.add_argument("--depth", type=int, help=f"default {BUILT_IN['depth']}")
    model.add_argument("--width", type=int, help=f"widening factor, default {BUILT_IN['width']}")
    model.add_argument("--classes", type=int, help=f"default {BUILT_IN['classes']}")
    model.add_argument("--head", choices=reference.HEADS, help=f"default {BUILT_IN['head']}")
    model.add_argument("--act", choices=tuple(reference.ACTS), help="default relu; silu makes gradients comparable")
    model.add_argument("--dropout", type=float, help="default 0; both drop by the same masks")
    model.add_argument("--block", choices=reference.BLOCKS, help="kernel sizes of a block, default B(3,3)")
    own = parser.add_argument_group("weights or a model of yours")
    own.add_argument("--checkpoint", metavar="FILE", help="alone: the network is what its tensors say")
    own.add_argument("--model", metavar="PACKAGE.MODULE:FACTORY", help="called without arguments, then accelerated")
    own.add_argument("--against", metavar="PACKAGE.MODULE:FACTORY", help="compare --model as it is with this plain one")
    work = parser.add_argument_group("the work")
    work.add_argument("--dtype", nargs="+", choices=tuple(_NAMES), default=[_short(d) for d in DTYPES])
    work.add_argument("--seeds", type=int, default=parity.SEEDS, help=f"at least {parity.SEEDS}, the default")
    work.add_argument("--first-seed", type=int, help="replays a run")
    work.add_argument("--steps", type=int, default=3, help="optimizer steps (default 3)")
    work.add_argument("--batch", type=int, default=4, help="images (default 4)")
    work.add_argument("--size", type=int, default=32, help="of the images; not 32: global pooling")
    work.add_argument("--device", default="cpu")
    out = parser.add_argument_group("the output")
    out.add_argument("--all", action="store_true", help="a line for each tensor")
    out.add_argument(
        "--write", metavar="FOLDER", type=Path, help="verify some built-in pairs, write parity.json and .md"
    )


def run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], Sequence[Any]]:
    """Verify, and say it in every form."""
    if arguments.write is not None:
        return _write_page(arguments)
    candidate, plain = _models(arguments)
    with _progress() as progress:
        report = verify(
            candidate, plain, seeds=arguments.seeds, dtypes=[_NAMES[name] for name in arguments.dtype],
            steps=arguments.steps, batch=arguments.batch, size=arguments.size, device=_device(arguments.device),
            randomize=arguments.checkpoint is None, first_seed=arguments.first_seed, progress=progress,
        )  # fmt: skip
    return int(not report.ok), report.as_dict(), _lines(report, arguments.all)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WrnFastError(f"`--device`: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _models(arguments: argparse.Namespace) -> tuple[nn.Module, nn.Module | None]:
    """(candidate, its counterpart or None for `reference_of`)."""
    if arguments.against and not arguments.model:
        raise WrnFastError("`--against`: expected beside --model, got it alone")
    if not arguments.model:
        return _built_in(arguments), None
    model = _made("--model", arguments.model)
    plain = _made("--against", arguments.against) if arguments.against else None
    if arguments.checkpoint:
        load_weights(model, Path(arguments.checkpoint))
    return (accelerate(model, require=True) if plain is None else model), plain


def _built_in(arguments: argparse.Namespace) -> nn.Module:
    """The drop-in of the options, or what the checkpoint is."""
    given = {name: getattr(arguments, name) for name in BUILT_IN if getattr(arguments, name) is not None}
    if not arguments.checkpoint:
        return _drop_in(pool="window" if arguments.size == 32 else "global", **(BUILT_IN | given))
    told = {"head": "head", "act": "act", "dropout": "dropRate"}
    for name in given.keys() - told.keys():
        raise WrnFastError(f"`--{name}`: expected without --checkpoint, whose tensors say it, got {given[name]}")
    try:
        model, loaded = load_checkpoint(arguments.checkpoint, {told[name]: value for name, value in given.items()})
    except WrnFastError as error:
        raise WrnFastError(f"`--checkpoint` {arguments.checkpoint}: {error}") from None
    # What was assumed and what did not fit comes out with the other notes.
    warnings.warn(str(loaded), stacklevel=2)
    if isinstance(model, WideResNet) and arguments.size != 32:
        model.pool = "global"
    return model


def _drop_in(*, depth: int, width: int, classes: int, dropout: float, head: str, **options: str) -> WideResNet:
    return WideResNet(depth, classes, width, dropout, head=head, dropout_in_eval=head == "cosine", **options)


def _made(option: str, path: str) -> nn.Module:
    """The module that `package.module:factory` makes."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise WrnFastError(f"`{option}`: expected package.module:factory, got {path!r}")
    sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise WrnFastError(f"`{option}`: {path!r} cannot be found: {error}") from None
    finally:
        sys.path.remove(os.getcwd())
    model = factory if isinstance(factory, nn.Module) else factory()
    if not isinstance(model, nn.Module):
        raise WrnFastError(f"`{option}`: expected {path!r} to make a torch.nn.Module, got {type(model).__name__}")
    return model


def load_weights(model: nn.Module, file: Path) -> None:
    """The file's state_dict into a model of the user's, strictly; nothing that the file says is run.

    Raises:
        WrnFastError: no such file, damaged or hostile, or keys and shapes that are not the model's, each named.
    """
    try:
        weights, _ = archive.state_dict(archive.read(file))
        archive.check_tensors(weights)
    except WrnFastError as error:
        raise WrnFastError(f"`--checkpoint` {file}: {error}") from None
    reason = misfit(model.state_dict(), weights)
    if reason is not None:
        raise WrnFastError(f"`--checkpoint` {file}: expected a state_dict of {type(model).__name__}, but {reason}")
    model.load_state_dict(weights, strict=True)


@contextmanager
def _progress(title: str = "models run") -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal's error stream, nothing elsewhere."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(report: Report, every: bool) -> list[Any]:
    title = f"{report.settings['candidate']} against {report.settings['reference']}"
    table = Table(*COLUMNS)
    for row in report.rows():
        table.add_row(*row.text(), style=None if not row.bad else "red")
    settings = ", ".join(f"{k} {v}" for k, v in report.settings.items() if k not in ("candidate", "reference"))
    failed = report.failed()
    verdict = "every quantity is within its bound" if report.ok else f"{len(failed)} of {len(report.cells)} are not ok"
    shown = report.cells if every else failed[:20]
    return [title, settings, table, *map(str, shown), f"{verdict} ({report.seconds:.0f} s)"]


def _write_page(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], Sequence[Any]]:
    """docs/parity.json and docs/parity.md."""
    folder: Path = arguments.write
    if not folder.is_dir():
        raise WrnFastError(f"`--write`: no folder {folder}")
    reports, lines = [], []
    for options, batch, steps, dtypes, trained in PAGE:
        chosen = BUILT_IN | options
        candidate = _drop_in(pool="window", **chosen)
        if trained:
            train_briefly(candidate)
        with _progress("WRN-{depth}-{width}".format_map(chosen)) as progress:
            report = verify(
                candidate, dtypes=dtypes, batch=batch, steps=steps, device=_device(arguments.device),
                randomize=not trained, seeds=arguments.seeds, first_seed=arguments.first_seed, progress=progress,
            )  # fmt: skip
        reports.append(report)
        lines += _lines(report, False)
    data = {"command": "wrn-fast verify --write docs", "reports": [report.as_dict(cells=False) for report in reports]}
    (folder / "parity.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "parity.md").write_text(markdown(data), encoding="utf-8")
    return int(not all(report.ok for report in reports)), data, lines
