"""A file of battles as the configuration names it: where it is, and how it is to be understood."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from arena_distill.config.judge import Section
from arena_distill.config.vocabulary import BattleFormat, Escape

TEXT_COLUMNS = (
    *("prompt", "system", "response_a", "response_b", "conversation_a", "conversation_b"),
    *("chosen", "rejected"),
)
COLUMNS = (
    *("id", *TEXT_COLUMNS, "completions", "answers"),
    *("winner", "winner_model_a", "winner_model_b", "winner_tie", "both_equal", "grade", "margin"),
    *("score_chosen", "score_rejected", "weight"),
    *("model_a", "model_b", "model_chosen", "model_rejected"),
    *("language", "category", "turn", "judge"),
)
"""The names that columns have here, whatever they are called in a file."""


class Reading(Section):
    """How a file of battles is understood."""

    format: Literal["auto"] | BattleFormat = "auto"
    """`auto`: by the names of the columns."""
    columns: dict[str, str | None] = {}
    """By our name of a column, its name in the file; null: the file's column is not used."""
    text: Literal["auto", "plain", "turns"] = "auto"
    """`turns`: cells of text are JSON lists of turns; `plain`: texts; `auto`: by what a column holds."""
    ties: dict[str, Literal["tie", "drop"]] = {}
    """By word of the vote, such as `both_bad`: whether it is a tie, or the row is left out."""
    missing_votes: Literal["refuse", "keep"] = "refuse"
    """`keep`: rows without a vote become battles of `unlabelled`."""
    system: Literal["turn", "drop"] = "turn"
    """A system prompt is the first turn of the prompt, or is left out."""
    escape: Escape = "none"
    """`backslash`: quotes in cells of a CSV file have one before them; `none`: they are doubled."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        if unknown := sorted(set(value) - set(COLUMNS)):
            raise ValueError(f"unknown column {unknown[0]!r}; known: {', '.join(COLUMNS)}")
        return value

    @field_validator("ties")
    @classmethod
    def _words_in_lower_case(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {word.strip().lower(): meaning for word, meaning in value.items()}


class Source(Reading):
    """A file of battles. A path alone means `{path: …}`."""

    path: str = Field(min_length=1)
    """A file, a folder of shards, or a pattern such as `data/train-*.parquet`."""
