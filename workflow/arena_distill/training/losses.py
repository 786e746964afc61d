"""Compute the losses of distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from arena_distill.config.training import Loss, State


def battle_losses(
    logits: torch.Tensor,
    votes: torch.Tensor,
    teachers: torch.Tensor | None,
    weights: torch.Tensor | None,
    loss: Loss,
    states: Mapping[State, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Compute each battle's loss, in float32 for logits of any precision.

    With `combine: separate` each of the J teachers adds its own terms, J w_j times; otherwise they form
    one target (J = 1 below), the weighted mean of their logits or of their probabilities at T:

        (ce · Σ_y v(y) · (1 − p_s(y))^γ · CE(y, s)
         + Σ_j J w_j [kl · T² · KL(t_j ‖ s) + cosine · (1 − cos(p_j, p_s))])
        / (ce + J (kl + cosine))

    where KL compares softmax(·/T) (Hinton et al. 2015, arXiv:1503.02531; T² unless switched off), cos
    compares the probabilities at temperature T, and CE smooths each class y of the vote v.
    `alpha·T²·KL + (1−alpha)·CE` is ce = 1−alpha, kl = alpha; five equal terms are ce = kl = cosine = 1 with
    two separate teachers.

    States have a term per teacher for any `combine`: each state adds Σ_j J w_j · weight · d_j to the
    numerator and J · weight to the denominator, with d_j of :func:`feature_distances` or
    :func:`attention_divergences`.

    Args:
        logits: (batch, classes), the student's.
        votes: float32 (batch, classes), of sum 1, or less where a vote counts less in CE (see
            ``targets.trusted_votes``); zeros where there is none: such a battle has no CE term, and by
            `loss.unlabelled` no weight for it in the denominator either.
        teachers: (batch, J, classes), or None where `kl` and `cosine` are 0.
        weights: (batch, J), each row's sum 1, or 0 for a battle that no teacher teaches: it has the CE term
            alone; None: equal.
        states: float32 (batch, J) by name, how far the student's are from each teacher's.

    Returns:
        float32 (batch,), whatever the battles' weights.
    """
    logits = logits.float()
    voted = votes.sum(-1) > 0
    surprise = -F.log_softmax(logits, dim=-1)
    if smoothing := loss.label_smoothing:
        spread = smoothing / surprise.shape[-1] * surprise.sum(-1, keepdim=True)
        surprise = (1 - smoothing) * surprise + spread
    if loss.focal:
        # Not 0, where the gradient of a power below 1 is infinite.
        missed = (1 - logits.softmax(-1)).clamp(min=torch.finfo(torch.float32).tiny)
        surprise = surprise * missed**loss.focal
    total = loss.ce * (votes * surprise).sum(-1)
    weight = loss.ce * (voted if loss.unlabelled == "own_terms" else torch.ones_like(total))
    taught = torch.ones_like(total) if weights is None else (weights.sum(-1) > 0).to(total.dtype)
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
        total = total + taught * (share * each).sum(-1)
        weight = weight + taught * terms * (loss.kl + loss.cosine)
    for name, distances in (states or {}).items():
        count = distances.shape[1]
        share = distances if weights is None else count * weights * distances
        total = total + getattr(loss, name) * share.sum(-1)
        weight = weight + taught * getattr(loss, name) * count
    return total / weight.clamp(min=torch.finfo(torch.float32).tiny)  # 0: nothing to learn


def feature_distances(
    students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Distance of a student's projected features from each teacher's: ‖s/‖s‖ − t/‖t‖‖², from 0 to 4.

    The mean over a battle's sequences. Sun et al. 2019, Patient Knowledge Distillation for BERT Model
    Compression, arXiv:1908.09355; through a learned layer, as Romero et al. 2015, FitNets,
    arXiv:1412.6550. Only directions count, so teachers with hidden states of other sizes and scales
    have the same weight.

    Args:
        students: per teacher, the projected features (batch, sequences, hidden size of the teacher).
        teachers: the same shapes.

    Returns:
        float32 (batch, J).
    """
    pairs = zip(students, teachers, strict=True)
    apart = [F.normalize(s.float(), dim=-1) - F.normalize(t.float(), dim=-1) for s, t in pairs]
    return torch.stack([a.square().sum(-1).mean(-1) for a in apart], dim=-1)


def attention_divergences(student: torch.Tensor, teachers: Sequence[torch.Tensor]) -> torch.Tensor:
    """KL(teacher ‖ student) of the last token's attention in the last layer, in nats.

    The mean over a battle's sequences. Wang et al. 2020, MiniLM, arXiv:2002.10957, section 3.1, for one
    token and the mean over the heads, so their number may differ between student and teacher. (Attention
    transfer: Zagoruyko and Komodakis 2017, arXiv:1612.03928; Jiao et al. 2020, TinyBERT,
    arXiv:1909.10351.)

    Args:
        student: (batch, sequences, tokens), each sequence sums to 1.
        teachers: each the same; sums may differ from 1 by float16's rounding.

    Returns:
        float32 (batch, J).
    """
    student = student.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    targets = [teacher.float() / teacher.float().sum(-1, keepdim=True) for teacher in teachers]
    each = [F.kl_div(student, target, reduction="none").sum(-1).mean(-1) for target in targets]
    return torch.stack(each, dim=-1)
