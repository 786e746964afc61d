"""What a student learns from: its teachers' logits, and the loss that follows them.

The targets are gathered here from the teachers' files, row by row of the student's training set and by
key, so a file in another order changes nothing and a missing row is an error.

What each kind of target knows: `in_sample` targets come from a teacher that was trained on the very rows,
so they are over-confident. `out_of_fold` targets are honest about their rows, but the teacher of another
fold was trained on the votes of the student's own validation rows, and extra rows were seen by every
fold's teacher: a student's out-of-fold score is a little flattered by that, its score on test is not.

Unlabelled battles have nothing but their targets. No teacher has seen their votes, as there are none, so
out of fold they get the mean of all folds' teachers, as extra rows do: the better teacher, but again one
that has learned from the votes of the student's validation rows. In sample they get their fold's own
teacher, which has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from arena_distill.artifacts import read_logits
from arena_distill.config import Loss, Targets
from arena_distill.errors import InputError
from arena_distill.keys import key, locate
from arena_distill.orders import NO_VOTE, swap_classes

if TYPE_CHECKING:
    import torch

VOTES = Loss(ce=1.0, kl=0.0, cosine=0.0)
"""The loss of a judge without teachers: cross-entropy with the vote."""


def teacher_targets(
    teachers: Mapping[str, Sequence[Path]], rows: pa.Table, targets: Targets
) -> np.ndarray:
    """Teachers' logits for a student's training rows.

    Args:
        teachers: each teacher's `fold_<k>.npy` files. For `out_of_fold` all of its folds, where a row's
            logits are those of the one fold model that never saw it (extra and unlabelled rows, which no
            fold holds out: the mean over folds).
            For `in_sample` the file of the student's own fold, whose teacher was trained on these rows.
        rows: the training rows; columns `id` and `source`.

    Returns:
        float32 (rows, teachers, orders, 3), classes in the canonical frame.

    Raises:
        InputError: a file is damaged or a row has no logits.
    """
    gather = {"out_of_fold": _out_of_fold, "in_sample": _in_sample}[targets]
    return np.stack([gather(name, files, rows) for name, files in teachers.items()], axis=1)


def _out_of_fold(teacher: str, files: Sequence[Path], rows: pa.Table) -> np.ndarray:
    held_out, held_out_keys, extra, extra_keys = [], [], [], None
    for file in files:
        logits, ids = read_logits(file)
        validation = ids["validation"].to_numpy()
        keys = key(ids)
        held_out.append(logits[validation])
        held_out_keys.append(keys.filter(pa.array(validation)))
        sources = ids["source"].cast(pa.string()).to_numpy(zero_copy_only=False)
        is_extra = np.isin(sources, ["extra", "unlabelled"])
        if is_extra.any():
            these = keys.filter(pa.array(is_extra))
            extra_keys = these if extra_keys is None else extra_keys
            order = locate(extra_keys, these, f"{teacher}'s logits in {file}")
            extra.append(logits[is_extra][order])
    if extra and extra_keys is not None:
        if len(extra) != len(files):
            raise InputError(
                f"{files[0].parent}: only some folds of {teacher} hold extra rows (or unlabelled)"
            )
        held_out.append(np.mean(extra, axis=0))
        held_out_keys.append(extra_keys)
    found = pa.concat_arrays(held_out_keys)
    position = locate(key(rows), found, f"{teacher}'s out-of-fold logits in {files[0].parent}")
    return np.concatenate(held_out)[position]


def _in_sample(teacher: str, files: Sequence[Path], rows: pa.Table) -> np.ndarray:
    (file,) = files
    logits, ids = read_logits(file)
    return logits[locate(key(rows), key(ids), f"{teacher}'s in-sample logits in {file}")]


def as_seen(targets: np.ndarray, order: int) -> np.ndarray:
    """Targets of one order in the frame of the answers as shown: (rows, teachers, 3)."""
    logits = targets[:, :, order]
    return swap_classes(logits) if order else logits


def teacher_weights(
    targets: np.ndarray, labels: np.ndarray, held_out: np.ndarray, loss: Loss
) -> np.ndarray:
    """How much each teacher counts, battle by battle.

    `equal`       1 / J.
    `fitted`      the weights on the simplex with the least log loss on the held-out rows: of the
                  weighted mean of logits or of probabilities, whichever `combine` makes (separate terms:
                  of probabilities). Both are convex. The rows are the student's training rows, never
                  those that validate it.
    `confidence`  (1 − softmax(CE)_j) / (J − 1), where CE_j is teacher j's cross-entropy with the vote:
                  a teacher that missed this battle's vote counts less in it. Zhang, Chen and Wang 2022,
                  Confidence-Aware Multi-Teacher Knowledge Distillation, arXiv:2201.00007, equation 3.

    Args:
        targets: float32 (rows, J, orders, 3).
        labels: int64 (rows,); NO_VOTE where there is none: such rows weigh teachers equally.
        held_out: bool (rows,), where the teachers' logits are out of fold.

    Returns:
        float32 (rows, J), each row's sum 1.

    Raises:
        InputError: weights are to be fitted, but no row is held out.
    """
    rows, count = targets.shape[:2]
    equal = np.full((rows, count), 1 / count, np.float32)
    if count == 1 or loss.weights == "equal":
        return equal
    logits = targets.mean(axis=2, dtype=np.float64)
    voted = labels != NO_VOTE
    if loss.weights == "confidence":
        surprise = _surprise(logits, np.where(voted, labels, 0))
        share = np.exp(surprise - surprise.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        return np.where(voted[:, None], (1 - share) / (count - 1), equal).astype(np.float32)
    fit = held_out & voted
    if not fit.any():
        raise InputError(
            "loss.weights: fitted, but no training battle has teachers' logits out of fold"
        )
    pooled = _fitted_weights(logits[fit], labels[fit], of_logits=loss.combine == "mean_logits")
    return np.tile(pooled.astype(np.float32), (rows, 1))


def _surprise(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each teacher's cross-entropy with the vote: float64 (rows, J)."""
    from scipy.special import log_softmax

    given = np.take_along_axis(log_softmax(logits, axis=-1), labels[:, None, None], axis=2)
    return np.asarray(-given[..., 0])


