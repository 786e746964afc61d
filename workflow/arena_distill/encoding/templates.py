"""Define the templates: the literals around the fields of a battle, and their length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from arena_distill.config.encoding import Encoding
from arena_distill.encoding.sequences import FIELDS, Field, Vocabulary
from arena_distill.errors import InputError
from arena_distill.verdicts import Order

View = Order | Literal["A", "B"]
"""What a sequence contains: both answers in an order, or one answer."""

SHOWN: Mapping[View, tuple[str, ...]] = {
    "AB": FIELDS,
    "BA": ("prompt", "response_b", "response_a"),
    "A": ("prompt", "response_a"),
    "B": ("prompt", "response_b"),
}
"""The fields of a view, in their order."""

# The text before the prompt, before each answer, and after the last, for training and prediction.
# `tokenize` adds begin and end of sequence.
TEMPLATES: Mapping[str, tuple[str, str, str, str]] = {
    "winners": ('User question:\n"""', '"""\nAnswer A:\n"""', '"""\nAnswer B:\n"""', '"""\n'),
    "markers": ("[PROMPT]", "[RESPONSE_A]", "[RESPONSE_B]", ""),
}
ONE_ANSWER: Mapping[str, tuple[str, str, str]] = {
    "winners": ('User question:\n"""', '"""\nAnswer:\n"""', '"""\n'),
    "markers": ("[PROMPT]", "[RESPONSE]", ""),
}
"""The templates of sequences with one answer."""

SIZE = "[TOKENS] {}"
"""The text after an answer if `encoding.sizes` is set: the number of tokens before truncation."""


NAME = "[MODEL] {}\n"
"""The text before an answer if `encoding.privileged` is set: the name of its model."""

UNKNOWN_MODEL = "unknown"
"""The name of a model that has none."""

LONGEST_NAME = 100
"""Characters of a model's name that are read."""

ROOM = 16
"""The fewest tokens that a sequence must have for its battle."""


def _shown(fields: Mapping[str, Field], encoding: Encoding, view: View) -> list[Field]:
    """The fields of a view; without sizes and names if the encoding has none.

    Raises:
        InputError: the encoding has names, but the file of tokens does not.
    """
    shown = [fields[name] for name in SHOWN[view]]
    if encoding.privileged and shown[-1].name is None:
        raise InputError(
            "encoding.privileged: the tokens have no names of models; delete their file, it will be rebuilt"
        )
    unused = [("size", encoding.sizes), ("name", encoding.privileged)]
    without: Any = {part: None for part, used in unused if not used}
    return [replace(field, **without) for field in shown]


def _framing(frame: tuple[tuple[int, ...], ...], fields: list[Field]) -> np.ndarray:
    """Tokens of each row's sequence outside the battle's fields: int64 (rows,)."""
    parts = [part for field in fields for part in (field.name, field.size)]
    beside = [part.lengths for part in parts if part is not None]
    return np.full(len(fields[0].cap), sum(map(len, frame))) + sum(beside)


def _frame(vocabulary: Vocabulary, encoding: Encoding, view: View) -> tuple[tuple[int, ...], ...]:
    """The literals around a view's fields."""
    literals = vocabulary.frames if len(SHOWN[view]) > 2 else vocabulary.one_answer
    return literals[encoding.template]
