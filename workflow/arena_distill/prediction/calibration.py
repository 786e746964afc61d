"""Fit and apply the calibration of a judge's final logits.

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

The scores of a calibration are cross-fitted: each part of the battles is calibrated with parameters
fitted to the other parts (:func:`parts_of`). The votes of a part affect its parameters only through the
other parts' logits, whose models were trained on them, as in all stacking.

References:
    Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import fold_settings, undivided_groups
from arena_distill.battles.style_features import read_styles
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases import Settings
from arena_distill.config.vocabulary import CalibrationMethod
from arena_distill.errors import InputError
from arena_distill.files.artifacts import provenance, read_json, read_parquet, write_json
from arena_distill.files.keys import key
from arena_distill.metrics import Figures, calibration_scores, scores, softmax
from arena_distill.scoring.logits import read_out_of_fold
from arena_distill.verdicts import Classes, Votes

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

    It is affine in the logits, so it can be applied before or after averaging them.

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


def parts_of(folds: pa.Table) -> np.ndarray:
    """Assign the out-of-fold rows to parts for cross-fitting that share no prompt.

    The parts are the folds if these keep prompts together (``stratified_group``), else as many parts
    of whole prompts by scikit-learn's GroupKFold: a vote on the same prompt would leak into the fit.
    If all rows share one prompt there is one part, and no rows to fit to.

    Args:
        folds: `folds.parquet`.

    Returns:
        int64 (out-of-fold rows,), in their order in `folds`.
    """
    dealt = fold_settings(folds)
    fold = folds["fold"].to_numpy()
    validation = fold >= 0
    if dealt["method"] == "stratified_group":
        return fold[validation].astype(np.int64)
    from sklearn.model_selection import GroupKFold

    groups = undivided_groups(folds)[validation]
    parts = np.zeros(len(groups), np.int64)
    n = min(dealt["n"], len(np.unique(groups)))
    if n > 1:
        for number, (_, rows) in enumerate(GroupKFold(n).split(groups, groups=groups)):
            parts[rows] = number
    return parts


def _centred(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.mean(axis=-1, keepdims=True)


# --- files ----------------------------------------------------------------------------------------


def fit_calibration(
    folds: Path,
    battles: Path,
    logits: Sequence[Path],
    output: Path,
    *,
    judge: str,
    settings: Settings,
) -> None:
    """Fit every method to a judge's out-of-fold logits, both orders averaged → JSON.

    It holds `judge`, `rows`, the uncalibrated scores (`raw`), and per method the `parameters`,
    fitted to all rows, and the cross-fitted scores.

    Args:
        folds: `folds.parquet`.
        battles: `battles.parquet`.
        logits: the judge's files `fold_<k>.npy`.

    Raises:
        InputError: a fold has no logits, or a row is missing, duplicated or unknown.
    """
    table = read_parquet(folds)
    seen = read_out_of_fold(table, logits, judge).mean(axis=1, dtype=np.float64)
    validation = table.filter(pc.greater_equal(table["fold"], 0))
    votes = votes_of(validation)
    parts, styles = parts_of(table), read_styles(battles, key(validation))

    def scored(logits: np.ndarray) -> Figures:
        probabilities = softmax(logits)
        return scores(probabilities, votes) | calibration_scores(probabilities, votes)

    figures: Figures = {"judge": judge, "rows": len(votes), "raw": scored(seen)}
    for method in methods(votes.classes):
        parameters = fit(method, seen, votes, styles).parameters
        after = scored(cross_fit(method, seen, votes, parts, styles))
        figures[method] = {"parameters": parameters, **after}
    figures["provenance"] = provenance("calibration", settings.model_dump())
    write_json(figures, output)
    told = (
        f"{name} {figures[name]['log_loss']:.4f} (ECE {figures[name]['ece']:.3f})"
        for name in ("raw", *methods(votes.classes))
    )
    print(f"{output}: log loss on {len(votes):,} battles out of fold: {', '.join(told)}")


def read_calibration(path: Path, method: CalibrationMethod) -> CalibrationMap:
    """Read one method's calibration from a file of :func:`fit_calibration`.

    Raises:
        InputError: the file is missing or invalid, or lacks the method.
    """
    figures = read_json(path)
    try:
        parameters = figures[method]["parameters"]
        found = CalibrationMap(
            **{
                name: np.array(parameters[name], np.float64)
                for name in ("scale", "bias", *(("lead", "tie") if method == "style" else ()))
            }
        )
        classes, features = len(found.scale), len(found.lead)
        sizes = [array.shape for array in (found.scale, found.bias, found.lead, found.tie)]
        ties = features if classes == 3 else 0
        whole = classes in get_args(Classes) and method in methods(classes)
        whole = whole and sizes == [(classes,), (classes,), (features,), (ties,)]
        whole = whole and bool((found.scale > 0).all())
        whole = whole and all(bool(np.isfinite(array).all()) for array in vars(found).values())
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(
            f"{path}: holds no calibration by {method}; delete it and run the workflow again: it "
            "will be rebuilt"
        )
    return found
