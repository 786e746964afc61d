"""How the folds become one model, and how it is quantised: the keys of ``merge`` and ``quantization``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
)

from arena_distill.config.section import Section, Seed, Share
from arena_distill.config.vocabulary import Bits, FoldAverage, FoldHeads, GroupSize
from arena_distill.errors import InputError

FEWEST_SAMPLES = 16
"""With fewer sequences the second moments of a layer's inputs mean nothing to GPTQ."""


class Merge(Section):
    """How the folds become one dense model."""

    average: FoldAverage = "factors"
    """Mean of LoRA's A and of its B over the folds (as documented), or of B·A (exact). Without LoRA it
    means nothing: the mean of the weights is exact."""
    heads: FoldHeads = "first"
    """The mean head of the folds, or that of the first one that is merged."""
    weights: Literal["equal", "validation", "greedy"] = "equal"
    """Weights of folds: by validation loss, or a greedy soup on battles apart (folds.choices)."""


class CalibrationRows(Section):
    """How many battles GPTQ reads."""

    samples: Annotated[int, Field(ge=FEWEST_SAMPLES)] | None = None
    """Training battles that calibrate; null: 128, or half of fewer than 256."""
    validation_rows: PositiveInt | None = None
    """Training battles, others than those, on which the drift is measured; null: 512, or what is left."""

    def sized(self, battles: int) -> Self:
        """The same with both numbers.

        Args:
            battles: how many training battles there are.

        Raises:
            InputError: too few.
        """
        rest = battles - self.validation_rows if self.validation_rows else battles // 2
        samples = self.samples or max(FEWEST_SAMPLES, min(128, rest))
        rows = self.validation_rows or max(1, min(512, battles - samples))
        if samples + rows > battles:
            raise InputError(
                f"config: judges.*.quantization: samples {samples} and validation_rows {rows}, but there "
                f"are only {battles} training battles; lower them, or set quantization: null"
            )
        return self.model_copy(update={"samples": samples, "validation_rows": rows})


class Quantization(CalibrationRows):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323)."""

    bits: Bits = 8
    """Per weight; the head stays as it is."""
    group_size: GroupSize = 128
    """Weights that share a scale; must divide every quantised layer's input size."""
    seed: Seed = 2025
    """Selects the battles for calibration and for measuring the drift."""
    max_kl: PositiveFloat = 0.001
    """The drift check fails if mean KL(before ‖ after), in nats, is larger."""
    max_flip_rate: Share = 0.02
    """The drift check fails if a larger share of verdicts changes."""
