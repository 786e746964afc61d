"""Combine judges, and trees over the surface, into one: a weighted geometric mean of their probabilities.

A stack's logits are its members' logits, each times its weight, added, and divided by a temperature. So
they are the logarithms of a geometric mean, and exchanging the answers exchanges them. Weights, which are
not negative and sum to 1, and the temperature have the least log loss on the members' logits out of fold
(Wolpert 1992, Stacked generalization; Breiman 1996, Stacked regressions: weights are not negative). That
is convex in the quotients of weights and temperature.

Each fold has its own: fitted to the battles of the other folds, without the prompts of this one. Those of
the final predictions are fitted to all battles out of fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from arena_distill.battles.folds import fold_rows, undivided_groups
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases.judging import StackedJudgeSettings
from arena_distill.config.phases.prediction import StackedViewsSettings
from arena_distill.config.phases.scoring import StackedLogitsSettings, StackSettings
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    REBUILD,
    check_made_from,
    fingerprint,
    provenance,
    read_json,
    read_parquet,
    write_json,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits, write_logits
from arena_distill.files.probabilities import read_probabilities
from arena_distill.metrics import Figures, losses, paired_difference, softmax
from arena_distill.scoring.logits import read_out_of_fold
from arena_distill.scoring.surface_trees import score_surface
from arena_distill.verdicts import ORDERS, Votes

SURFACE = "surface trees"
"""The member that is no judge; no judge can have this name."""

RIDGE = 10.0
"""Weight of half the squared distance from the plain geometric mean, relative to the log loss of all
battles: few battles move the weights little, and members that say the same have the same weight."""

NEGLIGIBLE = 1e-4
"""Nats, a difference that no table shows."""

LEAST = 1e-6
"""The least probability of trees: they may never have seen a class."""


def fit_stack(
    logits: Mapping[str, Sequence[Path]],
    folds: Path,
    output: Path,
    *,
    settings: StackSettings,
    surface: Path | None = None,
) -> None:
    """Fit a stack to the battles out of fold, and score it there → JSON: `judge` and :func:`worth`.

    Args:
        logits: by member its files `fold_<k>.npy`, in the order of the folds.
        folds: `folds.parquet`.
        surface: `surface.parquet`; without it the trees are no member.

    Raises:
        InputError: a file is missing, damaged or of other folds, or a row is in none.
    """
    table = read_parquet(folds)
    fold = table["fold"].to_numpy()
    rows = np.flatnonzero(fold >= 0)
    validated = table.take(pa.array(rows))
    views = {name: read_out_of_fold(table, files, name) for name, files in logits.items()}
    members = {name: found.mean(axis=1, dtype=np.float64) for name, found in views.items()}
    if surface is not None:
        members[SURFACE] = surface_logits(read_probabilities(surface, key(validated)))
    about = provenance("stack", settings.model_dump(mode="json"))
    figures = {
        "judge": settings.judge,
        **worth(members, votes_of(validated), fold[rows], undivided_groups(validated)),
        "provenance": about | {"made_from": {"folds": fingerprint(table)}},
    }
    write_json(figures, output)
    print(f"{output}: {describe(figures)}")


def worth(
    members: Mapping[str, np.ndarray], votes: Votes, fold: np.ndarray, groups: np.ndarray
) -> Figures:
    """Fit a stack, and compare it with its members.

    Args:
        members: by name, logits out of fold, float (rows, classes).
        votes: of these rows.
        fold, groups: int (rows,), each battle's fold and prompt.

    Returns:
        `rows`; by member (`members`) its `weight`, fitted to all rows, its weights in the `folds`, its
        `log_loss`, and that with its own temperature (`tempered`); the `temperature` and those of the
        `folds`; the stack's `log_loss`; the `best` member, tempered or not, and the difference from it with
        its interval of 95 % (`versus_best`); and whether all of that is a gain (`pays`). Losses are
        cross-fitted.
    """
    seen = np.stack(list(members.values()), axis=1)
    crossed, fitted = cross_fit(seen, votes, fold, groups)
    loss = losses(softmax(crossed), votes)
    raw = {name: losses(softmax(found), votes) for name, found in members.items()}
    tempered = {
        name: losses(softmax(cross_fit(found[:, None], votes, fold, groups)[0]), votes)
        for name, found in members.items()
    }
    alone = [*raw.items(), *tempered.items()]
    best, least = min(alone, key=lambda found: float(votes.mean(found[1])))
    versus = paired_difference(loss, least, votes, groups)
    weights, temperature = fit(seen, votes)
    return {
        "rows": len(votes),
        "members": {
            name: {
                "weight": float(weights[i]),
                "folds": [float(found[i]) for found, _ in fitted.values()],
                "log_loss": float(votes.mean(raw[name])),
                "tempered": float(votes.mean(tempered[name])),
            }
            for i, name in enumerate(members)
        },
        "temperature": temperature,
        "folds": [found for _, found in fitted.values()],
        "log_loss": float(votes.mean(loss)),
        "best": best,
        "versus_best": versus,
        "pays": versus["high"] is not None and versus["high"] < -NEGLIGIBLE,
    }


def describe(figures: Figures) -> str:
    """What :func:`fit_stack` found, in a sentence."""
    shares = ", ".join(f"{name} {m['weight']:.2f}" for name, m in figures["members"].items())
    best, versus = figures["best"], figures["versus_best"]
    between = ""
    if versus["low"] is not None:
        between = f" ({versus['low']:+.4f} to {versus['high']:+.4f})"
    return (
        f"the stack {figures['judge']} {'pays' if figures['pays'] else 'does not pay'}: log loss "
        f"{figures['log_loss']:.4f} out of fold, {versus['difference']:+.4f}{between} against "
        f"{best} alone; weights: {shares}"
    )


def combine_fold(
    logits: Sequence[Path],
    stack: Path,
    folds: Path,
    fold: int,
    output: Path,
    *,
    settings: StackedLogitsSettings,
    battles: Path | None = None,
) -> None:
    """Combine the members' logits of a fold → `fold_<k>.npy` and its ids, as a judge's.

    Args:
        logits: the members' files of this fold, in the order of `settings`.
        stack: the file of :func:`fit_stack`.
        battles: `battles.parquet`, for trees; of the fold's training battles.

    Raises:
        InputError: a file is missing, damaged or of other folds, or lacks a row.
    """
    table = read_parquet(folds)
    rows = fold_rows(table, fold, settings)
    wanted = key(rows)
    made_from = {"folds": fingerprint(table), "fold": fold}
    found = [_members_rows(path, wanted) for path in logits]
    if battles is not None:
        trees = surface_logits(score_surface(table, battles, fold, wanted))
        found.append(np.repeat(trees[:, None], len(ORDERS), axis=1))
    weights, temperature = read_stack(stack, names_of(settings), table, fold)
    about = provenance("stacked_logits", settings.model_dump(mode="json") | {"fold": fold})
    combined = combine(found, weights, temperature).astype(np.float32)
    write_logits(output, combined, rows, about | {"made_from": made_from})
    print(f"{output}: {len(rows):,} battles, {len(found)} members")


def names_of(
    settings: StackedLogitsSettings | StackedViewsSettings | StackedJudgeSettings,
) -> list[str]:
    """A stack's members in their order."""
    return [*settings.members, *([SURFACE] if settings.surface else [])]


