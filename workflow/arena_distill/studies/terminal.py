"""The comparison as tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arena_distill.evaluation.terminal import _table
from arena_distill.metrics import Figures

if TYPE_CHECKING:
    from rich.console import Console


def print_comparison(figures: Figures, console: Console | None = None) -> None:
    """Print `compare.json`: every judge, and what distillation adds to each student."""
    from rich.console import Console

    from arena_distill.studies.comparison_report import PARTS, gains

    console = console or Console()
    for part, name in PARTS.items():
        if not figures[part]:
            continue
        console.print(
            f"\n[bold]{figures['run']}[/bold]: {figures[part]['rows']:,} battles {name}\n"
        )
        table = _table(["judge"], ["log loss", "95 %", "acc.", "ECE", "TV"])
        for label, judge in figures[part]["judges"].items():
            position = judge.get("position")
            table.add_row(
                label,
                f"{judge['log_loss']:.4f}",
                f"{judge['low']:.3f}–{judge['high']:.3f}",
                f"{judge['accuracy']:.1%}",
                f"{judge['ece']:.3f}",
                f"{position['total_variation']:.3f}" if position else "–",
            )
        console.print(table)
    console.print("\nWhat distillation adds: log loss less that of the same judge on votes alone\n")
    table = _table(["student", "battles"], ["difference", "95 %"])
    for gain in gains(figures):
        interval = f"{gain['low']:+.4f} to {gain['high']:+.4f}"
        table.add_row(gain["label"], PARTS[gain["part"]], f"{gain['difference']:+.4f}", interval)
    console.print(table)
