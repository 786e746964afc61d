"""`graded`: a prompt, two answers and how much better one is, from −3 to 3 (HelpSteer2 and 3)."""

from __future__ import annotations

import numpy as np

from arena_distill.battles.formats import battles
from arena_distill.battles.formats.canonical import Battles
from arena_distill.battles.formats.columns import Rows
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
    return battles.with_votes(rows, _votes(rows))


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
