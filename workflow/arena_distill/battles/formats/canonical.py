"""What every format is turned into: prompts, two answers and votes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.formats.columns import Rows
from arena_distill.battles.formats.texts import ASSISTANT, SYSTEM, USER, Messages, joined
from arena_distill.battles.formats.votes import A, B
from arena_distill.verdicts import swap_classes


@dataclass(frozen=True)
class Battles:
    """Battles of some rows.

    Args:
        prompt, response_a, response_b: turns, list<string>.
        vote: float64 (battles, 3), shares of A, B and tie; NaN without a vote.
        model_a, model_b: string, null where unknown.
        row: int64 (battles,), the row of each within its piece, ascending.
        pair: string, what tells battles of one row apart; None where a row is one battle.
        weight: float64 (battles,), None: all 1.
    """

    prompt: pa.ListArray
    response_a: pa.ListArray
    response_b: pa.ListArray
    vote: np.ndarray
    model_a: pa.Array
    model_b: pa.Array
    row: np.ndarray
    pair: pa.Array | None = None
    weight: np.ndarray | None = None


def compose(
    rows: Rows, prompt: Messages | None, a: Messages, b: Messages, names: tuple[str, str]
) -> tuple[pa.ListArray, pa.ListArray, pa.ListArray]:
    """Put the turns of each row together.

    Where `a` has turns of a user, these are the prompt, and those of `b` must be the same; elsewhere
    `prompt` is. Earlier answers in the prompt come first in both answers, so that turns meet their answers
    by position. A missing text is no empty one: its row is refused. A system prompt becomes the first turn,
    or is left out, as `system` says.

    Args:
        names: of the columns that `a` and `b` are from.

    Returns:
        The turns of the prompt and of both answers, list<string> each.
    """
    count = rows.count
    for name in names:
        rows.refuse_missing(name)
    questions = [x.of(USER, SYSTEM) for x in (a, b)]
    differ = pc.not_equal(*(pc.binary_join(x.turns(), "\x1f") for x in questions))
    differ = differ.to_numpy(zero_copy_only=False) | (questions[0].count() != questions[1].count())
    rows.refuse(differ, names[1], f"its user or system turns differ from those of {names[0]}")
    whole = a.of(USER).count() > 0
    if prompt is None:
        rows.refuse(~whole, names[0], "no turn of a user, and there is no column prompt")
    else:
        if "prompt" in rows:
            rows.refuse_missing("prompt", ~whole)
        prompt = prompt.where(~whole[prompt.row])
    for side, name in zip((a, b), names, strict=True):
        unanswered = (side.of(USER, SYSTEM).count() > 0) & (side.last_role() != ASSISTANT)
        rows.refuse(unanswered, name, "no answer: it does not end with a turn of the assistant")
    asked, before = split_prompt(rows, [*([prompt] if prompt else []), a.of(USER, SYSTEM)])
    answers = [joined(count, [before, side.of(ASSISTANT)]).turns() for side in (a, b)]
    return asked.turns(), answers[0], answers[1]


def split_prompt(rows: Rows, prompt: list[Messages]) -> tuple[Messages, Messages]:
    """Split what was said before the answers into the turns of the prompt and earlier answers.

    A system prompt, there or in its column, becomes the first turn or is left out.
    """
    before = joined(rows.count, prompt)
    system = [before.of(SYSTEM)]
    if "system" in rows:
        text = rows.texts("system")
        known = text.is_valid().to_numpy(zero_copy_only=False)
        role = np.full(known.sum(), SYSTEM, np.int8)
        system = [Messages(rows.count, np.flatnonzero(known), role, text.drop_null()), *system]
    if rows.reading.system == "drop":
        system = []
    # A transcript that asks for an answer ends with an empty one.
    empty = pc.equal(before.text, "").to_numpy(zero_copy_only=False)
    earlier = before.where((before.role == ASSISTANT) & ~empty)
    return joined(rows.count, [*system, before.of(USER)]), earlier


def deal_sides(prompt: pa.ListArray, first: pa.ListArray, second: pa.ListArray) -> np.ndarray:
    """Decide by the texts which of two answers is A: bool (battles,), true where it is the first one.

    It is the one with the smaller hash, whichever was preferred, in whatever row of whatever file.
    """
    mine, other = hash_texts(prompt, first), hash_texts(prompt, second)
    decided: np.ndarray = (mine < other) | ((mine == other) & (mine % 2 == 0))
    return decided


def hash_texts(*columns: pa.Array) -> np.ndarray:
    """Hash each row of columns of texts or turns, a missing text as an empty one: uint64 (rows,)."""
    from pandas.util import hash_array

    mixed = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        texts = pc.binary_join(column, "\x1f") if pa.types.is_nested(column.type) else column
        cells = pc.fill_null(texts, "").to_numpy(zero_copy_only=False)
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hash_array(cells, categorize=False)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(32))


def battles_of_pairs(
    prompt: pa.ListArray,
    answers: tuple[pa.ListArray, pa.ListArray],
    models: tuple[pa.Array, pa.Array],
    vote: np.ndarray,
    row: np.ndarray,
    pair: pa.Array | None = None,
    weight: np.ndarray | None = None,
) -> Battles:
    """Battles of answers that have no sides of their own: these are dealt.

    Args:
        vote: float64 (battles, 3), as if the first answer were A.
        row, pair, weight: as in `Battles`.
    """
    first = deal_sides(prompt, *answers)
    mask = pa.array(first)
    sides = [(pc.if_else(mask, x, y), pc.if_else(mask, y, x)) for x, y in (answers, models)]
    vote = np.where(first[:, None], vote, swap_classes(vote))
    (response_a, response_b), (model_a, model_b) = sides
    return Battles(prompt, response_a, response_b, vote, model_a, model_b, row, pair, weight)


def better(scores: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The vote for the higher of two scores, a tie where they are equal: float64 (battles, 3)."""
    first, second = scores
    vote = np.where((first > second)[:, None], A, B)
    vote[first == second] = (0, 0, 1)
    return vote
