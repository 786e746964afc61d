"""What a judge's head reads and says: the keys of ``judges.*.head``."""

from __future__ import annotations

from typing import Literal

from arena_distill.config.section import Section
from arena_distill.verdicts import CLASSES, Classes

Pooling = Literal["mean", "answer", "last"]
"""Of the hidden states of a layer, see ``models.layer_reads``."""


class HeadKeys(Section):
    """What a judge reads in one sequence, and its output; see ``models.heads``."""

    kind: Literal["joint", "pointwise"]
    """`joint`: both answers in one sequence, a logit per class; `pointwise`: one answer, one strength."""
    ties: Literal["davidson", "rao_kupper"] = "davidson"
    """The model of ties that turns two strengths and a tie parameter into three logits (`classes: 3`)."""
    pooling: Literal["last", "mean", "layers"] = "last"
    """The head reads the last token's hidden state, or (decoders) the mean over the sequence's tokens;
    `layers`: it reads several layers as a frozen judge's head does; an adapter is trained below it."""


class Head(HeadKeys):
    """A judge's head in a run of so many classes."""

    classes: Classes = 3

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of a sequence's outputs, in their order."""
        if self.kind == "joint":
            return CLASSES[: self.classes]
        return ("strength", "tie")[: self.classes - 1]


JOINT = Head(kind="joint")
