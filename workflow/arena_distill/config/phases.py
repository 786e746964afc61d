"""What a phase is told: its version, and the part of the configuration that it computes by.

A phase's settings are its rule's ``params``: changing them rebuilds that phase and what follows, and
nothing else does. So they hold no more than the phase reads, and never `compute`, which decides only
how a job runs. Rules hand them over as JSON of what differs from the defaults (``Section.as_params``), so
a new key rebuilds nothing; the command line reads them back with :func:`parse`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from arena_distill.config.backbone import Backbone
from arena_distill.config.data import Arena, Audit, Folds
from arena_distill.config.derived import DerivedStudies
from arena_distill.config.external import Query
from arena_distill.config.judge import (
    JOINT,
    CalibrationRows,
    Encoding,
    Head,
    Lora,
    Loss,
    Merge,
    Pooling,
    Precision,
    Pretraining,
    Quantization,
    Schedule,
    State,
    Targets,
    Training,
)
from arena_distill.config.mistakes import explain
from arena_distill.config.run import Card, Cascade, Config, Prediction
from arena_distill.config.section import Name, Section, Share
from arena_distill.config.source import SOURCES, Origin, Source
from arena_distill.config.vocabulary import (
    AskedCalibration,
    Calibration,
    FoldAverage,
    ModelKind,
    ViewAverage,
)
from arena_distill.errors import InputError
from arena_distill.verdicts import Classes, Order, Ties

VERSIONS = {
    "simulate": 1,
    "fetch": 3,
    "battles": 5,
    "solution": 1,
    "folds": 2,
    "counts": 1,
    "audit": 2,
    "backbone": 1,
    "tokens": 4,
    "pretraining": 6,
    "features": 1,
    "probe": 1,
    "training": 6,
    "distillation": 7,
    "logits": 2,
    "stack": 1,
    "stacked_logits": 1,
    "stacked_views": 1,
    "endpoint": 1,
    "external_logits": 1,
    "merging": 4,
    "soups": 3,
    "quantization": 4,
    "drift": 1,
    "scoring": 2,
    "calibration": 4,
    "prediction": 2,
    "submission": 1,
    "benchmarks": 1,
    "judge": 3,
    "surface": 2,
    "evaluation": 15,
    "comparison": 7,
    "curves": 3,
    "averaging": 1,
    "report": 16,
}


Rows = Literal["validation", "training", "extra", "unlabelled"]


class Settings(Section):
    """Settings of one phase: its version and the part of the configuration that it computes by."""

    version: int


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


class BackboneSettings(Settings):
    """What is made an ordinary folder."""

    backbone: Backbone

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneSettings:
        return cls(version=VERSIONS["backbone"], backbone=backbone)


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
            sources=_told({name: getattr(config.data, name) for name in SOURCES}),
        )

    def files_of(self, name: str, files: Sequence[Path]) -> list[Source]:
        """The files of a source, each as its entry in the configuration interprets it."""
        return _interpreted(self.sources.get(name, ()), files)


def _told(given: Mapping[str, Sequence[Source]]) -> dict[str, tuple[Source, ...]]:
    """The entries that say more of a file than its path, by name."""
    told = {
        name: tuple(source for source in sources if source != Source(path=source.path))
        for name, sources in given.items()
    }
    return {name: sources for name, sources in told.items() if sources}


def _interpreted(entries: Sequence[Source], files: Sequence[Path]) -> list[Source]:
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


class TokensSettings(Settings):
    """What a judge's tokenizer tokenises."""

    names: bool = False
    """The models' names too: some judge with the same tokenizer reads them."""

    @classmethod
    def of(cls, config: Config, judge: str) -> TokensSettings:
        readers = [name for name, node in config.judges.items() if node.encoding.privileged]
        same = (config.tokenizer_name(name) == config.tokenizer_name(judge) for name in readers)
        return cls(version=VERSIONS["tokens"], names=any(same))


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


class PretrainingSettings(Settings):
    """Post-pretraining of a judge's adapter."""

    encoding: Encoding
    head: Head = JOINT
    lora: Lora
    precision: Precision
    pretraining: Pretraining

    @classmethod
    def of(cls, config: Config, judge: str) -> PretrainingSettings:
        node = config.judges[judge]
        if node.pretraining is None:
            raise InputError(f"judges.{judge}.pretraining is null: there is no adapter to pretrain")
        return cls(
            version=VERSIONS["pretraining"],
            encoding=node.encoding,
            head=config.head_of(judge),
            lora=node.lora,
            precision=node.precision,
            # What becomes of the head is for the folds to say: it changes nothing here.
            pretraining=node.pretraining.model_copy(update={"keep_head": False}),
        )


