"""Score predictions: pure functions of probabilities, votes and, if known, true probabilities.

Probabilities are float (rows, classes) in the order of the classes, votes are ``verdicts.Votes``. Log loss
is in nats, the mean over battles of −Σ vote · log p; lower is better. All means are weighted by battles.

A proper score (log loss, Brier) measures accuracy and calibration together. A calibration error
measures calibration only: the class prior is calibrated, but useless. Calibration errors depend on
the bins, so compare only errors that use the same bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arena_distill.verdicts import CLASSES, ORDERS, Votes

RESAMPLES_AT_ONCE = 64
"""Resamples that are computed together; limits memory."""

Z = 1.96
"""Half a normal 95 % interval, in standard errors."""

ECE_BINS = 15

Figures = dict[str, Any]
"""A part of `metrics.json`: plain JSON values."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute probabilities in float64 from logits (..., classes) of any precision."""
    logits = logits.astype(np.float64)
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = odds / odds.sum(axis=-1, keepdims=True)
    return probabilities


def mean_over_views(logits: np.ndarray) -> np.ndarray:
    """Softmax of the mean logits of a battle's views: (rows, views, classes) → float64 (rows, classes)."""
    return softmax(logits.mean(axis=1, dtype=np.float64))


# --- votes ----------------------------------------------------------------------------------------


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Their logarithms, float64; as in scikit-learn, 0 counts as the smallest step of float64, 2.2e-16."""
    return np.log(probabilities.astype(np.float64).clip(min=np.finfo(np.float64).eps))


def losses(probabilities: np.ndarray, votes: Votes) -> np.ndarray:
    """Log loss of every battle, in nats: float64 (rows,) of probabilities (rows, classes)."""
    return votes.cross_entropy(log_probabilities(probabilities))


def log_loss(probabilities: np.ndarray, votes: Votes) -> float:
    """The mean log loss of probabilities (rows, classes), in nats."""
    return float(votes.mean(losses(probabilities, votes)))


def most_probable(probabilities: np.ndarray) -> np.ndarray:
    """The verdicts: 1 for the most probable class, equal shares of several; float64, of (..., classes)."""
    top = probabilities == probabilities.max(axis=-1, keepdims=True)
    return np.asarray(top / top.sum(axis=-1, keepdims=True))


def right_verdicts(probabilities: np.ndarray, votes: Votes) -> np.ndarray:
    """Whether each verdict, of probabilities (rows, classes), is right: float64 (rows,), 0 to 1.

    It is right if it is the likeliest class of the vote. Of several classes that are equally probable each
    is a part of the verdict: a judge to whom both answers are equal does not say A. Of two classes, a vote
    as much for either makes any verdict half right.
    """
    shares = most_probable(probabilities)[np.arange(len(votes)), votes.labels]
    return np.where(votes.halves, 0.5, np.where(votes.known, shares, 0.0))


def scores(probabilities: np.ndarray, votes: Votes) -> Figures:
    """Row count, mean log loss and accuracy (:func:`right_verdicts`) of probabilities (rows, classes)."""
    return {
        "rows": len(votes),
        "log_loss": log_loss(probabilities, votes),
        "accuracy": float(votes.mean(right_verdicts(probabilities, votes))),
    }


def deployed_score(probabilities: np.ndarray, votes: Votes, groups: np.ndarray) -> Figures:
    """Score the model that is deployed: `rows`, `log_loss` and `accuracy` with their 95 % interval, `ece`.

    Args:
        probabilities: (rows, classes), as it gives them.
        votes: of these battles.
        groups: int (rows,), the battle's prompt.

    Returns:
        `log_loss` and `accuracy` are `value`, `low` and `high` (:func:`intervals`).
    """
    each = {
        "log_loss": losses(probabilities, votes),
        "accuracy": right_verdicts(probabilities, votes),
    }
    ece = calibration_error(reliability(probabilities, votes))
    return {"rows": len(votes), **intervals(each, votes, groups), "ece": ece}


def brier_score(probabilities: np.ndarray, votes: Votes) -> float:
    """The mean squared distance of the probabilities from the vote, 0 (perfect) to 2.

    References:
        Brier 1950, Verification of Forecasts Expressed in Terms of Probability.
    """
    distance = probabilities - votes.probabilities
    return float(votes.mean((distance**2).sum(axis=1)))


def mean_interval(
    values: np.ndarray, votes: Votes, groups: np.ndarray
) -> tuple[float, float | None, float | None]:
    """The mean over battles, and the ends of its 95 % interval; None of one prompt, which shows no luck.

    Battles with the same prompt are not independent: the interval is the normal one, by a standard
    error that is robust to clusters.

    Args:
        values: float or bool (rows,).
        votes: of these battles; their weights count.
        groups: int (rows,), the battle's prompt.

    References:
        Cameron and Miller 2015, A Practitioner's Guide to Cluster-Robust Inference.
    """
    mean, error, prompts = _mean_and_error(values, votes, groups)
    return (mean, mean - Z * error, mean + Z * error) if prompts > 1 else (mean, None, None)


def _mean_and_error(
    values: np.ndarray, votes: Votes, groups: np.ndarray
) -> tuple[float, float, int]:
    """The mean, its standard error that is robust to clusters (NaN of one), and the number of clusters."""
    mean = float(votes.mean(values))
    cluster = np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(cluster, votes.weights * (values - mean))
    number = len(sums)
    if number < 2:
        return mean, np.nan, number
    variance = number / (number - 1) * (sums**2).sum()
    return mean, float(np.sqrt(variance) / votes.weights.sum()), number


def share_interval(
    values: np.ndarray, votes: Votes, groups: np.ndarray
) -> tuple[float, float | None, float | None]:
    """As :func:`mean_interval`, of values between 0 and 1 such as right verdicts: it stays between them.

    Wilson's interval for as many independent battles as would have the standard error that is robust to
    clusters, and no more than there are; without any spread, for as many as there are prompts.

    References:
        Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22(158).
        Korn and Graubard 1998, Confidence Intervals for Proportions with Small Expected Number of Positive
        Counts, Survey Methodology 24(2): the effective number.
    """
    share, error, prompts = _mean_and_error(values, votes, groups)
    if prompts < 2:
        return share, None, None
    spread = share * (1 - share)
    number = min(spread / error**2, len(values)) if error > 1e-9 else prompts
    shrunk = 1 + Z**2 / number
    centre = (share + Z**2 / (2 * number)) / shrunk
    half = Z / shrunk * np.sqrt(spread / number + Z**2 / (4 * number**2))
    return share, float(centre - half), float(centre + half)


def intervals(each: Mapping[str, np.ndarray], votes: Votes, groups: np.ndarray) -> Figures:
    """The mean of each score, `log_loss` or `accuracy`, and its 95 % interval: `value`, `low`, `high`.

    Args:
        each: by score, its values, (rows,).
    """
    of = {"log_loss": mean_interval, "accuracy": share_interval}
    names = ("value", "low", "high")
    return {
        name: dict(zip(names, of[name](values, votes, groups), strict=True))
        for name, values in each.items()
    }


def paired_difference(
    loss: np.ndarray, reference: np.ndarray, votes: Votes, groups: np.ndarray
) -> Figures:
    """Mean difference of two losses on the same battles, with its 95 % interval (:func:`mean_interval`).

    Args:
        loss, reference: float (rows,), of the same battles in the same order.
    """
    mean, low, high = mean_interval(loss - reference, votes, groups)
    return {"difference": mean, "low": low, "high": high}


def gap_closed(log_loss: float, baselines: Mapping[str, Figures | None]) -> float | None:
    """Place a log loss between the class prior (0) and the Bayes limit (1); None if unknown."""
    prior, bayes = baselines["class_prior"], baselines["bayes"]
    if prior is None or bayes is None or prior["log_loss"] == bayes["log_loss"]:
        return None
    gap = prior["log_loss"] - bayes["log_loss"]
    return float((prior["log_loss"] - log_loss) / gap)


# --- calibration ----------------------------------------------------------------------------------


def calibration_scores(probabilities: np.ndarray, votes: Votes) -> Figures:
    """Brier score and the three calibration errors: `brier`, `ece`, `adaptive_ece`, `classwise_ece`."""
    return {
        "brier": brier_score(probabilities, votes),
        "ece": calibration_error(reliability(probabilities, votes)),
        "adaptive_ece": adaptive_calibration_error(probabilities, votes),
        "classwise_ece": classwise_calibration_error(class_reliability(probabilities, votes)),
    }


def reliability(probabilities: np.ndarray, votes: Votes) -> list[Figures]:
    """Confidence and accuracy of the verdicts, in 15 bins of equal width: the reliability diagram.

    A verdict is the most probable class, its confidence that class's probability. It is right by the
    vote's probability of that class. A bin holds the verdicts with `lower` < confidence <= `upper`;
    empty ones are left out. Its `weight` is the sum of its battles' weights.

    References:
        Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    return _diagram(probabilities.max(axis=1), _rightness(probabilities, votes), votes.weights)


