"""`battles`: a prompt, answers A and B, and a vote.

So are Kaggle's LMSYS and WSDM, PPE, PKU-SafeRLHF, LLMBar and JudgeBench published.
"""

from __future__ import annotations

import numpy as np

from arena_distill.battles.formats.canonical import Battles, compose
from arena_distill.battles.formats.columns import Rows
from arena_distill.battles.formats.texts import ASSISTANT, USER
from arena_distill.battles.formats.votes import read_votes


def convert(rows: Rows) -> Battles:
    return with_votes(rows, read_votes(rows))


def with_votes(rows: Rows, vote: np.ndarray) -> Battles:
    names = ("response_a", "response_b")
    a, b = (rows.messages(name, ASSISTANT) for name in names)
    turns = compose(rows, rows.messages("prompt", USER), a, b, names)
    models = (rows.texts("model_a"), rows.texts("model_b"))
    return Battles(*turns, vote, *models, np.arange(rows.count))