class TrainingSettings(Settings):
    """Training of a judge's folds, on votes or on teachers."""

    encoding: Encoding
    head: Head = JOINT
    lora: Lora
    precision: Precision
    training: Training
    keep_head: bool
    """Start from the post-pretrained head."""
    teachers: tuple[Name, ...] = ()
    targets: Targets | None = None
    loss: Loss
    pseudo_labels: bool = False
    """Learn the unlabelled battles too, from the teachers alone."""

    @classmethod
    def of(cls, config: Config, judge: str) -> TrainingSettings:
        node = config.judges[judge]
        student = bool(node.teachers)
        owner = config.pretraining_owner(judge)
        return cls(
            version=VERSIONS["distillation" if student else "training"],
            encoding=node.encoding,
            head=config.head_of(judge),
            lora=node.lora,
            precision=node.precision,
            training=node.training,
            keep_head=bool(owner and node.pretraining and node.pretraining.keep_head),
            teachers=node.teachers,
            targets=node.targets if student else None,
            loss=node.loss if student else node.loss.on_votes(),
            pseudo_labels=config.learns_unlabelled(judge),
        )


class FeatureSettings(Settings):
    """What is read of a frozen backbone."""

    encoding: Encoding
    head: Head
    precision: Precision
    layers: tuple[int, ...] | None = None
    poolings: tuple[Pooling, ...]

    @classmethod
    def of(cls, config: Config, judge: str) -> FeatureSettings:
        node = config.judges[judge]
        assert node.frozen
        return cls(
            version=VERSIONS["features"],
            encoding=node.encoding,
            head=config.head_of(judge),
            precision=node.precision,
            **node.frozen.model_dump(),
        )


class ProbeSettings(Settings):
    """How a frozen judge's head is fitted, on votes or on teachers."""

    head: Head
    share: float = 1.0
    """Of the fold's battles."""
    seed: int = 2025
    """Chooses them."""
    teachers: tuple[Name, ...] = ()
    targets: Targets | None = None
    loss: Loss
    pseudo_labels: bool = False

    @classmethod
    def of(cls, config: Config, judge: str) -> ProbeSettings:
        node = config.judges[judge]
        return cls(
            version=VERSIONS["probe"],
            head=config.head_of(judge),
            share=node.training.share,
            seed=node.training.seed,
            teachers=node.teachers,
            targets=node.targets if node.teachers else None,
            loss=node.loss if node.teachers else node.loss.on_votes(),
            pseudo_labels=config.learns_unlabelled(judge),
        )


class LogitsSettings(Settings):
    """What a fold's judge scores."""

    encoding: Encoding
    head: Head = JOINT
    precision: Precision
    rows: tuple[Rows, ...]
    """Validation rows always; training (with extra), extra or unlabelled rows where a student learns
    from them."""
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
        return cls(version=VERSIONS["stack"], judge=judge, **_members(config, judge))


class StackedLogitsSettings(Settings):
    """What a stack's fold combines, and of which rows."""

    members: tuple[Name, ...]
    surface: bool = False
    rows: tuple[Rows, ...]
    """As of its members' logits."""

    @classmethod
    def of(cls, config: Config, judge: str) -> StackedLogitsSettings:
        rows = _scored_rows(config, judge)
        return cls(version=VERSIONS["stacked_logits"], rows=rows, **_members(config, judge))


class StackedViewsSettings(Settings):
    """What a stack combines of its members' final predictions."""

    members: tuple[Name, ...]
    surface: bool = False
    max_lengths: tuple[int, ...]
    orders: tuple[Order, ...]
    cascade: Cascade | None = None

    @classmethod
    def of(cls, config: Config, judge: str) -> StackedViewsSettings:
        views = config.prediction.model_dump(include={"max_lengths", "orders", "cascade"})
        return cls(version=VERSIONS["stacked_views"], **views, **_members(config, judge))


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


class MergeSettings(Settings, Merge):
    """How a judge's folds become one model."""

    judge: Name
    encoding: Encoding
    head: Head = JOINT
    precision: Precision

    @classmethod
    def of(cls, config: Config, judge: str) -> MergeSettings:
        node = config.judges[judge]
        return cls(
            version=VERSIONS["merging"],
            judge=judge,
            encoding=node.encoding,
            head=config.head_of(judge),
            precision=node.dense_precision(),
            **node.merge.model_dump(),
        )


class SoupSettings(Settings):
    """What every way of merging a judge's folds is worth."""

    encoding: Encoding
    head: Head = JOINT
    precision: Precision
    average: FoldAverage = "products"

    @classmethod
    def of(cls, config: Config, judge: str) -> SoupSettings:
        node = config.judges[judge]
        return cls(
            version=VERSIONS["soups"],
            encoding=node.encoding,
            head=config.head_of(judge),
            precision=node.dense_precision(),
        )