def _fitted_weights(logits: np.ndarray, labels: np.ndarray, *, of_logits: bool) -> np.ndarray:
    """The weights on the simplex whose weighted mean has the least log loss: float64 (J,)."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax, softmax

    count = logits.shape[1]
    given = np.exp(-_surprise(logits, labels))

    def of_probabilities(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = given @ weights
        return float(-np.log(mixed).mean()), -(given / mixed[:, None]).mean(axis=0)

    def of_mean_logits(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mean = np.einsum("rjc,j->rc", logits, weights)
        own = np.arange(len(labels)), labels
        error = softmax(mean, axis=-1)
        error[own] -= 1
        gradient = np.einsum("rc,rjc->j", error, logits) / len(labels)
        return float(-log_softmax(mean, axis=-1)[own].mean()), gradient

    found = minimize(
        of_mean_logits if of_logits else of_probabilities,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12},
    )
    weights = np.clip(found.x, 0, 1)
    return np.asarray(weights / weights.sum())


def losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teachers: torch.Tensor | None,
    weights: torch.Tensor | None,
    loss: Loss,
) -> torch.Tensor:
    """Each battle's loss, in float32 whatever the precision of the logits.

    With `combine: separate` each of the J teachers adds its own terms, J w_j times; otherwise they are
    one target (J = 1 below), the weighted mean of their logits or of their probabilities at T:

        (ce · (1 − p_s(y))^γ · CE(y, s) + Σ_j J w_j [kl · T² · KL(t_j ‖ s) + cosine · (1 − cos(p_j, p_s))])
        / (ce + J (kl + cosine))

    where KL compares softmax(·/T) (Hinton et al. 2015, arXiv:1503.02531; T² unless switched off), cos
    compares the probabilities at temperature T, and CE smooths the vote. `alpha·T²·KL + (1−alpha)·CE` is
    ce = 1−alpha, kl = alpha; five equal terms are ce = kl = cosine = 1 with two separate teachers.

    Args:
        logits: (batch, 3), the student's.
        labels: int64 (batch,); NO_VOTE where there is none: such a battle has no CE term.
        teachers: (batch, J, 3), or None where `kl` and `cosine` are 0.
        weights: (batch, J), each row's sum 1; None: equal.

    Returns:
        float32 (batch,).
    """
    import torch
    import torch.nn.functional as F

    logits = logits.float()
    voted = labels != NO_VOTE
    votes = labels.where(voted, 0)
    ce = F.cross_entropy(logits, votes, reduction="none", label_smoothing=loss.label_smoothing)
    if loss.focal:
        foreseen = logits.softmax(-1).gather(-1, votes[:, None])[:, 0]
        ce = ce * (1 - foreseen) ** loss.focal
    total = loss.ce * ce * voted
    weight = loss.ce * voted
    if teachers is not None and loss.kl + loss.cosine > 0:
        teachers = teachers.float() / loss.temperature
        if weights is None:
            weights = torch.full_like(teachers[..., 0], 1 / teachers.shape[1])
        target = F.log_softmax(teachers, dim=-1)
        if loss.combine == "mean_logits":
            target = F.log_softmax((weights[..., None] * teachers).sum(1, keepdim=True), dim=-1)
        elif loss.combine == "mean_probabilities":
            log_weights = weights.clamp(min=1e-30).log()
            target = (log_weights[..., None] + target).logsumexp(1, keepdim=True)
        terms = target.shape[1]
        share = weights * terms if loss.combine == "separate" else torch.ones_like(target[..., 0])
        student = F.log_softmax(logits / loss.temperature, dim=-1).unsqueeze(1).expand_as(target)
        scale = loss.temperature**2 if loss.temperature_squared else 1.0
        divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        distance = 1 - F.cosine_similarity(student.exp(), target.exp(), dim=-1)
        each = loss.kl * scale * divergence + loss.cosine * distance
        total = total + (share * each).sum(-1)
        weight = weight + terms * (loss.kl + loss.cosine)
    return total / weight
