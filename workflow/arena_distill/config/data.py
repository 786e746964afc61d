"""The battles of a run: their sources, the split into folds, the leak audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from arena_distill.config.section import FilePath, Section, Seed, Share
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


class Solution(Section):
    """The votes of the test battles. A path alone means `{path: …}`."""

    path: FilePath
    """A file with columns `id` and of votes."""
    annotators: Literal["keep", "merge"] = "keep"
    """`merge`: rows with the same id are votes of several annotators; the battle's vote is their mean."""


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


def _solution(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


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
    solution: Annotated[
        Solution | None,
        BeforeValidator(_solution, json_schema_input_type=str | Solution | None),
    ] = None
    """The votes of the test battles, if known: the report then scores every variant on them."""
    max_refused: Share = 0.05
    """The largest share of a source's rows that may be rejected; a larger share is an error."""
    ties: Literal["refuse", "drop", "half"] = "refuse"
    """With `classes: 2`: ties, and shares of one, are refused, left out, or half a vote for each answer."""

    @model_validator(mode="after")
    def _arena_or_files(self) -> Data:
        files = any((*self.files(), self.solution))
        if self.arena is None and not (self.train and self.test):
            raise ValueError("give `train` and `test` files, or `arena` for the synthetic battles")
        if self.arena is not None and files:
            raise ValueError(
                "give files or `arena`, not both (set `arena: null` to use your files)"
            )
        origins: dict[str, tuple[object, ...]] = {}
        for name in SOURCES:
            for source in getattr(self, name):
                where = f"{name}: {source.path}"
                fewer = {
                    "annotators: merge": source.annotators == "merge",
                    "repeated: drop": source.repeated == "drop",
                    "without": bool(source.without),
                }
                if name == "test" and any(fewer.values()):
                    key = next(key for key, asked in fewer.items() if asked)
                    raise ValueError(
                        f"{where}: {key}, but every test battle needs a prediction: remove it"
                    )
                if name in source.without:
                    raise ValueError(f"{where}: without: all its prompts are in {name} itself")
                if lacking := [other for other in source.without if not getattr(self, other)]:
                    raise ValueError(f"{where}: without: there are no {lacking[0]} battles")
                origin = (source.kaggle, source.hub, source.revision, source.files)
                if origins.setdefault(source.path, origin) != origin:
                    raise ValueError(f"{where}: two sources have this path, but another origin")
        return self

    def files(self) -> tuple[Source, ...]:
        """The files of all sources."""
        return (*self.train, *self.extra, *self.ut, *self.test, *self.unlabelled)

    def merged(self) -> tuple[Literal["train", "test"], ...]:
        """The sources in which the rows of several annotators are one battle."""
        train = any(source.annotators == "merge" for source in self.train)
        test = self.solution is not None and self.solution.annotators == "merge"
        found: dict[Literal["train", "test"], bool] = {"train": train, "test": test}
        return tuple(name for name, merged in found.items() if merged)

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
    """Share of the training prompts kept from every training: they calibrate and score what is deployed."""
    choices: Annotated[float, Field(ge=0, le=0.4)] = 0.0
    """Share of the training prompts kept from training and scores: choices use them (docs/judges.md)."""
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
