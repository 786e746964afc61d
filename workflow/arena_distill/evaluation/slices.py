"""Score a judge by slice: on the battles of a language, of a category, and of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.metrics import (
    Figures,
    calibration_error,
    losses,
    mean_interval,
    reliability,
    right_verdicts,
    scores,
    share_interval,
)
from arena_distill.verdicts import Votes

COLUMNS_OF = {
    "language": ("language",),
    "category": ("category",),
    "model": ("model_a", "model_b"),
}
"""The ways to slice, and the columns of battles that name a battle's slices: a model is on either side."""

SLICED = tuple(name for columns in COLUMNS_OF.values() for name in columns)

FEWEST = 100
"""Slices of fewer battles are pooled as `OTHER`: their scores would be little more than chance."""

OTHER, UNKNOWN = "other", "unknown"

SLICE_COLUMNS = (
    *("battles", "by", "slice", "rows", "log_loss", "low", "high"),
    *("accuracy", "accuracy_low", "accuracy_high", "ece"),
    *("class_prior", "length", "surface", "bayes"),
)


def slices_of(battles: pa.Table) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield each slice: what it is of, its name, and its battles.

    Args:
        battles: the columns of `SLICED`, string. A missing name is `UNKNOWN`. If no name has `FEWEST`
            battles there is nothing to compare, so there are no slices.

    Yields:
        a key of `COLUMNS_OF`; the slice's name; int64 (its battles,), ascending. The largest slice
        comes first, `OTHER` and `UNKNOWN` last.
    """
    for by, columns in COLUMNS_OF.items():
        cells = pa.concat_arrays([battles[name].combine_chunks() for name in columns])
        encoded = pc.fill_null(cells, UNKNOWN).dictionary_encode()
        row = np.tile(np.arange(len(battles)), len(columns))
        names = np.array(encoded.dictionary.to_pylist(), object)
        code, _ = _distinct(encoded.indices.to_numpy().astype(np.int64), row)
        names[np.bincount(code) < FEWEST] = OTHER
        names, pooled = np.unique(names, return_inverse=True)
        if {OTHER, UNKNOWN}.issuperset(names):
            continue
        code, row = _distinct(pooled[encoded.indices.to_numpy()], row)
        parts = np.split(row, np.searchsorted(code, np.arange(1, len(names))))
        order = sorted(
            range(len(names)), key=lambda i: (names[i] in (OTHER, UNKNOWN), -len(parts[i]))
        )
        yield from ((by, str(names[i]), parts[i]) for i in order)


def _distinct(code: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a slice and a battle, sorted, each once: a model may meet itself."""
    slices, battles = np.divmod(np.unique(code * len(row) + row), max(len(row), 1))
    return slices, battles


def slice_scores(
    battles: pa.Table,
    probabilities: np.ndarray,
    baselines: Mapping[str, np.ndarray],
    votes: Votes,
    groups: np.ndarray,
) -> list[Figures]:
    """Score probabilities on every slice.

    Args:
        battles: columns as for :func:`slices_of`.
        probabilities: float (rows, classes), the judge's; `baselines`: the same by name.
        votes: of these battles.
        groups: int (rows,), the battle's prompt.

    Returns:
        One record per slice: `by`, `slice`; `rows`, `log_loss`, `accuracy` and `ece`; the 95 % intervals
        of the log loss (`low`, `high`) and of the accuracy (`accuracy_low`, `accuracy_high`), by
        :func:`mean_interval` and :func:`share_interval`; and the log loss of each baseline, by its name.
    """
    loss = losses(probabilities, votes)
    right = right_verdicts(probabilities, votes)
    losses_of = {name: losses(p, votes) for name, p in baselines.items()}
    records = []
    for by, name, rows in slices_of(battles):
        mine = votes[rows]
        _, low, high = mean_interval(loss[rows], mine, groups[rows])
        _, least, most = share_interval(right[rows], mine, groups[rows])
        records.append(
            {
                "by": by,
                "slice": name,
                **scores(probabilities[rows], mine),
                **{"low": low, "high": high, "accuracy_low": least, "accuracy_high": most},
                "ece": calibration_error(reliability(probabilities[rows], mine)),
                **{of: float(mine.mean(values[rows])) for of, values in losses_of.items()},
            }
        )
    return records


def slice_records(metrics: Figures) -> list[Figures]:
    """One record per slice, of the final judge out of fold and of what is submitted on test battles."""
    test = metrics["test"] or {"slices": []}
    found = {"out of fold": metrics["slices"], "test": test["slices"]}
    return [{"battles": of, **record} for of, records in found.items() for record in records]
