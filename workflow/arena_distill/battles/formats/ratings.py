"""`ratings`: a prompt and answers, each with a score (UltraFeedback)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arena_distill.battles.formats.canonical import Battles
from arena_distill.battles.formats.columns import Rows, finite
from arena_distill.battles.formats.pairs import (
    Answers,
    all_pairs,
    battles_of_answers,
    is_answer,
)
from arena_distill.files.raw_tables import plain_text

_SCORES = ("fine-grained_score", "score", "rating", "overall_score")
"""The first that is there counts. UltraFeedback's `overall_score` was found to be wrong in places."""


def convert(rows: Rows) -> Battles:
    """Every two answers of a row meet; the higher score wins. Answers without a score meet nobody."""
    found = []
    for row, completions in enumerate(rows.objects("completions")):
        for completion in completions if isinstance(completions, list) else ():
            if isinstance(completion, dict) and is_answer(completion.get("response")):
                score = _score(completion)
                if score is not None or not rows.table.votes:
                    text, model = plain_text(completion["response"]), completion.get("model")
                    found.append((row, text, model and str(model), score or 0.0))
    answers = Answers.of(found)
    counts = np.bincount(answers.row, minlength=rows.count)
    rows.refuse(counts < 2, "completions", "fewer than two answers with a text and a score")
    return battles_of_answers(rows, answers, all_pairs(counts))


def _score(completion: Mapping[str, Any]) -> float | None:
    """A completion's score, else the mean rating of its annotations."""
    for name in _SCORES:
        if (score := finite(completion.get(name))) is not None:
            return score
    aspects = completion.get("annotations")
    values = aspects.values() if isinstance(aspects, dict) else ()
    ratings = [finite(aspect.get("Rating")) for aspect in values if isinstance(aspect, dict)]
    known = [rating for rating in ratings if rating is not None]
    return float(np.mean(known)) if known else None
