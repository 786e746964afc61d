"""Compute the figures of one judge out of fold: scores, calibration, position bias, truth."""

from __future__ import annotations

import numpy as np

from arena_distill.evaluation.out_of_fold import Run
from arena_distill.metrics import (
    Figures,
    calibration_scores,
    class_reliability,
    mean_over_views,
    position_bias,
    reliability,
    scores,
    softmax,
    truth_scores,
)
from arena_distill.prediction.calibration import cross_fitted, scores_by_method
from arena_distill.verdicts import ORDERS, Votes

LEAST_SPREAD = 1e-4
"""Probabilities of a judge that differ by less over all battles do not depend on the battle."""


def judge_figures(run: Run, logits: np.ndarray) -> Figures:
    """The figures of one judge: the mean of both orders' logits, and each order alone."""
    votes = run.votes()
    probabilities = mean_over_views(logits)
    position = position_bias(logits, votes)
    return {
        "folds": run.by_fold(probabilities),
        "oof": scores(probabilities, votes) | calibration_scores(probabilities, votes),
        "orders": {order: scores(softmax(logits[:, i]), votes) for i, order in enumerate(ORDERS)},
        "order_flip_rate": position["flip_rate"],
        "position": position,
        "reliability": reliability(probabilities, votes),
        "class_reliability": class_reliability(probabilities, votes),
    }


def judge_warning(logits: np.ndarray, oof: Figures, prior: Figures) -> str | None:
    """Why a judge knows nothing of the battles, as the end of a sentence; None if it knows something."""
    if np.ptp(softmax(logits), axis=0).max(initial=0) < LEAST_SPREAD:
        return "gives every battle the same verdict: it has learned nothing, or reads nothing of a battle"
    if oof["log_loss"] > prior["log_loss"]:
        return (
            f"predicts worse than the class prior: log loss {oof['log_loss']:.4f}, "
            f"without any judge {prior['log_loss']:.4f}"
        )
    return None


def calibration_figures(
    logits: np.ndarray,
    votes: Votes,
    parts: np.ndarray,
    styles: np.ndarray,
    truth: np.ndarray | None,
) -> Figures:
    """Scores of a judge after each calibration, cross-fitted, and its distances from the truth."""
    mean = logits.mean(axis=1, dtype=np.float64)
    crossed = cross_fitted(mean, votes, parts, styles)
    figures = scores_by_method(crossed, mean, votes, styles)
    if truth is None:
        return {"calibration": figures, "truth": None}
    seen: dict[str, np.ndarray] = {"raw": mean_over_views(logits)} | dict(crossed)
    distances = {name: truth_scores(truth, p, votes) for name, p in seen.items()}
    return {"calibration": figures, "truth": distances}
