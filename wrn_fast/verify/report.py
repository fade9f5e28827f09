"""The result of a verification: cells, the table that people read, JSON, and the page `docs/parity.md`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from wrn_fast import parity
from wrn_fast.parity import Cell

COLUMNS = ("quantity", "dtype", "tensors", "worst of them", "err(fast)", "err(eager)", "ratio", "to NCHW", "verdict")


@dataclass(frozen=True)
class Row:
    """Cells of one quantity and dtype: how many there are, and the one nearest to its bound or furthest beyond it."""

    quantity: str
    dtype: str
    tensors: int
    bad: int
    worst: str
    err_fast: float
    err_eager: float
    ratio: float
    ratio_nchw: float | None
    bound: float
    rule: str
    verdict: str

    def text(self) -> tuple[str, ...]:
        """The row in the order of `COLUMNS`."""
        nchw = "-" if self.ratio_nchw is None else _figure(self.ratio_nchw, ".2f")
        verdict = f"{self.verdict} ({self.bad})" if self.bad else self.verdict
        if not self.bad and self.err_fast > self.bound:
            verdict += ", flips"
        ratio = _figure(self.ratio, ".2f")
        errors = _figure(self.err_fast, ".1e"), _figure(self.err_eager, ".1e")
        return self.quantity, self.dtype, str(self.tensors), self.worst, *errors, ratio, nchw, verdict


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _excess(cell: Cell) -> float:
    """The error in units of its bound."""
    return cell.err_fast / cell.bound


def _row(quantity: str, dtype: str, cells: list[Cell]) -> Row:
    worst = max(cells, key=lambda cell: (not cell.ok, _excess(cell)))
    bad = sum(not c.ok for c in cells)
    return Row(
        quantity, dtype, len(cells), bad, worst.name.split("/", 2)[2], worst.err_fast, worst.err_eager, worst.ratio,
        worst.ratio_nchw, worst.bound, worst.rule, worst.verdict,
    )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Parity of two models.

    Args:
        cells: one a tensor and dtype, named mode/quantity/tensor.
        settings: what was compared and how.
        machine: device, threads, versions, date.
        seconds: wall time.
    """

    cells: tuple[Cell, ...]
    settings: dict[str, Any]
    machine: dict[str, str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Is every cell within its bound, and could it have shown the contrary?"""
        return bool(self.cells) and all(cell.ok for cell in self.cells)

    def failed(self) -> list[Cell]:
        """The cells that are out of bounds or mistrusted, worst first."""
        return sorted((c for c in self.cells if not c.ok), key=_excess, reverse=True)

    def rows(self) -> list[Row]:
        """The table: cells grouped by quantity and dtype."""
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            mode, quantity, _ = cell.name.split("/", 2)
            groups.setdefault((f"{mode}: {quantity}", _short(cell.dtype)), []).append(cell)
        return [_row(*key, cells) for key, cells in groups.items()]

    def as_dict(self, cells: bool = True) -> dict[str, Any]:
        """Plain values only; figures that JSON has no word for (nan, inf) become None."""
        found: dict[str, Any] = {
            "ok": self.ok,
            "settings": self.settings,
            "machine": self.machine,
            "seconds": round(self.seconds, 1),
            "rows": [_plain(row) for row in self.rows()],
        }
        if cells:
            found["cells"] = [_plain(cell) for cell in self.cells]
        return found

    def to_json(self) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"{self.settings['candidate']} against {self.settings['reference']}: {'ok' if self.ok else 'NOT ok'}"]
        lines += _columns([COLUMNS, *(row.text() for row in self.rows())])
        return "\n".join(lines + [str(cell) for cell in self.failed()[:10]])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Cell | Row) -> dict[str, Any]:
    found = dataclasses.asdict(value)
    for key, item in found.items():
        if isinstance(item, float) and not math.isfinite(item):
            found[key] = None
        elif isinstance(item, torch.dtype):
            found[key] = _short(item)
    return found


def _columns(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in table]


def _settings_line(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("candidate", "reference"))


def markdown(data: dict[str, Any]) -> str:
    """The page `docs/parity.md` from the data of `docs/parity.json`.

    Args:
        data: {"command": str, "reports": [Report.as_dict(cells=False), ...]}.
    """
    lines = [
        "# Parity, measured",
        "",
        f"Written by `{data['command']}` from `docs/parity.json`; do not edit.",
        "",
        *_PREFACE.format(
            ratio=parity.RATIO, seeds=parity.SEEDS, float64=parity.FLOAT64, zeros=parity.MOSTLY_ZERO, **parity.WINOGRAD
        )
        .strip()
        .splitlines(),
    ]
    for report in data["reports"]:
        lines += ["", *_section(report)]
    return "\n".join(lines) + "\n"


def _section(report: dict[str, Any]) -> Iterable[str]:
    settings = report["settings"]
    yield f"## {settings['candidate']} against {settings['reference']}"
    yield ""
    yield f"{_settings_line(settings)}. " + ", ".join(f"{k} {v}" for k, v in report["machine"].items()) + "."
    yield ""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "| " + " | ".join("---" for _ in COLUMNS) + " |"
    for row in map(_row_of, report["rows"]):
        yield "| " + " | ".join(row.text()) + " |"


def _row_of(stored: dict[str, Any]) -> Row:
    figures = {key: math.nan for key in ("err_fast", "err_eager", "ratio", "bound") if stored[key] is None}
    return Row(**(stored | figures))


_PREFACE = """
How far the fast path is from the truth, beside how far PyTorch itself is. The oracle is the plain PyTorch model in
float64, on the same weights and images: `err(v) = ||v - oracle|| / ||oracle||`. *fast* is the model under test, *eager*
plain PyTorch in the same dtype and channels_last (float32 there has 2 to 5 times the error of NCHW: the last but one
column is the ratio to NCHW). A row stands for all tensors of its quantity and shows the one nearest to its bound.

The rule: `rms(err fast) <= {ratio} * rms(err eager) + u` over at least {seeds} seeds, u one unit roundoff of the dtype;
in float64 at most {float64:g}. One seed alone proves nothing: near the rounding limit both errors are luck.
Gradients and optimizer steps of a ReLU network are judged by medians over the seeds: a pre-activation near zero that
changes sign moves a gradient by 1e-3, on either side. `ok, flips`: the medians differ by more than {ratio}, by luck:
fast is beyond {ratio} times eager in fewer than 15 of 16 pairs of seeds. The table with act='silu' has no such luck,
and its gradients are pooled as well. A row whose expected values are more than {zeros:.0%} zeros is `mistrusted`.
Single convolutions have absolute bounds: F(4x4) {f4:g}, F(3x3) {f3:g}, F(2x2) {f2:g}, wgrad {wgrad:g}; the last
holds for the gradient of a filter here.

BatchNorm's affine parameters are drawn at random, and its statistics near those of the images: with those of a fresh
network (1 and 0) many faults do not show. One network keeps its own, after 20 steps of training: errors that point one
way, layer after layer, show there and nowhere else. Running statistics and the change of every weight after the
optimizer steps are compared as well, then outputs again, from the same object: nothing derived from old weights may be
left.
Dropout: the drop-in draws its masks from a counter-based generator and stores none, so for the same seed they differ
from those of `F.dropout`. For this table the reference drops by the drop-in's masks; models of others run without
dropout.
"""
