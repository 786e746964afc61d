"""All files of an invented run: battles with known probabilities, and judges that know them roughly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from arena_distill.battles.folds import assign_folds, held_out_rows
from arena_distill.battles.parts import SCHEMA
from arena_distill.battles.prompts import prompt_groups
from arena_distill.battles.reading import REJECTED_SCHEMA
from arena_distill.battles.solution import write_test_votes
from arena_distill.battles.votes import vote_columns, with_classes
from arena_distill.config.phases.battles import SolutionSettings
from arena_distill.config.phases.evaluation import EvaluationSettings
from arena_distill.config.phases.prediction import CalibrationSettings, PredictionSettings
from arena_distill.config.phases.settings import VERSIONS
from arena_distill.config.vocabulary import ModelKind
from arena_distill.evaluation.evaluate import evaluate
from arena_distill.files.artifacts import provenance as origin
from arena_distill.files.artifacts import write_json, write_parquet, write_text
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import write_logits
from arena_distill.metrics import softmax
from arena_distill.prediction.held_out import fit_calibration
from arena_distill.prediction.test_time import Passes, predict_test
from arena_distill.verdicts import CLASSES, NO_VOTE, WINNERS, Votes

SIZES = {"train": 120, "extra": 30, "test": 40}
FOLDS = 3
JUDGES = {"big": (), "other-big": (), "small": ("big", "other-big")}
NOISE = {"big": 0.4, "other-big": 0.6, "small": 0.5}
LENGTHS = (256, 512)
VIEWS = {"max_lengths": LENGTHS, "orders": ["AB", "BA"]}
OVERCONFIDENT = 2.0
"""What the deployed model multiplies the true logits by, on held-out battles."""


@dataclass(frozen=True)
class MadeUpRun:
    """The files of a run in `folder`, and the data from which they are made.

    battles, folds: the tables as written.
    truth: float64 (rows of battles, classes), the logarithms of the true probabilities.
    """

    folder: Path
    battles: pa.Table
    folds: pa.Table
    truth: np.ndarray
    settings: EvaluationSettings

    def calibrate(self, model: ModelKind = "gptq", **changes: Any) -> Path:
        """Write the calibration of a deployed model of a run with held-out battles."""
        views = {"max_lengths": LENGTHS, "orders": ("AB", "BA"), "average": "logits"}
        asked = {"calibration": "auto"} | changes
        output = self.folder / "calibration" / f"{model}.json"
        fit_calibration(
            self.folder / "folds.parquet",
            self.folder / "battles.parquet",
            self.folder / "logits" / "small" / f"{model}_held_out.npy",
            output,
            judge="small",
            model=model,
            settings=CalibrationSettings(version=1, **(views | asked)),
        )
        return output

    @property
    def logits(self) -> dict[str, list[Path]]:
        """Each judge's files."""
        return {j: sorted((self.folder / "logits" / j).glob("fold_*.npy")) for j in JUDGES}

    def true_logits(self, rows: pa.Table) -> np.ndarray:
        """Rows of `truth` for the ids and sources of a table."""
        return self.truth[locate(key(rows), key(self.battles), "battles")]

    def evaluate(self, *, test: bool = True, **changes: Any) -> Path:
        """Write `metrics.json` of this run; without `test`, as on an arena of unknown votes."""
        known = {"test_votes": "test_votes.parquet", "drift": "drift.json"}
        known |= {"truth": "truth.parquet", "test_logits": "logits/small/gptq_test.npy"}
        known = known if test else {}
        options: dict[str, Any] = {name: self.folder / file for name, file in known.items()}
        if test:
            options["predictions"] = [self.folder / f"{m}.parquet" for m in ("merged", "gptq")]
        evaluate(
            self.folder / "folds.parquet",
            self.folder / "battles.parquet",
            self.logits,
            self.folder / "metrics.json",
            self.folder / "tables",
            **{
                "settings": self.settings,
                "surface": self.folder / "surface.parquet",
                "rejected": self.folder / "rejected.parquet",
                **options,
                **changes,
            },
        )
        return self.folder / "metrics.json"


