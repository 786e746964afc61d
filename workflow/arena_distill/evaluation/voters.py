"""What one person predicts of another's vote, beside what a judge predicts: how far one can get.

The best possible predictor is unknown, but battles that several people voted on say how much people agree.
Of each such battle every voter is left out once and predicted, by one other voter, by all others, and by
the judge: people and judge are scored on the same votes. (Leave one annotator out: Calderon et al. 2025,
The Alternative Annotator Test, arXiv:2501.10970; agreement of two voters: Zheng et al. 2023, MT-Bench,
arXiv:2306.05685.)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from arena_distill.metrics import Figures, intervals, losses, most_probable
from arena_distill.verdicts import Votes


def voter_scores(
    votes: Votes, judged: Mapping[str, np.ndarray], groups: np.ndarray
) -> Figures | None:
    """Score voters and judges on the votes of single people.

    Args:
        votes: of battles whose weight is their number of voters, the vote these voters' shares
            (`annotators: merge`). Battles with one voter, or with shares that are no whole numbers of
            votes, do not count.
        judged: probabilities (rows, classes) by name.
        groups: int (rows,), the battle's prompt.

    Returns:
        None without such battles. Else means over voters, so a battle counts by their number: `battles`;
        `voters`; `agreement`, how often two voters of a battle agree; `entropy` of the shares in nats, with
        the correction of Miller and Madow for few voters, an estimate of the least expected log loss;
        `scores`, by name, first `others`: `accuracy` (does the most frequent verdict, of several the
        share, meet the vote?) and `log_loss`, each `value`, `low` and `high` (``metrics.intervals``).
        The log loss of others is of their shares with half a vote more for each class.

    References:
        Miller 1955, Note on the Bias of Information Estimates; Krichevsky and Trofimov 1981, The
        Performance of Universal Encoding (half a vote).
    """
    exact = votes.probabilities * votes.weights[:, None]
    counts = np.round(exact)
    rows = np.flatnonzero((abs(exact - counts) < 1e-3).all(axis=1) & (counts.sum(axis=1) >= 2))
    if not len(rows):
        return None
    votes, counts, groups = votes[rows], counts[rows], groups[rows]
    number, classes = counts.sum(axis=1), counts.shape[1]
    # (battles, the vote of who is left out, the others' votes); nobody left out weighs nothing below.
    own = np.arange(classes)
    others = (counts[:, None] - np.eye(classes)).clip(min=0)
    expected = np.log((others + 0.5) / (number - 1 + classes / 2)[:, None, None])
    of_others = {
        "accuracy": most_probable(others)[:, own, own],
        "log_loss": -expected[:, own, own],
    }
    each = {"others": {k: (votes.probabilities * v).sum(axis=1) for k, v in of_others.items()}}
    for name, probabilities in judged.items():
        p = probabilities[rows]
        met = (votes.probabilities * most_probable(p)).sum(axis=1)
        each[name] = {"accuracy": met, "log_loss": losses(p, votes)}
    agreed = (counts * (counts - 1)).sum(axis=1) / (number * (number - 1))
    shares = counts / number[:, None]
    plain = -(shares * np.log(np.where(counts > 0, shares, 1))).sum(axis=1)
    entropy = plain + ((counts > 0).sum(axis=1) - 1) / (2 * number)
    return {
        "battles": len(rows),
        "voters": int(number.sum()),
        "agreement": float(votes.mean(agreed)),
        "entropy": float(votes.mean(entropy)),
        "scores": {name: intervals(values, votes, groups) for name, values in each.items()},
    }


def shown_voters(metrics: Figures) -> Figures | None:
    """The scores on test battles, or else out of fold; None if no battle has several voters."""
    for battles, figures in (("test", metrics["test"] or {}), ("out of fold", metrics)):
        if found := figures.get("voters"):
            return {"of": battles, **found}
    return None


def describe_voters(found: Figures) -> str:
    """What voters predict of each other, beside the judge, in a sentence."""
    others, judge = found["scores"]["others"], found["scores"]["judge"]
    return (
        f"{found['voters']:,} voters on {found['battles']:,} battles "
        f"{'of the test' if found['of'] == 'test' else 'out of fold'}: the others of a battle meet a "
        f"voter’s verdict in {others['accuracy']['value']:.1%} (log loss "
        f"{others['log_loss']['value']:.4f}), the judge in {judge['accuracy']['value']:.1%} "
        f"({judge['log_loss']['value']:.4f}); two voters agree in {found['agreement']:.1%}"
    )
