"""Ragged sequences → padded batches, with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def token_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Batches of rows of like length, each of at most `batch_tokens` tokens, padding included.

    Args:
        lengths: int (rows,).
        batch_tokens: a sequence longer than this makes a batch of its own.

    Yields:
        Row positions, int64; the longest first, so that a batch that does not fit into memory fails at
        the start of a job and not at its end.
    """
    rows = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(rows):
        size = max(1, batch_tokens // max(1, int(lengths[rows[start]])))
        yield rows[start : start + size]
        start += size


def micro_batch_size(share: int, most: int) -> int:
    """The largest micro batch of at most `most` rows whose multiples make a device's share of a batch."""
    return max(n for n in range(1, min(most, share) + 1) if share % n == 0)


def pad(sequences: Sequence[np.ndarray], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad a batch: input ids and attention mask, int64 (batch, longest)."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    ids = np.full(mask.shape, pad_token_id, np.int64)
    ids[mask] = np.concatenate(sequences)
    return ids, mask.astype(np.int64)
