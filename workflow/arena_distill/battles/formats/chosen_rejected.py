"""`chosen_rejected`: a preferred answer and another one.

So are TRL's sets, hh-rlhf, Skywork, UltraFeedback binarised and RewardBench published. Both answers are
texts beside a prompt, conversations with or without one, transcripts, or texts with no prompt: then what
they begin with in common is the prompt, as TRL's `extract_prompt` has it.
"""

from __future__ import annotations

import os

import numpy as np

from arena_distill.battles.formats.canonical import Battles, battles_of_pairs, better, compose
from arena_distill.battles.formats.columns import Rows
from arena_distill.battles.formats.texts import ASSISTANT, USER, Messages, strings
from arena_distill.battles.formats.votes import NONE, A

_NAMES = ("chosen", "rejected")


def convert(rows: Rows) -> Battles:
    chosen, rejected = (rows.messages(name, ASSISTANT) for name in _NAMES)
    prompt = rows.messages("prompt", USER) if "prompt" in rows else None
    if prompt is None and not any((side.role == USER).any() for side in (chosen, rejected)):
        prompt, chosen, rejected = _common_beginning(chosen, rejected)
    turns = compose(rows, prompt, chosen, rejected, _NAMES)
    models = (rows.texts("model_chosen"), rows.texts("model_rejected"))
    return battles_of_pairs(turns[0], turns[1:], models, _votes(rows), np.arange(rows.count))


def _votes(rows: Rows) -> np.ndarray:
    """The votes as if the chosen answer were A: float64 (rows, 3).

    A margin m is taken for a difference of rewards: the chosen answer is better with probability
    1 / (1 + e⁻ᵐ).
    Of scores equal ones are a tie.
    """
    if not rows.table.votes:
        return np.tile(NONE, (rows.count, 1))
    votes = np.tile(A, (rows.count, 1))
    if "score_chosen" in rows:
        scores = (rows.numbers("score_chosen"), rows.numbers("score_rejected"))
        known = ~np.isnan(scores[0] + scores[1])
        votes[known] = better((scores[0][known], scores[1][known]))
        rows.refuse(
            scores[0] < scores[1], "score_chosen", "lower than the score of the rejected answer"
        )
    elif "margin" in rows:
        margin = rows.numbers("margin")
        chosen = 1 / (1 + np.exp(-np.nan_to_num(margin, nan=np.inf)))
        votes = np.stack([chosen, 1 - chosen, np.zeros(rows.count)], axis=1)
    return votes


def _common_beginning(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    prompts: list[str] = []
    answers: tuple[list[str], list[str]] = ([], [])
    for texts in zip(*(_one_text(side) for side in (chosen, rejected)), strict=True):
        length = len(os.path.commonprefix(texts))
        if texts[0][length - 1 : length] == " ":
            length -= 1
        prompts.append(texts[0][:length])
        for into, text in zip(answers, texts, strict=True):
            into.append(text[length:])
    rows = np.arange(chosen.rows)

    def messages(texts: list[str], role: int) -> Messages:
        return Messages(chosen.rows, rows, np.full(len(rows), role, np.int8), strings(texts))

    first, second = (messages(texts, ASSISTANT) for texts in answers)
    return messages(prompts, USER), first, second


def _one_text(side: Messages) -> list[str]:
    return ["\n".join(turns) for turns in side.turns().to_pylist()]
