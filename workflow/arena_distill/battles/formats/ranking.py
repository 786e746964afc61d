"""`ranking`: answers by rank (Nectar), or lists of better and worse ones (RewardBench 2, RM-Bench)."""

from __future__ import annotations

from typing import Any

import numpy as np

from arena_distill.battles.formats.canonical import Battles
from arena_distill.battles.formats.columns import Rows
from arena_distill.battles.formats.pairs import (
    Answers,
    all_pairs,
    battles_of_answers,
    is_answer,
    pairs_between,
)
from arena_distill.files.raw_tables import plain_text


def convert(rows: Rows) -> Battles:
    return _by_rank(rows) if "answers" in rows else _by_list(rows)


def _by_rank(rows: Rows) -> Battles:
    """Every two answers of a row meet; the lower rank wins, equal ones are a tie."""
    found, bad = [], np.zeros(rows.count, bool)
    for row, answers in enumerate(rows.objects("answers")):
        try:
            ranked = [
                (
                    row,
                    plain_text(a["answer"]),
                    a.get("model") and str(a["model"]),
                    -float(a["rank"]),
                )
                for a in answers
            ]
            bad[row] = len(ranked) < 2 or not all(is_answer(a["answer"]) for a in answers)
        except (AttributeError, KeyError, TypeError, ValueError):
            bad[row] = True
            continue
        found += ranked
    rows.refuse(bad, "answers", "not a list of two or more objects with answer and rank")
    answers = Answers.of(found)
    counts = np.bincount(answers.row, minlength=rows.count)
    return battles_of_answers(rows, answers, all_pairs(counts))


def _by_list(rows: Rows) -> Battles:
    """Every chosen answer of a row wins against every rejected one."""
    found: list[tuple[int, str, str | None, float]] = []
    counts = np.zeros((rows.count, 2), np.int64)
    bad = np.zeros(rows.count, bool)
    for row, lists in enumerate(zip(rows.objects("chosen"), rows.objects("rejected"), strict=True)):
        if not all(_texts(texts) for texts in lists):
            bad[row] = True
            continue
        counts[row] = [len(texts) for texts in lists]
        for score, texts in zip((1.0, 0.0), lists, strict=True):
            found += [(row, plain_text(text), None, score) for text in texts]
    rows.refuse(bad, "chosen", "chosen and rejected are not both lists of texts")
    return battles_of_answers(rows, Answers.of(found), pairs_between(counts))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_answer, value))
