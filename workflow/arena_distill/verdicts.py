"""Define the two orders of the answers, and exchange verdicts between them.

Classes are always 0 = model_a, 1 = model_b, 2 = tie. Files hold logits in this canonical frame for both
orders, so a reader can average over orders directly. The frame of the answers as shown is used in
two places only: right after the judge answers, and for the targets of swapped rows. The exchange is its
own inverse, so :func:`exchange` works both ways.

A vote is three probabilities in that order, a battle's weight is how much it counts: see :class:`Votes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Order = Literal["AB", "BA"]
ORDERS: tuple[Order, ...] = get_args(Order)
CLASSES = ("model_a", "model_b", "tie")
WINNERS = tuple(f"winner_{name}" for name in CLASSES)
"""Columns of the competition: votes in its battles, probabilities in predictions and submissions."""

NO_VOTE = -1
"""The label of a battle without a vote: students learn it from their teachers only."""

_EXCHANGED = np.array([1, 0, 2])


@dataclass(frozen=True)
class Votes:
    """What people said of battles.

    Losses are linear in both fields: a battle with the vote (0.5, 0.25, 0.25) and the weight 4 counts as
    two votes for A, one for B and one for a tie.

    probabilities: float64 (rows, 3), each row's sum 1; one-hot for a hard vote, three zeros for no vote.
    weights: float64 (rows,), greater than 0.
    """

    probabilities: np.ndarray
    weights: np.ndarray

    @classmethod
    def hard(cls, labels: np.ndarray) -> Votes:
        """Votes of weight 1 for one class each: int (rows,) of 0, 1, 2 or NO_VOTE."""
        one_hot = np.eye(len(CLASSES) + 1, len(CLASSES))[labels]  # the index NO_VOTE, -1: the zeros
        return cls(one_hot, np.ones(len(labels)))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: np.ndarray) -> Votes:
        """The given rows (int positions, or a bool mask), in that order."""
        return Votes(self.probabilities[rows], self.weights[rows])

    @property
    def known(self) -> np.ndarray:
        """Which battles have a vote: bool (rows,)."""
        return np.asarray(self.probabilities.any(axis=1))

    @property
    def labels(self) -> np.ndarray:
        """The likeliest class of each vote, the first of equal ones: int64 (rows,), NO_VOTE for no vote."""
        return np.where(self.known, self.probabilities.argmax(axis=1), NO_VOTE)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean over battles, each by its weight: (rows, ...) → float64 (...)."""
        return np.asarray(np.average(values, axis=0, weights=self.weights))

    def cross_entropy(self, log_probabilities: np.ndarray) -> np.ndarray:
        """−Σ vote · log p of each battle, in nats: float (rows, ..., 3) → float64 (rows, ...)."""
        return -np.einsum("rc,r...c->r...", self.probabilities, log_probabilities)


def swap_classes(scores: np.ndarray) -> np.ndarray:
    """Exchange model_a and model_b in logits or probabilities: float (..., 3) → same shape."""
    return scores[..., _EXCHANGED]


def exchange(scores: np.ndarray, orders: Sequence[Order] = ORDERS) -> np.ndarray:
    """Scores as shown in each order → scores in the canonical frame, or back: float (..., orders, 3)."""
    swapped = np.array(orders)[:, None] == "BA"
    return np.where(swapped, swap_classes(scores), scores)
