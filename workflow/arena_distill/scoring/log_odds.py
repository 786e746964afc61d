"""Map another judge's log-odds that A is better, on a scale of its own and without ties, onto votes.

Davidson's model (``models.heads``) with one tie parameter: log-odds x become the logits
(s·x/2, −s·x/2, log ν). The scale s and log ν are fitted

to `votes`    where `FEWEST` battles have both: they have the least log loss there;
by `surface`  where the judge saw other battles than people did. Ties are as frequent as among the votes.
              And what shows on the surface of a battle (``battles.surface_features``) predicts votes as it
              predicts the mapped verdicts: their difference P(A) − P(B) is regressed on the surface of the
              judge's battles, and that regression has the least squared error on the votes. (A two-sample
              instrument: Angrist and Krueger 1992, JASA 87(418). It assumes that judge and people like the
              same things on the surface, in the same proportions.)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from arena_distill.config.section import Section
from arena_distill.verdicts import Votes

Fitted = Literal["votes", "surface", "ties"]

FEWEST = 100
"""Battles with a vote, from which the map is fitted to them."""

WEAKEST, STRONGEST = 0.01, 10.0
"""Bounds of the scale."""


class Scale(Section):
    """The map, and what it was fitted to."""

    scale: float
    log_nu: float | None
    """None in a run without ties."""
    fitted: Fitted
    """To what; `ties`: the scale was given, log ν alone is fitted."""
    battles: int
    """With a vote, of the fit."""

    def logits(self, log_odds: np.ndarray) -> np.ndarray:
        """float64 (rows, classes)."""
        return _logits(log_odds, self.scale, self.log_nu)

    def __str__(self) -> str:
        what = {
            "votes": "the votes of the same battles",
            "surface": "votes of other battles, by what shows on their surface",
            "ties": "votes, whose share of ties it has",
        }[self.fitted]
        tie = "" if self.log_nu is None else f", tie {self.log_nu:+.2f}"
        return f"log-odds × {self.scale:.3g}{tie}, fitted to {self.battles:,} {what}"


def fit_to_votes(log_odds: np.ndarray, votes: Votes) -> Scale:
    """Fit the map where the judge's battles have votes.

    Args:
        log_odds: float64 (rows,).
        votes: of the same battles.
    """
    from scipy.optimize import minimize

    def loss(found: np.ndarray) -> float:
        logits = _logits(log_odds, found[0], *found[1:])
        return float(votes.mean(votes.cross_entropy(log_softmax(logits))))

    start = np.array([0.1, 0.0][: votes.classes - 1])
    bounds = [(WEAKEST, STRONGEST), (-10, 10)][: votes.classes - 1]
    found = minimize(loss, start, method="L-BFGS-B", bounds=bounds).x
    return _scale(found, "votes", len(votes))


def fit_to_ties(log_odds: np.ndarray, scale: float, votes: Votes) -> Scale:
    """The map of a given scale that makes ties as frequent as among the votes, of whatever battles."""
    log_nu = [_tie_parameter(log_odds, scale, _share_of_ties(votes))] if votes.classes == 3 else []
    return _scale([scale, *log_nu], "ties", len(votes))


def fit_by_surface(
    log_odds: np.ndarray, judged: np.ndarray, voted: np.ndarray, votes: Votes
) -> Scale:
    """Fit the map where the judge's battles have no votes.

    Args:
        log_odds: float64 (rows,).
        judged: float (rows, features), the differences of both answers' surface in these battles.
        voted: float (others, features), in the battles with votes.
        votes: of the latter.
    """
    from scipy.optimize import minimize_scalar
    from sklearn.linear_model import Ridge

    spread = judged.std(axis=0)
    spread[spread == 0] = 1
    judged, voted = judged / spread, voted / spread
    said = votes.probabilities[:, 0] - votes.probabilities[:, 1]
    ties = _share_of_ties(votes) if votes.classes == 3 else None

    def parameters(scale: float) -> list[float]:
        return [scale] if ties is None else [scale, _tie_parameter(log_odds, scale, ties)]

    def error(log_scale: float) -> float:
        p = np.exp(log_softmax(_logits(log_odds, *parameters(np.exp(log_scale)))))
        line = Ridge(alpha=1.0, fit_intercept=False).fit(judged, p[:, 0] - p[:, 1])
        return float(votes.mean((said - line.predict(voted)) ** 2))

    bounds = np.log(WEAKEST), np.log(STRONGEST)
    best = minimize_scalar(error, bounds=bounds, method="bounded").x
    return _scale(parameters(float(np.exp(best))), "surface", len(votes))


def _share_of_ties(votes: Votes) -> float:
    return float(votes.mean(votes.probabilities[:, 2]))


def _tie_parameter(log_odds: np.ndarray, scale: float, ties: float) -> float:
    """The log ν with which that share of the battles are ties."""
    from scipy.optimize import brentq

    def too_many(log_nu: float) -> float:
        p = np.exp(log_softmax(_logits(log_odds, scale, log_nu)))
        return float(p[:, 2].mean()) - ties

    low, high = -30.0, 30.0 + scale * float(np.abs(log_odds).max())
    if too_many(low) >= 0:
        return low
    return high if too_many(high) <= 0 else float(brentq(too_many, low, high))


def _logits(log_odds: np.ndarray, scale: float, log_nu: float | None = None) -> np.ndarray:
    half = scale * log_odds / 2
    columns = [half, -half]
    if log_nu is not None:
        columns.append(np.full_like(half, log_nu))
    return np.stack(columns, axis=-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Scores (..., classes) as logarithms of probabilities that sum to 1: float64."""
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def _scale(found: Any, fitted: Fitted, battles: int) -> Scale:
    scale, *tie = map(float, found)
    return Scale(scale=scale, log_nu=tie[0] if tie else None, fitted=fitted, battles=battles)
