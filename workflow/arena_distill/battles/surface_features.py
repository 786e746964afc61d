"""Count what shows on the surface of a prompt and of its two answers: lengths, layout, phrases, words.

No judge is needed for these. What a judge claims to have understood is claimed against trees over them
(``scoring.surface_trees``), which see the same of answer A as of answer B.

Of each answer, in this order (`ANSWER`):

    characters, words, sentences, lines, paragraphs        how long it is, and how it is cut
    headings, bold, bullets, numbered, tables, code        Markdown
    links, digits, questions, exclamations
    refusals                                               "I cannot", "as an AI", apologies
    first                                                  words for the speaker
    distinct                                               share of its words that differ
    overlap                                                share of its different words that the prompt has
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.style_features import WORD
from arena_distill.files.artifacts import read_parquet_parts
from arena_distill.files.keys import key

COUNTED = {
    "words": WORD,
    "sentences": r"[.!?](?:\s|$)|[。！？]",
    "lines": r"\n+",
    "paragraphs": r"\n\s*\n",
    "headings": r"(?m)^#{1,6} ",
    "bold": r"\*\*[^*\n]+\*\*",
    "bullets": r"(?m)^\s*[-*+•] ",
    "numbered": r"(?m)^\s*\d+[.)] ",
    "tables": r"(?m)^\s*\|",
    "code": r"```|`[^`\n]+`",
    "links": r"https?://|www\.",
    "digits": r"\p{Nd}",
    "questions": r"[?？]",
    "exclamations": r"[!！]",
    "refusals": r"(?i)\bI(?:'m| am)? (?:can ?not|can't|unable|sorry|apologi[sz]e)|\bas an AI\b|\bsorry\b",
    "first": r"\bI\b|\b(?:my|My|me)\b",
}
"""Patterns whose matches are counted."""

ANSWER = ("characters", *COUNTED, "distinct", "overlap")
"""The features of an answer."""

PROMPT = ("characters", "words", "lines", "code", "digits", "questions")
"""The features of a prompt."""

ROWS = 2_048
"""Battles whose words are compared at a time."""


def surface_features(battles: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of prompts, of answers A and of answers B.

    Args:
        battles: columns `prompt`, `response_a` and `response_b`, lists of turns.

    Returns:
        float32 (rows, 6) of `PROMPT`; float32 (rows, 19) of `ANSWER`, twice.
    """
    prompt, *answers = (
        pc.binary_join(battles[name], "\n") for name in ("prompt", "response_a", "response_b")
    )
    asked, *used = _different_words(prompt, *answers)
    found = []
    for text, words in zip(answers, used, strict=True):
        counted = _counts(text, ANSWER[:-2])
        different = np.bincount(words[0], minlength=len(text))
        shared = np.bincount(words[0][_in(words, asked)], minlength=len(text))
        of_words = np.maximum(counted[:, ANSWER.index("words")], 1)
        shares = different / of_words, shared / np.maximum(different, 1)
        found.append(np.column_stack([counted, *shares]).astype(np.float32))
    a, b = found
    return _counts(prompt, PROMPT).astype(np.float32), a, b


def read_surface(battles: Path) -> tuple[pa.Array, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Keys and :func:`surface_features` of all battles of `battles.parquet`, a few at a time."""
    columns = ["id", "source", "prompt", "response_a", "response_b"]
    keys, features = [], []
    for part in read_parquet_parts(battles, columns):
        keys.append(key(part))
        starts = range(0, max(len(part), 1), ROWS)
        features += [surface_features(part.slice(start, ROWS)) for start in starts]
    prompt, a, b = (np.concatenate(arrays) for arrays in zip(*features, strict=True))
    return pa.concat_arrays(keys), (prompt, a, b)


def _counts(text: pa.ChunkedArray, names: tuple[str, ...]) -> np.ndarray:
    """Characters and matches of patterns: float64 (rows, names)."""
    columns = [
        pc.utf8_length(text)
        if name == "characters"
        else pc.count_substring_regex(text, COUNTED[name])
        for name in names
    ]
    return np.column_stack([column.to_numpy().astype(np.float64) for column in columns])


def _different_words(*texts: pa.ChunkedArray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each text's different words, in lower case: int64 rows and the words' numbers, sorted pairs."""
    # Trimmed: Arrow (26.0) now and then leaves white space at the very end of its buffer unsplit.
    trimmed = (pc.utf8_trim_whitespace(pc.utf8_lower(text)) for text in texts)
    split = [pc.utf8_split_whitespace(text).combine_chunks() for text in trimmed]
    flat = pa.concat_arrays([pc.list_flatten(words) for words in split])
    some = pc.not_equal(flat, "").to_numpy(zero_copy_only=False)  # of an empty text
    number = flat.dictionary_encode().indices.to_numpy().astype(np.int64)
    most, start, found = max(int(number.max(initial=0)), 0) + 1, 0, []
    for words in split:
        row = pc.list_parent_indices(words).to_numpy().astype(np.int64)
        mine = slice(start, start + len(row))
        start += len(row)
        pairs = (row * most + number[mine])[some[mine]]
        found.append(np.divmod(np.unique(pairs), most))
    return found


def _in(words: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Which (row, word) pairs are among the others: bool (pairs,)."""
    most = max(int(numbers.max(initial=0)) for _, numbers in (words, others)) + 1
    pairs, known = (row * most + number for row, number in (words, others))
    return np.isin(pairs, known)
