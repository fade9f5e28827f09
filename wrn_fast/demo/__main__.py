"""The command line of the demo."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from wrn_fast.demo import report
from wrn_fast.demo.stages import Demo
from wrn_fast.errors import WrnFastError

# race: depth and width of the model that is timed; batches: of its inference and its training step.
FULL = {"epochs": 8, "limit": 1500, "race": (28, 10), "batches": (8, 16), "runs": 5}
QUICK = {"epochs": 2, "limit": 256, "race": (16, 4), "batches": (8, 8), "runs": 3}
DEPTH, WIDTH = 10, 4


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options; what was not given has the value of the full or the quick run."""
    parser = argparse.ArgumentParser(
        "python -m wrn_fast.demo",
        description="Train a small WideResNet on real images with the plain reference and with the drop-in, exchange "
        "their weights, and race the two as WRN-28-10. Writes demo.json and demo.png.",
    )
    option = parser.add_argument
    option("--data", metavar="PATH", help="folder with CIFAR-10, CIFAR-100 or SVHN files (default: handwritten digits)")
    option("--limit", type=int, help="most training images, and four times the test images; 0: all (default: 1500)")
    option("--epochs", type=int, help="training epochs of each model (default: 8)")
    option("--depth", type=int, default=DEPTH, help=f"of the trained model, 6n + 4 (default: {DEPTH})")
    option("--width", type=int, default=WIDTH, help=f"its widening factor (default: {WIDTH})")
    option("--batch", type=int, default=64, help="images a training step (default: 64)")
    option("--lr", type=float, default=0.1, help="first learning rate (default: 0.1)")
    option("--seed", type=int, default=0, help="of the weights, the images drawn and the batches (default: 0)")
    option("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    option("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    option("--out", type=Path, default=Path(), metavar="FOLDER", help="of demo.json and demo.png (default: here)")
    option("--quick", action="store_true", help="less than a minute: fewer images and epochs, and WRN-16-4 in the race")
    options = parser.parse_args(words)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def check(options: argparse.Namespace) -> None:
    """Raise WrnFastError before any work if an option cannot be meant, or the results could not be written."""
    for name, least in (("epochs", 1), ("batch", 2), ("limit", 0), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise WrnFastError(f"--{name}: expected at least {least}, got {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise WrnFastError("--device: expected cpu, because PyTorch finds no GPU here, got cuda")
    if importlib.util.find_spec("matplotlib") is None:
        raise WrnFastError("the demo draws with matplotlib, which is not installed: pip install matplotlib")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrnFastError(f"--out: expected a folder, got {options.out}: {error}") from error
    if not os.access(options.out, os.W_OK):
        raise WrnFastError(f"--out: expected a folder that can be written, got {options.out}")


def main(words: list[str] | None = None) -> int:
    """Run the demo.

    Returns:
        The exit status: 0; 1 if the two models disagree; 2 for bad input; 130 if stopped by Ctrl-C, after writing what
        was measured until then.
    """
    options = parse(words)
    console = Console()
    if not console.is_terminal:
        console = Console(width=report.WIDTH)
    demo = None
    try:
        check(options)
        if options.threads:
            torch.set_num_threads(options.threads)
        demo = Demo(options, console)
        demo.run()
    except WrnFastError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("stopped")
        if demo is not None:
            report.conclude(demo.results, options.out, console)
        return 130
    return report.conclude(demo.results, options.out, console)


if __name__ == "__main__":
    sys.exit(main())
