"""`conversations`: two whole conversations and a vote.

So are the sets of Chatbot Arena and search arena, compar:IA and MT-Bench published.
"""

from __future__ import annotations

import numpy as np

from arena_distill.battles.formats.canonical import Battles, compose
from arena_distill.battles.formats.columns import Rows
from arena_distill.battles.formats.texts import USER, Messages
from arena_distill.battles.formats.votes import read_votes


def convert(rows: Rows) -> Battles:
    """Convert conversations; where a column `turn` says n, the first n turns were judged."""
    names = ("conversation_a", "conversation_b")
    judged = np.nan_to_num(rows.numbers("turn"), nan=np.inf)
    a, b = (_first_turns(rows.messages(name, USER), judged) for name in names)
    turns = compose(rows, None, a, b, names)
    models = (rows.texts("model_a"), rows.texts("model_b"))
    return Battles(*turns, read_votes(rows), *models, np.arange(rows.count))


def _first_turns(messages: Messages, turns: np.ndarray) -> Messages:
    """Each row's messages up to the answers to its first `turns` (rows,) turns of the user."""
    asked = np.cumsum(messages.role == USER)
    before = np.concatenate([[0], asked])[np.searchsorted(messages.row, messages.row)]
    return messages.where(asked - before <= turns[messages.row])
