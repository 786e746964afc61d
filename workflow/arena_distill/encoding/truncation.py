"""Which tokens of a battle are kept when it is longer than a judge may read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from arena_distill.config.judge import Encoding
from arena_distill.encoding.sequences import Field, Sequences, Tokens, gather, offsets_of
from arena_distill.encoding.templates import ROOM, SHOWN, View, _frame, _framing, _shown
from arena_distill.errors import InputError

PROMPT_TOKENS = 256
"""The winners cut the prompt to so many tokens where a battle is too long."""


def length_budget(tokens: Tokens, encoding: Encoding, view: View, max_length: int) -> int:
    """The length all sequences are cut at, so that they have `tokens_per_battle` tokens on average.

    It is the greatest one, up to `max_length`, at which the training battles (source `train`) of the
    whole file have no more than that in the mean, template included. So short battles stay whole and
    the longest give first, as the two answers do within a battle; and what is kept of a battle does
    not depend on the rows that a fold, a shard or a test happens to hold. The length is the same for
    both orders, and for both answers shown alone.

    Of all ways to spend a budget, this one has the shortest longest sequence and the least sum of any
    convex cost, such as attention's squares; and the greatest sum of any use that grows ever more
    slowly with the tokens kept of a battle, whatever its size (A. W. Marshall, I. Olkin and
    B. C. Arnold 2011, Inequalities: Theory of Majorization and Its Applications).

    Raises:
        InputError: the file holds no training battle, or the template alone takes too much.
    """
    training, budget = tokens.training or {}, encoding.tokens_per_battle
    if budget is None:
        return max_length
    if not training or not len(training["prompt"].cap):
        raise InputError(
            "encoding.tokens_per_battle: the tokens hold no training battle to find a length by"
        )
    frame = _frame(tokens.vocabulary, encoding, view)
    truncate = TRUNCATIONS[encoding.truncation]
    # Both orders are equally long: one will do. Answers shown alone are not: their mean.
    views: tuple[View, ...] = ("AB",) if len(SHOWN[view]) > 2 else ("A", "B")
    shown = [_shown(training, encoding, v) for v in views]
    framings = [_framing(frame, fields) for fields in shown]
    most = max(int(framing.max()) for framing in framings)
    rows = len(training["prompt"].cap)

    def total(length: int) -> int:
        """Tokens of all training battles, cut at a length."""
        return sum(
            int(truncate(fields, length - framing)[1].sum() + framing.sum())
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


def truncate_winners(fields: list[Field], budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The winners' rule: what to keep of the prompt and of one or two answers.

    Fields are cut to their word caps. A battle still longer than the budget has its prompt cut to 256
    tokens (half the budget, where that is less), then the longer answer's tail trimmed until both are
    equal, then both alike. An odd token that is left goes to neither, so both orders keep the same text.

    Args:
        budget: int64 (rows,), tokens to keep at most.

    Returns:
        starts and lengths, int64 (rows, fields), within each field's row.
    """
    prompt, *answers = (np.minimum(f.tokens.lengths, f.cap) for f in fields)
    over = prompt + sum(answers) > budget
    cut = np.minimum(prompt, np.minimum(PROMPT_TOKENS, budget // 2))
    prompt = np.where(over, cut, prompt)
    lengths = np.stack([prompt, *_share(answers, budget - prompt)], axis=1)
    return np.zeros_like(lengths), lengths


def truncate_rounds(fields: list[Field], budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The round-aware rule: what to keep of the prompt and of one or two answers.

    Whole rounds (a prompt's turn with its answers) are dropped from the front until the rest fits.
    The last round always stays; where it alone is too long, its prompt keeps a quarter of the budget
    (more, if the answers leave it) and the answers share what is left, the longer giving first.

    Args:
        budget: int64 (rows,), tokens to keep at most.

    Returns:
        starts and lengths, int64 (rows, fields), within each field's row.
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
        return totals, totals
    kept = np.minimum.reduceat(np.where(fits, number, np.iinfo(np.int64).max), offsets[:-1])
    starts = starts[offsets[:-1] + kept]
    prompt, *answers = (totals - starts).T
    prompt = np.minimum(prompt, np.maximum(budget // 4, budget - sum(answers)))
    return starts, np.stack([prompt, *_share(answers, budget - prompt)], axis=1)


TRUNCATIONS = {"winners": truncate_winners, "rounds": truncate_rounds}
"""What to keep of the fields of battles that are too long."""


def _turn_start(field: Field, row: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Where a round starts in a field; at the field's end, for one that has fewer turns."""
    exists = number < field.turns.lengths[row]
    position = np.where(exists, field.turns.offsets[row] + number, 0)
    start = field.turns.ids[position] if len(field.turns.ids) else np.zeros(len(row), np.int64)
    return np.where(exists, start, field.tokens.lengths[row]).astype(np.int64)


def _share(answers: Sequence[np.ndarray], room: np.ndarray) -> list[np.ndarray]:
    """Trim the answers' lengths to a common room: the longer gives first, then both alike."""
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
    starts: np.ndarray,
    lengths: np.ndarray,
) -> Sequences:
    """Set the kept stretches between the template's literals, for all rows in one gather."""
    rows = len(starts)
    # In the order of the sequence: a pool of ids, and where each row's stretch of it starts and ends.
    pools: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def literal(ids: tuple[int, ...]) -> None:
        pools.append((np.array(ids, np.int32), np.zeros(rows, np.int64), np.full(rows, len(ids))))

    for i, field in enumerate(fields):
        literal(frame[i])
        pools.append((field.tokens.ids, field.tokens.offsets[:-1] + starts[:, i], lengths[:, i]))
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
