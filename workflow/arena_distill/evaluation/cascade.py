"""Compute the tokens that a cascade over lengths or orders saves, and its cost in log loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from arena_distill.battles.votes import Solution
from arena_distill.config.prediction import Cascade, Swap
from arena_distill.config.vocabulary import ViewAverage
from arena_distill.files.artifacts import read_provenance
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import ids_path, read_logits
from arena_distill.metrics import Figures, losses, paired_difference, scores
from arena_distill.prediction.averages import averages
from arena_distill.prediction.test_time import Passes, confidence
from arena_distill.verdicts import Votes

CASCADE_COLUMNS = (
    *("swap", "threshold", "battles", "sequences", "tokens", "all_tokens"),
    *("log_loss", "accuracy", "difference", "low", "high"),
)


THRESHOLDS = (0.0, *(i / 100 for i in range(34, 101)))
"""Of the cascade's curve; the most probable of three verdicts has at least 1/3, of two 1/2."""


def _cascade(test_logits: Path, solved: Solution, average: ViewAverage) -> list[Figures] | None:
    """The :func:`cascade_curve` of a file of `score_test`; None if it has no costs."""
    logits, scored = read_logits(test_logits)
    about = _settings(ids_path(test_logits))
    lengths, orders = (about.get(name, ()) for name in ("max_lengths", "orders"))
    costs = Passes.read(scored, lengths)
    if costs is None:
        return None
    rows = locate(solved.keys, key(scored), str(ids_path(test_logits)))
    fixed = Cascade.model_validate(about["cascade"]) if about.get("cascade") else None

    def predict(scores: np.ndarray) -> np.ndarray:
        *_, everything = averages(scores, lengths, orders, average).values()
        return everything

    taken = costs.take(rows)
    kinds: list[Swap] = ["always"]
    if len(orders) > 1 and about.get("head", {}).get("kind") == "joint":
        kinds.append("unsure")
    points = [
        point
        for swap in ([fixed.swap] if fixed else kinds)
        for point in cascade_curve(
            logits[rows], lengths, predict, taken, solved.votes, solved.groups,
            fixed.threshold if fixed else None, swap=swap,
        )
    ]  # fmt: skip
    return points or None


def cascade_curve(
    logits: np.ndarray,
    lengths: Sequence[int],
    predict: Callable[[np.ndarray], np.ndarray],
    costs: Passes,
    votes: Votes,
    groups: np.ndarray,
    threshold: float | None = None,
    *,
    swap: Swap = "always",
) -> list[Figures]:
    """Compute a cascade's work and scores at each of `THRESHOLDS` that changes them.

    Every point has `swap`; the shares of `battles`, `sequences` and `tokens` that are scored after the
    first views, and of all tokens (`all_tokens`); the scores of the prediction; and `versus_all`, the
    paired difference from scoring everything.

    Args:
        logits: float32 (rows, lengths, orders, classes), in the canonical frame.
        predict: logits → float64 (rows, classes), each row by itself.
        votes: of the battles.
        groups: int64 (rows,), their prompts.
        threshold: of the cascade that the logits were scored with. The score without it is unknown
            then, so there is one point, of this cascade, and its `versus_all` is None.
        swap: whether the first views have all orders (:class:`Cascade`); `unsure` is for joint heads.

    Returns:
        No point if no battle has more views than the first.
    """
    short = int(np.argmin(lengths))
    at_short = costs.sequences[:, short]
    views = np.minimum(at_short, 1) if swap == "unsure" else at_short
    # A battle's orders are equally long.
    before = costs.tokens[:, short] * views / np.maximum(at_short, 1)
    sequences, tokens = costs.sequences.sum(axis=1) - views, costs.tokens.sum(axis=1) - before
    more = sequences > 0
    if not more.any():
        return []
    first = logits[:, short, : 1 if swap == "unsure" else None]
    everything, brief = predict(logits), predict(np.broadcast_to(first[:, None], logits.shape))
    reference, sure = losses(everything, votes), confidence(first)
    # Skip thresholds that send no further battle to the other views.
    told = {int((more & (sure < p)).sum()): p for p in reversed(THRESHOLDS)}
    points = []
    for p in sorted(told.values()) if threshold is None else [threshold]:
        goes_on = more & (sure < p)
        probabilities = np.where(goes_on[:, None], everything, brief)
        points.append(
            {
                "swap": swap,
                "threshold": p,
                "battles": float(goes_on.mean()),
                "sequences": float(sequences[goes_on].sum() / sequences.sum()),
                "tokens": float(tokens[goes_on].sum() / tokens.sum()),
                "all_tokens": float((before.sum() + tokens[goes_on].sum()) / costs.tokens.sum()),
                **scores(probabilities, votes),
                "versus_all": paired_difference(
                    losses(probabilities, votes), reference, votes, groups
                )
                if threshold is None
                else None,
            }
        )
    return points


def _settings(path: Path) -> Figures:
    return dict(read_provenance(path).get("settings", {}))


def cascade_records(metrics: Figures) -> list[Figures]:
    """One record per point of the cascade's curve."""
    points = (metrics["test"] or {}).get("cascade") or []
    flat = [point | (point["versus_all"] or {}) for point in points]
    return [{column: point.get(column) for column in CASCADE_COLUMNS} for point in flat]
