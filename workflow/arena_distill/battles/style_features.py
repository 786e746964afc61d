"""Compute how two answers differ in style: length and Markdown formatting.

Votes depend on style as well as on content, so the Chatbot Arena publishes ratings with such
differences as covariates ("style control": Li, Angelopoulos, Chiang 2024, Does style matter?
Disentangling style and substance in Chatbot Arena, lmsys.org/blog/2024-08-28-style-control). The same
differences are used here: (a − b) / (a + b) of characters, headers, bold texts and list items.

Exchanging the answers changes the sign of every feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.files.artifacts import read_parquet_parts
from arena_distill.files.keys import key, locate

WORD = r"[^\s\x0b\x1c-\x1f\x85\p{Z}]+"
"""A word in Arrow's regular expressions: the same as Python's ``\\S+`` (whose white space is wider)."""


ORNAMENTS = (
    r"(?m)^#{1,6} ",  # headers
    r"\*\*[^*\n]+\*\*",  # bold texts
    r"(?m)^\s*(?:[-*+]|\d+\.) ",  # list items
)

LENGTHS = 4
"""The number of length features."""


def style_features(battles: pa.Table) -> np.ndarray:
    """Compute the differences in style of answers A and B: float64 (rows, 8).

    First the `LENGTHS`: difference and log-ratio, in characters and in words. Then those of style
    control.
    """
    a, b = _counts(battles, (WORD, *ORNAMENTS))
    controlled = [i for i in range(a.shape[1]) if i != 1]  # without the words
    first, second = a[:, controlled], b[:, controlled]
    relative = (first - second) / np.maximum(first + second, 1)
    return np.column_stack([_longer(a[:, :2], b[:, :2]), relative])


def _counts(battles: pa.Table, patterns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Characters, and matches of each pattern, in A and in B: float64 (rows, 1 + patterns) each."""
    found = []
    for name in ("response_a", "response_b"):
        text = pc.binary_join(battles[name], "\n")
        columns = [pc.utf8_length(text), *(pc.count_substring_regex(text, p) for p in patterns)]
        found.append(np.column_stack([column.to_numpy().astype(np.float64) for column in columns]))
    a, b = found
    return a, b


def _longer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Difference and log-ratio of each count in turn: float64 (rows, 2 · counts)."""
    both = np.stack([a - b, np.log1p(a) - np.log1p(b)], axis=2)
    return both.reshape(len(both), 2 * a.shape[1])


def read_styles(battles: Path, keys: pa.Array) -> np.ndarray:
    """:func:`style_features` of the battles of these keys, from `battles.parquet`: float64 (rows, 8).

    A part of the answers is in memory at a time.
    """
    names = ["id", "source", "response_a", "response_b"]
    parts = [(key(part), style_features(part)) for part in read_parquet_parts(battles, names)]
    known, features = zip(*parts, strict=True)
    return np.concatenate(features)[locate(keys, pa.concat_arrays(known), str(battles))]
