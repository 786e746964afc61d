"""A file of battles in the configuration: its path, where it comes from, and how to interpret it."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import field_validator, model_validator

from arena_distill.config.section import Distinct, FilePath, Section, Word
from arena_distill.config.vocabulary import BattleFormat, Escape, SourceName

SOURCES: tuple[SourceName, ...] = get_args(SourceName)

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
    *(
        "winner",
        "winner_model_a",
        "winner_model_b",
        "winner_tie",
        "both_equal",
        "grade",
        "grades",
        "margin",
    ),
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
    """`merge`: rows of the same texts and models become one battle; its vote is the mean of theirs. In a
    graded file, also the grades of each annotator (`individual_preference`) count."""
    system: Literal["turn", "drop"] = "turn"
    """A system prompt is the first turn of the prompt, or is left out."""
    escape: Escape = "none"
    """How a CSV file writes quotes in cells. `backslash`: with one before them; `none`: doubled."""
    pairs: Literal["all", "one"] = "all"
    """Of a row with several answers: all pairs, or one pair, chosen by a hash of the texts."""
    without: Distinct[tuple[SourceName, ...]] = ()
    """Sources whose prompts are left out here."""
    repeated: Literal["keep", "drop"] = "keep"
    """`drop`: of rows of a source with the same prompt and answers only the first is kept."""

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


class Origin(Section):
    """Where a file that does not exist yet is fetched from: at most one of `kaggle`, `hub`."""

    kaggle: Word | None = None
    """A Kaggle competition with this file. You need a token and have to accept its rules first."""
    hub: Word | None = None
    """A data set on the Hugging Face hub; its files go into the folder `path`. Needs `revision`."""
    revision: Word | None = None
    """A commit on the hub, or a tag or branch, whose commit is recorded in the folder."""
    files: tuple[str, ...] = ()
    """Glob patterns of files on the hub, or the file's name on Kaggle (default: the name here)."""

    @model_validator(mode="after")
    def _known_place(self) -> Origin:
        if self.kaggle and self.hub:
            raise ValueError("give one of kaggle, hub, not both")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("`hub` and `revision` go together")
        if self.hub and not self.files:
            raise ValueError("files: say which of the data set's files: data/train-*.parquet")
        if self.kaggle and len(self.files) > 1:
            raise ValueError("files: from Kaggle comes one file, so give one name")
        if self.files and not self.is_remote:
            raise ValueError("files: only with hub or kaggle, of whose files these are the names")
        return self

    @property
    def is_remote(self) -> bool:
        return bool(self.kaggle or self.hub)

    def origin(self) -> str:
        """What to call it in messages."""
        return f"kaggle {self.kaggle}" if self.kaggle else f"{self.hub}@{self.revision}"


class Source(Reading, Origin):
    """A file of battles. A path alone means `{path: …}`."""

    path: FilePath
    """A file, a folder of shards, or a pattern such as `data/train-*.parquet`."""

    @model_validator(mode="after")
    def _one_path_to_fetch(self) -> Source:
        if self.is_remote and glob.has_magic(self.path):
            raise ValueError("path: what is fetched needs a name, not a pattern")
        return self

    def inputs(self) -> list[Path]:
        """What a job that reads this source depends on: its shards, or the folder they are fetched into."""
        return [Path(self.path)] if self.hub else self.shards()

    def shards(self) -> list[Path]:
        """The file, or the shards in the order of their names; of a folder those with one of `SUFFIXES`.

        A folder that was fetched from the hub has folders of its own. A pattern or folder without shards
        stands for itself: whoever reads it finds nothing there.
        """
        path = Path(self.path)
        if path.is_dir():
            inside = path.rglob("*") if self.hub else path.iterdir()
            shards = [file for file in inside if file.name.lower().endswith(SUFFIXES)]
        elif glob.has_magic(self.path) and not path.exists():
            # Not by Path.glob, which takes no absolute pattern.
            shards = [Path(file) for file in glob.glob(self.path, recursive=True)]
        else:
            return [path]
        files = sorted(f for f in shards if f.is_file() and not f.name.startswith((".", "_")))
        return files or [path]


EXPECTED = f"{', '.join(SUFFIXES[1:6])} (also .gz, .zst) or .parquet expected"
