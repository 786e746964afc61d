"""Read a run for evaluation: battles, votes and logits out of fold, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from arena_distill.battles.folds import (
    EVERY_FOLD,
    dropped_extra,
    fold_settings,
    shared_prompts,
    training_rows,
    undivided_groups,
    validation_rows,
)
from arena_distill.battles.style_features import LENGTHS, read_styles
from arena_distill.battles.votes import classes_of, votes_of
from arena_distill.evaluation.baselines import Baseline
from arena_distill.evaluation.slices import SLICED
from arena_distill.files.artifacts import read_parquet
from arena_distill.files.keys import key, locate
from arena_distill.metrics import Figures, scores
from arena_distill.prediction.calibration import parts_of
from arena_distill.scoring.logits import read_out_of_fold
from arena_distill.verdicts import Votes


@dataclass(frozen=True)
class Run:
    """The battles of a run, and which of them validate.

    folds: `folds.parquet`.
    battles: `battles.parquet` without its texts.
    battle_styles: float64 (rows of `battles`, 8), :func:`read_styles`.
    styles: the same for the rows of `folds`.
    validation: positions in `folds` of the out-of-fold rows: what every score is computed on.
    """

    folds: pa.Table
    battles: pa.Table
    battle_styles: np.ndarray
    styles: np.ndarray
    validation: np.ndarray

    @classmethod
    def read(cls, folds_path: Path, battles_path: Path) -> Run:
        folds = read_parquet(folds_path)
        battles = read_parquet(battles_path, ["id", "source", *SLICED])
        keys = key(folds)
        locate(keys, keys, str(folds_path))  # no row is there twice
        rows = locate(keys, key(battles), str(battles_path))
        validation = np.flatnonzero(folds["fold"].to_numpy() >= 0)
        styles = read_styles(battles_path, key(battles))
        return cls(folds, battles, styles, styles[rows], validation)

    @property
    def lengths(self) -> np.ndarray:
        """Features of the length baseline for the rows of `folds`: float64 (rows, 4)."""
        return self.styles[:, :LENGTHS]

    def of_folds(self, n: int) -> Run:
        """The same run, with only the battles of the first `n` folds to score."""
        fold = self.folds["fold"].to_numpy()
        return replace(self, validation=np.flatnonzero((fold >= 0) & (fold < n)))

    def judge_logits(self, judge: str, paths: Sequence[Path]) -> np.ndarray:
        """A judge's out-of-fold logits: float32 (out-of-fold rows, orders, classes)."""
        scored = self.folds.take(pa.array(self.validation))
        return read_out_of_fold(scored, paths, judge)

    def styles_of(self, keys: pa.Array) -> np.ndarray:
        """Features of any battles of the run: float64 (rows, 8), :func:`read_styles`."""
        return self.battle_styles[locate(keys, key(self.battles), "battles")]

    def names_of(self, keys: pa.Array) -> pa.Table:
        """What any battles of the run are sliced by: the columns of `SLICED`."""
        rows = locate(keys, key(self.battles), "battles")
        return self.battles.select(SLICED).take(pa.array(rows))

    def named(self) -> pa.Table:
        """The out-of-fold rows: `id`, `source`, `fold`, and the columns of `SLICED`."""
        rows = self.folds.select(["id", "source", "fold"]).take(pa.array(self.validation))
        names = self.names_of(key(rows))
        return pa.table({n: t[n] for t in (rows, names) for n in t.column_names})

    def keys(self) -> pa.Array:
        """Keys of the out-of-fold rows."""
        return key(self.folds.select(["id", "source"]).take(pa.array(self.validation)))

    def fold_numbers(self) -> list[int]:
        return np.unique(self.folds["fold"].to_numpy()[self.validation]).tolist()

    def votes(self, rows: np.ndarray | None = None) -> Votes:
        """Votes of the given rows of `folds`, by default of the out-of-fold rows."""
        return votes_of(self.folds)[self.validation if rows is None else rows]

    def voted(self) -> tuple[np.ndarray, Votes]:
        """`lengths` and votes of all rows with a vote."""
        rows = np.flatnonzero(votes_of(self.folds).known)
        return self.lengths[rows], self.votes(rows)

    def trained(self) -> tuple[np.ndarray, Votes]:
        """`lengths` and votes of all rows that train some fold."""
        rows = np.flatnonzero(self.folds["fold"].to_numpy() >= EVERY_FOLD)
        return self.lengths[rows], self.votes(rows)

    def groups(self) -> np.ndarray:
        """Prompts of the out-of-fold rows, as numbers: int64 (``folds.undivided_groups``)."""
        return undivided_groups(self.folds)[self.validation]

    def parts(self) -> np.ndarray:
        """Parts of the out-of-fold rows for cross-fitting, which share no prompt: int64.

        The folds, if these keep prompts together, else as many parts (``calibration.parts_of``).
        """
        dealt = fold_settings(self.folds)
        fold = self.folds["fold"].to_numpy()
        if dealt["method"] == "stratified_group":
            return fold[self.validation].astype(np.int64)
        parts = np.full(len(self.folds), -1)
        parts[fold >= 0] = parts_of(undivided_groups(self.folds)[fold >= 0], dealt["n"])
        return parts[self.validation]

    def out_of_fold(self, baseline: Baseline) -> np.ndarray:
        """Probabilities of the out-of-fold rows, each from the rows that train its fold."""
        probabilities = np.empty((len(self.folds), classes_of(self.folds)))
        for fold in self.fold_numbers():
            training, rows = training_rows(self.folds, fold), validation_rows(self.folds, fold)
            seen = self.lengths[training], self.votes(training)
            probabilities[rows] = baseline(*seen, self.lengths[rows])
        return probabilities[self.validation]

    def by_fold(self, probabilities: np.ndarray) -> list[Figures]:
        """Scores per fold of the out-of-fold rows' probabilities."""
        fold, votes = self.folds["fold"].to_numpy()[self.validation], self.votes()
        return [
            {"fold": k, **scores(probabilities[fold == k], votes[fold == k])}
            for k in self.fold_numbers()
        ]


def _fold(run: Run, fold: int) -> Figures:
    return {
        "fold": fold,
        "training_rows": len(training_rows(run.folds, fold)),
        "validation_rows": len(validation_rows(run.folds, fold)),
        "dropped_extra": dropped_extra(run.folds, fold),
        "shared_prompts": shared_prompts(run.folds, fold),
    }
