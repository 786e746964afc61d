"""Batches hold every row once, stay within their token limit, and pad on the right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena_distill.encoding.batching import pad, token_batches


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 600))
def test_every_row_is_in_one_batch_within_the_bound(lengths: list[int], bound: int) -> None:
    rows = np.array(lengths, np.int64)
    batches = list(token_batches(rows, bound))
    assert sorted(int(row) for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) > 0
        assert len(batch) == 1 or len(batch) * rows[batch].max() <= bound


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 600))
def test_the_longest_come_first(lengths: list[int], bound: int) -> None:
    order = np.concatenate(list(token_batches(np.array(lengths), bound)))
    assert np.all(np.diff(np.array(lengths)[order]) <= 0)


def test_no_rows_make_no_batches() -> None:
    assert list(token_batches(np.zeros(0, np.int64), 100)) == []


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6))
def test_padding_stands_on_the_right(rows: list[list[int]]) -> None:
    ids, mask = pad([np.array(row, np.int32) for row in rows], 0)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        assert row_ids.tolist() == row + [0] * (ids.shape[1] - len(row))
        assert row_mask.tolist() == [1] * len(row) + [0] * (ids.shape[1] - len(row))


@pytest.mark.parametrize("token", [0, 7, 128_003])
def test_padding_uses_the_given_token(token: int) -> None:
    ids, _ = pad([np.array([5]), np.array([5, 6, 7])], token)
    assert ids[0].tolist() == [5, token, token]
