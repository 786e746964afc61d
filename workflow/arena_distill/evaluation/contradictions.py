"""List the battles whose vote every teacher contradicts: noise, or what no teacher understands.

A teacher that was not trained on a battle contradicts its vote if it gives the vote a probability below a
threshold. Some votes are improbable by right: beside the count stands how many there would be if votes were
drawn from the teachers' mean probabilities. What is more is noise, or the teachers are too sure.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from arena_distill.evaluation.slices import COLUMNS_OF
from arena_distill.metrics import Figures
from arena_distill.verdicts import CLASSES, Votes

SHOWN = 10
"""Battles and models that are shown, the worst of all."""


def contradicted_votes(
    battles: pa.Table, judged: Mapping[str, np.ndarray], votes: Votes, below: float
) -> tuple[pa.Table, Figures]:
    """Find the battles whose vote has a probability below `below` from every teacher.

    Args:
        battles: `id`, `source`, `fold`, `model_a` and `model_b` of the battles out of fold.
        judged: each teacher's probabilities of them out of fold, float64 (rows, classes).
        votes: of these battles. The probability of a soft vote is the mean of its classes'.

    Returns:
        These battles, the worst first: the columns of `battles`, `vote`, its likeliest class (string), and
        for each teacher `p_<name>`, float64, the probability that it gives the vote. And figures:
        `teachers`, `below`, `rows`, `battles` (contradicted ones), `expected` (their number by chance),
        `votes` (counts by class of the vote), `models` and `worst`, records of at most `SHOWN`.
    """
    stacked = np.stack(list(judged.values()))
    given = np.einsum("jrc,rc->jr", stacked, votes.probabilities)
    most = given.max(axis=0)
    found = np.flatnonzero((most < below) & votes.known)
    found = found[np.argsort(most[found], kind="stable")]
    improbable = stacked.max(axis=0) < below
    expected = (stacked.mean(axis=0) * improbable)[votes.known].sum()
    labels = votes.labels[found]
    table = battles.take(pa.array(found)).append_column(
        "vote", pa.array(np.array(CLASSES)[labels], pa.string())
    )
    for name, p in zip(judged, given, strict=True):
        table = table.append_column(f"p_{name}", pa.array(p[found]))
    counts = np.bincount(labels, minlength=votes.classes)
    return table, {
        "teachers": list(judged),
        "below": below,
        "rows": int(votes.known.sum()),
        "battles": len(found),
        "expected": float(expected),
        "votes": dict(zip(CLASSES, counts.tolist(), strict=False)),
        "models": _by_model(battles, found)[:SHOWN],
        "worst": table.slice(0, SHOWN).to_pylist(),
    }


def _by_model(battles: pa.Table, found: np.ndarray) -> list[Figures]:
    """How many of each model's battles are contradicted: the most first, then by name."""
    sides = [battles[name].combine_chunks().cast(pa.string()) for name in COLUMNS_OF["model"]]
    coded = [pa.concat_arrays([side.take(pa.array(rows)) for side in sides]) for rows in
             (np.arange(len(battles)), found)]  # fmt: skip
    counts = [
        {one["values"]: one["counts"] for one in side.drop_null().value_counts().to_pylist()}
        for side in coded
    ]
    everywhere, here = counts
    return [
        {"model": name, "rows": everywhere[name], "battles": here[name]}
        for name in sorted(here, key=lambda name: (-here[name], name))
    ]


def describe_contradictions(found: Figures) -> str:
    """How many votes all teachers contradict, in a sentence."""
    return (
        f"{found['battles']:,} of {found['rows']:,} votes have a probability below {found['below']:g} "
        f"out of fold from {' and '.join(found['teachers'])}; by chance it would be "
        f"{found['expected']:,.0f}"
    )