def made_up_run(
    folder: Path,
    *,
    seed: int = 0,
    noise: Mapping[str, float] = NOISE,
    holdout: float = 0,
    classes: int = 3,
) -> MadeUpRun:
    """Write a run's files; `noise` is the standard deviation of the error in each judge's logits."""
    rng = np.random.default_rng(seed)
    battles, truth = _battles(rng, classes)
    about = origin("made up", {})
    folds = assign_folds(battles, method="stratified_group", n=FOLDS, seed=1, holdout=holdout)
    write_parquet(battles, folder / "battles.parquet", about)
    write_parquet(folds, folder / "folds.parquet", about)
    settings = EvaluationSettings(
        version=VERSIONS["evaluation"], run="made-up", judges=JUDGES, final="small", model="gptq"
    )
    run = MadeUpRun(folder, battles, folds, truth, settings)
    for judge, error in noise.items():
        for fold in range(FOLDS):
            _write_fold(run, judge, fold, error, rng)
    _write_test(run, noise["small"], rng)
    if holdout:
        held_out = folds.select(["id", "source"]).take(pa.array(held_out_rows(folds)))
        true = run.true_logits(held_out)[:, None, None]
        shape = (len(held_out), len(LENGTHS), 2, run.truth.shape[1])
        for model in ("merged", "gptq"):
            seen = OVERCONFIDENT * true + rng.normal(0, noise["small"], shape)
            path = folder / "logits" / "small" / f"{model}_held_out.npy"
            write_logits(path, seen.astype(np.float32), held_out, origin("scoring", VIEWS))
    _write_beside(run)
    return run


def _battles(rng: np.random.Generator, classes: int) -> tuple[pa.Table, np.ndarray]:
    """Battles in the canonical schema whose longer answer tends to win, and their true probabilities."""
    rows = sum(SIZES.values())
    source = np.repeat(list(SIZES), list(SIZES.values()))
    words = rng.integers(1, 60, (rows, 2))
    logits = np.column_stack([words / 20, words.mean(axis=1) / 20 - 0.8])
    logits[:, :2] += rng.normal(0, 0.8, (rows, 2))
    truth = np.log(softmax(logits[:, :classes]))
    label = (np.exp(truth).cumsum(axis=1) < rng.random(rows)[:, None]).sum(axis=1)
    label = label.clip(max=classes - 1)
    ids = [str(i) for i in rng.permutation(rows)]
    # An id of train turns up in test as well: rows are named by source and id.
    ids[-1] = ids[0]
    table = {
        "id": ids,
        "source": source,
        "prompt": [[f"question {i // 2}"] for i in range(rows)],
        "response_a": [["word " * n] for n in words[:, 0]],
        "response_b": [["word " * n] for n in words[:, 1]],
        "model_a": ["x"] * rows,
        "model_b": ["y"] * rows,
        "language": pa.nulls(rows, pa.string()),
        "category": pa.nulls(rows, pa.string()),
        **vote_columns(Votes.hard(np.where(source == "test", NO_VOTE, label), classes)),
    }
    table["group"] = prompt_groups(pa.table(table)["prompt"])
    whole = pa.table(table).cast(with_classes(SCHEMA, classes))
    return whole.replace_schema_metadata(_votes(label)), truth


def _votes(label: np.ndarray) -> dict[str, str]:
    return {"votes": "".join(map(str, label))}


def _write_fold(
    run: MadeUpRun, judge: str, fold: int, error: float, rng: np.random.Generator
) -> None:
    """A fold's logits: its validation rows, and the extra rows that students learn from."""
    fold_of = run.folds["fold"].to_numpy()
    rows = rng.permutation(np.flatnonzero((fold_of == fold) | (fold_of == -1)))
    ids = run.folds.select(["id", "source"]).take(pa.array(rows))
    ids = ids.append_column("validation", pa.array(fold_of[rows] == fold))
    true = run.true_logits(ids)[:, None]
    logits = (true + rng.normal(0, error, (len(rows), 2, true.shape[-1]))).astype(np.float32)
    path = run.folder / "logits" / judge / f"fold_{fold}.npy"
    write_logits(path, logits, ids, origin("logits", {"fold": fold}))


