"""Fit and apply the calibration of the deployed model, and score it on battles that nothing was trained on.

A judge may predict the right winner with the wrong confidence. These maps correct its probabilities.
They are fitted by maximum likelihood to the held-out battles (``folds.HELD_OUT``), whose votes neither the
judge nor its teachers saw, and to what the deployed model itself, merged or quantised, says of them under
the views that are submitted:

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

`auto` chooses among them (:func:`choose`): a temperature from `FEWEST` battles on, and more only where
cross-validation on these battles says that it pays.

The scores of a calibration are cross-fitted: each part of the battles, of whole prompts, is calibrated with
parameters fitted to the other parts. So the same battles calibrate the model and score it, calibrated.

References:
    Breiman et al. 1984, Classification and Regression Trees, section 3.4.3 (one standard error).
    Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from arena_distill.battles.folds import held_out_rows, undivided_groups
from arena_distill.battles.style_features import read_styles
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases import CalibrationSettings
from arena_distill.config.vocabulary import (
    AskedCalibration,
    Calibration,
    CalibrationMethod,
    ModelKind,
)
from arena_distill.errors import InputError
from arena_distill.files.artifacts import REBUILD, provenance, read_json, read_parquet, write_json
from arena_distill.files.keys import key, locate
from arena_distill.metrics import (
    Figures,
    calibration_scores,
    class_reliability,
    deployed_score,
    losses,
    paired_difference,
    reliability,
    scores,
    softmax,
)
from arena_distill.prediction.averages import mean_of_views, read_views
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

FEWEST = 200
"""Held-out battles from which on `auto` calibrates."""

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
        return softmax(self(_logarithms(probabilities), styles))

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


def choose(
    logits: np.ndarray, votes: Votes, groups: np.ndarray, styles: np.ndarray | None = None
) -> Calibration:
    """What so many battles suffice for.

    None below `FEWEST`, else the temperature; a map with more parameters only if its cross-validated log
    loss is lower by more than one standard error of the difference.

    Args:
        logits: float (rows, classes).
        votes: of these rows.
        groups: int (rows,), the battle's prompt.
        styles: float (rows, features), or None.
    """
    if len(votes) < FEWEST:
        return "none"
    crossed = cross_fitted(logits, votes, parts_of(groups), styles)
    loss = {method: losses(p, votes) for method, p in crossed.items()}
    best: CalibrationMethod = "temperature"
    for richer in methods(votes.classes)[1:]:
        gain = paired_difference(loss[richer], loss[best], votes, groups)
        error = (gain["high"] - gain["low"]) / (2 * 1.96)
        if gain["difference"] + error < 0:
            best = richer
    return best


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


def _as_deployed(
    asked: AskedCalibration,
    logits: np.ndarray,
    votes: Votes,
    groups: np.ndarray,
    styles: np.ndarray,
) -> np.ndarray:
    """Probabilities of each part, calibrated as the other parts say, the choice of a method included."""
    parts, calibrated = parts_of(groups), np.empty(logits.shape)
    for part in np.unique(parts):
        mine = parts == part
        known = logits[~mine], votes[~mine]
        method = choose(*known, groups[~mine], styles[~mine]) if asked == "auto" else asked
        seen = logits[mine]
        if method != "none":
            seen = fit(method, *known, styles[~mine])(seen, styles[mine])
        calibrated[mine] = softmax(seen)
    return calibrated


def _logarithms(probabilities: np.ndarray) -> np.ndarray:
    return np.log(probabilities.clip(min=np.finfo(np.float64).tiny))


def _centred(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.mean(axis=-1, keepdims=True)


# --- files ----------------------------------------------------------------------------------------


def fit_calibration(
    folds: Path,
    battles: Path,
    logits: Path,
    output: Path,
    *,
    judge: str,
    model: ModelKind,
    settings: CalibrationSettings,
) -> None:
    """Fit the calibration of a deployed model to the held-out battles, and score it there → JSON.

    It holds `judge`, `model`, `rows`; `method`, the calibration that is used; `deployed`, the score of the
    model with it (``metrics.deployed_score``), cross-fitted; the scores of the uncalibrated model (`raw`);
    and per method its `parameters`, fitted to all rows, and its cross-fitted scores (`methods`).

    Args:
        folds: `folds.parquet`.
        battles: `battles.parquet`.
        logits: the model's file `<model>_held_out.npy`.

    Raises:
        InputError: no battle is held out, one has no logits, or they were made with other views.
    """
    table = read_parquet(folds)
    rows = held_out_rows(table)
    if not len(rows):
        raise InputError(f"{folds}: no battle is held out; set folds.holdout")
    held_out = table.take(rows)
    scored, ids = read_views(logits, settings)
    scored = scored[locate(key(held_out), key(ids), str(logits))]
    views = scored.reshape(len(rows), -1, scored.shape[-1])
    seen = _logarithms(mean_of_views(views, settings.average))
    votes, groups = votes_of(held_out), undivided_groups(held_out)
    styles, asked = read_styles(battles, key(held_out)), settings.calibration
    method = choose(seen, votes, groups, styles) if asked == "auto" else asked
    crossed = cross_fitted(seen, votes, parts_of(groups), styles)
    deployed = _as_deployed(asked, seen, votes, groups, styles)
    figures: Figures = {
        "judge": judge,
        "model": model,
        "rows": len(votes),
        "method": method,
        "deployed": deployed_score(deployed, votes, groups),
        "raw": all_scores(softmax(seen), votes),
        "methods": scores_by_method(crossed, seen, votes, styles),
        "provenance": provenance("calibration", settings.model_dump(mode="json")),
    }
    write_json(figures, output)
    told = {"raw": figures["raw"], **figures["methods"]}
    listed = ", ".join(f"{k} {f['log_loss']:.4f} (ECE {f['ece']:.3f})" for k, f in told.items())
    print(f"{output}: log loss on {len(votes):,} held-out battles: {listed}; used: {method}")


def read_calibration(path: Path) -> tuple[Calibration, CalibrationMap | None]:
    """Read the calibration that is used from a file of :func:`fit_calibration`: its name, and its map.

    Raises:
        InputError: the file is missing or invalid, or lacks its method.
    """
    figures = read_json(path)
    method: Any = figures.get("method") if isinstance(figures, dict) else None
    if method == "none":
        return "none", None
    try:
        found = _map(method, figures["methods"][method]["parameters"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: holds no calibration by {method}; {REBUILD}") from None
    return method, found


def _map(method: Any, parameters: Figures) -> CalibrationMap:
    """A map from its parameters.

    Raises:
        KeyError, TypeError, ValueError: they are not those of this method.
    """
    names = ("scale", "bias", *(("lead", "tie") if method == "style" else ()))
    found = CalibrationMap(**{name: np.array(parameters[name], np.float64) for name in names})
    classes, features = len(found.scale), len(found.lead)
    sizes = [array.shape for array in vars(found).values()]
    ties = features if classes == 3 else 0
    whole = classes in get_args(Classes) and method in methods(classes)
    whole = whole and sizes == [(classes,), (classes,), (features,), (ties,)]
    whole = whole and bool((found.scale > 0).all())
    if not (whole and all(bool(np.isfinite(array).all()) for array in vars(found).values())):
        raise ValueError(method)
    return found
