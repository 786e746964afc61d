"""The battles of a run: their sources, the split into folds, the leak audit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from arena_distill.config.section import FilePath, Section, Seed, Share, Word
from arena_distill.config.source import SOURCES, Source
from arena_distill.config.vocabulary import FoldMethod


class Arena(Section):
    """The synthetic arena: battles with known vote probabilities (see ``battles.simulation``)."""

    seed: Seed = 2025
    """Seed of the simulation."""
    train: PositiveInt = 2000
    """Labelled battles."""
    extra: NonNegativeInt = 600
    """Labelled battles for training in every fold."""
    ut: NonNegativeInt = 1500
    """Battles for post-pretraining, with votes of another population."""
    test: PositiveInt = 500
    """Battles to predict."""
    unlabelled: NonNegativeInt = 0
    """Battles without votes, for students."""


class Fetch(Section):
    """The source of a file of battles: exactly one of `kaggle`, `hub`."""

    kaggle: Word | None = None
    """A Kaggle competition. You need a token and have to accept its rules first."""
    hub: Word | None = None
    """A data set on the Hugging Face hub; needs `revision`."""
    revision: Word | None = None
    """A commit on the hub, or a tag or branch; the file's provenance records the commit."""
    files: tuple[str, ...] = ()
    """The file's name on Kaggle (default: the name here), or glob patterns on the hub."""
    format: Literal["battles", "ultrafeedback", "arena"] = "battles"
    """`battles`: as it is; `ultrafeedback`: rated answers; `arena`: conversations that were voted on."""
    without: tuple[FilePath, ...] = ()
    """Files of battles whose prompts are left out (`arena`)."""
    seed: Seed = 2025
    """Selects the two answers of each battle (`ultrafeedback`)."""

    @model_validator(mode="after")
    def _known_place(self) -> Fetch:
        if (self.kaggle is None) == (self.hub is None):
            raise ValueError("needs exactly one of kaggle, hub")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("`hub` and `revision` go together")
        if self.hub and not self.files:
            raise ValueError(
                "files: say which of the data set's files, such as data/train-*.parquet"
            )
        if self.kaggle and (self.format != "battles" or len(self.files) > 1):
            raise ValueError(
                "a file of Kaggle is taken as it is: format: battles, one name in files"
            )
        if self.without and self.format != "arena":
            raise ValueError("without: only of format arena battles are left out")
        return self

    def source(self) -> str:
        """What to call it in messages."""
        return f"kaggle {self.kaggle}" if self.kaggle else f"{self.hub}@{self.revision}"


def _sources(value: Any) -> Any:
    """One file is a list of one, a path alone a section."""
    entries = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(entries, list | tuple):
        return value
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_sources, json_schema_input_type=str | Source | list[str | Source]),
]


class Data(Section):
    """Where the battles come from: your own files, or the synthetic arena."""

    arena: Arena | None = None
    """Simulate the battles instead of reading files."""
    train: Sources = ()
    """Labelled battles: files, folders or patterns, or sections with options for a file."""
    extra: Sources = ()
    """More labelled battles: training rows of every fold, never validation rows."""
    ut: Sources = ()
    """Labelled battles for post-pretraining, such as UltraFeedback."""
    test: Sources = ()
    """Battles to predict."""
    unlabelled: Sources = ()
    """Battles without votes: students learn them from their teachers (see `pseudo_labels`)."""
    solution: FilePath | None = None
    """The votes of the test battles, if known: the report then scores every variant on them."""
    max_refused: Share = 0.05
    """The largest share of a source's rows that may be rejected; a larger share is an error."""
    ties: Literal["refuse", "drop", "half"] = "refuse"
    """With `classes: 2`: ties, and shares of one, are refused, left out, or half a vote for each answer."""
    fetch: dict[FilePath, Fetch] = {}
    """By file: the source of files that do not exist yet. Files not listed are never fetched."""

    @field_validator("fetch")
    @classmethod
    def _named_on_kaggle(cls, value: dict[str, Fetch]) -> dict[str, Fetch]:
        return {
            path: origin
            if origin.files
            else origin.model_copy(update={"files": (PurePath(path).name,)})
            for path, origin in value.items()
        }

    @model_validator(mode="after")
    def _arena_or_files(self) -> Data:
        files = any((*self.files(), self.solution))
        if self.arena is None and not (self.train and self.test):
            raise ValueError("give `train` and `test` files, or `arena` for the synthetic battles")
        if self.arena is not None and files:
            raise ValueError(
                "give files or `arena`, not both (set `arena: null` to use your files)"
            )
        if any(source.annotators == "merge" for source in self.test):
            raise ValueError(
                "test: annotators: merge, but every test battle needs a prediction: remove it"
            )
        named = {self.solution, *(source.path for source in self.files())}
        for path, origin in self.fetch.items():
            if path not in named:
                raise ValueError(f"fetch.{path}: no source reads this file; known: {self._known()}")
            if not path.endswith(".parquet") and origin.format != "battles":
                raise ValueError(f"fetch.{path}: what is converted is parquet: name it so")
        return self

    def _known(self) -> str:
        return ", ".join(source.path for source in self.files()) or "none"

    def files(self) -> tuple[Source, ...]:
        """The files of all sources."""
        return (*self.train, *self.extra, *self.ut, *self.test, *self.unlabelled)

    def sources(self) -> tuple[str, ...]:
        """The sources this run has battles of, in the order of the canonical file."""
        given = self.arena or self
        kept = any(
            source.missing_votes == "keep" for source in (*self.train, *self.extra, *self.ut)
        )
        return tuple(s for s in SOURCES if getattr(given, s) or (s == "unlabelled" and kept))


class Folds(Section):
    """Cross-validation. Only `stratified_group` keeps battles with the same prompt in one fold."""

    method: FoldMethod = "kfold"
    """scikit-learn's KFold, StratifiedKFold (on the vote) or StratifiedGroupKFold (by prompt too)."""
    n: Annotated[int, Field(ge=2, le=127)] = 5
    """How many folds."""
    seed: Seed = 42
    """Seed of the split."""
    holdout: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the training prompts held out of all folds, for choices (merge.weights: greedy)."""
    near_duplicates: bool = False
    """Also keep near-duplicate prompts (see `audit`) in one fold; only with `stratified_group`."""

    @model_validator(mode="after")
    def _near_duplicates_are_groups(self) -> Folds:
        if self.near_duplicates and self.method != "stratified_group":
            raise ValueError(
                f"near_duplicates keeps prompts together, which {self.method} does not: "
                "set `method: stratified_group`"
            )
        return self


class Audit(Section):
    """The leak audit: battles whose prompt, or a near-duplicate, is also in training data."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Near-duplicates have at least this Jaccard index of their sequences of 5 characters."""
    permutations: Annotated[int, Field(ge=64, le=1024)] = 128
    """Of MinHash, which finds candidates: more permutations, fewer needless comparisons."""
    seed: Seed = 2025
    """Seed of MinHash."""
