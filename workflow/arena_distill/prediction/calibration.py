"""Fit and apply maps that calibrate a judge's probabilities.

A judge may predict the right winner with the wrong confidence. These maps correct its probabilities.
They are fitted by maximum likelihood to votes on battles that the judge was not trained on:

- `temperature`: softmax(z / T), one parameter. No verdict changes.
- `vector`: softmax(W z + b) with a diagonal W. Exchanging the answers must exchange the verdict, so A
  and B share their scale and bias. Three parameters remain: the scale of the answers, the scale and
  the bias of the tie (the answers' bias is 0, because softmax ignores a constant).
- `style`: `vector`, with the differences in style (:mod:`arena_distill.battles.style_features`) as
  covariates: a judge that reads truncated answers does not know their length. Each difference shifts
  the lead of A over B, and its absolute value shifts the tie.

Of two classes, `vector` has no tie to scale or shift, so it is `temperature` and not offered; `style` is
the temperature and the shifts of the lead.

Logits are centred first (minus their mean over the classes), because softmax ignores a constant but W
does not. For three classes, `vector` is as general as a full matrix: the maps that respect the
exchange scale the lead of A over B, and scale and shift that of the tie.

All are logistic regressions on the logits, so the likelihood has one optimum. A ridge of `RIDGE` towards
the identity gives a unique fit if a judge predicts the same for every battle, or a class has no votes.
Covariates are more numerous and have a stronger ridge. Both are zero for the identity, so a fit never
has a lower likelihood than the raw logits.

The scores of a calibration are cross-fitted: each part of the battles, of whole prompts, is calibrated with
parameters fitted to the other parts. So the same battles calibrate the model and score it, calibrated.

References:
    Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from arena_distill.config.vocabulary import CalibrationMethod
from arena_distill.metrics import (
    Figures,
    calibration_scores,
    class_reliability,
    reliability,
    scores,
    softmax,
)
from arena_distill.verdicts import Votes

METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)


def methods(classes: int) -> tuple[CalibrationMethod, ...]:
    """The methods that differ from each other, for so many classes."""
    return tuple(method for method in METHODS if classes == 3 or method != "vector")


COLDEST, HOTTEST = 0.01, 100.0
"""The bounds of a temperature: of T, and of the inverse of each scale of `vector`."""

RIDGE = 1e-6
"""Weight of half the squared distance from the identity, relative to the mean log loss in nats."""

STYLE_RIDGE = 10.0
"""The same for the coefficients of standardised covariates, relative to the log loss of all battles."""

PARTS = 5
"""Of a cross-validation, at most."""

# Each parameter is a scale or a bias of these classes (A, B, tie).
_ALL, _APART = np.array([[1.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
_NONE, _TIE = np.empty((0, 3)), np.array([[0.0, 0.0, 1.0]])
_SCALES: dict[CalibrationMethod, np.ndarray] = {
    "temperature": _ALL,
    "vector": _APART,
    "style": _APART,
}
_BIASES: dict[CalibrationMethod, np.ndarray] = {"temperature": _NONE, "vector": _TIE, "style": _TIE}


@dataclass(frozen=True)
class CalibrationMap:
    """A map of logits: centred, times `scale`, plus `bias`, plus the effect of the answers' style.

    It is affine in the logits; of averaged probabilities their logarithms are the logits.

    scale, bias: float64 (classes,).
    lead: float64 (features,), the shift of A's logit relative to B's per unit of a difference; empty
        without style.
    tie: float64 (features,), the shift of the tie's logit per unit of a difference's absolute value;
        empty without ties.
    """

    scale: np.ndarray
    bias: np.ndarray
    lead: np.ndarray = field(default_factory=lambda: np.empty(0))
    tie: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __call__(self, logits: np.ndarray, styles: np.ndarray | None = None) -> np.ndarray:
        """Calibrated logits.

        Args:
            logits: float (rows, ..., classes).
            styles: float (rows, features), of the battles; needed for `style`.

        Returns:
            float64, of the shape of `logits`.
        """
        calibrated = _centred(logits) * self.scale + self.bias
        if not len(self.lead):
            return calibrated
        if styles is None:
            raise ValueError("this calibration needs the style of the answers")
        added = _by_style(styles, len(self.scale)) @ np.concatenate([self.lead, self.tie])
        return calibrated + added.reshape(len(logits), *[1] * (logits.ndim - 2), -1)

    def probabilities(
        self, probabilities: np.ndarray, styles: np.ndarray | None = None
    ) -> np.ndarray:
        """Calibrated probabilities of (rows, classes), the mean of a battle's views: float64."""
        return softmax(self(logarithms(probabilities), styles))

    @property
    def parameters(self) -> Figures:
        """As JSON: the non-empty fields, and the `temperature` if that is the only parameter."""
        found: Figures = {"scale": self.scale.tolist(), "bias": self.bias.tolist()}
        if len(self.lead):
            return {**found, "lead": self.lead.tolist(), "tie": self.tie.tolist()}
        if len(set(found["scale"])) == 1 and not any(found["bias"]):
            found = {"temperature": 1 / found["scale"][0], **found}
        return found