class QuantizationSettings(Settings, CalibrationRows):
    """GPTQ of the merged judge."""

    encoding: Encoding
    head: Head = JOINT
    bits: int
    group_size: int
    seed: int

    @classmethod
    def of(cls, config: Config, judge: str) -> QuantizationSettings:
        return cls(
            version=VERSIONS["quantization"],
            encoding=config.judges[judge].encoding,
            head=config.head_of(judge),
            **_quantization(config, judge).model_dump(exclude={"max_kl", "max_flip_rate"}),
        )


class DriftSettings(Settings):
    """The bounds of the drift gate."""

    max_kl: float
    max_flip_rate: float

    @classmethod
    def of(cls, config: Config, judge: str) -> DriftSettings:
        bounds = _quantization(config, judge).model_dump(include={"max_kl", "max_flip_rate"})
        return cls(version=VERSIONS["drift"], **bounds)


class ScoringSettings(Settings):
    """How test battles are scored."""

    encoding: Encoding
    head: Head = JOINT
    precision: Precision
    max_lengths: tuple[int, ...]
    orders: tuple[Order, ...]
    cascade: Cascade | None = None

    @classmethod
    def of(cls, config: Config, judge: str) -> ScoringSettings:
        node = config.judges[judge]
        return cls(
            version=VERSIONS["scoring"],
            encoding=node.encoding,
            head=config.head_of(judge),
            precision=node.dense_precision(),
            max_lengths=config.prediction.max_lengths,
            orders=config.prediction.orders,
            cascade=config.prediction.cascade,
        )


class Views(Section):
    """Which views of a battle are averaged, and how."""

    max_lengths: tuple[int, ...]
    orders: tuple[Order, ...]
    average: ViewAverage
    calibration: AskedCalibration = "none"
    cascade: Cascade | None = None


class CalibrationSettings(Views, Settings):
    """What the deployed model's calibration is, and the views that it is fitted to."""

    @classmethod
    def of(cls, config: Config, judge: str) -> CalibrationSettings:
        views = config.prediction.model_dump(exclude={"model"})
        return cls(version=VERSIONS["calibration"], **views)


class PredictionSettings(Views, Settings):
    """How test scores are averaged."""

    @classmethod
    def of(cls, config: Config, judge: str) -> PredictionSettings:
        views = config.prediction.model_dump(exclude={"model"})
        return cls(version=VERSIONS["prediction"], **views)


class JudgeSettings(Settings):
    """What a finished judge says of itself."""

    run: str
    judge: Name
    backbone: str
    encoding: Encoding
    head: Head = JOINT
    max_lengths: tuple[int, ...]
    orders: tuple[Order, ...]
    average: ViewAverage
    cascade: Cascade | None = None
    card: Card = Card()

    @classmethod
    def of(cls, config: Config, judge: str) -> JudgeSettings:
        node = config.judges[judge]
        assert node.backbone, "only trained judges are deployed"
        card = config.card
        if card.base_model is None:
            card = card.model_copy(update={"base_model": node.backbone.hub})
        return cls(
            version=VERSIONS["judge"],
            run=config.run,
            judge=judge,
            backbone=node.backbone.hub or node.backbone.stem(),
            encoding=node.encoding,
            head=config.head_of(judge),
            card=card,
            **config.prediction.model_dump(exclude={"model", "calibration"}),
        )


class BenchmarkSettings(Settings):
    """How files of benchmarks are read."""

    sources: dict[str, tuple[Source, ...]] = {}
    """What is not understood by default: by benchmark, its files."""

    @classmethod
    def of(cls, config: Config, judge: str) -> BenchmarkSettings:
        return cls(version=VERSIONS["benchmarks"], sources=_told(config.benchmarks))

    def files_of(self, named: Sequence[str]) -> dict[str, list[Source]]:
        """The files of each benchmark: NAME=PATH of each, in the order of the configuration."""
        files: dict[str, list[Path]] = {}
        for name, _, path in (one.partition("=") for one in named):
            files.setdefault(name, []).append(Path(path))
        return {name: _interpreted(self.sources.get(name, ()), of) for name, of in files.items()}


