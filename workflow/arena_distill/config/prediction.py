"""What is made of the final judge: how test battles are scored, and its model card."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from arena_distill.config.section import Distinct, Section, Share, Word
from arena_distill.config.vocabulary import AskedCalibration, ModelKind, ViewAverage
from arena_distill.verdicts import Order

Swap = Literal["always", "unsure"]


class Cascade(Section):
    """Battles are scored in all views only if the judge is not sure in the first ones."""

    threshold: Share
    """A battle continues if its most probable verdict is below this (mean logits of the first views)."""
    swap: Swap = "always"
    """The first views: the shortest length in all orders, or (`unsure`, joint heads) in the first order."""


class Prediction(Section):
    """Test-time augmentation: every battle is scored at each length and in each order."""

    max_lengths: Distinct[tuple[Annotated[int, Field(ge=32)], ...]] = Field(
        (1024, 2000), min_length=1
    )
    """Tokens per sequence; the scores of several lengths are averaged."""
    orders: Distinct[tuple[Order, ...]] = Field(("AB", "BA"), min_length=1)
    """The orders to score and average; verdicts of BA are swapped back first."""
    average: ViewAverage = "logits"
    """What is averaged."""
    model: ModelKind = "gptq"
    """The model whose predictions are submitted; if both exist, both are scored."""
    calibration: AskedCalibration = "none"
    """Fitted to held-out battles (folds.holdout). `auto`: temperature, or more where more of it pays."""
    cascade: Cascade | None = None
    """Saves forward passes. null: every battle is scored at every length and in every order."""

    @model_validator(mode="after")
    def _a_cascade_has_steps(self) -> Prediction:
        by_order = self.cascade and self.cascade.swap == "unsure" and len(self.orders) > 1
        if self.cascade and len(self.max_lengths) < 2 and not by_order:
            raise ValueError(
                "a cascade goes from the shortest of max_lengths to longer: give several, or two orders "
                "and swap: unsure"
            )
        return self


class Card(Section):
    """The model card of the finished judge: what the workflow cannot know."""

    license: Word | None = None
    """An identifier of the hub, such as apache-2.0; null: not stated."""
    languages: Distinct[tuple[Word, ...]] = ()
    """Codes of the battles' languages, such as en."""
    datasets: Distinct[tuple[Word, ...]] = ()
    """Ids on the hub of the data sets that the battles come from."""
    base_model: Word | None = None
    """The backbone's id on the hub; by default that of `backbone.hub`."""
