"""Calibration: a map of the final logits that makes probabilities mean what they say.

A judge may be right about who wins and wrong about how surely. Two maps mend that, fitted by maximum
likelihood to votes on battles that the judge was not trained on:

- `temperature`: softmax(z / T), one parameter. No verdict changes.
- `vector`: softmax(W z + b) with a diagonal W. Exchanging the answers has to exchange the verdict, so
  A and B share their scale and bias: three parameters are left, the scale of the answers, the scale
  of the tie and its bias (the answers' bias is 0: a constant more on all logits changes nothing).

Logits are centred first (their mean over the classes is taken off), as softmax does not see a constant
but W would. With the three classes of a battle, this `vector` is as general as a matrix could be: the
maps that respect the exchange scale the lead of A over B, and scale and shift that of the tie.

Both are logistic regressions on the logits, so the likelihood has one optimum. A ridge of `RIDGE` to
the identity decides where votes do not: where a judge says the same of every battle, or a kind of vote
is absent. It is zero for the identity, so a fit never has a worse likelihood than the raw logits.

What a calibration is judged by is cross-fitted: each part of the battles is calibrated by what was
fitted to the other parts (:func:`parts_of`). The votes of a part reach its parameters only by way of
the other parts' logits, whose models were trained on them, as with all stacking.

References:
    Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from arena_distill.artifacts import provenance, read_json, read_parquet, write_json
from arena_distill.errors import InputError
from arena_distill.folds import fold_settings
from arena_distill.logits import read_out_of_fold
from arena_distill.metrics import Figures, calibration_scores, scores, softmax

Method = Literal["temperature", "vector"]
METHODS: tuple[Method, ...] = get_args(Method)

COLDEST, HOTTEST = 0.01, 100.0
"""The bounds of a temperature: of T, and of the inverse of each scale of `vector`."""

RIDGE = 1e-6
"""Weight of half the squared distance from the identity, beside the mean log loss in nats."""

# Each parameter is a scale or a bias of these classes (A, B, tie).
_SCALES: dict[Method, np.ndarray] = {
    "temperature": np.array([[1.0, 1.0, 1.0]]),
    "vector": np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
}
_BIASES: dict[Method, np.ndarray] = {
    "temperature": np.empty((0, 3)),
    "vector": np.array([[0.0, 0.0, 1.0]]),
}


@dataclass(frozen=True)
class Calibration:
    """A map of logits: centred, times `scale`, plus `bias`; both float64 (3,).

    It is affine, so it may be applied before logits are averaged or after.
    """

    scale: np.ndarray
    bias: np.ndarray

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated logits: float (..., 3) → float64 of the same shape."""
        return _centred(logits) * self.scale + self.bias

    @property
    def parameters(self) -> Figures:
        """As JSON: `scale` and `bias` per class, and the `temperature` where it is but that."""
        found: Figures = {"scale": self.scale.tolist(), "bias": self.bias.tolist()}
        if len(set(found["scale"])) == 1 and not any(found["bias"]):
            found = {"temperature": 1 / found["scale"][0], **found}
        return found


# --- fitting --------------------------------------------------------------------------------------


