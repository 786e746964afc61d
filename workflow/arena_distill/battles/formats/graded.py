"""`graded`: a prompt, two answers and how much better one is, from −3 to 3 (HelpSteer2 and 3)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from arena_distill.battles.formats import battles
from arena_distill.battles.formats.canonical import Battles
from arena_distill.battles.formats.columns import Rows, finite
from arena_distill.battles.formats.votes import NONE

VOTES = {
    -3: (0.95, 0.02, 0.03),
    -2: (0.85, 0.06, 0.09),
    -1: (0.65, 0.15, 0.20),
    0: (0.15, 0.15, 0.70),
    1: (0.15, 0.65, 0.20),
    2: (0.06, 0.85, 0.09),
    3: (0.02, 0.95, 0.03),
}
"""By grade, the shares of A, B and tie that people would vote for: "much better" is nearly certain,
"slightly better" often a tie. A choice of ours: the sets publish no such shares."""


def convert(rows: Rows) -> Battles:
    """With `annotators: merge`, the vote is the mean of all annotators' and the weight their number."""
    vote = _votes(rows)
    if "grades" not in rows or not rows.table.votes or rows.reading.annotators == "keep":
        return battles.with_votes(rows, vote)
    row, votes = _of_annotators(rows)
    count = np.bincount(row, minlength=rows.count)
    sums = [np.bincount(row, share, rows.count) for share in votes.T]
    graded = (count > 0) & ~np.isnan(vote[:, 0])
    shares = np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]
    made = battles.with_votes(rows, np.where(graded[:, None], shares, vote))
    return replace(made, weight=np.where(graded, count, 1).astype(float))


def _of_annotators(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The row of each annotator's grade, int64 (grades,), and its vote, float64 (grades, 3)."""
    found = [(np.zeros(0, np.int64), np.zeros((0, 3)))]
    bad = np.zeros(rows.count, bool)
    for row, cell in enumerate(rows.objects("grades")):
        given = cell if isinstance(cell, list) else []
        scores = [finite(one.get("score") if isinstance(one, dict) else one) for one in given]
        votes = [VOTES[int(score)] for score in scores if score is not None and score in VOTES]
        bad[row] = len(votes) < len(scores) or not isinstance(cell, list | None)
        found += [(np.full(len(votes), row), np.array(votes))] if votes else []
    rows.refuse(bad, "grades", "a list with a `score` from -3 to 3 of each annotator expected")
    rows_of, votes_of = zip(*found, strict=True)
    return np.concatenate(rows_of), np.concatenate(votes_of)


def _votes(rows: Rows) -> np.ndarray:
    """Negative grades are for the first answer."""
    if not rows.table.votes:
        return np.tile(NONE, (rows.count, 1))
    grades = rows.numbers("grade", "a whole number from -3 to 3")
    missing = np.isnan(grades)
    if rows.reading.missing_votes == "refuse":
        rows.refuse(missing, "grade", "no vote; to keep such rows: `missing_votes: keep`")
    known = np.isin(grades, list(VOTES))
    unknown = ~known & ~missing
    rows.refuse_each(unknown, "grade", rows.texts("grade"), "a whole number from -3 to 3 expected")
    table = np.array(list(VOTES.values()))
    index = np.where(known, np.nan_to_num(grades) + 3, 0).astype(int)
    return np.where(known[:, None], table[index], NONE)
