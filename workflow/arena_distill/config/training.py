"""How a judge is trained: the keys of ``lora``, ``pretraining``, ``training`` and ``loss``."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from arena_distill.config.section import Section, Seed, Share, Word

WARMUP = 0.05
"""The share of its steps that a training warms up for, unless it says otherwise."""

Momentum = Annotated[float, Field(ge=0, lt=1)]
Targets = Literal["out_of_fold", "in_sample", "unlabelled"]
State = Literal["features", "attention"]


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: PositiveInt = 64
    """Rank; scale it down for small models."""
    alpha: PositiveInt = 128
    """The update is scaled by alpha / r."""
    dropout: Share = 0.05
    """Of the adapter's input, in training."""
    target_modules: Annotated[tuple[Word, ...], Field(min_length=1)] | Literal["all-linear"] = (
        "all-linear"
    )
    """Module names; `all-linear` is q, k, v, o, gate, up, down on the three families."""


class Schedule(Section):
    """How long a training takes."""

    epochs: PositiveFloat = 1
    """Passes over the battles (in both orders, with `swap`)."""
    batch_size: PositiveInt = 64
    """Battles as shown (each order is one) per optimizer step, over all devices."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps of the linear warm-up to `lr`."""
    swap: bool = True
    """Show every battle in both orders, the vote exchanged with the answers (pointwise: no need)."""

    def steps(self, examples: int) -> int:
        """Optimizer steps, as the Trainer counts them.

        Args:
            examples: battles as shown.
        """
        return math.ceil(self.epochs * max(1, math.ceil(examples / self.batch_size)))


class Optimization(Schedule):
    """AdamW with a cosine schedule, as transformers' Trainer runs it."""

    lr: PositiveFloat
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    seed: Seed = 2025
    """Seed of the initial head and LoRA, of dropout and of the order of the rows."""


class Pretraining(Optimization):
    """Post-pretraining of the adapter on UT battles."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    keep_head: bool = False
    """Start the folds from the head learned here, not from a new one."""


class Training(Optimization):
    """Training of each fold, on votes or on teachers."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate."""
    epochs: PositiveFloat = 2
    """Passes over the battles (in both orders, with `swap`)."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the fold's battles to train on: random, and part of every larger share."""
    fit_head: bool = False
    """Fit the head to the frozen backbone before training (a linear probe); set merge.heads: average."""
    eval_steps: PositiveFloat | None = 0.1
    """Steps between log losses on the battles for choices (folds.choices); below 1: a share of all."""
    keep: Literal["last", "best"] = "last"
    """The weights of the last step, or of the one with the least of these log losses."""
    patience: PositiveInt | None = None
    """Stop after so many of these log losses without a new least one. null: never."""
    own_start: bool = False
    """Each fold has its own initial head and LoRA: then only their products can be averaged."""


class Loss(Section):
    """A judge's loss: the mean of its terms, weighted; see ``training.losses``."""

    ce: NonNegativeFloat = 0.3
    """Weight of the cross-entropy with the vote. Without teachers it is the only term."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a vote that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567)."""
    focal: NonNegativeFloat = 0.0
    """γ: weights the cross-entropy by (1 − p)^γ (Lin et al. 2017, arXiv:1708.02002)."""
    kl: NonNegativeFloat = 0.7
    """Weight of KL(teacher ‖ student) at `temperature`."""
    cosine: NonNegativeFloat = 0.0
    """Weight of the cosine distance between the two probability vectors."""
    temperature: PositiveFloat = 3.0
    """T: softens the probabilities that KL and cosine compare."""
    temperature_squared: bool = True
    """Multiply the KL term by T², which keeps its gradients' size (Hinton et al. 2015)."""
    combine: Literal["mean_logits", "mean_probabilities", "separate"] = "mean_logits"
    """One target (the teachers' mean logits, or mean probabilities), or KL and cosine per teacher."""
    weights: Literal["equal", "fitted", "confidence"] = "equal"
    """Weights of teachers. `fitted`: least log loss out of fold; `confidence`: per battle."""
    contradicted_weight: Share = 1.0
    """How much a vote counts in CE that every teacher gives less than `contradicted_below` out of fold."""
    contradicted_below: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The probability of such a vote; the report lists them (tables/contradicted.parquet)."""
    unlabelled: Literal["own_terms", "all_terms"] = "own_terms"
    """A loss without a vote lacks CE: divide it by its own weights (then KL counts more), or by all."""
    unlabelled_weight: PositiveFloat = 1.0
    """How much a battle without a vote counts, against one vote."""
    features: NonNegativeFloat = 0.0
    """Weight of the distance to each teacher's last hidden state (PKD); needs the same kind of head."""
    attention: NonNegativeFloat = 0.0
    """Weight of KL(teacher ‖ student) of the last token's attention (MiniLM); needs the same tokens."""

    @model_validator(mode="after")
    def _some_term(self) -> Loss:
        if self.ce + self.kl + self.cosine <= 0:
            raise ValueError("at least one of ce, kl, cosine must be positive")
        if not self.contradicted_weight and self.kl + self.cosine <= 0:
            raise ValueError(
                "contradicted_weight: 0, but kl and cosine are 0: nothing is left to learn of such a "
                "battle; give one of them a weight, or a small contradicted_weight"
            )
        return self

    def states(self) -> tuple[State, ...]:
        """What it compares of student and teachers beside their logits."""
        return tuple(name for name in get_args(State) if getattr(self, name) > 0)

    def on_votes(self) -> Loss:
        """What is left of it without teachers."""
        return Loss(ce=1, kl=0, cosine=0, label_smoothing=self.label_smoothing, focal=self.focal)
