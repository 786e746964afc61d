"""Settings of the phases that give the logits of folds: trained judges, stacks, endpoints."""

from __future__ import annotations

from typing import Any, Literal

from arena_distill.config.compute import Precision
from arena_distill.config.encoding import Encoding
from arena_distill.config.external import Query
from arena_distill.config.head import JOINT, Head
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.config.run import Config
from arena_distill.config.section import Name
from arena_distill.config.training import State
from arena_distill.errors import InputError

Rows = Literal["validation", "training", "extra", "unlabelled"]


class LogitsSettings(Settings):
    """What a fold's judge scores."""

    encoding: Encoding
    head: Head = JOINT
    precision: Precision
    rows: tuple[Rows, ...]
    """Validation rows, unless the judge has no score; training (with extra), extra or unlabelled rows where
    a student learns from them."""
    states: tuple[State, ...] = ()
    """What students read of it beside logits (see ``models.hidden_states``)."""

    @classmethod
    def of(cls, config: Config, judge: str) -> LogitsSettings:
        node = config.judges[judge]
        return cls(
            version=VERSIONS["logits"],
            encoding=node.encoding,
            head=config.head_of(judge),
            precision=node.precision,
            rows=_scored_rows(config, judge),
            states=config.states_of(judge),
        )


class StackSettings(Settings):
    """What is combined."""

    judge: Name
    members: tuple[Name, ...]
    surface: bool = False

    @classmethod
    def of(cls, config: Config, judge: str) -> StackSettings:
        return cls(version=VERSIONS["stack"], judge=judge, **members_of(config, judge))


class StackedLogitsSettings(Settings):
    """What a stack's fold combines, and of which rows."""

    members: tuple[Name, ...]
    surface: bool = False
    rows: tuple[Rows, ...]
    """As of its members' logits."""

    @classmethod
    def of(cls, config: Config, judge: str) -> StackedLogitsSettings:
        rows = _scored_rows(config, judge)
        return cls(version=VERSIONS["stacked_logits"], rows=rows, **members_of(config, judge))


class ExternalSettings(Settings):
    """How an external judge's file is read."""

    battles: Literal["all", "unlabelled"] = "all"
    scale: float | None = None
    """Of log-odds; None: fitted."""

    @classmethod
    def of(cls, config: Config, judge: str) -> ExternalSettings:
        external = config.judges[judge].external
        assert external, "only of external judges"
        how = external.model_dump(include={"battles", "scale"})
        return cls(version=VERSIONS["external_logits"], **how)


class QuerySettings(Settings, Query):
    """What an endpoint is asked."""

    unlabelled: bool = False
    """Ask about battles without votes too: a student learns them."""

    @classmethod
    def of(cls, config: Config, judge: str) -> QuerySettings:
        external = config.judges[judge].external
        if external is None or external.endpoint is None:
            raise InputError(f"judges.{judge} has no external endpoint: there is nobody to ask")
        asking = external.endpoint.model_dump(include=set(Query.model_fields))
        unlabelled = any(map(config.learns_unlabelled, config.students_of(judge)))
        return cls(version=VERSIONS["endpoint"], unlabelled=unlabelled, **asking)


def _scored_rows(config: Config, judge: str) -> tuple[Rows, ...]:
    """The rows that a judge's folds score, for evaluation and for those that learn from it."""
    students = config.students_of(judge)
    needed = {config.judges[student].targets for student in students}
    rows: tuple[Rows, ...] = () if config.judges[judge].without_votes() else ("validation",)
    if "in_sample" in needed:
        rows += ("training",)
    if "out_of_fold" in needed and "extra" in config.data.sources():
        rows += ("extra",)
    if any(map(config.learns_unlabelled, students)):
        rows += ("unlabelled",)
    return rows


def members_of(config: Config, judge: str) -> dict[str, Any]:
    """What a stack combines."""
    stack = config.judges[judge].stack
    assert stack, "only of stacks"
    return {"members": stack.judges, "surface": stack.surface}
