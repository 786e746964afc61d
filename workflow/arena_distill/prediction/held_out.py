"""Calibrate the deployed model and score it, on battles that nothing was trained on.

The maps of ``prediction.calibration`` are fitted to the held-out battles (``folds.HELD_OUT``), whose votes
neither the judge nor its teachers saw, and to what the deployed model itself (merged or quantised) says of
them under the submitted views. The same battles score the model, calibrated by cross-fitting.

References:
    Breiman et al. 1984, Classification and Regression Trees, section 3.4.3 (one standard error).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np

from arena_distill.battles.folds import held_out_rows, undivided_groups
from arena_distill.battles.style_features import read_styles
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases.prediction import CalibrationSettings
from arena_distill.config.vocabulary import (
    AskedCalibration,
    Calibration,
    CalibrationMethod,
    ModelKind,
)
from arena_distill.errors import InputError
from arena_distill.files.artifacts import REBUILD, provenance, read_json, read_parquet, write_json
from arena_distill.files.keys import key, locate
from arena_distill.metrics import Figures, Z, deployed_score, losses, paired_difference, softmax
from arena_distill.prediction.averages import mean_of_views, read_views
from arena_distill.prediction.calibration import (
    CalibrationMap,
    all_scores,
    cross_fitted,
    fit,
    logarithms,
    methods,
    parts_of,
    scores_by_method,
)
from arena_distill.verdicts import Classes, Votes

FEWEST = 200
"""Held-out battles from which on `auto` calibrates."""


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
        error = gain["difference"] - gain["low"] if gain["low"] is not None else np.inf
        if gain["difference"] + error / Z < 0:
            best = richer
    return best


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
    seen = logarithms(mean_of_views(views, settings.average))
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