def fit(method: Method, logits: np.ndarray, votes: np.ndarray) -> Calibration:
    """Fit a calibration by maximum likelihood; with no rows, it is the identity.

    Args:
        logits: float (rows, 3).
        votes: int (rows,) of 0, 1, 2.
    """
    from scipy.optimize import minimize

    scales, biases = _SCALES[method], _BIASES[method]
    identity = np.concatenate([np.ones(len(scales)), np.zeros(len(biases))])
    # The calibrated logits are linear in the parameters: (rows, 3, parameters) @ (parameters,).
    rows = len(votes)
    scaled = _centred(logits)[:, :, None] * scales.T
    shifted = np.broadcast_to(biases.T, (rows, *biases.T.shape))
    features = np.concatenate([scaled, shifted], axis=2)
    of_vote = np.take_along_axis(features, votes.astype(np.int64)[:, None, None], axis=1)[:, 0]

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean log loss with the ridge, and its gradient."""
        z = features @ parameters
        top = z.max(axis=1, keepdims=True)
        odds = np.exp(z - top)
        total = odds.sum(axis=1, keepdims=True)
        loss = (top + np.log(total))[:, 0] - of_vote @ parameters
        slope = np.einsum("rc,rcp->rp", odds / total, features) - of_vote
        away = parameters - identity
        n = max(rows, 1)
        value = loss.sum() / n + RIDGE / 2 * away @ away
        return float(value), slope.sum(axis=0) / n + RIDGE * away

    bounds = [(1 / HOTTEST, 1 / COLDEST)] * len(scales) + [(None, None)] * len(biases)
    found = minimize(
        objective,
        identity,
        jac=True,
        bounds=bounds,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
    ).x
    return Calibration(found[: len(scales)] @ scales, found[len(scales) :] @ biases)


def cross_fit(
    method: Method, logits: np.ndarray, votes: np.ndarray, parts: np.ndarray
) -> np.ndarray:
    """Calibrate each part by what is fitted to the other parts: float64 (rows, 3), logits.

    Args:
        logits: float (rows, 3).
        votes: int (rows,).
        parts: int (rows,), of :func:`parts_of`.
    """
    calibrated = np.empty(logits.shape, np.float64)
    for part in np.unique(parts):
        mine = parts == part
        calibrated[mine] = fit(method, logits[~mine], votes[~mine])(logits[mine])
    return calibrated


def parts_of(folds: pa.Table) -> np.ndarray:
    """Deal the out-of-fold rows into parts for cross-fitting that share no prompt.

    The folds themselves where they keep prompts together (``stratified_group``), else as many parts
    of whole prompts, dealt by scikit-learn's GroupKFold: a vote on the same prompt would tell of the
    rows that are judged. Where all rows share one prompt there is one part, and nothing to fit to.

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

    groups = folds["group"].to_numpy()[validation]
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
    folds: Path, logits: Sequence[Path], output: Path, *, judge: str, version: int
) -> None:
    """Fit both methods to a judge's out-of-fold logits, both orders averaged → JSON.

    It holds `judge`, `rows`, the scores as they are (`raw`), and per method the `parameters`,
    fitted to all rows, and the scores, cross-fitted.

    Args:
        folds: `folds.parquet`.
        logits: the judge's files `fold_<k>.npy`.

    Raises:
        InputError: a fold has no logits, or a row is missing, there twice, or unknown.
    """
    table = read_parquet(folds)
    seen = read_out_of_fold(table, logits, judge).mean(axis=1, dtype=np.float64)
    votes = table["label"].to_numpy()[table["fold"].to_numpy() >= 0].astype(np.int64)
    parts = parts_of(table)

    def scored(logits: np.ndarray) -> Figures:
        probabilities = softmax(logits)
        return scores(probabilities, votes) | calibration_scores(probabilities, votes)

    figures: Figures = {"judge": judge, "rows": len(votes), "raw": scored(seen)}
    for method in METHODS:
        parameters = fit(method, seen, votes).parameters
        after = scored(cross_fit(method, seen, votes, parts))
        figures[method] = {"parameters": parameters, **after}
    figures["provenance"] = provenance("calibration", {"version": version})
    write_json(figures, output)
    told = (
        f"{name} {figures[name]['log_loss']:.4f} (ECE {figures[name]['ece']:.3f})"
        for name in ("raw", *METHODS)
    )
    print(f"{output}: log loss on {len(votes):,} battles out of fold: {', '.join(told)}")


def read_calibration(path: Path, method: Method) -> Calibration:
    """Read what :func:`fit_calibration` found by one of its methods.

    Raises:
        InputError: the file is missing, broken, or holds something else.
    """
    figures = read_json(path)
    try:
        parameters = figures[method]["parameters"]
        scale, bias = (np.array(parameters[name], np.float64) for name in ("scale", "bias"))
        whole = scale.shape == bias.shape == (3,)
        whole = whole and bool(np.isfinite([scale, bias]).all() and (scale > 0).all())
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(
            f"{path}: holds no calibration by {method}; delete it and run the workflow again: it "
            "will be rebuilt"
        )
    return Calibration(scale, bias)
