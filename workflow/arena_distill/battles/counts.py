"""Refuse what a run has too few battles for, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import fold_settings, training_rows
from arena_distill.config.phases.battles import CountSettings, JudgeCounts
from arena_distill.config.training import Schedule
from arena_distill.errors import InputError
from arena_distill.files.artifacts import provenance, read_parquet, write_json


def write_counts(battles: Path, folds: Path, output: Path, *, settings: CountSettings) -> None:
    """Write the counts of a run, and print them.

    Raises:
        InputError: as :func:`count`.
    """
    ut = pc.sum(pc.equal(read_parquet(battles, ["source"])["source"], "ut")).as_py() or 0
    counts = count(read_parquet(folds), ut, settings)
    write_json(counts | {"provenance": provenance("counts", settings.model_dump())}, output)
    for name, steps in counts["steps"].items():
        print(f"{name}: {', '.join(f'{part} {number} steps' for part, number in steps.items())}")


def count(folds: pa.Table, ut: int, settings: CountSettings) -> dict[str, Any]:
    """Count the optimizer steps of each training, and the battles of quantisation.

    Args:
        folds: the table of folds.
        ut: battles for post-pretraining.

    Returns:
        JSON: ``steps``: by judge and part (`pretraining`, `training`: of the shortest fold);
        ``quantization``: ``samples`` and ``validation_rows``, or null.

    Raises:
        InputError: one line per training that ends before it has warmed up, and one for quantisation.
    """
    problems, steps = [], {}
    shortest = {
        unlabelled: min(
            len(training_rows(folds, fold, unlabelled=unlabelled))
            for fold in range(fold_settings(folds)["n"])
        )
        for unlabelled in (False, True)
    }
    for name, judge in settings.judges.items():
        rows = max(1, round(judge.share * shortest[judge.unlabelled]))
        parts = {"training": (judge.training, rows)}
        if judge.pretraining:
            parts["pretraining"] = judge.pretraining, ut
        steps[name] = {part: how.steps(_shown(how, judge, n)) for part, (how, n) in parts.items()}
        for part, (how, battles) in parts.items():
            if how.warmup_steps and how.warmup_steps >= steps[name][part]:
                problems.append(
                    f"config: judges.{name}.{part}.warmup_steps: {how.warmup_steps}, but {battles} battles "
                    f"make {steps[name][part]} steps: lr would never be reached; lower it, or leave it out"
                )
    train = pc.sum(pc.equal(folds["source"], "train")).as_py() or 0
    sizes = None
    try:
        sizes = settings.quantization and settings.quantization.sized(train)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return {
        "steps": steps,
        "quantization": sizes and sizes.model_dump(include={"samples", "validation_rows"}),
    }


def _shown(how: Schedule, judge: JudgeCounts, battles: int) -> int:
    """Battles as shown: in both orders with `swap`; a pointwise judge is shown each once."""
    return battles * (2 if how.swap and not judge.pointwise else 1)
