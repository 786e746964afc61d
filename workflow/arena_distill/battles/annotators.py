"""Merge the rows of several annotators on one battle: their votes become shares."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from arena_distill.battles.formats.canonical import hash_texts
from arena_distill.verdicts import Votes, swap_classes


def merge_annotators(sides: np.ndarray, votes: Votes) -> tuple[np.ndarray, Votes]:
    """Find the rows that are one battle, and take the mean of their votes.

    Rows are one battle if they have the same prompt, answers and models, also with the sides exchanged:
    then the votes are exchanged with them. Rows without a vote count for nothing beside a vote.

    Args:
        sides: uint64 (rows, 2), the battles' :func:`hash_sides`.
        votes: of these battles; a vote counts by its weight.

    Returns:
        rows: int64 (merged battles,), the row whose id, sides and models each one has: the first with a
            vote, of those whose sides the texts decide where rows have both.
        votes: their mean votes; the weight is the sum of the weights, so no mean over votes changes.
    """
    exchanged = sides[:, 0] > sides[:, 1]
    pairs = np.ascontiguousarray(np.sort(sides, axis=1))
    buffers = [None, pa.py_buffer(pairs)]
    keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(pairs), buffers)
    battle = keys.dictionary_encode().indices.to_numpy()
    order = np.lexsort((exchanged, ~votes.known, battle))
    rows = order[np.unique(battle[order], return_index=True)[1]]
    turned = (exchanged != exchanged[rows][battle])[:, None]
    shown = np.where(turned, swap_classes(votes.probabilities), votes.probabilities)
    weights = np.where(votes.known, votes.weights, 0.0)
    total = np.bincount(battle, weights)
    sums = np.stack([np.bincount(battle, weights * share) for share in shown.T], axis=1)
    total = np.where(total > 0, total, votes.weights[rows])
    return rows, Votes(sums / total[:, None], total)


def hash_sides(battles: pa.Table) -> np.ndarray:
    """Hash each battle's prompt with the answer and the model of each side: uint64 (rows, 2).

    Args:
        battles: columns ``prompt``, ``response_a``, ``response_b`` (list<string>), ``model_a`` and
            ``model_b`` (string).
    """
    batches = battles.to_batches()  # the texts of all may be too long for one array
    sides = [["prompt", f"response_{side}", f"model_{side}"] for side in "ab"]
    hashes = [[hash_texts(*batch.select(side).columns) for side in sides] for batch in batches]
    return np.concatenate([np.zeros((2, 0), np.uint64), *hashes], axis=1).T
