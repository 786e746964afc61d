"""Settings of the phases that finish a judge."""

from __future__ import annotations

from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.config.phases.scoring import members_of
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.config.prediction import Card, Cascade
from arena_distill.config.run import Config
from arena_distill.config.section import Name
from arena_distill.config.vocabulary import ViewAverage
from arena_distill.verdicts import Order


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


class StackedJudgeSettings(Settings):
    """What a finished stack says of itself."""

    run: str
    judge: Name
    members: tuple[Name, ...]
    surface: bool = False
    orders: tuple[Order, ...]
    average: ViewAverage
    card: Card = Card()

    @classmethod
    def of(cls, config: Config, judge: str) -> StackedJudgeSettings:
        return cls(
            version=VERSIONS["stacked_judge"],
            run=config.run,
            judge=judge,
            card=config.card,
            **config.prediction.model_dump(include={"orders", "average"}),
            **members_of(config, judge),
        )
