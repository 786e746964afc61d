"""Draw learning curves: the scores of judges against the number of training battles.

All points of a curve are scored on the same validation rows; a larger share of the training battles
contains the smaller ones. On the synthetic arena the truth is known, so the excess over the Bayes limit
can be computed without noise from the votes: the mean KL divergence from the true probabilities.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arena_distill.config.phases.studies import CurveSettings
from arena_distill.evaluation.baselines import class_prior, length_regression
from arena_distill.evaluation.drawings import ACCENT, INK, MUTED, PAPER, SECOND, draw
from arena_distill.evaluation.out_of_fold import Run
from arena_distill.files.artifacts import provenance, read_json, write_json, write_text
from arena_distill.files.probabilities import read_probabilities
from arena_distill.files.tables import table_csv
from arena_distill.layout import Layout
from arena_distill.metrics import (
    Figures,
    bootstrap,
    calibration_scores,
    losses,
    mean_over_views,
    scores,
    truth_scores,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(run: Path, output: Path, *, settings: CurveSettings, truth: Path | None) -> None:
    """Score every point's folds → `curves.json`, `curves.csv`, `curves.svg`.

    Args:
        run: the run's folder: the adapters and logits of every point's folds are read.
        truth: the synthetic arena's true vote probabilities.
    """
    layout = Layout(str(run))
    data = Run.read(Path(layout.folds), Path(layout.battles)).of_folds(settings.folds)
    folds = data.fold_numbers()
    votes = data.votes()
    true = None if truth is None else read_probabilities(truth, data.keys())
    points: list[Figures] = []
    for label, judges in settings.curves.items():
        for share, judge in judges.items():
            files = [Path(layout.logits(judge, k)) for k in folds]
            p = mean_over_views(data.judge_logits(judge, files))
            adapters = [Path(layout.adapter(judge, k)) for k in folds]
            seen = [read_json(folder / "metrics.json")["battles"] for folder in adapters]
            loss = losses(p, votes)[None]
            drawn = bootstrap(loss, votes, data.groups(), resamples=2000)[:, 0]
            low, high = np.quantile(drawn, [0.025, 0.975])
            point = {"curve": label, "judge": judge, "share": float(share)}
            point |= {"battles": round(float(np.mean(seen))), **scores(p, votes)}
            point |= {"low": float(low), "high": float(high), **calibration_scores(p, votes)}
            if true is not None:
                point |= truth_scores(true, p, votes)
            points.append(point)
    baselines = {
        "class prior": data.out_of_fold(class_prior),
        "length regression": data.out_of_fold(length_regression),
        "surface trees": read_probabilities(Path(layout.surface), data.keys()),
    }
    if true is not None:
        baselines["Bayes limit"] = true
    figures = {
        "rows": len(votes),
        "points": points,
        "baselines": {name: scores(p, votes) for name, p in baselines.items()},
        "provenance": provenance("curves", settings.model_dump(mode="json")),
    }
    write_json(figures, output / "curves.json")
    flat = [{k: v for k, v in p.items() if not isinstance(v, list | dict)} for p in points]
    write_text(table_csv(flat), output / "curves.csv")
    write_text(draw("curves", _drawing, figures), output / "curves.svg")
    print(f"{output}: {len(points)} points on {len(votes):,} battles")


def _drawing(figures: dict[str, Any]) -> Figure:
    """Log loss against battles, with intervals; if known, also the KL divergence from the truth."""
    from matplotlib.figure import Figure

    points = figures["points"]
    known = all("kl" in point for point in points)
    figure = Figure(figsize=(7.2, 3.8))
    panels = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    labels = list(dict.fromkeys(point["curve"] for point in points))
    colours = [ACCENT, SECOND, INK, MUTED]
    for i, label in enumerate(labels):
        line = [point for point in points if point["curve"] == label]
        battles, loss = [p["battles"] for p in line], np.array([p["log_loss"] for p in line])
        bars = np.stack([loss - [p["low"] for p in line], [p["high"] for p in line] - loss])
        style: dict[str, Any] = {"color": colours[i % len(colours)], "mec": PAPER}
        panels[0].errorbar(battles, loss, bars, fmt="o-", elinewidth=1, label=label, **style)
        if known:
            panels[1].plot(battles, [p["kl"] for p in line], "o-", **style)
    for (name, baseline), dash in zip(
        figures["baselines"].items(),
        [(0, (4, 3)), (0, (1, 1)), (0, (4, 1)), (0, (1, 3))],
        strict=False,
    ):
        panels[0].axhline(baseline["log_loss"], color=MUTED, lw=0.9, ls=dash, label=name, zorder=0)
    panels[0].set_ylabel(f"log loss on {figures['rows']:,} battles, nats")
    if known:
        panels[1].set(ylabel="excess over Bayes: KL(truth ‖ judge)", ylim=(0, None))
    ticks = sorted({point["battles"] for point in points})
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("training battles")
        axes.grid(True)
    panels[0].legend(fontsize=8, labelcolor=INK)
    return figure
