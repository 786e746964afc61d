"""Compute the weight of each fold in the merged model.

A mean of models with the same start is called a soup (Wortsman et al. 2022, Model soups,
arXiv:2203.05482). Unequal weights must be chosen on battles that the fold did not train on:

``validation``  fold k has the weight exp(−(L_k − L̄) / s), with L_k its log loss on its own validation
                rows and s the mean standard error of the L_k: a fold that is worse by one standard error
                has 1/e of the weight. Folds validate on different rows, so noise should not count.
``greedy``      the greedy soup of the paper: folds are added in the order of their log loss on the
                battles for choices (``folds.CHOICE``), each only if it does not raise the soup's log loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arena_distill.battles.folds import choice_rows
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases.deployment import MergeSettings, SoupSettings
from arena_distill.config.vocabulary import FoldAverage, FoldHeads
from arena_distill.deployment.merging import merge_into, read_adapters
from arena_distill.encoding.sequences import Sequences, Tokens, read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    check_made_from,
    fingerprint,
    read_parquet,
    read_provenance,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import ids_path, read_logits
from arena_distill.metrics import log_loss, losses, mean_over_views
from arena_distill.models.heads import verdicts
from arena_distill.models.loading import load_classifier
from arena_distill.models.scoring import score
from arena_distill.verdicts import Votes

if TYPE_CHECKING:
    from arena_distill.deployment.merging import Adapter


def validation_weights(logits: Sequence[Path], folds: Path) -> list[float]:
    """Weight folds by their log loss on their own validation rows; weights sum to 1.

    Args:
        logits: `fold_<k>.npy`, in the order of the folds.
    """
    table = read_parquet(folds, ["id", "source", "vote", "weight"])
    means, errors = [], []
    for fold, path in enumerate(logits):
        scores, ids = read_logits(path)
        origin = read_provenance(ids_path(path))
        check_made_from(origin, path, folds=fingerprint(table), fold=fold)
        rows = np.flatnonzero(ids["validation"].to_numpy())
        votes = votes_of(table)[locate(key(ids.take(rows)), key(table), str(folds))]
        loss = losses(mean_over_views(scores[rows]), votes)
        mean, weights = votes.mean(loss), votes.weights
        means.append(mean)
        rows_worth = weights.sum() ** 2 / (weights**2).sum()
        errors.append(np.sqrt(votes.mean((loss - mean) ** 2) / rows_worth))
    weights = np.exp(-(np.array(means) - np.mean(means)) / max(float(np.mean(errors)), 1e-12))
    return [float(w) for w in weights / weights.sum()]


def greedy(log_loss: Callable[[list[int]], float], folds: int) -> list[int]:
    """Choose the folds of the greedy soup, best first.

    Args:
        log_loss: of the equal soup of some folds, on battles that none of them trained on.
    """
    alone = {fold: log_loss([fold]) for fold in range(folds)}
    ranked = sorted(alone, key=alone.__getitem__)
    chosen, best = ranked[:1], alone[ranked[0]]
    for fold in ranked[1:]:
        with_it = log_loss([*chosen, fold])
        if with_it <= best:
            chosen, best = [*chosen, fold], with_it
    return chosen


def greedy_weights(
    backbone: Path,
    adapters: Sequence[Path],
    tokens: Path,
    folds: Path,
    *,
    settings: MergeSettings,
    batch_tokens: int,
) -> list[float]:
    """Weights of the greedy soup, by the battles for choices: equal for its folds, else 0.

    Raises:
        InputError: no battle is for choices.
    """
    table = read_parquet(folds)
    rows = table.take(choice_rows(table))
    if not len(rows):
        raise InputError(f"{folds}: no battles to choose folds by; set folds.choices")
    read = read_tokens(tokens)
    read = read.take(locate(key(rows), read.keys(), f"tokens in {tokens}"))
    pot = FoldMerger(backbone, adapters, read, settings, batch_tokens)
    chosen = greedy(lambda some: pot.log_loss(some, votes_of(rows)), len(adapters))
    print(
        f"greedy soup of folds {', '.join(map(str, chosen))}, on {len(rows):,} battles for choices"
    )
    return [1 / len(chosen) if fold in chosen else 0.0 for fold in range(len(adapters))]


class FoldMerger:
    """Merges folds in memory and scores battles with the result.

    Every soup starts from the backbone's file, so it is independent of the last one.
    """

    def __init__(
        self,
        backbone: Path,
        adapters: Sequence[Path],
        tokens: Tokens,
        settings: MergeSettings | SoupSettings,
        batch_tokens: int,
    ) -> None:
        self.backbone = backbone
        self.folds: list[Adapter] = read_adapters(adapters)
        self.settings = settings
        self.batch_tokens = batch_tokens
        self.pad = tokens.vocabulary.pad
        self.views: list[Sequences] = encode_views(tokens, settings.encoding, settings.head)

    def logits(
        self,
        weights: Sequence[float],
        average: FoldAverage = "products",
        heads: FoldHeads = "average",
    ) -> tuple[np.ndarray, float | None]:
        """Logits of the soup: float32 (rows, orders, classes), and the gap between its two averages."""
        from arena_distill.models.layer_reads import attach_head_of

        model: Any = load_classifier(
            self.backbone,
            head=self.settings.head,
            precision=self.settings.precision,
            pad_token_id=self.pad,
            head_seed=0,  # the folds have their own
        )
        attach_head_of(model, self.folds[0].folder)
        used = [(fold, w) for fold, w in zip(self.folds, weights, strict=True) if w]
        folds, shares = [fold for fold, _ in used], [w for _, w in used]
        gap = merge_into(model, folds, shares, average, heads, model.dtype)
        outputs = [score(model, view, batch_tokens=self.batch_tokens) for view in self.views]
        return verdicts(np.stack(outputs, axis=1), self.settings.head), gap

    def log_loss(self, some: Sequence[int], votes: Votes) -> float:
        """Log loss of the equal soup of some folds, merged as it will be, by both orders' mean logits."""
        weights = [1 / len(some) if fold in some else 0.0 for fold in range(len(self.folds))]
        assert isinstance(self.settings, MergeSettings)
        logits, _ = self.logits(weights, self.settings.average, self.settings.heads)
        return log_loss(mean_over_views(logits), votes)
