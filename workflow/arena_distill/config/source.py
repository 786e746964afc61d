"""A file of battles in the configuration: its path, and how to interpret it."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from arena_distill.config.section import FilePath, Section
from arena_distill.config.vocabulary import BattleFormat, Escape

SOURCES = ("train", "extra", "ut", "test", "unlabelled")
"""The sources of battles: the keys of `data` with files, in the order of the canonical file."""

KINDS = ("parquet", "csv", "tsv", "jsonl", "ndjson", "json")
PACKED = {"gz": "gzip", "zst": "zstd"}
SUFFIXES = tuple(f".{kind}" for kind in KINDS) + tuple(
    f".{kind}.{packed}" for kind in KINDS[1:] for packed in PACKED
)
"""Suffixes of files of battles."""

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
"""Our names of the columns, independent of their names in a file."""


class Reading(Section):
    """How to interpret a file of battles."""

    format: Literal["auto"] | BattleFormat = "auto"
    """`auto`: by the names of the columns."""
    columns: dict[str, str | None] = {}
    """By our name of a column, its name in the file; null: do not use that column."""
    text: Literal["auto", "plain", "turns"] = "auto"
    """`turns`: cells of text are JSON lists of turns; `plain`: texts; `auto`: by what a column holds."""
    ties: dict[str, Literal["tie", "drop"]] = {}
    """For words of the vote, such as `both_bad`: a tie, or the row is left out."""
    missing_votes: Literal["refuse", "keep"] = "refuse"
    """`keep`: rows without a vote become battles of `unlabelled`."""
    annotators: Literal["keep", "merge"] = "keep"
    """`merge`: rows of the same texts and models become one battle; its vote is the mean of theirs."""
    system: Literal["turn", "drop"] = "turn"
    """A system prompt is the first turn of the prompt, or is left out."""
    escape: Escape = "none"
    """How a CSV file writes quotes in cells. `backslash`: with one before them; `none`: doubled."""

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

    path: FilePath
    """A file, a folder of shards, or a pattern such as `data/train-*.parquet`."""

    def files(self) -> list[Path]:
        """The file, or the shards in the order of their names; of a folder those with one of `SUFFIXES`.

        A pattern or folder without shards stands for itself: whoever reads it finds nothing there.
        """
        path = Path(self.path)
        if path.is_dir():
            shards = [file for file in path.iterdir() if file.name.lower().endswith(SUFFIXES)]
        elif glob.has_magic(self.path) and not path.exists():
            # Not by Path.glob, which takes no absolute pattern.
            shards = [Path(file) for file in glob.glob(self.path, recursive=True)]
        else:
            return [path]
        files = sorted(f for f in shards if f.is_file() and not f.name.startswith((".", "_")))
        return files or [path]


EXPECTED = f"{', '.join(SUFFIXES[1:6])} (also .gz, .zst) or .parquet expected"
