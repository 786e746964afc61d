"""What stands around the parts of a battle: the literals of each template, and how long they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from arena_distill.config.judge import Encoding
from arena_distill.encoding.sequences import FIELDS, Field, Vocabulary
from arena_distill.verdicts import Order

View = Order | Literal["A", "B"]
"""What a sequence shows of a battle: both answers in an order, or one answer alone."""

SHOWN: Mapping[View, tuple[str, ...]] = {
    "AB": FIELDS,
    "BA": ("prompt", "response_b", "response_a"),
    "A": ("prompt", "response_a"),
    "B": ("prompt", "response_b"),
}
"""The fields of a view, in the order they are shown."""

# What stands before the prompt, before each answer, and after the last. The same at training and
# prediction: there is no second copy. Begin and end of sequence are added by `tokenize`.
TEMPLATES: Mapping[str, tuple[str, str, str, str]] = {
    "winners": ('User question:\n"""', '"""\nAnswer A:\n"""', '"""\nAnswer B:\n"""', '"""\n'),
    "markers": ("[PROMPT]", "[RESPONSE_A]", "[RESPONSE_B]", ""),
}
ONE_ANSWER: Mapping[str, tuple[str, str, str]] = {
    "winners": ('User question:\n"""', '"""\nAnswer:\n"""', '"""\n'),
    "markers": ("[PROMPT]", "[RESPONSE]", ""),
}
"""The templates of sequences that show one answer."""

SIZE = "[TOKENS] {}"
"""What stands behind an answer where its size is stated: how many tokens it has in full."""


ROOM = 16
"""A sequence has room for at least so many tokens of its battle."""


# --- text → ids -------------------------------------------------------------------------------------


# --- ids → sequences --------------------------------------------------------------------------------


def _shown(fields: Mapping[str, Field], encoding: Encoding, view: View) -> list[Field]:
    """The fields of a view, without their sizes where these are not stated."""
    shown = [fields[name] for name in SHOWN[view]]
    return shown if encoding.sizes else [replace(field, size=None) for field in shown]


def _framing(frame: tuple[tuple[int, ...], ...], fields: list[Field]) -> np.ndarray:
    """Tokens of each row's sequence that are not of the battle: int64 (rows,)."""
    sizes = [field.size.lengths for field in fields if field.size is not None]
    return np.full(len(fields[0].cap), sum(map(len, frame))) + sum(sizes)


def _frame(vocabulary: Vocabulary, encoding: Encoding, view: View) -> tuple[tuple[int, ...], ...]:
    """The literals that a view's fields are set between."""
    literals = vocabulary.frames if len(SHOWN[view]) > 2 else vocabulary.one_answer
    return literals[encoding.template]
