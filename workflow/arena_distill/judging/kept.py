"""Say where a judge stops to read: which characters of a battle's texts are in its sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arena_distill.encoding.sequences import FIELDS, Tokens
from arena_distill.encoding.text_encoder import character_offsets
from arena_distill.encoding.truncation import Kept
from arena_distill.encoding.views import tokens_kept, views
from arena_distill.judging.battles import battles_table
from arena_distill.judging.judge import Judge, ModelJudge

if TYPE_CHECKING:
    from arena_distill.judging.battles import Battles

Characters = dict[str, list[list[tuple[int, int]]]]
"""By field and turn, the ranges of characters that are read: the first one, and the one after the last."""


def characters_kept(judge: Judge, battles: Battles) -> list[Characters] | None:
    """Which characters of each battle a judge reads at its greatest length, in its views together.

    None, if its tokenizer does not know characters, or it is a stack of several judges.

    Raises:
        InputError: as for :meth:`Judge.predict`.
    """
    table = battles_table(battles)
    if len(judge.models) > 1:
        return None
    (judge,) = judge.models
    tokens = judge.encode(table)
    kept = _tokens_kept(judge, tokens)
    found: list[Characters] = []
    for row in range(len(tokens)):
        ranges: Characters = {}
        for name in FIELDS:
            pieces = [(int(first[row]), int(end[row])) for first, end in kept[name]]
            texts = table[name][row].as_py()
            with judge.tokenizing:
                offsets = character_offsets(judge.tokenizer, texts)
            if offsets is None:
                return None
            starts = tokens.fields[name].turns[row]
            ranges[name] = [
                [
                    (int(some[0, 0]), int(some[-1, 1]))
                    for first, end in pieces
                    if len(some := where[max(first - start, 0) : max(end - start, 0)])
                ]
                for where, start in zip(offsets, starts.tolist(), strict=True)
            ]
        found.append(ranges)
    return found


def _tokens_kept(
    judge: ModelJudge, tokens: Tokens
) -> dict[str, tuple[tuple[np.ndarray, ...], ...]]:
    """First and end of the pieces of each field, in the view that shows the fewest of its tokens."""
    contract = judge.contract
    found: dict[str, Kept] = {}
    for view in views(contract.head, contract.orders):
        shown = tokens_kept(tokens, contract.encoding, view, max(contract.lengths))
        for name, kept in shown.items():
            known = found.setdefault(name, kept)
            fewer = kept.lengths < known.lengths
            pairs = zip(vars(kept).values(), vars(known).values(), strict=True)
            found[name] = Kept(*(np.where(fewer, mine, theirs) for mine, theirs in pairs))
    return {name: kept.spans(tokens.fields[name].tokens.lengths) for name, kept in found.items()}
