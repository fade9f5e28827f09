"""`wrn-fast verify`: parity of the drop-in, or of a model of yours, against plain PyTorch in float64."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from wrn_fast import parity, reference
from wrn_fast.errors import WrnFastError
from wrn_fast.model import WideResNet
from wrn_fast.verify import COLUMNS, DTYPES, Report, markdown, misfit, verify

NAME = "verify"
HELP = "parity of the drop-in, or of a model of yours, against plain PyTorch in float64"
_NAMES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What docs/parity.md shows: (depth, widen_factor, dropRate, head, act), batch, steps, dtypes.
PAGE = (
    ((16, 4, 0.0, "cosine", "relu"), 4, 3, DTYPES),
    ((16, 2, 0.3, "classic", "silu"), 4, 3, DTYPES),
    ((28, 10, 0.0, "classic", "relu"), 2, 1, (torch.float32,)),
)


def options(parser: argparse.ArgumentParser) -> None:
    """The model, the work, the output."""
    model = parser.add_argument_group("the built-in pair: wrn_fast.WideResNet against the reference")
    model.add_argument("--depth", type=int, default=16)
    model.add_argument("--width", type=int, default=2, help="widening factor (default 2)")
    model.add_argument("--classes", type=int, default=10)
    model.add_argument("--head", choices=reference.HEADS, default="cosine")
    model.add_argument("--act", choices=tuple(reference.ACTS), default="relu", help="silu makes gradients comparable")
    model.add_argument("--dropout", type=float, default=0.0, help="both drop by the same masks")
    own = parser.add_argument_group("a model of yours")
    own.add_argument("--model", metavar="PACKAGE.MODULE:FACTORY", help="the candidate, called without arguments")
    own.add_argument("--against", metavar="PACKAGE.MODULE:FACTORY", help="its plain PyTorch counterpart")
    own.add_argument("--checkpoint", metavar="FILE", help="weights to verify with, loaded with weights_only=True")
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
    if arguments.against and not arguments.model:
        raise WrnFastError("`--against`: expected beside --model, got it alone")
    if arguments.model and not arguments.against:
        raise WrnFastError("`--against`: expected the plain PyTorch counterpart of --model, got none")
    if arguments.model:
        candidate = _made("--model", arguments.model)
    else:
        candidate = _built_in(
            arguments.depth, arguments.width, arguments.dropout, arguments.head, arguments.act, arguments.classes,
            "window" if arguments.size == 32 else "global",
        )  # fmt: skip
    if arguments.checkpoint:
        load_weights(candidate, Path(arguments.checkpoint))
    return candidate, _made("--against", arguments.against) if arguments.against else None


def _built_in(depth: int, width: int, dropout: float, head: str, act: str, classes: int, pool: str) -> WideResNet:
    in_eval = head == "cosine"
    return WideResNet(depth, classes, width, dropout, head=head, dropout_in_eval=in_eval, pool=pool, act=act)


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
    """The file's state_dict into `model`, strictly.

    Raises:
        WrnFastError: no such file, not a plain state_dict, or keys and shapes that are not the model's, each named.
    """
    weights = read_weights(file)
    reason = misfit(model.state_dict(), weights)
    if reason is not None:
        raise WrnFastError(
            f"`--checkpoint`: expected a state_dict of {type(model).__name__}, but in {file.name} {reason}"
        )
    model.load_state_dict(weights, strict=True)


def read_weights(file: Path) -> dict[str, Tensor]:
    """A flat state_dict, read without running anything that the file says."""
    if not file.is_file():
        raise WrnFastError(f"`--checkpoint`: no file {file}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise WrnFastError(f"`--checkpoint`: {file} holds more than weights, refused: {_first_line(error)}") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise WrnFastError(f"`--checkpoint`: {file} cannot be read: {_first_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        held = ", ".join(map(str, list(found)[:5])) if isinstance(found, dict) else type(found).__name__
        raise WrnFastError(f"`--checkpoint`: expected a state_dict (names to tensors) in {file}, got {held}")
    return found


def _is_zip(file: Path) -> bool:
    """torch.save's format since 1.6; only that can be mapped into memory."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    for (depth, width, dropout, head, act), batch, steps, dtypes in PAGE:
        candidate = _built_in(depth, width, dropout, head, act, arguments.classes, "window")
        with _progress(f"WRN-{depth}-{width}") as progress:
            report = verify(
                candidate, dtypes=dtypes, batch=batch, steps=steps, device=_device(arguments.device),
                seeds=arguments.seeds, first_seed=arguments.first_seed, progress=progress,
            )  # fmt: skip
        reports.append(report)
        lines += _lines(report, False)
    data = {"command": "wrn-fast verify --write docs", "reports": [report.as_dict(cells=False) for report in reports]}
    (folder / "parity.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "parity.md").write_text(markdown(data), encoding="utf-8")
    return int(not all(report.ok for report in reports)), data, lines