def read_stack(
    path: Path, members: Sequence[str], folds: pa.Table | None = None, fold: int | None = None
) -> tuple[np.ndarray, float]:
    """Weights float64 (members,) and temperature of a file of :func:`fit_stack`: of a fold, or of all rows.

    Raises:
        InputError: it is of other members, or not of `folds`.
    """
    figures = read_json(path)
    if folds is not None:
        check_made_from(figures.get("provenance", {}), path, folds=fingerprint(folds))
    if list(figures.get("members", {})) != list(members):
        raise InputError(f"{path}: not the stack of {', '.join(members)}; {REBUILD}")
    each = figures["members"].values()
    if fold is None:
        return np.array([member["weight"] for member in each]), figures["temperature"]
    return np.array([member["folds"][fold] for member in each]), figures["folds"][fold]


def surface_logits(probabilities: np.ndarray) -> np.ndarray:
    """The trees' logits: float64, of the same shape."""
    return np.log(probabilities.clip(min=LEAST))


def combine(
    members: Sequence[np.ndarray], weights: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """The logits of the weighted geometric mean: float64, of the members' shape.

    Args:
        members: each member's logits, float (rows, ..., classes).
        weights: float (members,), not negative, sum 1.

    Raises:
        InputError: the members have other classes or views.
    """
    if len({found.shape for found in members}) > 1:
        shapes = ", ".join(str(found.shape[1:]) for found in members)
        raise InputError(f"the members of a stack have logits of different shapes: {shapes}")
    total = np.zeros(members[0].shape)
    for found, weight in zip(members, weights, strict=True):
        total += float(weight) / temperature * found
    return total


def cross_fit(
    members: np.ndarray, votes: Votes, fold: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, float]]]:
    """Combine each fold as the other folds say, which share no prompt with it.

    Args:
        members: float (rows, members, classes), logits out of fold.
        fold, groups: int (rows,).

    Returns:
        Logits float64 (rows, classes); by fold the weights and the temperature.
    """
    crossed, fitted = np.empty((len(members), members.shape[-1])), {}
    for number in np.unique(fold).tolist():
        mine = fold == number
        others = ~np.isin(groups, groups[mine])
        fitted[number] = fit(members[others], votes[others])
        crossed[mine] = combine(list(members[mine].swapaxes(0, 1)), *fitted[number])
    return crossed, fitted


COLDEST, HOTTEST = 0.01, 100.0
"""Bounds of the temperature."""


def fit(members: np.ndarray, votes: Votes) -> tuple[np.ndarray, float]:
    """The weights and the temperature with the least log loss.

    Args:
        members: float (rows, members, classes), logits; no rows: equal weights.

    Returns:
        float64 (members,), not negative, sum 1; and the temperature, from `COLDEST` to `HOTTEST`.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    rows, count = members.shape[:2]
    equal = np.full(count, 1 / count)
    if not rows:
        return equal, 1.0
    ridge = RIDGE / rows

    def loss(each: np.ndarray) -> tuple[float, np.ndarray]:
        logs = log_softmax(np.einsum("rjc,j->rc", members, each), axis=-1)
        slope = np.einsum("rc,rjc->rj", np.exp(logs) - votes.probabilities, members)
        far = each - equal
        value = float(votes.mean(votes.cross_entropy(logs))) + ridge / 2 * far @ far
        return value, votes.mean(slope) + ridge * far

    found = minimize(loss, equal, jac=True, method="L-BFGS-B", bounds=[(0, None)] * count)
    total = float(found.x.sum())
    weights = found.x / total if total > 0 else equal
    return weights, float(np.clip(1 / max(total, 1 / HOTTEST), COLDEST, HOTTEST))


def _members_rows(path: Path, wanted: pa.Array) -> np.ndarray:
    logits, ids = read_logits(path)
    return logits[locate(wanted, key(ids), str(path))]
