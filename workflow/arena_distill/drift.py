"""How far the means of factors and of products part as the folds of a judge drift apart.

Folds that start from one adapter and stay near it can be averaged factor by factor; folds that started
apart, or went far, cannot: mean(B)·mean(A) is then another matrix than mean(B·A). The drawing shows the
gap between the two against how far the folds are from their mean, and what it costs in test log loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arena_distill.artifacts import provenance, read_json, write_json, write_text
from arena_distill.settings import DriftStudySettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STARTS = {"shared": "one start for all folds", "own": "each fold its own start"}


def draw_drift(soups: Sequence[Path], output: Path, *, settings: DriftStudySettings) -> None:
    """Gather the judges' soups (``soups.compare_soups``) → `drift.json`, `drift.csv`, `drift.svg`."""
    import pandas as pd

    from arena_distill.report import draw

    by_judge = {path.stem: read_json(path) for path in soups}
    points = []
    for start, judges in settings.drifts.items():
        for epochs, judge in judges.items():
            soup = by_judge[judge]
            point = {"start": start, "epochs": float(epochs), "judge": judge}
            point |= {"distance": soup["distance"], "factors_gap": soup["factors_gap"]}
            point |= {name: way["log_loss"] for name, way in soup["ways"].items()}
            points.append(point)
    figures = {
        "points": points,
        "provenance": provenance("drift_study", settings.model_dump(mode="json")),
    }
    write_json(figures, output / "drift.json")
    write_text(pd.DataFrame(points).to_csv(index=False, lineterminator="\n"), output / "drift.csv")
    write_text(draw("drift", _drawing, figures), output / "drift.svg")
    print(f"{output}: {len(points)} points")


def _drawing(figures: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    from arena_distill.report import ACCENT, INK, MUTED, PAPER, SECOND

    colours = {"shared": ACCENT, "own": SECOND}
    scored = all("products" in point for point in figures["points"])
    figure = Figure(figsize=(7.2, 3.6 if scored else 3.2))
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    for start, name in STARTS.items():
        line = [point for point in figures["points"] if point["start"] == start]
        epochs = [point["epochs"] for point in line]
        gap = [point["factors_gap"] for point in line]
        panels[0].plot(epochs, gap, "o-", color=colours[start], mec=PAPER, label=name)
        if scored:
            for way, dash in (
                ("products", "-"),
                ("factors", (0, (4, 2))),
                ("ensemble", (0, (1, 2))),
            ):
                panels[1].plot(
                    epochs, [p[way] for p in line], marker="o", ms=4, ls=dash, color=colours[start]
                )
    panels[0].set(ylabel="‖factors − products‖ / ‖products‖", ylim=(0, None))
    for axes in panels:
        axes.set_xscale("log", base=2)
        ticks = sorted({point["epochs"] for point in figures["points"]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("epochs that the folds train apart")
        axes.grid(True)
    if scored:
        panels[1].set_ylabel("test log loss of the merged model, nats")
        for way, dash in (("products", "-"), ("factors", (0, (4, 2))), ("ensemble", (0, (1, 2)))):
            panels[1].plot([], [], ls=dash, color=MUTED, label=way)
        panels[1].legend(fontsize=9, labelcolor=INK)
    panels[0].legend(fontsize=9, labelcolor=INK)
    return figure
