"""Encode battles as the sequences that a judge reads: one view per order, or per answer.

``encode`` builds them from the token file: truncation selects the part of each field to keep, and a
template adds its literals. Both work on ids, for all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.encoding.sequences import Field, Sequences, Tokens
from arena_distill.encoding.templates import ROOM, SHOWN, View, _frame, _framing, _shown
from arena_distill.encoding.truncation import TRUNCATIONS, Kept, _fill, length_budget
from arena_distill.errors import InputError
from arena_distill.verdicts import ORDERS, Order

ANSWERS: tuple[View, ...] = ("A", "B")


def views(head: Head, orders: Sequence[Order] = ORDERS) -> tuple[View, ...]:
    """The views of a battle that a judge needs for its verdict in the given orders."""
    return ANSWERS if head.kind == "pointwise" else tuple(orders)


def encode_views(
    tokens: Tokens,
    encoding: Encoding,
    head: Head,
    orders: Sequence[Order] = ORDERS,
    max_length: int | None = None,
) -> list[Sequences]:
    """The sequences of each view, rows as in `tokens`."""
    return [encode(tokens, encoding, view, max_length) for view in views(head, orders)]


def encode(
    tokens: Tokens,
    encoding: Encoding,
    view: View,
    max_length: int | np.ndarray | None = None,
) -> Sequences:
    """Build every battle's sequence.

    Args:
        encoding: template, truncation, the most tokens of a sequence, template included
            (unless `max_length` is given), and the most on average.
        view: `BA` puts answer B in the place of answer A; `A` and `B` contain one answer.
        max_length: the same for all rows, or int (rows,).

    Returns:
        Sequences of at most `max_length` tokens, rows as in `tokens`, with the whole template; with
        `encoding.tokens_per_battle`, none is longer than the :func:`length_budget`.

    Raises:
        InputError: the template leaves no room in `max_length`, or as for :func:`length_budget`.
    """
    return _fill(*_cut(tokens, encoding, view, max_length))


def tokens_cut(
    tokens: Tokens, encoding: Encoding, view: View, max_length: int | None = None
) -> dict[str, np.ndarray]:
    """How many tokens of each field a view leaves out: int64 (rows,) by field; see :func:`encode`."""
    return {
        name: tokens.fields[name].tokens.lengths - kept.lengths
        for name, kept in tokens_kept(tokens, encoding, view, max_length).items()
    }


def tokens_kept(
    tokens: Tokens, encoding: Encoding, view: View, max_length: int | None = None
) -> dict[str, Kept]:
    """Which tokens of each field a view shows, by field."""
    *_, kept = _cut(tokens, encoding, view, max_length)
    return {name: kept.field(i) for i, name in enumerate(SHOWN[view])}


def _cut(
    tokens: Tokens, encoding: Encoding, view: View, max_length: int | np.ndarray | None
) -> tuple[tuple[tuple[int, ...], ...], list[Field], Kept]:
    """A view's literals, its fields, and what is kept of each."""
    lengths = np.asarray(encoding.max_length if max_length is None else max_length, np.int64)
    frame = _frame(tokens.vocabulary, encoding, view)
    fields = _shown(tokens.fields, encoding, view)
    framing = _framing(frame, fields)
    shortest, most = lengths.min(initial=np.iinfo(np.int64).max), framing.max(initial=0)
    if shortest < most + ROOM:
        raise InputError(
            f"max_length {shortest}: template {encoding.template!r} takes {most} tokens, "
            f"which leaves {shortest - most} for the battle; at least {ROOM} needed"
        )
    if encoding.tokens_per_battle is not None:
        longest = int(lengths.max(initial=shortest))
        lengths = np.minimum(lengths, length_budget(tokens, encoding, view, longest))
    budget = np.broadcast_to(lengths, len(tokens)) - framing
    return frame, fields, TRUNCATIONS[encoding.truncation](fields, budget)
