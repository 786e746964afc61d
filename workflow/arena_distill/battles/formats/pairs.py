"""Several answers per row → all pairs of them that were compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.formats.canonical import (
    Battles,
    battles_of_pairs,
    better,
    hash_texts,
    split_prompt,
)
from arena_distill.battles.formats.columns import Rows
from arena_distill.battles.formats.texts import ASSISTANT, USER, Messages, joined, strings
from arena_distill.battles.formats.votes import NONE


@dataclass(frozen=True)
class Answers:
    """The answers of some rows, those of a row together.

    Args:
        row: int64 (answers,), ascending.
        text: string (answers,).
        model: string (answers,), null where unknown.
        score: float64 (answers,), higher is better.
    """

    row: np.ndarray
    text: pa.Array
    model: pa.Array
    score: np.ndarray

    @classmethod
    def of(cls, found: list[tuple[int, str, str | None, float]]) -> Answers:
        row, text, model, score = zip(*found, strict=True) if found else ((), (), (), ())
        scores = np.array(score, np.float64)
        return cls(np.array(row, np.int64), strings(text), strings(model), scores)


def is_answer(value: Any) -> bool:
    """Whether a value is a text or a number, and not missing."""
    return not (value is None or isinstance(value, list | dict))


def all_pairs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the first and the second answer of every pair within a row, row by row.

    Args:
        counts: int64 (rows,), how many answers each row has; these stand one after the other.
    """
    return _pairs(counts[:, None], lambda sizes: np.triu_indices(sizes[0], 1))


def pairs_between(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `all_pairs`, of rows with a first group of answers and then a second one: each with each.

    Args:
        counts: int64 (rows, 2), the sizes of both groups.
    """

    def of_sizes(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = np.indices(tuple(sizes)).reshape(2, -1)
        return first, sizes[0] + second

    return _pairs(counts, of_sizes)


def _pairs(
    counts: np.ndarray, of_sizes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    totals = counts.sum(axis=1)
    starts = np.cumsum(totals) - totals
    firsts, seconds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for sizes in np.unique(counts, axis=0):
        of_rows = starts[(counts == sizes).all(axis=1), None]
        first, second = of_sizes(sizes)
        firsts.append((of_rows + first).ravel())
        seconds.append((of_rows + second).ravel())
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    order = np.lexsort((second, first))
    return first[order], second[order]


def battles_of_answers(
    rows: Rows, answers: Answers, pairs: tuple[np.ndarray, np.ndarray]
) -> Battles:
    """Make a battle of each pair, or of one pair of each row, as `pairs` of the configuration says.

    All pairs of a row weigh as many votes as it has answers, less one.

    Args:
        pairs: positions in `answers`.
    """
    first, second = pairs
    rows.refuse_missing("prompt")
    asked, earlier = split_prompt(rows, [rows.messages("prompt", USER)])
    prompt, turns = asked.turns(), _turns(answers, earlier)
    of_row = np.bincount(answers.row, minlength=rows.count)
    if rows.reading.pairs == "one":
        hashes = hash_texts(prompt.take(pa.array(answers.row)), turns)
        order = np.lexsort((hashes[first] + hashes[second], answers.row[first]))
        _, starts = np.unique(answers.row[first][order], return_index=True)
        first, second = first[order[starts]], second[order[starts]]
        weight = np.ones(rows.count)
    else:
        met = np.bincount(answers.row[first], minlength=rows.count)
        weight = (of_row - 1) / np.maximum(met, 1)
    row = answers.row[first]
    sides = [pa.array(x) for x in (first, second)]
    texts = [turns.take(side) for side in sides]
    models = [answers.model.take(side) for side in sides]
    votes = better((answers.score[first], answers.score[second]))
    if not rows.table.votes:
        votes = np.tile(NONE, (len(first), 1))
    start = np.cumsum(of_row) - of_row
    numbers = [pa.array(x - start[row] + 1).cast(pa.string()) for x in (first, second)]
    pair = pc.binary_join_element_wise(*numbers, "-")
    return battles_of_pairs(
        prompt.take(pa.array(row)), (texts[0], texts[1]), (models[0], models[1]), votes, row, pair,
        weight[row],
    )  # fmt: skip


def _turns(answers: Answers, earlier: Messages) -> pa.ListArray:
    """The turns of each answer, those before it first: list<string> (answers,)."""
    count = len(answers.row)
    before = earlier.turns().take(pa.array(answers.row))
    row = np.repeat(np.arange(count), before.value_lengths().to_numpy())
    parts = ((row, before.flatten()), (np.arange(count), answers.text))
    return joined(
        count,
        [Messages(count, of, np.full(len(of), ASSISTANT, np.int8), text) for of, text in parts],
    ).turns()
