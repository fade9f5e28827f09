"""A report as one picture: for each case, every variant's time as a multiple of the fastest peer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers import FAST, PEERS
from benchmarks.report import figure_of, summary_line

# Okabe and Ito's palette: told apart by colour-blind readers; markers differ as well.
COLOURS = ("#D55E00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#000000", "#999999")
MARKERS = "osD^vPX<"


def plot(report: dict[str, Any], file: Path) -> None:
    """Write a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["fastest_peer"]]
    figure, axes = pyplot.subplots(figsize=(11, 2.2 + 0.5 * max(1, len(rows))), layout="constrained")
    style = {peer.name: (COLOURS[i], MARKERS[i]) for i, peer in enumerate(PEERS)}
    seen: set[str] = set()
    for y, row in enumerate(rows):
        for variant in row["variants"]:
            name = variant["name"]
            colour, marker = style[name]
            x = 1.0 / variant["ratio"]
            spread = [[x * (1.0 - variant["p20_ms"] / variant["ms"])], [x * (variant["p80_ms"] / variant["ms"] - 1.0)]]
            label = None if name in seen else name
            size = 10 if name == FAST else 7
            axes.errorbar(
                x, y, xerr=spread, fmt=marker, color=colour, markersize=size, label=label, alpha=0.9, capsize=2,
                zorder=3 if name == FAST else 2,
            )  # fmt: skip
            seen.add(name)
            if name == FAST:
                words = f"{figure_of(variant['ms'] / row['images'])} ms/image, {variant['ratio']:.2f}x"
                axes.annotate(words, (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=8, color=colour)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 10, 20, 50) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("time as a multiple of the fastest peer's (log scale; left of 1 is faster than every peer)")
    head = report["head"]
    title = summary_line(report).replace("; ", "\n")
    axes.set_title(f"{title}\n{head.get('gpu', head['cpu'])}, {head['threads']} threads", fontsize=9, loc="left")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
