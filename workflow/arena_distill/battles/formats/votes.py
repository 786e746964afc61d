"""Columns of votes → shares of A, B and tie."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.formats.columns import Rows, numbering
from arena_distill.files.raw_tables import DROPPED
from arena_distill.verdicts import WINNERS

A, B, TIE = np.eye(3)
NONE = np.full(3, np.nan)
"""No vote."""

_PREFIXES = ("", "model_", "response_", "output_", "answer_")
WORDS = {
    **{prefix + "a": A for prefix in _PREFIXES},
    **{prefix + "b": B for prefix in _PREFIXES},
    **{"a>b": A, "b>a": B, "a<b": B, "b<a": A},
    **dict.fromkeys(("a=b", "tie", "tied", "draw", "tie (bothbad)", "both_bad", "bothbad"), TIE),
}
"""Words of votes, in lower case, and what they say. Beside them: numbers, and the row's own models."""


def read_votes(rows: Rows) -> np.ndarray:
    """Read the votes of rows with an answer A and an answer B: float64 (rows, 3), NaN without a vote."""
    if not rows.table.votes:
        return np.tile(NONE, (rows.count, 1))
    votes = _shares(rows) if WINNERS[0] in rows else _words(rows)
    if rows.reading.missing_votes == "refuse":
        column = "winner_*" if WINNERS[0] in rows else "winner"
        rows.refuse(
            np.isnan(votes[:, 0]), column, "no vote; to keep such rows: `missing_votes: keep`"
        )
    return votes


def _shares(rows: Rows) -> np.ndarray:
    """Read a column each for A, B and tie: one of them is 1, or they are shares that sum to 1."""
    absent = np.zeros(rows.count)  # a set without ties may lack their column
    columns = [rows.numbers(n, "0, 1 or a share") if n in rows else absent for n in WINNERS]
    votes = np.stack(columns, axis=1)
    empty = np.isnan(votes)
    for name, lacks in zip(WINNERS, empty.T, strict=True):
        rows.refuse(lacks & ~empty.all(axis=1), name, "empty, 0, 1 or a share expected")
    total = votes.sum(axis=1)
    flags = np.isin(votes, (0, 1)).all(axis=1)
    votes[total == 0] = NONE
    several = flags & (total > 1)
    rows.refuse(several, "winner_*", "several winners are set")
    odd = (votes < 0).any(axis=1) | (np.abs(total - 1) > 1e-3)
    rows.refuse(~flags & odd & ~np.isnan(total), "winner_*", "shares that sum to 1 expected")
    votes[several | odd] = NONE
    with np.errstate(invalid="ignore"):
        return votes / total[:, None]


def _words(rows: Rows) -> np.ndarray:
    """Read a word or number, or the name of the row's model that won."""
    texts = rows.texts("winner")
    words = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    words = pc.replace_substring_regex(words, r"^([0-9]+)\.0+$", r"\1")
    words = pc.if_else(pc.equal(words, ""), pa.scalar(None, pa.string()), words)
    if "both_equal" in rows:
        equal = pa.array(rows.numbers("both_equal") == 1)
        words = pc.if_else(equal, "tie", words)
    known = {**WORDS, **_numbers(rows), **dict.fromkeys(rows.reading.ties, TIE)}
    index = pc.fill_null(pc.index_in(words, pa.array(list(known)), skip_nulls=True), -1)
    votes = np.array([*known.values(), NONE])[index.to_numpy()]
    names = np.tile(NONE, (rows.count, 1))
    for side, vote in (("model_b", B), ("model_a", A)):
        if side in rows:
            won = pc.fill_null(pc.equal(rows.texts(side), texts), False)
            won = won.to_numpy(zero_copy_only=False)
            votes_clash = won & ~np.isnan(names[:, 0])
            rows.refuse(votes_clash, "winner", "two meanings: it is the name of both models")
            names[won] = vote
    by_name = ~np.isnan(names[:, 0])
    clash = by_name & ~np.isnan(votes[:, 0]) & (votes != names).any(axis=1)
    rows.refuse(clash, "winner", "two meanings: it is a model's name and a word for another vote")
    votes[by_name] = names[by_name]
    drop = [word for word, meaning in rows.reading.ties.items() if meaning == "drop"]
    dropped = pc.is_in(words, pa.array(drop, pa.string()), skip_nulls=True)
    rows.refuse(dropped.to_numpy(zero_copy_only=False), "winner", f"{DROPPED}as `ties` says")
    unknown = np.isnan(votes[:, 0]) & words.is_valid().to_numpy(zero_copy_only=False)
    expected = "model_a, model_b, tie, a model's name or 0, 1, 2 expected; more words: `ties`"
    rows.refuse_each(unknown, "winner", texts, expected)
    return votes


def _numbers(rows: Rows) -> dict[str, np.ndarray]:
    """What numbers mean: where answers are numbered 1 and 2, or 0 and 1, votes are as well."""
    sides = [rows.table.names.get(side, side) for side in ("response_a", "response_b")]
    first = numbering(sides)
    if first is None:
        return {"0": A, "1": B, "2": TIE}
    words = {prefix + str(first + i): vote for prefix in _PREFIXES for i, vote in enumerate((A, B))}
    return words | {f"response{first + i}": vote for i, vote in enumerate((A, B))}