def _write_test(run: MadeUpRun, error: float, rng: np.random.Generator) -> None:
    test = run.battles.slice(sum(SIZES.values()) - SIZES["test"]).select(["id", "source"])
    settings = PredictionSettings(
        version=1, max_lengths=LENGTHS, orders=("AB", "BA"), average="logits"
    )
    shape = (len(test), len(LENGTHS), 2, run.truth.shape[1])
    logits = run.true_logits(test)[:, None, None] + rng.normal(0, error, shape)
    costs = _costs(len(test))
    test = pa.table({n: test[n] for n in test.column_names} | costs.columns(LENGTHS))
    drifts: dict[ModelKind, float] = {"merged": 0.0, "gptq": 0.01}
    for model, drift in drifts.items():
        path = run.folder / "logits" / "small" / f"{model}_test.npy"
        shuffled = rng.permutation(len(test))
        drifted = logits + rng.normal(0, drift, shape)
        drifted[:, 1] = np.where(costs.scored[:, 1, None, None], drifted[:, 1], drifted[:, 0])
        write_logits(
            path,
            drifted[shuffled].astype(np.float32),
            test.take(pa.array(shuffled)),
            origin("scoring", VIEWS),
        )
        predict_test(path, run.folder / f"{model}.parquet", model=model, settings=settings)


def _costs(rows: int) -> Passes:
    """The costs of battles from 60 tokens up; the longest are cut at both lengths."""
    tokens = 2 * np.minimum(60 + 20 * np.arange(rows)[:, None], LENGTHS)
    tokens[:, 1] *= tokens[:, 1] > tokens[:, 0]
    return Passes(2 * (tokens > 0), tokens, tokens > 0)


def _write_beside(run: MadeUpRun) -> None:
    """The solution, the truth, the refused rows and the drift of GPTQ."""
    folder, battles = run.folder, run.battles
    votes = np.array(list(battles.schema.metadata[b"votes"].decode()), np.int64)
    test = np.flatnonzero(battles["source"].to_numpy() == "test")
    classes = run.truth.shape[1]
    frame = pd.DataFrame(np.eye(classes, dtype=int)[votes[test]], columns=list(WINNERS[:classes]))
    frame.insert(0, "id", battles["id"].take(pa.array(test)).to_pylist())
    write_text(frame.to_csv(index=False), folder / "solution.csv")
    write_test_votes(
        folder / "solution.csv",
        folder / "battles.parquet",
        folder / "test_votes.parquet",
        SolutionSettings(version=1, ties="class" if classes == 3 else "refuse"),
    )
    p = np.exp(run.truth)
    truth = {"source": battles["source"], "id": battles["id"]}
    truth |= {f"p_{name}": p[:, i] for i, name in enumerate(CLASSES[:classes])}
    write_parquet(pa.table(truth), folder / "truth.parquet", origin("made up", {}))
    # In place of trees: the truth, halfway to equal shares.
    truth |= {f"p_{name}": (p[:, i] + 1 / classes) / 2 for i, name in enumerate(CLASSES[:classes])}
    write_parquet(pa.table(truth), folder / "surface.parquet", origin("made up", {}))
    refused = [
        ("train", "prompt", "starts with [ but is not a JSON list: Expecting value: line 1"),
        ("train", "prompt", "starts with [ but is not a JSON list: Extra data: line 9"),
        ("train", "id", "id 12 is taken by row 3 of train.csv"),
        ("extra", None, "not a battle: Expecting value"),
    ]
    lines = [
        {"source": s, "file": f"{s}.csv", "row": i, "column": c, "reason": r}
        for i, (s, c, r) in enumerate(refused, start=1)
    ]
    rejected = pa.Table.from_pylist(lines, schema=REJECTED_SCHEMA)
    write_parquet(rejected, folder / "rejected.parquet", origin("made up", {}))
    drift = {"kl": 2.5e-6, "kl_max": 4e-5, "flip_rate": 0.0, "rows": 512, "log_loss_change": 1e-4}
    write_json(drift | {"bytes_before": 4_300_000, "bytes": 1_900_000}, folder / "drift.json")
