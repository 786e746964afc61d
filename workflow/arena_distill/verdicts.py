"""Define the two orders of the answers, and exchange verdicts between them.

Classes are always 0 = model_a, 1 = model_b, 2 = tie; a run of two classes has no ties. An array or a file
knows how many it has: the size of its last axis, `classes` below. Files hold logits in this canonical
frame for both orders, so a reader can average over orders directly. The frame of the answers as shown is
used in two places only: right after the judge answers, and for the targets of swapped rows. The exchange is
its own inverse, so :func:`exchange` works both ways.

A vote is a probability per class, a battle's weight is how much it counts: see :class:`Votes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Order = Literal["AB", "BA"]
ORDERS: tuple[Order, ...] = get_args(Order)
CLASSES = ("model_a", "model_b", "tie")
Classes = Literal[3, 2]
"""How many of them a run has."""
WINNERS = tuple(f"winner_{name}" for name in CLASSES)
"""Columns of the competition: votes in its battles, probabilities in predictions and submissions."""

Ties = Literal["class", "refuse", "drop", "half"]
"""What a tie is: a class; or, where a run has two, a mistake, no vote, or half a vote for either answer."""

NO_VOTE = -1
"""The label of a battle without a vote: students learn it from their teachers only."""

_EXCHANGED = np.array([1, 0, 2])


@dataclass(frozen=True)
class Votes:
    """What people said of battles.

    Losses are linear in both fields: a battle with the vote (0.5, 0.25, 0.25) and the weight 4 counts as
    two votes for A, one for B and one for a tie.

    probabilities: float64 (rows, classes), each row's sum 1; one-hot for a hard vote, zeros for no vote.
        (Less, in training, of a vote that counts less: ``training.targets.trusted_votes``.)
    weights: float64 (rows,), greater than 0.
    """

    probabilities: np.ndarray
    weights: np.ndarray

    @classmethod
    def hard(cls, labels: np.ndarray, classes: int = len(CLASSES)) -> Votes:
        """Votes of weight 1 for one class each: int (rows,) of 0, 1, 2 or NO_VOTE."""
        one_hot = np.eye(classes + 1, classes)[labels]  # the index NO_VOTE, -1: the zeros
        return cls(one_hot, np.ones(len(labels)))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: np.ndarray) -> Votes:
        """The given rows (int positions, or a bool mask), in that order."""
        return Votes(self.probabilities[rows], self.weights[rows])

    @property
    def classes(self) -> int:
        return self.probabilities.shape[1]

    @property
    def known(self) -> np.ndarray:
        """Which battles have a vote: bool (rows,)."""
        return np.asarray(self.probabilities.any(axis=1))

    @property
    def labels(self) -> np.ndarray:
        """The likeliest class of each vote, the first of equal ones: int64 (rows,), NO_VOTE for no vote."""
        return np.where(self.known, self.probabilities.argmax(axis=1), NO_VOTE)

    @property
    def halves(self) -> np.ndarray:
        """Which votes of two classes are as much for either: bool (rows,)."""
        a, b = self.probabilities.T[:2]
        return np.asarray(self.known & (a == b) & (self.classes == 2))

    def among(self, ties: Ties) -> Votes:
        """What votes of three classes say where a tie is what `ties` says.

        class  the same.
        half   (a, b, t) → (a + t/2, b + t/2), of the same weight w.
        drop   (a, b, t) → (a, b) / (1 − t), of weight w · (1 − t): what is left of w votes without the ties
               among them. No vote, if all are ties.
        refuse as `drop`; the caller has refused all ties.
        """
        if ties == "class":
            return self
        answers, tie = self.probabilities[:, :2], self.probabilities[:, 2:]
        if ties == "half":
            return Votes(answers + tie / 2, self.weights)
        left = answers.sum(axis=1)
        some = np.where(left > 0, left, 1)
        return Votes(answers / some[:, None], self.weights * some)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean over battles, each by its weight: (rows, ...) → float64 (...)."""
        return np.asarray(np.average(values, axis=0, weights=self.weights))

    def cross_entropy(self, log_probabilities: np.ndarray) -> np.ndarray:
        """−Σ vote · log p of each battle, in nats: float (rows, ..., classes) → float64 (rows, ...)."""
        return -np.einsum("rc,r...c->r...", self.probabilities, log_probabilities)


def swap_classes(scores: np.ndarray) -> np.ndarray:
    """Exchange model_a and model_b in logits or probabilities: float (..., classes) → same shape."""
    return scores[..., _EXCHANGED[: scores.shape[-1]]]


def exchange(scores: np.ndarray, orders: Sequence[Order] = ORDERS) -> np.ndarray:
    """Scores as shown in each order → in the canonical frame, or back: float (..., orders, classes)."""
    swapped = np.array(orders)[:, None] == "BA"
    return np.where(swapped, swap_classes(scores), scores)


def logits_among(logits: np.ndarray, classes: int) -> np.ndarray:
    """Logits of the classes of a run, from a judge that may know ties where the run has none.

    Without its third logit, softmax(z_a, z_b)_a is P(A) / (P(A) + P(B)) = P(A | no tie): the judge's
    opinion if there is a winner. In logarithms, log P(A | no tie) = z_a − log(e^z_a + e^z_b).

    Args:
        logits: float (..., classes of the judge), as many as the run's or more; also log-probabilities.

    Returns:
        float (..., classes), of which log-probabilities no longer sum to 1.
    """
    return logits[..., :classes]
