"""Settings of the phases that make one model of the folds, and quantise it."""

from __future__ import annotations

from arena_distill.config.compute import Precision
from arena_distill.config.deployment import CalibrationRows, Merge, Quantization
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.config.run import Config
from arena_distill.config.section import Name
from arena_distill.config.vocabulary import FoldAverage
from arena_distill.errors import InputError


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


def _quantization(config: Config, judge: str) -> Quantization:
    quantization = config.judges[judge].quantization
    if quantization is None:
        raise InputError(f"judges.{judge}.quantization is null: there is nothing to quantise")
    return quantization
