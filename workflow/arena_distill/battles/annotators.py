"""Merge the rows of several annotators on one battle: their votes become shares."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from arena_distill.battles.formats.canonical import hash_texts
from arena_distill.verdicts import Votes, swap_classes


def merge_annotators(battles: pa.Table, votes: Votes) -> tuple[np.ndarray, Votes]:
    """Find the rows that are one battle, and take the mean of their votes.

    Rows are one battle if they have the same prompt, answers and models, also with the sides exchanged:
    then the votes are exchanged with them. Rows without a vote count for nothing beside a vote.

    Args:
        battles: columns ``prompt``, ``response_a``, ``response_b`` (list<string>), ``model_a`` and
            ``model_b`` (string).
        votes: of these battles; a vote counts by its weight.

    Returns:
        rows: int64 (merged battles,), the row whose id, sides and models each one has: the first with a
            vote, of those whose sides the texts decide where rows have both.
        votes: their mean votes; the weight is the sum of the weights, so no mean over votes changes.
    """
    sides = [_hashes(battles, side) for side in "ab"]
    exchanged = sides[0] > sides[1]
    pairs = np.sort(np.stack(sides, axis=1), axis=1)
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


def _hashes(battles: pa.Table, side: str) -> np.ndarray:
    """Hashes of each battle's prompt, and of one side's answer and model: uint64 (rows,)."""
    names = ["prompt", f"response_{side}", f"model_{side}"]
    batches = battles.select(names).to_batches()  # the texts of all may be too long for one array
    return np.concatenate([np.zeros(0, np.uint64), *(hash_texts(*b.columns) for b in batches)])
