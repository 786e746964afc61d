"""The two orders in which a judge may see the answers, and what exchanging them does to the verdict.

Classes are always 0 = model_a, 1 = model_b, 2 = tie. Files hold logits in that canonical frame whatever
order the judge saw, so whoever reads a file may average over orders at once. What a judge *saw* is
needed in two places only: right after a forward pass and where a swapped row's target is built. The
exchange is its own inverse, so :func:`swap_classes` serves both ways.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Order = Literal["AB", "BA"]
ORDERS: tuple[Order, ...] = get_args(Order)
CLASSES = ("model_a", "model_b", "tie")

NO_VOTE = -1
"""The label of a battle that nobody voted on: it is learned from teachers alone."""

_EXCHANGED = np.array([1, 0, 2])
_VOTES_EXCHANGED = np.array([*_EXCHANGED, NO_VOTE])  # the index NO_VOTE, -1, finds itself


def swap_labels(labels: np.ndarray) -> np.ndarray:
    """Votes after the answers changed places: int (...,) of 0, 1, 2 or NO_VOTE → same shape, dtype."""
    return _VOTES_EXCHANGED.astype(labels.dtype)[labels]


def swap_classes(scores: np.ndarray) -> np.ndarray:
    """Logits or probabilities after the answers changed places: float (..., 3) → same shape."""
    return scores[..., _EXCHANGED]
