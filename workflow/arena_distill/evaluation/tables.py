"""Write the main tables of `metrics.json` as CSV."""

from __future__ import annotations

from pathlib import Path

from arena_distill.evaluation.cascade import CASCADE_COLUMNS, cascade_records
from arena_distill.evaluation.ranking import RANKING_COLUMNS, ranking_records
from arena_distill.evaluation.slices import SLICE_COLUMNS, slice_records
from arena_distill.files.artifacts import write_text
from arena_distill.files.tables import table_csv
from arena_distill.metrics import Figures

JUDGE_COLUMNS = ("name", "kind", "fold", "rows", "log_loss", "accuracy")

VARIANT_COLUMNS = ("model", "variant", "rows", "log_loss", "accuracy", "submitted")


def write_tables(metrics: Figures, folder: Path) -> None:
    """Write `judges`, `variants`, `cascade`, `slices` and `ranking.csv`, exact figures."""
    for name, records, columns in (
        ("judges", judge_records, JUDGE_COLUMNS),
        ("variants", variant_records, VARIANT_COLUMNS),
        ("cascade", cascade_records, CASCADE_COLUMNS),
        ("slices", slice_records, SLICE_COLUMNS),
        ("ranking", ranking_records, RANKING_COLUMNS),
    ):
        write_text(table_csv(records(metrics), columns), folder / f"{name}.csv")


def judge_records(metrics: Figures) -> list[Figures]:
    """One record per judge or baseline and fold, and one (`fold` "all") over all folds' rows."""
    records = []
    baselines = {n: (f, f) for n, f in metrics["baselines"].items() if f}
    judges = {n: (f, f["oof"]) for n, f in metrics["judges"].items()}
    for kind, group in (("judge", judges), ("baseline", baselines)):
        for name, (figures, overall) in group.items():
            for part in (*figures["folds"], {"fold": "all", **overall}):
                record = {"name": name, "kind": kind, **part}
                records.append({column: record[column] for column in JUDGE_COLUMNS})
    return records


def variant_records(metrics: Figures) -> list[Figures]:
    """One record per model and variant scored on the test battles."""
    test = metrics["test"] or {"models": {}, "submitted": None}
    return [
        {"model": model, "variant": variant, **figures}
        | {"submitted": test["submitted"] == {"model": model, "variant": variant}}
        for model, variants in test["models"].items()
        for variant, figures in variants.items()
    ]
