"""Group and pad sequences into batches with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def token_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Batch rows of similar length, at most `batch_tokens` tokens each, padding included.

    Args:
        lengths: int (rows,).
        batch_tokens: a longer sequence forms a batch of its own.

    Yields:
        Row positions, int64; the longest first, so that a job that needs too much memory fails at its
        start.
    """
    rows = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(rows):
        size = max(1, batch_tokens // max(1, int(lengths[rows[start]])))
        yield rows[start : start + size]
        start += size


def pad(sequences: Sequence[np.ndarray], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad a batch: input ids and attention mask, int64 (batch, longest)."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    ids = np.full(mask.shape, pad_token_id, np.int64)
    ids[mask] = np.concatenate(sequences)
    return ids, mask.astype(np.int64)
