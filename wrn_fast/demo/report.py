"""What the demo found: the record that becomes demo.json, its tables, and its picture."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from wrn_fast import __version__, machine, native, parity
from wrn_fast.cli import info
from wrn_fast.demo.compare import Agreement, Speed
from wrn_fast.demo.train import Epoch

EAGER, FAST = "reference", "drop-in"
# Columns of a console that is not a terminal.
WIDTH = 110


@dataclass
class Results:
    """Everything the demo measured so far; `complete` is false if it was stopped."""

    command: str
    machine: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[Epoch]] = field(default_factory=lambda: {EAGER: [], FAST: []})
    agreements: list[Agreement] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    complete: bool = False

    def rounds(self) -> int:
        """Epochs that both models finished."""
        return min(len(curve) for curve in self.curves.values())

    def save(self, folder: Path) -> list[Path]:
        """Write demo.json, and demo.png if there is a curve; returns the files."""
        record = dataclasses.asdict(self)
        for row, speed in zip(record["speeds"], self.speeds, strict=True):
            row["ratio"] = speed.ratio if speed.fast else None
        files = [folder / "demo.json"]
        files[0].write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if self.rounds():
            files.append(folder / "demo.png")
            plot(self, files[1])
        return files


def describe(device: torch.device) -> dict[str, Any]:
    """What the demo runs on, with the backend of each operator for layers of WRN-28-10 in float32."""
    rows = [row for row in info.choices(device.type, batch=8) if row["dtype"] == "float32"]
    isa = native.isa() if device.type == "cpu" else None
    return {"wrn_fast": __version__, **machine.head(device), "isa": isa, "layers": rows}


def print_machine(results: Results, console: Console) -> None:
    """What this runs on, and who serves each operator."""
    m = results.machine
    isa = f", {m['isa']}" if m["isa"] else ""
    console.print(f"wrn_fast {m['wrn_fast']}, torch {m['torch']}, Python {m['python']}", highlight=False)
    console.print(f"{m['device']}{isa}, {m['threads']} threads", highlight=False)
    why_not: dict[str, str] = {}
    for row in m["layers"]:
        served = ", ".join(f"{op} {backend}" for op, backend in row["uses"].items())
        console.print(f"  {row['layer']}: {served}", highlight=False)
        why_not |= row["why_not"]
    for name, reason in why_not.items():
        console.print(f"  not {name}: {reason}", style="dim", highlight=False, markup=False)


def conclude(results: Results, folder: Path, console: Console) -> int:
    """Write the files and say in a few lines what came out; returns the exit status."""
    for file in results.save(folder):
        console.print(f"wrote {file}", highlight=False)
    if not results.complete:
        agreed, raced = len(results.agreements), sum(1 for s in results.speeds if s.fast)
        console.print(
            f"They are partial: {results.rounds()} of {results.model.get('epochs', '?')} epochs of both models, "
            f"{agreed} of 3 comparisons of weights, {raced} of 2 races."
        )
        return 130
    bad = [a.moved for a in results.agreements if a.verdict != parity.OK]
    if bad:
        console.print(f"The models disagree: {'; '.join(bad)}", style="red", highlight=False)
    return 1 if bad else 0


def _table(title: str, left: str, *right: str) -> Table:
    """An empty table narrow enough for 80 columns, its first column flush left."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(left)
    for name in right:
        table.add_column(name, justify="right")
    return table


def curve_table(results: Results) -> Table:
    """Loss, test accuracy and time of each epoch, both models side by side."""
    title = f"{results.model['name']} on {results.data['name']}"
    columns = [f"{name}\n{what}" for name in (EAGER, FAST) for what in ("loss", "accuracy", "s")]
    table = _table(title, "epoch", *columns)
    for number in range(results.rounds()):
        row = [str(number + 1)]
        for name in (EAGER, FAST):
            e = results.curves[name][number]
            row += [f"{e.loss:.4f}", f"{e.accuracy:.1%}", f"{e.seconds:.2f}"]
        table.add_row(*row)
    return table


def agreement_table(results: Results) -> Table:
    """Do the two models, holding the same weights, say the same?"""
    title = "The same weights in both models: relative L2 distance to float64"
    table = _table(title, "whose weights", EAGER, FAST, "bound", "max diff", "same class", "verdict")
    for a in results.agreements:
        table.add_row(
            a.moved, f"{a.err_eager:.1e}", f"{a.err_fast:.1e}", f"{a.bound:.1e}", f"{a.max_difference:.1e}",
            f"{a.same_predictions}/{a.images}", a.verdict,
        )  # fmt: skip
    return table


def speed_table(results: Results) -> Table:
    """Median seconds of both, their ratio and its spread."""
    title = "Seconds a call (medians, run in turn), channels_last"
    table = _table(title, "task", "batch", EAGER, FAST, "ratio", "range")
    for s in results.speeds:
        if s.fast:
            table.add_row(
                f"{s.model} {s.task}", str(s.batch), f"{statistics.median(s.eager):.3f}",
                f"{statistics.median(s.fast):.3f}", f"{s.ratio:.2f}", f"{min(s.ratios):.2f} to {max(s.ratios):.2f}",
            )  # fmt: skip
    return table


def plot(results: Results, file: Path) -> None:
    """Loss, accuracy and speed as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    speeds = [s for s in results.speeds if s.fast]
    figure = Figure(figsize=(13 if speeds else 9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if speeds else 2)
    # The curves nearly coincide: the first is drawn wide and pale, so that both can be seen.
    styles = {
        EAGER: {"color": "tab:orange", "linewidth": 5, "alpha": 0.5},
        FAST: {"color": "tab:blue", "linewidth": 1.5},
    }
    for axis, what, title in ((axes[0], "loss", "training loss"), (axes[1], "accuracy", "test accuracy")):
        for name, curve in results.curves.items():
            axis.plot(
                range(1, len(curve) + 1), [getattr(e, what) for e in curve], marker="o", label=name, **styles[name]
            )
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(loc="upper right")
    axes[1].legend(loc="lower right")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    if speeds:
        labels = [f"{s.task}\nbatch {s.batch}" for s in speeds]
        for shift, name, values in ((-0.2, EAGER, "eager"), (0.2, FAST, "fast")):
            heights = [statistics.median(getattr(s, values)) / s.batch * 1000 for s in speeds]
            places = [i + shift for i in range(len(speeds))]
            bars = axes[2].bar(places, heights, 0.38, color=styles[name]["color"], label=name)
            axes[2].bar_label(bars, fmt="%.1f")
        axes[2].set(title=f"{speeds[0].model}, ms an image", xticks=range(len(speeds)), xticklabels=labels)
        axes[2].margins(y=0.15)
        axes[2].legend()
    figure.suptitle(f"{results.model['name']} on {results.data['name']}, seed {results.model['seed']}")
    figure.savefig(file, dpi=120)