def _by_style(styles: np.ndarray, classes: int) -> np.ndarray:
    """The factors of `lead` and, with ties, `tie`: float64 (rows, classes, features or 2 · features)."""
    zero, size = np.zeros_like(styles), np.abs(styles)
    lead = np.stack([styles / 2, -styles / 2, zero][:classes], axis=1)
    if classes == 2:
        return lead
    return np.concatenate([lead, np.stack([zero, zero, size], axis=1)], axis=2)


# --- fitting --------------------------------------------------------------------------------------


def fit(
    method: CalibrationMethod,
    logits: np.ndarray,
    votes: Votes,
    styles: np.ndarray | None = None,
) -> CalibrationMap:
    """Fit a calibration by maximum likelihood; without rows it is the identity.

    Args:
        logits: float (rows, classes).
        votes: of these rows.
        styles: float (rows, features), of the battles; without them `style` is `vector`.
    """
    from scipy.optimize import minimize

    scales, biases = (_of(votes.classes, of[method]) for of in (_SCALES, _BIASES))
    rows, total_weight = len(votes), votes.weights.sum() or 1.0
    if method != "style" or styles is None:
        styles = np.empty((rows, 0))
    # Differences are not centred: that would favour one side.
    spread = np.sqrt(np.square(styles).mean(axis=0)) if rows else np.ones(styles.shape[1])
    spread[spread == 0] = 1
    by_style = _by_style(styles / spread, votes.classes)
    # The calibrated logits are linear in the parameters: (rows, classes, parameters) @ (parameters,).
    scaled = _centred(logits)[:, :, None] * scales.T
    shifted = np.broadcast_to(biases.T, (rows, *biases.T.shape))
    features = np.concatenate([scaled, shifted, by_style], axis=2)
    of_vote = np.einsum("rc,rcp->rp", votes.probabilities, features)
    counts = len(scales), len(biases), by_style.shape[2]
    identity = np.repeat([1.0, 0.0, 0.0], counts)
    ridge = np.repeat([RIDGE, RIDGE, STYLE_RIDGE / total_weight], counts)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean log loss with the ridge, and its gradient."""
        z = features @ parameters
        top = z.max(axis=1, keepdims=True)
        odds = np.exp(z - top)
        total = odds.sum(axis=1, keepdims=True)
        loss = (top + np.log(total))[:, 0] - of_vote @ parameters
        slope = np.einsum("rc,rcp->rp", odds / total, features) - of_vote
        away = parameters - identity
        value = (votes.weights * loss).sum() / total_weight + ridge / 2 @ away**2
        slope *= votes.weights[:, None]
        return float(value), slope.sum(axis=0) / total_weight + ridge * away

    free = counts[1] + counts[2]
    bounds = [(1 / HOTTEST, 1 / COLDEST)] * counts[0] + [(None, None)] * free
    found = minimize(
        objective,
        identity,
        jac=True,
        bounds=bounds,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    ).x
    of_scales, of_biases, of_styles = np.split(found, np.cumsum(counts)[:2])
    lead, tie = np.split(of_styles, [len(spread)])
    tie = tie / spread if len(tie) else tie
    return CalibrationMap(of_scales @ scales, of_biases @ biases, lead / spread, tie)


def _of(classes: int, parameters: np.ndarray) -> np.ndarray:
    """The parameters that have an effect on so many classes."""
    some = parameters[:, :classes]
    return some[some.any(axis=1)]


def cross_fit(
    method: CalibrationMethod,
    logits: np.ndarray,
    votes: Votes,
    parts: np.ndarray,
    styles: np.ndarray | None = None,
) -> np.ndarray:
    """Calibrate each part with a fit to the other parts: float64 (rows, classes), logits.

    Args:
        logits: float (rows, classes).
        votes: of these rows.
        parts: int (rows,), of :func:`parts_of`.
        styles: float (rows, features), or None.
    """
    calibrated = np.empty(logits.shape, np.float64)
    for part in np.unique(parts):
        mine = parts == part
        known, asked = (None, None) if styles is None else (styles[~mine], styles[mine])
        calibrated[mine] = fit(method, logits[~mine], votes[~mine], known)(logits[mine], asked)
    return calibrated


def parts_of(groups: np.ndarray, n: int = PARTS) -> np.ndarray:
    """Assign rows to parts for cross-fitting that share no prompt, by scikit-learn's GroupKFold.

    A vote on the same prompt would leak into the fit. If all rows share one prompt there is one part, and
    no rows to fit to.

    Args:
        groups: int (rows,), the battle's prompt.
        n: parts, fewer where there are fewer prompts.

    Returns:
        int64 (rows,).
    """
    from sklearn.model_selection import GroupKFold

    parts = np.zeros(len(groups), np.int64)
    n = min(n, len(np.unique(groups)))
    if n > 1:
        for number, (_, rows) in enumerate(GroupKFold(n).split(groups, groups=groups)):
            parts[rows] = number
    return parts


def cross_fitted(
    logits: np.ndarray, votes: Votes, parts: np.ndarray, styles: np.ndarray | None = None
) -> dict[CalibrationMethod, np.ndarray]:
    """Probabilities by every method, cross-fitted: float64 (rows, classes); arguments as `cross_fit`."""
    return {
        method: softmax(cross_fit(method, logits, votes, parts, styles))
        for method in methods(votes.classes)
    }


def scores_by_method(
    crossed: dict[CalibrationMethod, np.ndarray],
    logits: np.ndarray,
    votes: Votes,
    styles: np.ndarray | None,
) -> Figures:
    """By method: the `parameters` fitted to all rows, and every score of the `crossed` probabilities."""
    return {
        method: {
            "parameters": fit(method, logits, votes, styles).parameters,
            **all_scores(probabilities, votes),
        }
        for method, probabilities in crossed.items()
    }


def all_scores(probabilities: np.ndarray, votes: Votes) -> Figures:
    """Scores, calibration errors and reliability diagrams of probabilities (rows, classes)."""
    return {
        **scores(probabilities, votes),
        **calibration_scores(probabilities, votes),
        "reliability": reliability(probabilities, votes),
        "class_reliability": class_reliability(probabilities, votes),
    }


def logarithms(probabilities: np.ndarray) -> np.ndarray:
    """Logits of probabilities; 0 counts as the least float64."""
    return np.log(probabilities.clip(min=np.finfo(np.float64).tiny))


def _centred(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.mean(axis=-1, keepdims=True)
