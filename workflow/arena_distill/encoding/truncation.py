"""Choose which tokens of a battle to keep if it is too long."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arena_distill.config.encoding import Encoding
from arena_distill.encoding.sequences import Field, Sequences, Tokens, gather, offsets_of
from arena_distill.encoding.templates import ROOM, SHOWN, View, _frame, _framing, _shown
from arena_distill.errors import InputError

PROMPT_TOKENS = 256
"""The number of tokens to which the winners cut the prompt of a battle that is too long."""


@dataclass(frozen=True)
class Kept:
    """Which tokens of each battle's fields are kept: int64 (rows, fields) each.

    starts: the first one.
    lengths: how many, of which the last `tails` are the field's last ones, and the others follow the first.
    """

    starts: np.ndarray
    lengths: np.ndarray
    tails: np.ndarray

    @classmethod
    def of(cls, starts: np.ndarray, lengths: np.ndarray) -> Kept:
        """One piece of each field."""
        return cls(starts, lengths, np.zeros_like(lengths))

    def field(self, i: int) -> Kept:
        """Of one field: (rows,) each."""
        return Kept(self.starts[:, i], self.lengths[:, i], self.tails[:, i])

    def spans(self, totals: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """First token and end of the two pieces, the second often empty.

        Args:
            totals: int64, the fields' tokens, of the shape of `lengths`.
        """
        heads = self.starts + self.lengths - self.tails
        return (self.starts, heads), (totals - self.tails, totals)


def length_budget(tokens: Tokens, encoding: Encoding, view: View, max_length: int) -> int:
    """Compute the length at which all sequences are cut to average `tokens_per_battle` tokens.

    It is the greatest length, up to `max_length`, at which the mean over the training battles (source
    `train`) of the whole file is at most that, template included. So short battles stay whole and the
    longest are cut first, like the longer answer within a battle; and a battle's tokens do not depend
    on the other rows of a fold, a shard or a test set. The length is the same for both orders, and
    for both sequences with one answer.

    For a given budget, one common length minimises the longest sequence and the sum of any convex cost
    of lengths, such as the squares of attention; and it maximises the sum of any concave benefit of
    the tokens kept (A. W. Marshall, I. Olkin and B. C. Arnold 2011, Inequalities: Theory of
    Majorization and Its Applications).

    Raises:
        InputError: the file has no training battle, or the template alone exceeds the budget.
    """
    training, budget = tokens.training or {}, encoding.tokens_per_battle
    if budget is None:
        return max_length
    if not training or not len(training["prompt"].cap):
        raise InputError(
            "encoding.tokens_per_battle: there is no training battle to compute a length from"
        )
    frame = _frame(tokens.vocabulary, encoding, view)
    truncate = TRUNCATIONS[encoding.truncation]
    # Both orders are equally long: use one. Sequences with one answer are not: use their mean.
    views: tuple[View, ...] = ("AB",) if len(SHOWN[view]) > 2 else ("A", "B")
    shown = [_shown(training, encoding, v) for v in views]
    framings = [_framing(frame, fields) for fields in shown]
    most = max(int(framing.max()) for framing in framings)
    rows = len(training["prompt"].cap)

    def total(length: int) -> int:
        """Tokens of all training battles, cut to a length."""
        return sum(
            int(truncate(fields, length - framing).lengths.sum() + framing.sum())
            for fields, framing in zip(shown, framings, strict=True)
        )

    lengths = range(most + ROOM, max_length + 1)
    found = bisect_right(lengths, budget * rows * len(shown), key=total)
    if not found:
        least = total(most + ROOM) / (rows * len(shown))
        raise InputError(
            f"encoding.tokens_per_battle {budget}: cut to {most + ROOM} tokens each, of which the "
            f"template takes {most}, training battles still have {least:.1f} on average; raise it"
        )
    return lengths[found - 1]


def truncate_winners(fields: list[Field], budget: np.ndarray) -> Kept:
    """Apply the winners' rule: what to keep of the prompt and of one or two answers.

    Fields are cut to their word caps. If a battle is still longer than the budget, its prompt is cut to
    256 tokens (or half the budget, if less), then the end of the longer answer until both are equal,
    then both equally. An odd token left over is dropped, so both orders keep the same text.

    Args:
        budget: int64 (rows,), the most tokens to keep.
    """
    prompt, *answers = (np.minimum(f.tokens.lengths, f.cap) for f in fields)
    over = prompt + sum(answers) > budget
    cut = np.minimum(prompt, np.minimum(PROMPT_TOKENS, budget // 2))
    prompt = np.where(over, cut, prompt)
    lengths = np.stack([prompt, *_share(answers, budget - prompt)], axis=1)
    return Kept.of(np.zeros_like(lengths), lengths)


def truncate_rounds(fields: list[Field], budget: np.ndarray) -> Kept:
    """Apply the round-aware rule: what to keep of the prompt and of one or two answers.

    Whole rounds (a prompt's turn with its answers) are dropped from the front until the rest fits.
    The last round always stays. If it alone is too long, its prompt keeps a quarter of the budget
    (more, if the answers need less) and the answers share the rest; the longer one is cut first.

    Args:
        budget: int64 (rows,), the most tokens to keep.
    """
    totals = np.stack([f.tokens.lengths for f in fields], axis=1)
    turns = np.stack([f.turns.lengths for f in fields], axis=1)
    rounds = np.maximum(turns.max(axis=1), 1)
    offsets = offsets_of(rounds)
    row = np.repeat(np.arange(len(rounds)), rounds)
    number = np.arange(len(row)) - offsets[row]
    starts = np.stack([_turn_start(f, row, number) for f in fields], axis=1)
    fits = ((totals[row] - starts).sum(axis=1) <= budget[row]) | (number == rounds[row] - 1)
    if not len(row):
        return Kept.of(totals, totals)
    kept = np.minimum.reduceat(np.where(fits, number, np.iinfo(np.int64).max), offsets[:-1])
    starts = starts[offsets[:-1] + kept]
    prompt, *answers = (totals - starts).T
    prompt = np.minimum(prompt, np.maximum(budget // 4, budget - sum(answers)))
    return Kept.of(starts, np.stack([prompt, *_share(answers, budget - prompt)], axis=1))


def truncate_middle(fields: list[Field], budget: np.ndarray) -> Kept:
    """Cut the middle out of every part: what to keep of the prompt and of one or two answers.

    A battle longer than the budget loses tokens of all its parts in proportion to their lengths. Each part
    keeps its head and its tail, half of what is kept each (the head has the odd token). A quarter of the
    budget is shared equally before, so that a short question beside long answers stays whole. What does not
    divide goes to the prompt or is dropped, so both orders keep the same text.

    Args:
        budget: int64 (rows,), the most tokens to keep.

    References:
        Sun et al. 2019, How to Fine-Tune BERT for Text Classification?, arXiv:1905.05583 (head and tail).
    """
    totals = np.stack([f.tokens.lengths for f in fields], axis=1)
    least = np.minimum(totals, np.maximum(budget // (4 * len(fields)), 2)[:, None])
    rest, room = totals - least, (budget - least.sum(axis=1))[:, None]
    shared = least + room * rest // np.maximum(rest.sum(axis=1, keepdims=True), 1)
    shared[:, 0] = np.minimum(totals[:, 0], budget - shared[:, 1:].sum(axis=1))
    over = (totals.sum(axis=1) > budget)[:, None]
    lengths = np.where(over, shared, totals)
    return Kept(np.zeros_like(totals), lengths, np.where(over, lengths // 2, 0))


TRUNCATIONS = {"winners": truncate_winners, "rounds": truncate_rounds, "middle": truncate_middle}
"""The truncation rules by name."""


def _turn_start(field: Field, row: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Where a round starts in a field; the field's end if it has fewer turns."""
    exists = number < field.turns.lengths[row]
    position = np.where(exists, field.turns.offsets[row] + number, 0)
    start = field.turns.ids[position] if len(field.turns.ids) else np.zeros(len(row), np.int64)
    return np.where(exists, start, field.tokens.lengths[row]).astype(np.int64)


def _share(answers: Sequence[np.ndarray], room: np.ndarray) -> list[np.ndarray]:
    """Trim the answers' lengths to a common room: first the longer one, then both equally."""
    if len(answers) == 1:
        return [np.minimum(answers[0], room)]
    first, second = answers
    half = room // 2
    short = np.minimum(np.minimum(first, second), half)
    fits = first + second <= room
    trimmed = [
        np.where(length <= half, length, np.where(other <= half, room - short, half))
        for length, other in ((first, second), (second, first))
    ]
    return [np.where(fits, first, trimmed[0]), np.where(fits, second, trimmed[1])]


def _fill(
    frame: tuple[tuple[int, ...], ...],
    fields: list[Field],
    kept: Kept,
) -> Sequences:
    """Insert the kept slices between the template's literals, for all rows in one gather."""
    rows = len(kept.starts)
    # In the order of the sequence: a pool of ids, and where each row's slice of it starts and ends.
    pools: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def literal(ids: tuple[int, ...]) -> None:
        pools.append((np.array(ids, np.int32), np.zeros(rows, np.int64), np.full(rows, len(ids))))

    for i, field in enumerate(fields):
        literal(frame[i])
        if field.name is not None:
            pools.append((field.name.ids, field.name.offsets[:-1], field.name.lengths))
        mine, offsets = kept.field(i), field.tokens.offsets[:-1]
        for first, end in mine.spans(field.tokens.lengths)[: 2 if mine.tails.any() else 1]:
            pools.append((field.tokens.ids, offsets + first, end - first))
        if field.size is not None:
            pools.append((field.size.ids, field.size.offsets[:-1], field.size.lengths))
    literal(frame[-1])
    base = offsets_of(np.array([len(ids) for ids, _, _ in pools]))
    begins = [start + at for (_, start, _), at in zip(pools, base, strict=False)]
    flat = gather(
        np.concatenate([ids for ids, _, _ in pools]),
        np.stack(begins, axis=1).ravel(),
        np.stack([length for _, _, length in pools], axis=1).ravel(),
    )
    return Sequences(flat.ids, flat.offsets[:: len(pools)])