def class_reliability(probabilities: np.ndarray, votes: Votes) -> dict[str, list[Figures]]:
    """A reliability diagram per class: its probability, and how often it was the vote.

    The bins are those of :func:`reliability`, over the probability of the class in all rows:
    `confidence` is the mean of that probability, `accuracy` the share of votes for the class.
    """
    return {
        name: _diagram(probabilities[:, i], votes.probabilities[:, i], votes.weights)
        for i, name in enumerate(CLASSES[: votes.classes])
    }


def calibration_error(bins: Sequence[Figures]) -> float:
    """The expected calibration error (ECE): mean |accuracy - confidence| of a reliability diagram.

    Bins weigh as much as their battles. 0 is perfect; it also depends on the number of bins, so
    compare only what was computed alike.
    """
    total = sum(b["weight"] for b in bins)
    return float(sum(b["weight"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total)


def adaptive_calibration_error(probabilities: np.ndarray, votes: Votes) -> float:
    """The ECE of the verdicts in 15 bins of equal size.

    If a judge is rarely confident, most of its verdicts fall into few bins of equal width. Equal
    confidences share a bin, so the result does not depend on the order of the rows.

    References:
        Nguyen and O'Connor 2015, Posterior Calibration and Exploratory Analysis for Natural
        Language Processing Models (adaptive bins); Nixon et al. 2019, Measuring Calibration in Deep
        Learning, arXiv:1904.01685, whose ACE does the same for every class.
    """
    confidence = probabilities.max(axis=1)
    apart = votes.weights * (_rightness(probabilities, votes) - confidence)
    rank = np.searchsorted(np.sort(confidence), confidence)
    gaps = np.bincount(rank * ECE_BINS // len(rank), apart)
    return float(abs(gaps).sum() / votes.weights.sum())


def classwise_calibration_error(diagrams: Mapping[str, Sequence[Figures]]) -> float:
    """The classwise ECE: the mean over the classes of their diagrams' calibration errors.

    Unlike the ECE of the verdicts, it uses all probabilities, also those of ties that are never the
    verdict.

    References:
        Kull et al. 2019, Beyond Temperature Scaling, arXiv:1910.12656; the same as the static
        calibration error of Nixon et al. 2019, arXiv:1904.01685.
    """
    return float(np.mean([calibration_error(bins) for bins in diagrams.values()]))


def _rightness(probabilities: np.ndarray, votes: Votes) -> np.ndarray:
    """The vote's probability of each verdict: float64 (rows,)."""
    return np.asarray((votes.probabilities * most_probable(probabilities)).sum(axis=1))


def _diagram(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> list[Figures]:
    """The bins of equal width that are not empty, of probabilities (rows,) and shares right (rows,)."""
    number = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    rows, total, confidences, rights = (
        np.bincount(number, values, minlength=ECE_BINS)
        for values in (None, weights, weights * confidence, weights * right)
    )
    return [
        {
            "lower": i / ECE_BINS,
            "upper": (i + 1) / ECE_BINS,
            "rows": int(rows[i]),
            "weight": float(total[i]),
            "confidence": float(confidences[i] / total[i]),
            "accuracy": float(rights[i] / total[i]),
        }
        for i in np.flatnonzero(rows).tolist()
    ]


# --- the truth, where it is known -----------------------------------------------------------------


def truth_scores(truth: np.ndarray, probabilities: np.ndarray, votes: Votes) -> Figures:
    """Distance of probabilities (rows, classes) from the true ones, alike, from which votes are drawn.

    Returns:
        `kl`, the mean KL(truth ‖ probabilities) in nats; `mean_absolute_error`, over rows and
        classes; `excess_log_loss`, the log loss less that of the truth on the same votes.

    `kl` is the expected value of `excess_log_loss` over votes: the expected log loss minus the entropy
    of the truth. It does not depend on the votes drawn.
    """
    ratio = log_probabilities(truth) - log_probabilities(probabilities)
    excess = losses(probabilities, votes) - losses(truth, votes)
    return {
        "kl": float(votes.mean((truth * ratio).sum(axis=1))),
        "mean_absolute_error": float(votes.mean(abs(truth - probabilities)).mean()),
        "excess_log_loss": float(votes.mean(excess)),
    }


# --- the order of the answers ---------------------------------------------------------------------


def position_bias(logits: np.ndarray, votes: Votes) -> Figures:
    """How much the order of the answers changes a judge's output; all zero if it does not.

    Args:
        logits: float (rows, orders, classes), in the canonical frame: if a judge ignores the order, the
            logits of both orders are equal.

    Returns:
        `flip_rate`, the share of battles whose verdict differs between the orders;
        `total_variation`, the mean over battles of ½ Σ |p_AB - p_BA|, 0 to 1;
        `first_place_preference`, the share of verdicts for the answer shown first minus that
        for the second, over both orders, -1 to 1; `log_loss` of each order alone and, as
        `both`, of the mean of their logits.

    References:
        Wang et al. 2023, Large Language Models are not Fair Evaluators, arXiv:2305.17926.
    """
    verdicts, probabilities = logits.argmax(axis=-1), softmax(logits)
    first, second = np.array([0, 1]), np.array([1, 0])  # the class of that answer, in AB and in BA
    seen: dict[str, np.ndarray] = {order: probabilities[:, i] for i, order in enumerate(ORDERS)}
    seen["both"] = mean_over_views(logits)
    distance = abs(probabilities[:, 0] - probabilities[:, 1]).sum(axis=-1) / 2
    return {
        "flip_rate": float((verdicts[:, 0] != verdicts[:, 1]).mean()),
        "total_variation": float(distance.mean()),
        "first_place_preference": float((verdicts == first).mean() - (verdicts == second).mean()),
        "log_loss": {name: log_loss(p, votes) for name, p in seen.items()},
    }


def bootstrap(
    losses: np.ndarray, votes: Votes, groups: np.ndarray, *, resamples: int, seed: int = 0
) -> np.ndarray:
    """Mean losses on resampled battles; whole groups are drawn with replacement.

    Args:
        losses: float (judges, rows).
        votes: of these battles; their weights count.
        groups: int (rows,), the battle's prompt.

    Returns:
        float64 (resamples, judges); in each row all judges are scored on the same battles.
    """
    group = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(group, votes.weights)
    sums = np.stack([np.bincount(group, votes.weights * loss) for loss in losses], axis=1)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        draws = min(RESAMPLES_AT_ONCE, resamples - start)
        counts = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), draws)
        means.append((counts @ sums) / (counts @ sizes)[:, None])
    return np.concatenate(means)
