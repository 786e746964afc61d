"""What `arena-distill plan` assumes: machines, prices, and data that is not there yet."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from arena_distill.config.section import Section

Accelerator = Literal["a100-80g", "a100-40g", "h100-80g", "h200", "l40s", "rtx-4090"]


class PlannedBattles(Section):
    """Battles per source, if the run has not read them yet. Sources that the run lacks are ignored."""

    train: PositiveInt = 57477
    """As in the competition."""
    extra: NonNegativeInt = 33000
    """As for the winners."""
    ut: NonNegativeInt = 60000
    """A pair of answers for nearly every prompt of UltraFeedback."""
    test: PositiveInt = 25000
    """About as in the competition's hidden test set."""
    unlabelled: NonNegativeInt = 50000
    """A guess."""


class Plan(Section):
    """`arena-distill plan`: the machines, and assumptions for missing data. Rebuilds nothing."""

    accelerator: Accelerator = "a100-80g"
    """The model of all GPUs."""
    nodes: PositiveInt = 1
    """Number of machines."""
    gpus_per_node: PositiveInt = 8
    """GPUs per machine."""
    cores_per_node: PositiveInt = 64
    """CPU cores per machine."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.18
    """Reached share of the peak FLOP/s; 0.18 fits the winners' published durations."""
    price_per_gpu_hour: NonNegativeFloat | dict[Accelerator, NonNegativeFloat] | None = None
    """Price in any currency, or one for each model of GPU; null: no price is printed."""
    battles: PlannedBattles = PlannedBattles()
    """How many."""
    tokens_per_battle: PositiveFloat = 850.0
    """Mean tokens of a battle, prompt and both answers, before truncation."""
    tokens_spread: PositiveFloat = 0.9
    """Standard deviation of the logarithm of these tokens: lengths are assumed log-normal."""
    one_answer: Annotated[float, Field(gt=0, le=1)] = 0.56
    """Share of a battle's tokens in its prompt and one answer: a sequence of a pointwise judge."""
    disk_gb_per_s: PositiveFloat = 1.0
    """Speed at which jobs read and write models, GB/s."""
    startup: NonNegativeFloat = 60.0
    """Seconds of each job before it computes: queue, imports."""

    def price(self, accelerator: str) -> float | None:
        """The price of an hour on a GPU of this model; None if it is not known."""
        if isinstance(self.price_per_gpu_hour, dict):
            return self.price_per_gpu_hour.get(accelerator)  # type: ignore[call-overload]
        return self.price_per_gpu_hour if accelerator == self.accelerator else None
