"""Measure the gap between the means of factors and of products as a judge's folds drift apart.

Folds that start from one adapter and stay near it can be averaged factor by factor. Folds with different
starts, or far from their start, cannot: mean(B)·mean(A) then differs from mean(B·A). The drawing shows the
gap between the two against the folds' distance from their mean, and its cost in test log loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from arena_distill.battles.votes import Solution
from arena_distill.config.phases.deployment import SoupSettings
from arena_distill.config.phases.studies import AveragingSettings
from arena_distill.deployment.fold_weights import FoldMerger, validation_weights
from arena_distill.encoding.sequences import read_tokens
from arena_distill.evaluation.drawings import ACCENT, INK, MUTED, PAPER, SECOND, draw
from arena_distill.files.artifacts import provenance, read_json, write_json, write_text
from arena_distill.files.keys import locate
from arena_distill.files.tables import table_csv
from arena_distill.metrics import losses, mean_over_views, paired_difference, scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from arena_distill.deployment.merging import Adapter

STARTS = {"shared": "same start for all folds", "own": "own start for each fold"}


def draw_averaging(soups: Sequence[Path], output: Path, *, settings: AveragingSettings) -> None:
    """Collect the judges' soups (``compare_soups``) → `averaging.json`, `averaging.csv`, `averaging.svg`.

    Args:
        soups: one file per judge, in the order of `settings.averaging`.
    """
    named = [
        {"start": start, "epochs": float(epochs), "judge": judge}
        for start, judges in settings.averaging.items()
        for epochs, judge in judges.items()
    ]
    points = []
    for point, path in zip(named, soups, strict=True):
        soup = read_json(path)
        point |= {"distance": soup["distance"], "factors_gap": soup["factors_gap"]}
        points.append(point | {name: way["log_loss"] for name, way in soup["ways"].items()})
    figures = {
        "points": points,
        "provenance": provenance("averaging", settings.model_dump(mode="json")),
    }
    write_json(figures, output / "averaging.json")
    write_text(table_csv(points), output / "averaging.csv")
    write_text(draw("averaging", _drawing, figures), output / "averaging.svg")
    print(f"{output}: {len(points)} points")


def _drawing(figures: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

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
        axes.set_xlabel("epochs of separate training")
        axes.grid(True)
    if scored:
        panels[1].set_ylabel("test log loss of the merged model, nats")
        for way, dash in (("products", "-"), ("factors", (0, (4, 2))), ("ensemble", (0, (1, 2)))):
            panels[1].plot([], [], ls=dash, color=MUTED, label=way)
        panels[1].legend(fontsize=9, labelcolor=INK)
    panels[0].legend(fontsize=9, labelcolor=INK)
    return figure


def compare_soups(
    backbone: Path,
    adapters: Sequence[Path],
    logits: Sequence[Path],
    tokens: Path,
    folds: Path,
    test_votes: Path | None,
    output: Path,
    *,
    settings: SoupSettings,
    batch_tokens: int,
) -> None:
    """Score every way to make one model from a judge's folds on the test battles → JSON.

    `fold_<k>` alone, `best_fold` (by its validation loss), `ensemble` (the mean of the folds' logits: as
    many models as folds), `factors`, `products`, `validation` (weighted products). Differences are to
    the ensemble, paired, with intervals by prompt. Without the test battles' votes there are no scores,
    only the gap between the two averages.

    Args:
        logits: the folds' `fold_<k>.npy`, in the order of `adapters`.
        test_votes: `test_votes.parquet`, where the votes are known.
    """
    read = read_tokens(tokens)
    read = read.take(np.asarray(pc.equal(read.sources, "test")))
    pot = FoldMerger(backbone, adapters, read, settings, batch_tokens)
    n = len(adapters)
    by_validation = validation_weights(logits, folds)
    alone = [pot.logits([float(k == fold) for k in range(n)])[0] for fold in range(n)]
    equal = [1 / n] * n
    factors, gap = pot.logits(equal, "factors")
    ways = {f"fold_{k}": each for k, each in enumerate(alone)}
    ways |= {
        "best_fold": alone[int(np.argmax(by_validation))],
        "ensemble": np.mean(alone, axis=0),
        "factors": factors,
        "products": pot.logits(equal)[0],
        "validation": pot.logits(by_validation)[0],
    }
    figures: dict[str, Any] = {
        "factors_gap": gap,
        "weights": by_validation,
        "distance": _distance(pot.folds),
        "ways": {},
        "provenance": provenance("soups", settings.model_dump(mode="json")),
    }
    if test_votes:
        solved = Solution.read(test_votes)
        votes, groups = solved.votes, solved.groups
        place = locate(solved.keys, read.keys(), str(tokens))
        p = {name: mean_over_views(each[place]) for name, each in ways.items()}
        loss = {name: losses(each, votes) for name, each in p.items()}
        figures["ways"] = {
            name: scores(each, votes)
            | {"versus_ensemble": paired_difference(loss[name], loss["ensemble"], votes, groups)}
            for name, each in p.items()
        }
    write_json(figures, output)
    told = ", ".join(f"{name} {way['log_loss']:.4f}" for name, way in figures["ways"].items())
    print(f"{output}: gap {gap}; {told}")


def _distance(folds: Sequence[Adapter]) -> float:
    """Relative distance of the folds from their mean: root of Σ‖Δ_k − Δ̄‖² / (n Σ‖Δ̄‖²).

    Δ are the folds' updates s·B·A of all adapted layers, ‖·‖ Frobenius.
    """
    import torch

    apart = size = 0.0
    for target in folds[0].targets:
        updates = torch.stack([s * (b @ a) for a, b, s in (f.factors(target) for f in folds)])
        mean = updates.mean(0)
        apart += float((updates - mean).square().sum(dtype=torch.float64)) / len(folds)
        size += float(mean.square().sum(dtype=torch.float64))
    return float(np.sqrt(apart / size)) if size else 0.0
