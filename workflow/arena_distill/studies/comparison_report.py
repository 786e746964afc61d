"""Render `compare.json` as one HTML page, a drawing, and two flat tables."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from arena_distill.evaluation.drawings import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    SECOND,
    draw,
    inline,
    rows_axis,
)
from arena_distill.evaluation.report import template
from arena_distill.files.artifacts import read_json, write_text
from arena_distill.files.tables import table_csv
from arena_distill.metrics import Figures
from arena_distill.studies.comparison import calibrated_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {"out_of_fold": "out of fold", "test": "on the test battles, merged models"}


def render_comparison(path: Path, output: Path) -> None:
    """Write `report.html`, `compare.svg`, `judges.csv`, `differences.csv` next to `compare.json`."""
    figures = read_json(path)
    drawing = draw("compare", _drawing, figures)
    parts = {part: figures[part] for part in PARTS if figures[part]}
    page = template("compare.html.j2").render(
        figures=figures,
        parts=parts,
        names=PARTS,
        entries={entry["label"]: entry for entry in figures["entries"]},
        methods=sorted({entry["calibration"] for entry in figures["entries"]} - {"none"}),
        gains=gains(figures),
        trainings=trainings(figures),
        drawing=inline(drawing, _alt(figures)),
        difference=difference,
    )
    write_text(drawing, output / "compare.svg")
    write_text(table_csv(judge_records(figures)), output / "judges.csv")
    write_text(table_csv(difference_records(figures)), output / "differences.csv")
    write_text(page, output / "report.html")


def gains(figures: Figures) -> list[Figures]:
    """The gain of distillation: each student against the same judge trained on votes only."""
    pairs = [
        (calibrated_label(entry["label"], method), calibrated_label(entry["against"], method))
        for entry in figures["entries"]
        if entry["against"]
        for method in dict.fromkeys(("none", entry["calibration"]))
    ]
    return [
        {"label": judge, "against": against, "part": part}
        | difference(figures[part], judge, against)
        for judge, against in pairs
        for part in PARTS
        if figures[part] and {judge, against} <= set(figures[part]["judges"])
    ]


def trainings(figures: Figures) -> list[Figures]:
    """The luck of training: mean and standard deviation over an entry and its repeats with other seeds.

    Returns:
        per entry and part `trainings`, their number; `log_loss` and `gain` (to the same judge on votes
        alone, of the same seed), each `mean` and `deviation`; `gain` is None where there is none.
    """
    by_label = {entry["label"]: entry for entry in figures["entries"]}
    records = []
    for label in by_label:
        again = [e for e in figures["entries"] if e["repeats"] == label]
        for part in PARTS if again else ():
            table = figures[part]
            runs = [e for e in (by_label[label], *again) if table and e["label"] in table["judges"]]
            if len(runs) < 2:
                continue
            losses = [table["judges"][e["label"]]["log_loss"] for e in runs]
            gained = [
                difference(table, e["label"], e["against"])["difference"]
                for e in runs
                if e["against"] in table["judges"]
            ]
            gain = _spread(gained) if len(gained) == len(runs) else None
            records.append({"label": label, "part": part, "trainings": len(runs)})
            records[-1] |= {"log_loss": _spread(losses), "gain": gain}
    return records


def _spread(values: list[float]) -> Figures:
    return {"mean": fmean(values), "deviation": stdev(values)}


def difference(table: Figures, judge: str, against: str) -> Figures:
    """The difference in log loss between two judges of a part, with its interval."""
    if judge == against:
        return {"difference": 0.0, "low": 0.0, "high": 0.0}
    return next(
        {name: row[name] for name in ("difference", "low", "high")}
        for row in table["differences"]
        if (row["judge"], row["against"]) == (judge, against)
    )


def judge_records(figures: Figures) -> list[Figures]:
    """One record per judge and part."""
    entries = {entry["label"]: entry for entry in figures["entries"]}
    records = []
    for part in PARTS:
        for label, judge in (figures[part] or {"judges": {}})["judges"].items():
            entry, position = entries.get(label, {}), judge.get("position", {})
            records.append(
                {
                    "part": part,
                    "label": label,
                    "judge": entry.get("judge"),
                    "teachers": " ".join(entry.get("teachers", ())),
                    "rows": judge["rows"],
                    "log_loss": judge["log_loss"],
                    "low": judge["low"],
                    "high": judge["high"],
                    "accuracy": judge["accuracy"],
                    "brier": judge["brier"],
                    "ece": judge["ece"],
                    "kl_to_truth": judge.get("truth", {}).get("kl"),
                    "flip_rate": position.get("flip_rate"),
                    "total_variation": position.get("total_variation"),
                    "parameters": entry.get("parameters"),
                    "bytes": entry.get("bytes"),
                    "training_seconds": entry.get("seconds"),
                }
            )
    return records


def difference_records(figures: Figures) -> list[Figures]:
    """One record per part and ordered pair of judges."""
    return [
        {"part": part, **row}
        for part in PARTS
        if figures[part]
        for row in figures[part]["differences"]
    ]


def _drawing(figures: Figures) -> Figure:
    """A row per judge: log loss with its interval, out of fold and on test."""
    from matplotlib.figure import Figure

    parts = [part for part in PARTS if figures[part]]
    labels = list(figures["out_of_fold"]["judges"])
    figure = Figure(figsize=(7.6, 0.9 + 0.34 * len(labels)))
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    shown = [(e, calibrated_label(e["label"], e["calibration"])) for e in figures["entries"]]
    colours = {
        label: SECOND if entry["teachers"] else ACCENT
        for entry, calibrated in shown
        for label in (entry["label"], calibrated)
    }
    raw = {entry["label"] for entry in figures["entries"]}
    for axes, part in zip(panels, parts, strict=True):
        for y, label in enumerate(labels):
            judge: dict[str, Any] | None = figures[part]["judges"].get(label)
            if judge is None:
                continue
            colour = colours.get(label, MUTED)
            if judge["low"] is not None:
                axes.plot([judge["low"], judge["high"]], [y, y], color=colour, lw=1.4, alpha=0.7)
            axes.plot(
                judge["log_loss"], y, "o" if label in raw else "D", color=colour, mec=PAPER, ms=7
            )
        rows_axis(axes, labels)
        axes.set_xlabel(f"log loss {PARTS[part]}", fontsize=9)
    panels[0].tick_params(axis="y", labelcolor=INK)
    return figure


def _alt(figures: Figures) -> str:
    shown = [f"{n} {j['log_loss']:.3f}" for n, j in figures["out_of_fold"]["judges"].items()]
    return f"Dot chart of log loss out of fold with intervals, lower is better: {', '.join(shown)}."
