"""Settings of the phases that score battles with the deployed model, and calibrate it."""

from __future__ import annotations

from arena_distill.config.compute import Precision
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.config.phases.scoring import members_of
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.config.prediction import Cascade
from arena_distill.config.run import Config
from arena_distill.config.section import Name, Section
from arena_distill.config.vocabulary import AskedCalibration, ViewAverage
from arena_distill.verdicts import Order


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
        return cls(version=VERSIONS["stacked_views"], **views, **members_of(config, judge))


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
