"""Say where a judge stops to read: which characters of a battle's texts are in its sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arena_distill.encoding.sequences import FIELDS, Tokens
from arena_distill.encoding.text_encoder import character_offsets
from arena_distill.encoding.views import tokens_kept, views
from arena_distill.judging.battles import battles_table
from arena_distill.judging.judge import Judge

if TYPE_CHECKING:
    from arena_distill.judging.battles import Battles

Kept = dict[str, list[tuple[int, int]]]
"""By field, the first character of each turn that is read, and the one after the last."""


def characters_kept(judge: Judge, battles: Battles) -> list[Kept] | None:
    """Which characters of each battle a judge reads at its greatest length, in its views together.

    None, if its tokenizer does not know characters.

    Raises:
        InputError: as for :meth:`Judge.predict`.
    """
    table = battles_table(battles)
    tokens = judge.encode(table)
    kept = _tokens_kept(judge, tokens)
    found: list[Kept] = []
    for row in range(len(tokens)):
        ranges: Kept = {}
        for name in FIELDS:
            first, count = (int(values[row]) for values in kept[name])
            texts = table[name][row].as_py()
            with judge.tokenizing:
                offsets = character_offsets(judge.tokenizer, texts)
            if offsets is None:
                return None
            starts = tokens.fields[name].turns[row]
            ranges[name] = [
                _range(where, first - start, first + count - start)
                for where, start in zip(offsets, starts.tolist(), strict=True)
            ]
        found.append(ranges)
    return found


def _tokens_kept(judge: Judge, tokens: Tokens) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """First and number of each field's tokens, in the view that shows the fewest of them."""
    contract = judge.contract
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for view in views(contract.head, contract.orders):
        shown = tokens_kept(tokens, contract.encoding, view, max(contract.lengths))
        for name, (starts, counts) in shown.items():
            known = found.setdefault(name, (starts, counts))
            fewer = counts < known[1]
            found[name] = (
                np.where(fewer, starts, known[0]),
                np.where(fewer, counts, known[1]),
            )
    return found


def _range(offsets: np.ndarray, first: int, end: int) -> tuple[int, int]:
    """The characters of tokens `first` to `end` of a turn, of which these may not all exist."""
    some = offsets[max(first, 0) : max(end, 0)]
    return (int(some[0, 0]), int(some[-1, 1])) if len(some) else (0, 0)
