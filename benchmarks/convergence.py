"""`python -m benchmarks.convergence`: drop-in and reference trained to the end on real labelled images, seed by seed.

Both start from the same weights and see the same batches; in float32 and under bfloat16 autocast, without and with
dropout (whose masks differ: they come from another generator). What is asked: does the drop-in's mean test accuracy lie
within the spread of the reference's seeds? Writes convergence.json, .md and .png into docs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import wrn_fast
from benchmarks import machine
from wrn_fast import reference
from wrn_fast.demo import data
from wrn_fast.demo.train import Trainer, accuracy, logits

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
SIDES: dict[str, Any] = {"reference": reference.WideResNet, "drop-in": wrn_fast.WideResNet}
DOCS = machine.ROOT / "docs"


class Run(Trainer):
    """A training run in one dtype."""

    def __init__(self, model: nn.Module, steps: int, lr: float, dtype: torch.dtype | None) -> None:
        super().__init__(model, steps, lr)
        self.dtype = dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Around forward passes."""
        return nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step; the loss is float32."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            out = self.model(x)
        loss = F.cross_entropy(out.float(), y)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def accuracy(self, split: data.Split) -> float:
        """On the test images."""
        with self.autocast():
            return accuracy(logits(self.model, split.test_x), split.test_y)


def train(side: str, split: data.Split, dtype: str, drop: float, seed: int, args: argparse.Namespace) -> list[float]:
    """Test accuracy after each epoch."""
    torch.manual_seed(seed)
    classic = {"head": "classic", "dropout_in_eval": False, "pool": "global"}
    model = SIDES[side](args.depth, split.classes, args.width, drop, **classic).to(memory_format=torch.channels_last)
    count = len(split.train_x) // args.batch
    run = Run(model, args.epochs * count, args.lr, DTYPES[dtype])
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for _ in range(args.epochs):
        rows = torch.randperm(len(split.train_x), generator=generator)[: count * args.batch]
        model.train()
        for part in rows.split(args.batch):
            run.step(split.train_x[part], split.train_y[part])
        curve.append(run.accuracy(split))
    return curve


def resized(split: data.Split, size: int) -> data.Split:
    """The images at size x size."""
    x = (F.interpolate(v, size=(size, size), mode="area") for v in (split.train_x, split.test_x))
    train_x, test_x = (v.contiguous(memory_format=torch.channels_last) for v in x)
    return split._replace(train_x=train_x, test_x=test_x)


def judge(curves: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Last accuracies of both sides, and whether the drop-in's mean is within the reference's spread."""
    last = {side: [curve[-1] for curve in of] for side, of in curves.items()}
    means = {side: statistics.fmean(of) for side, of in last.items()}
    low, high = min(last["reference"]), max(last["reference"])
    return {"last": last, "mean": means, "spread": [low, high], "within": low <= means["drop-in"] <= high}


def plot(found: dict[str, Any], file: Path) -> None:
    """Mean and range of the seeds, epoch by epoch; one panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = found["cells"]
    figure, panels = pyplot.subplots(1, len(cells), figsize=(3.4 * len(cells), 3.4), sharey=True, layout="constrained")
    for axes, (name, cell) in zip(panels, cells.items()):
        for side, colour in (("reference", "#0072B2"), ("drop-in", "#D55E00")):
            epochs = list(zip(*cell["curves"][side]))
            x = range(1, len(epochs) + 1)
            axes.fill_between(x, [min(e) for e in epochs], [max(e) for e in epochs], color=colour, alpha=0.2, lw=0)
            axes.plot(x, [statistics.fmean(e) for e in epochs], color=colour, label=side, marker=".")
        means = cell["mean"]
        axes.set_title(f"{name}\n{means['reference']:.4f} and {means['drop-in']:.4f}", fontsize=9)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy: mean and range of the seeds")
    panels[0].legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def page(found: dict[str, Any]) -> str:
    """docs/convergence.md."""
    lines = [
        "# Convergence\n",
        f"{found['network']} from the same weights on the same batches of {found['data']}: {found['train']} images to "
        f"train on, {found['test']} to test on, {found['epochs']} epochs, {found['seeds']} seeds. Test accuracy after "
        "the last epoch; with dropout the masks differ.\n",
        "| | reference, mean | its seeds | drop-in, mean | its seeds | mean within the reference's spread |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cell in found["cells"].items():
        of = cell["last"]["drop-in"]
        spreads = [f"{low:.4f} to {high:.4f}" for low, high in (cell["spread"], (min(of), max(of)))]
        means = [f"{cell['mean'][side]:.4f}" for side in SIDES]
        words = " | ".join([name, means[0], spreads[0], means[1], spreads[1], "yes" if cell["within"] else "**no**"])
        lines.append(f"| {words} |")
    lines += ["\n![test accuracy, epoch by epoch](convergence.png)\n", f"`{found['command']}`, torch {found['torch']}."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where a mean lies outside."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--data", help="a folder with CIFAR or SVHN files; default: scikit-learn's digits")
    parser.add_argument("--limit", type=int, default=0, help="at most so many training images; 0: all")
    for name, default in (("depth", 10), ("width", 1), ("epochs", 6), ("batch", 32), ("seeds", 5), ("size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="others stay as written before"
    )
    parser.add_argument("--lr", type=float, default=0.05, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.3, help="of the runs with dropout; default: %(default)s")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder that is written into")
    args = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    split = resized(data.load(args.data, limit=args.limit, seed=0), args.size)
    file = args.out / "convergence.json"
    cells: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.exists() else {}
    for dtype in args.dtype:
        for drop in (0.0, args.dropout):
            curves: dict[str, list[list[float]]] = {side: [] for side in SIDES}
            for seed in range(args.seeds):
                for side in SIDES:
                    curves[side].append(train(side, split, dtype, drop, seed, args))
            name = f"{dtype}, dropout {drop:g}"
            cells[name] = {"curves": curves, **judge(curves)}
            console.print(f"{name}: {cells[name]['mean']}, spread {cells[name]['spread']}: {cells[name]['within']}")
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.convergence", *words])
    found = {
        "command": command, "network": f"WRN-{args.depth}-{args.width}", "data": split.name, "epochs": args.epochs,
        "seeds": args.seeds, "train": len(split.train_x), "test": len(split.test_x), "torch": torch.__version__,
        "cells": cells,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / "convergence.md").write_text(page(found), encoding="utf-8")
    plot(found, args.out / "convergence.png")
    return 0 if all(cell["within"] for cell in cells.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
