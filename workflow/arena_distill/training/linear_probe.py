"""Fit a head before training: logistic regression on a frozen judge's features.

Training a fresh head and the adapters together adapts the features to a random head. A head fitted
first starts from the linear probe (Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution, arXiv:2202.10054). With only hundreds of battles, that probe is most
of what can be learned.

Features are the inputs of the head's last layer. The ridge applies on their standardised scale; it is
the best of `RIDGES` in a cross-validation that does not split prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from arena_distill.config.head import Head
from arena_distill.config.training import Loss, State
from arena_distill.encoding.batching import token_batches
from arena_distill.encoding.sequences import Sequences
from arena_distill.errors import InputError
from arena_distill.models.heads import battle_logits
from arena_distill.models.hidden_states import capture, head_layer
from arena_distill.models.scoring import score_batches
from arena_distill.training.answer_pairs import Objective
from arena_distill.training.losses import battle_losses
from arena_distill.verdicts import Votes

if TYPE_CHECKING:
    from arena_distill.training.examples import Examples

RIDGES = tuple(10.0 ** (k / 2) for k in range(6, -7, -1))
"""Weights of half the squared norm of the head, relative to the mean loss in nats; descending."""

PARTS = 5
"""Of the cross-validation."""


def fit_head(judge: Any, examples: Examples, *, loss: Loss, head: Head, batch_tokens: int) -> None:
    """Replace the weights of the head's last layer by fitted ones.

    It uses the judge's own loss, votes and teachers. Each of several processes computes the whole fit,
    with the same result.

    Args:
        examples: with the `groups` of their prompts.
        batch_tokens: padded tokens per forward pass.
    """
    assert examples.groups is not None
    features = torch.from_numpy(read_features(judge, examples.views, batch_tokens))
    objective = objective_of(
        examples.votes, examples.teachers, examples.weights, loss=loss, head=head
    )
    layer = head_layer(judge)
    fitted, ridge, found = cross_validate(features, objective, layer.out_features, examples.groups)
    with torch.no_grad():
        layer.weight.copy_(fitted)
        if layer.bias is not None:
            layer.bias.zero_()
    print(f"head fitted to frozen features: ridge {ridge:.3g}, loss {found:.4f} cross-validated")


def objective_of(
    votes: Votes,
    teachers: np.ndarray | None,
    weights: np.ndarray | None,
    *,
    loss: Loss,
    head: Head,
) -> Objective:
    """What a head is fitted by: a judge's own loss.

    Args:
        votes: of the battles as shown.
        teachers: float32 (rows, teachers, classes), logits, or None.
        weights: float32 (rows, teachers), or None.
    """
    shares = torch.from_numpy(votes.probabilities.astype(np.float32))
    counts = torch.from_numpy(votes.weights.astype(np.float32))
    taught, trusted = (
        None if array is None else torch.from_numpy(array) for array in (teachers, weights)
    )

    def objective(outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        targets = None if taught is None else taught[rows]
        trust = None if trusted is None else trusted[rows]
        each = battle_losses(battle_logits(outputs, head), shares[rows], targets, trust, loss)
        return each * counts[rows]

    return objective


def read_features(judge: Any, views: tuple[Sequences, ...], batch_tokens: int) -> np.ndarray:
    """The head's inputs for every sequence: float32 (battles as shown, views, features).

    Raises:
        InputError: a value is too large for half precision.
    """
    width = head_layer(judge).in_features
    features = np.empty((len(views[0]), len(views), width), np.float32)
    wanted: State = "features"
    handles = capture(judge, (wanted,))
    try:
        for view, sequences in enumerate(views):
            room = np.empty((len(sequences), width), np.float16)
            batches = list(token_batches(sequences.lengths, batch_tokens))
            score_batches(judge, sequences, batches, {wanted: room})
            features[:, view] = room
    finally:
        for handle in handles:
            handle.remove()
        judge.train()
    if not np.isfinite(features).all():
        raise InputError(
            f"{judge.config.name_or_path}: hidden states exceed {np.finfo(np.float16).max:,.0f}: cannot "
            "fit a head to them; set training.fit_head: false"
        )
    return features


def cross_validate(
    features: torch.Tensor,
    objective: Objective,
    outputs: int,
    groups: np.ndarray,
    ridges: tuple[float, ...] = RIDGES,
) -> tuple[torch.Tensor, float, float]:
    """Fit weights with the ridge that predicts best.

    Args:
        features: float32 (rows, views, features).
        objective: of the outputs (rows, views, outputs).
        groups: int (rows,); rows of a group are never on both sides.
        ridges: to choose from, descending.

    Returns:
        float32 (outputs, features), fitted to all rows; the ridge; its cross-validated mean loss.
    """
    from sklearn.model_selection import GroupKFold

    rows = np.arange(len(groups))
    parts = min(PARTS, len(np.unique(groups)))
    if parts < 2:  # no cross-validation
        return fit_weights(features, objective, outputs, rows, ridges[:1])[-1], ridges[0], np.nan
    scores = np.zeros(len(ridges))
    for known, held_out in GroupKFold(parts).split(rows, groups=groups):
        asked = torch.from_numpy(held_out)
        for i, fitted in enumerate(fit_weights(features, objective, outputs, known, ridges)):
            scores[i] += float(objective(features[asked] @ fitted.T, asked).sum()) / len(rows)
    best = int(np.argmin(scores))
    # Through the stronger ridges, as in the cross-validation: each fit starts from the last.
    fitted = fit_weights(features, objective, outputs, rows, ridges[: best + 1])[-1]
    return fitted, ridges[best], float(scores[best])


def fit_weights(
    features: torch.Tensor,
    objective: Objective,
    outputs: int,
    rows: np.ndarray,
    ridges: tuple[float, ...],
) -> list[torch.Tensor]:
    """Minimise mean loss plus ridge by L-BFGS, for each ridge: float32 (outputs, features)."""
    chosen = torch.from_numpy(rows)
    known = features[chosen]
    # The mean is not removed: a head without a bias needs it.
    spread = known.flatten(0, 1).std(0)
    spread[spread < 1e-6] = 1.0  # of a constant
    known = known / spread
    weights = torch.zeros(outputs, features.shape[-1], requires_grad=True)
    fitted = []
    for ridge in ridges:
        solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss(solver: torch.optim.LBFGS = solver, ridge: float = ridge) -> torch.Tensor:
            solver.zero_grad()
            value = objective(known @ weights.T, chosen).mean() + ridge / 2 * weights.square().sum()
            value.backward()
            return value

        solver.step(loss)
        fitted.append((weights / spread).detach().clone())
    return fitted