class EvaluationSettings(Settings):
    """What is evaluated."""

    run: str
    judges: dict[str, tuple[str, ...]]
    """Teachers by judge."""
    external: tuple[str, ...] = ()
    """Judges that are not trained here."""
    privileged: tuple[str, ...] = ()
    """Judges that read the models' names."""
    optimistic: tuple[str, ...] = ()
    """Students whose teachers have learned from the very votes that they are scored by out of fold."""
    merged: tuple[Literal["train", "test"], ...] = ()
    """Sources with `annotators: merge`: a battle's weight is the number of its voters."""
    contradicted_below: float = 0.1
    """The probability below which all teachers of the final judge contradict a vote."""
    final: str
    model: ModelKind
    """The model of the final judge that is submitted."""

    @classmethod
    def of(cls, config: Config) -> EvaluationSettings:
        return cls(
            version=VERSIONS["evaluation"],
            run=config.run,
            judges={name: config.judges[name].teachers for name in config.ordered()},
            external=tuple(name for name, judge in config.judges.items() if judge.external),
            privileged=tuple(n for n in config.judges if config.is_privileged(n)),
            optimistic=tuple(filter(config.is_optimistic, config.judges)),
            merged=config.data.merged(),
            contradicted_below=config.judges[config.final].loss.contradicted_below,
            final=config.final,
            model=config.prediction.model,
        )


class Entry(Section):
    """A judge of the comparison."""

    label: str
    judge: Name
    folds: Name
    """The judge whose folds it has: another one, where the two differ in merging alone."""
    teachers: tuple[Name, ...]
    against: str | None
    """The label of the same judge on votes alone."""
    tested: bool
    """Whether its merged model is scored on the test battles."""
    optimistic: bool = False
    """Whether its teachers have learned from the very votes that it is scored by out of fold."""
    calibration: Calibration = "none"
    """Of its folds' models, cross-fitted: a diagnostic."""
    prediction: Prediction
    repeats: str | None = None
    """The label of the entry of which this is another training."""


class CompareSettings(Settings):
    """What is compared."""

    run: str
    entries: tuple[Entry, ...]
    runs: tuple[str, ...]
    resamples: int

    @classmethod
    def of(cls, config: Config, studies: DerivedStudies) -> CompareSettings:
        return cls(
            version=VERSIONS["comparison"],
            run=config.run,
            entries=tuple(
                Entry(
                    label=entry.label,
                    judge=entry.judge,
                    folds=entry.folds,
                    teachers=config.judges[entry.judge].teachers,
                    against=entry.against,
                    tested=entry.tested,
                    optimistic=config.is_optimistic(entry.judge),
                    calibration=config.fold_calibration(entry.judge),
                    prediction=entry.prediction.model_copy(update={"calibration": "none"}),
                    repeats=entry.repeats,
                )
                for entry in studies.compared
            ),
            runs=config.compare.runs,
            resamples=config.compare.resamples,
        )


class CurveSettings(Settings):
    """Learning curves: label → share of the training battles, as text → judge."""

    curves: dict[str, dict[str, Name]]
    folds: int

    @classmethod
    def of(cls, config: Config, studies: DerivedStudies) -> CurveSettings:
        return cls(
            version=VERSIONS["curves"],
            curves={
                label: {f"{share:g}": judge for share, judge in points.items()}
                for label, points in studies.curves.items()
            },
            folds=config.studies.curve_folds,
        )


class AveragingSettings(Settings):
    """Folds that drift apart: start → epochs, as text → judge."""

    averaging: dict[str, dict[str, Name]]

    @classmethod
    def of(cls, config: Config, studies: DerivedStudies) -> AveragingSettings:
        return cls(
            version=VERSIONS["averaging"],
            averaging={
                start: {f"{epochs:g}": judge for epochs, judge in points.items()}
                for start, points in studies.averaging.items()
            },
        )


T = TypeVar("T", bound=Section)


def parse(model: type[T], text: str) -> T:
    """Read settings back from JSON.

    Raises:
        InputError: one line per mistake.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise InputError("\n".join(explain(error, of=model))) from None


def _scored_rows(config: Config, judge: str) -> tuple[Rows, ...]:
    """The rows that a judge's folds score, for evaluation and for those that learn from it."""
    students = config.students_of(judge)
    needed = {config.judges[student].targets for student in students}
    rows: tuple[Rows, ...] = ("validation",)
    if "in_sample" in needed:
        rows += ("training",)
    if "out_of_fold" in needed and "extra" in config.data.sources():
        rows += ("extra",)
    if any(map(config.learns_unlabelled, students)):
        rows += ("unlabelled",)
    return rows


def _members(config: Config, judge: str) -> dict[str, Any]:
    """What a stack combines."""
    stack = config.judges[judge].stack
    assert stack, "only of stacks"
    return {"members": stack.judges, "surface": stack.surface}


def _quantization(config: Config, judge: str) -> Quantization:
    quantization = config.judges[judge].quantization
    if quantization is None:
        raise InputError(f"judges.{judge}.quantization is null: there is nothing to quantise")
    return quantization


def _part(model: type[T], of: Section | None) -> T | None:
    """The fields of a part that it is made of."""
    return model(**of.model_dump(include=set(model.model_fields))) if of else None
