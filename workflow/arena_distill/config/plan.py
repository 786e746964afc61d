"""What `arena-distill plan` assumes: machines, prices, and data that is not there yet."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from arena_distill.config.section import Section

Accelerator = Literal["a100-80g", "a100-40g", "h100-80g", "h200", "l40s", "rtx-4090"]


class PlannedBattles(Section):
    """Battles per source, where the run has not read them yet. Of sources that it lacks nothing counts."""

    train: PositiveInt = 57477
    """As many as the competition's."""
    extra: NonNegativeInt = 33000
    """As many as the winners had."""
    ut: NonNegativeInt = 60000
    """A pair of answers for nearly every prompt of UltraFeedback."""
    test: PositiveInt = 25000
    """About as many as the competition's hidden ones."""
    unlabelled: NonNegativeInt = 50000
    """A guess."""


class Plan(Section):
    """`arena-distill plan`: the machines, and assumptions for missing data. Rebuilds nothing."""

    accelerator: Accelerator = "a100-80g"
    """The GPU of every job that has one."""
    nodes: PositiveInt = 1
    """Machines that work at a time."""
    gpus_per_node: PositiveInt = 8
    """GPUs of each."""
    cores_per_node: PositiveInt = 64
    """CPU cores of each."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.18
    """Share of the peak FLOP/s that is reached: 0.18 is what the winners' published durations come to."""
    price_per_gpu_hour: NonNegativeFloat | None = None
    """In any currency; null: no price is told."""
    battles: PlannedBattles = PlannedBattles()
    """How many."""
    tokens_per_battle: PositiveFloat = 850.0
    """Mean of a battle's tokens, prompt and both answers, before it is cut at max_length."""
    tokens_spread: PositiveFloat = 0.9
    """Standard deviation of their logarithm: lengths are taken to be log-normal."""
    one_answer: Annotated[float, Field(gt=0, le=1)] = 0.56
    """Share of a battle's tokens in its prompt and one answer, which is what a pointwise judge is shown."""
    disk_gb_per_s: PositiveFloat = 1.0
    """What a job reads and writes of models."""
    startup: NonNegativeFloat = 60.0
    """Seconds of each job before it works: the queue, imports."""
