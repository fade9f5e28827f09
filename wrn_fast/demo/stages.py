"""The stages of the demo in their order; each prints what it found and adds it to the record."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import wrn_fast
from wrn_fast import reference
from wrn_fast.demo import compare, data, report
from wrn_fast.demo.report import EAGER, FAST
from wrn_fast.demo.train import train
from wrn_fast.errors import WrnFastError


class Demo:
    """One run; `results` holds what is known so far, whenever it is stopped."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        command = shlex.join(["python", "-m", "wrn_fast.demo", *sys.argv[1:]])
        self.results = report.Results(command, report.describe(self.device))

    def run(self) -> None:
        """All stages."""
        report.print_machine(self.results, self.console)
        self.load()
        self.train()
        self.exchange()
        self.race()
        self.results.complete = True

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps; gives the function that advances it."""
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def load(self) -> None:
        """Real images, on the device."""
        o = self.options
        split = data.load(o.data, limit=o.limit, seed=o.seed)
        train_count, test_count = len(split.train_x), len(split.test_x)
        if train_count < o.batch:
            raise WrnFastError(f"--batch: expected at most the number of training images, {train_count}, got {o.batch}")
        if test_count < compare.PIECES:
            raise WrnFastError(f"--limit: expected at least {4 * compare.PIECES} (or 0: all images), got {o.limit}")
        self.results.data = {
            "name": split.name, "path": o.data, "classes": split.classes, "train": train_count, "test": test_count
        }  # fmt: skip
        self.console.print(f"{split.name}: {train_count} images to train on, {test_count} to test on")
        self.split = split.to(self.device)

    def build(self, depth: int, width: int) -> dict[str, nn.Module]:
        """Reference and drop-in from the same seed, channels_last."""
        models: dict[str, nn.Module] = {}
        for name, make in ((EAGER, reference.classic), (FAST, wrn_fast.classic)):
            torch.manual_seed(self.options.seed)
            model: nn.Module = make(depth, self.split.classes, width)
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            models[name] = model.to(self.device)
        return models

    def train(self) -> None:
        """Both models on the same batches."""
        o = self.options
        self.models = self.build(o.depth, o.width)
        name = f"WRN-{o.depth}-{o.width}"
        parameters = sum(p.numel() for p in self.models[EAGER].parameters())
        self.results.model = {
            "name": name, "parameters": parameters, "epochs": o.epochs, "batch": o.batch, "lr": o.lr, "seed": o.seed
        }  # fmt: skip
        steps = 2 * o.epochs * (len(self.split.train_x) // o.batch)
        with self.progress(f"training {name}, both in turn", steps) as tick:
            epochs = train(self.models, self.split, epochs=o.epochs, batch=o.batch, lr=o.lr, seed=o.seed, tick=tick)
            for whose, epoch in epochs:
                self.results.curves[whose].append(epoch)
                # A log file shows no bar.
                if not self.console.is_terminal:
                    self.console.print(f"{whose}, epoch {len(self.results.curves[whose])}: loss {epoch.loss:.4f}")
        self.console.print(report.curve_table(self.results))

    def exchange(self) -> None:
        """Each trained model's weights go into an untrained model of the other kind; then those of the race's model."""
        x, y = self.split.test_x, self.split.test_y
        fresh = self.build(self.options.depth, self.options.width)
        self.racers = self.build(*self.options.race)
        name, race_name = self.results.model["name"], self.race_name()
        for source, target, model, count in (
            (self.models[EAGER], fresh[FAST], f"{name} {EAGER}'s", len(x)),
            (self.models[FAST], fresh[EAGER], f"{name} {FAST}'s", len(x)),
            (self.racers[EAGER], self.racers[FAST], f"{race_name} {EAGER}'s", compare.PIECES),
        ):
            tensors = compare.move(source, target)
            eager, fast = (target, source) if target is fresh[EAGER] else (source, target)
            self.results.agreements.append(compare.agree(model, eager, fast, tensors, x[:count], y[:count]))
        self.console.print(report.agreement_table(self.results))

    def race(self) -> None:
        """Inference and one training step, in turn."""
        o = self.options
        with self.progress(f"racing {self.race_name()}", 4 * (o.runs + 1)) as tick:
            for task, batch in zip(("inference", "training step"), o.batches):
                rows = torch.arange(batch, device=self.device) % len(self.split.train_x)
                x, y = self.split.train_x[rows], self.split.train_y[rows]
                calls = [
                    compare.forward(model, x) if task == "inference" else compare.training_step(model, x, y)
                    for model in self.racers.values()
                ]
                speed = compare.Speed(task, self.race_name(), batch)
                self.results.speeds.append(speed)
                compare.race(speed, *calls, runs=o.runs, device=self.device, tick=tick)
        self.console.print(report.speed_table(self.results))

    def race_name(self) -> str:
        """WRN-depth-width of the model that is raced."""
        return "WRN-{}-{}".format(*self.options.race)
