"""Read how a run went: time and memory of its jobs beside the plan, and the histories of its trainings."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa

from arena_distill.files.artifacts import read_json, read_parquet
from arena_distill.metrics import Figures


def job_costs(run: Path) -> list[Figures]:
    """Time and memory by rule, as Snakemake measured the last run of each job; the longest first.

    Args:
        run: the run's folder; `plan.json` is read if `snakemake plan` has written it.

    Returns:
        Records of `rule`, `jobs`, `seconds` (of all), `longest` (seconds), `memory` (the most, in MB, or
        None) and `planned` (seconds of all, or None).
    """
    plan = run / "plan.json"
    planned = read_json(plan)["jobs"] if plan.exists() else []
    found = []
    for path in sorted((run / "benchmarks").glob("*")):
        files = sorted(path.glob("*.tsv")) if path.is_dir() else [path]
        lines = [line for file in files for line in _measured(file)]
        if not lines:
            continue
        rule = path.stem
        seconds = [float(line["s"]) for line in lines]
        memory = [float(line["max_rss"]) for line in lines if line["max_rss"][:1].isdigit()]
        told = [
            j["seconds"] for j in planned if j["rule"] == rule or j["rule"].startswith(f"{rule}_")
        ]
        found.append(
            {
                "rule": rule,
                "jobs": len(lines),
                "seconds": sum(seconds),
                "longest": max(seconds),
                "memory": max(memory, default=None),
                "planned": sum(told) if told else None,
            }
        )
    return sorted(found, key=lambda record: -record["seconds"])


def _measured(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def histories(run: Path, judges: list[str]) -> dict[str, list[pa.Table]]:
    """The histories of the judges' folds (``training.trainer``), of those that were trained here."""
    found = {
        judge: [
            read_parquet(path)
            for path in sorted((run / "adapters" / judge).glob("fold_*/history.parquet"))
        ]
        for judge in judges
    }
    return {judge: tables for judge, tables in found.items() if tables}
