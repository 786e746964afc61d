"""What a student learns from: its teachers' logits, and the loss that follows them.

The targets are gathered here from the teachers' files, row by row of the student's training set and by
key, so a file in another order changes nothing and a missing row is an error.

What each kind of target knows: `in_sample` targets come from a teacher that was trained on the very rows,
so they are over-confident. `out_of_fold` targets are honest about their rows, but the teacher of another
fold was trained on the votes of the student's own validation rows, and extra rows were seen by every
fold's teacher: a student's out-of-fold score is a little flattered by that, its score on test is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.artifacts import read_logits
from arena_distill.config import Loss, Targets
from arena_distill.errors import InputError
from arena_distill.keys import key, locate
from arena_distill.orders import swap_classes

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
            logits are those of the one fold model that never saw it (extra rows: the mean over folds).
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
        is_extra = pc.equal(ids["source"], "extra").to_numpy(zero_copy_only=False)
        if is_extra.any():
            these = keys.filter(pa.array(is_extra))
            extra_keys = these if extra_keys is None else extra_keys
            order = locate(extra_keys, these, f"{teacher}'s logits in {file}")
            extra.append(logits[is_extra][order])
    if extra and extra_keys is not None:
        if len(extra) != len(files):
            raise InputError(f"{files[0].parent}: only some folds of {teacher} hold extra rows")
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


def losses(
    logits: torch.Tensor, labels: torch.Tensor, teachers: torch.Tensor | None, loss: Loss
) -> torch.Tensor:
    """Each battle's loss, in float32 whatever the precision of the logits.

    With `combine: mean_logits` the teachers are one target z̄ (the mean of their logits), with `separate`
    each of the J teachers adds its own terms:

        (ce · CE(y, s) + Σ_j [kl · T² · KL(t_j ‖ s) + cosine · (1 − cos(p_j, p_s))])
        / (ce + J (kl + cosine))

    where KL compares softmax(·/T) (Hinton et al. 2015, arXiv:1503.02531; T² unless switched off) and cos
    compares the probabilities at temperature T. `alpha·T²·KL + (1−alpha)·CE` is ce = 1−alpha, kl = alpha;
    five equal terms are ce = kl = cosine = 1 with two separate teachers.

    Args:
        logits: (batch, 3), the student's.
        labels: int64 (batch,).
        teachers: (batch, J, 3), or None where `kl` and `cosine` are 0.

    Returns:
        float32 (batch,).
    """
    import torch.nn.functional as F

    logits = logits.float()
    total = loss.ce * F.cross_entropy(logits, labels, reduction="none")
    weight = loss.ce
    if teachers is not None and loss.kl + loss.cosine > 0:
        teachers = teachers.float()
        if loss.combine == "mean_logits":
            teachers = teachers.mean(dim=1, keepdim=True)
        student = F.log_softmax(logits / loss.temperature, dim=-1).unsqueeze(1).expand_as(teachers)
        target = F.log_softmax(teachers / loss.temperature, dim=-1)
        scale = loss.temperature**2 if loss.temperature_squared else 1.0
        divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        distance = 1 - F.cosine_similarity(student.exp(), target.exp(), dim=-1)
        total = total + (loss.kl * scale * divergence + loss.cosine * distance).sum(-1)
        weight += teachers.shape[1] * (loss.kl + loss.cosine)
    return total / weight
