"""Settings of the phases that read battles and deal them to folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from arena_distill.config.data import Arena, Audit, Folds
from arena_distill.config.deployment import CalibrationRows
from arena_distill.config.phases.settings import VERSIONS, Settings, T
from arena_distill.config.run import Config
from arena_distill.config.section import Name, Section, Share
from arena_distill.config.source import SOURCES, Origin, Source
from arena_distill.config.training import Schedule
from arena_distill.errors import InputError
from arena_distill.verdicts import Classes, Ties


class ArenaSettings(Settings, Arena):
    """What is simulated."""

    classes: Classes = 3

    @classmethod
    def of(cls, config: Config) -> ArenaSettings:
        if config.data.arena is None:
            raise InputError("data.arena is null: there is nothing to simulate")
        arena = config.data.arena.model_dump()
        return cls(version=VERSIONS["simulate"], classes=config.classes, **arena)


class FetchSettings(Settings, Origin):
    """What is fetched."""

    @classmethod
    def of(cls, source: Source) -> FetchSettings:
        return cls(version=VERSIONS["fetch"], **source.model_dump(include=set(Origin.model_fields)))


class BattlesSettings(Settings):
    """How battles are read."""

    max_refused: Share = 0.05
    ties: Ties = "class"
    sources: dict[str, tuple[Source, ...]] = {}
    """What is not understood by default: by source, its files, shards by the name of all."""

    @classmethod
    def of(cls, config: Config) -> BattlesSettings:
        return cls(
            version=VERSIONS["battles"],
            max_refused=config.data.max_refused,
            ties=config.ties(),
            sources=told({name: getattr(config.data, name) for name in SOURCES}),
        )

    def files_of(self, name: str, files: Sequence[Path]) -> list[Source]:
        """The files of a source, each as its entry in the configuration interprets it."""
        return interpreted(self.sources.get(name, ()), files)


def told(given: Mapping[str, Sequence[Source]]) -> dict[str, tuple[Source, ...]]:
    """The entries that say more of a file than its path, by name."""
    told = {
        name: tuple(source for source in sources if source != Source(path=source.path))
        for name, sources in given.items()
    }
    return {name: sources for name, sources in told.items() if sources}


def interpreted(entries: Sequence[Source], files: Sequence[Path]) -> list[Source]:
    """Files, each as its entry in the configuration interprets it."""
    known = {
        file: entry for entry in reversed(entries) for file in entry.inputs()
    }  # the first counts
    return [
        known[file].model_copy(update={"path": str(file)})
        if file in known
        else Source(path=str(file))
        for file in files
    ]


class SolutionSettings(Settings):
    """How the votes of the test battles are read."""

    ties: Ties = "class"
    annotators: Literal["keep", "merge"] = "keep"

    @classmethod
    def of(cls, config: Config) -> SolutionSettings:
        given = config.data.solution
        return cls(
            version=VERSIONS["solution"],
            ties=config.ties(),
            annotators=given.annotators if given else "keep",
        )


class FoldsSettings(Settings, Folds):
    """How battles are dealt."""

    audit: Audit | None = None
    """What nearly the same prompts are, where these are kept together."""

    @classmethod
    def of(cls, config: Config) -> FoldsSettings:
        folds = config.folds
        audit = config.audit if folds.near_duplicates else None
        return cls(version=VERSIONS["folds"], audit=audit, **folds.model_dump())


class JudgeCounts(Section):
    """How long the trainings of a judge take."""

    training: Schedule
    share: float = 1.0
    """Of a fold's battles."""
    pretraining: Schedule | None
    """None: it is not pretrained, or with another judge's."""
    pointwise: bool = False
    unlabelled: bool = False
    """Whether it learns battles without votes."""


class CountSettings(Settings):
    """What takes so many battles."""

    judges: dict[Name, JudgeCounts]
    quantization: CalibrationRows | None
    """Of the final judge."""

    @classmethod
    def of(cls, config: Config) -> CountSettings:
        judges = {
            name: JudgeCounts(
                training=_part(Schedule, judge.training),
                share=judge.training.share,
                pretraining=_part(Schedule, judge.pretraining)
                if config.pretraining_owner(name) == name
                else None,
                pointwise=judge.head.kind == "pointwise",
                unlabelled=config.learns_unlabelled(name),
            )
            for name, judge in config.judges.items()
            if judge.backbone and not judge.frozen
        }
        # Of several that a stack combines, the one that takes most battles.
        asked = [
            _part(CalibrationRows, config.judges[name].quantization) for name in config.deployed()
        ]
        quantization = max(
            filter(None, asked),
            key=lambda rows: (rows.samples or 0) + (rows.validation_rows or 0),
            default=None,
        )
        return cls(version=VERSIONS["counts"], judges=judges, quantization=quantization)


class AuditSettings(Settings, Audit):
    """How the leak audit compares prompts."""

    @classmethod
    def of(cls, config: Config) -> AuditSettings:
        return cls(version=VERSIONS["audit"], **config.audit.model_dump())


def _part(model: type[T], of: Section | None) -> T | None:
    """The fields of a part that it is made of."""
    return model(**of.model_dump(include=set(model.model_fields))) if of else None
