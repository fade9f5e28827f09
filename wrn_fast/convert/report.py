"""What was made fast, what was left, and why: data that prints well."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """Result of `report(model)`.

    Args:
        accelerated: names of the blocks and chains that compute through the fused operator.
        left: names of modules that look like residual blocks and were left alone.
        why: for each name, what it was recognised as, or the reason.
        notes: sentences about the whole.
    """

    accelerated: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    why: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.accelerated)} accelerated, {len(self.left)} left as they are"]
        for title, names in (("accelerated", self.accelerated), ("left", self.left)):
            by_reason: dict[str, list[str]] = {}
            for name in names:
                by_reason.setdefault(self.why[name], []).append(name or "(the model itself)")
            for reason, group in by_reason.items():
                lines += [f"  {title}: {_shorten(group)}", f"    {reason}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
