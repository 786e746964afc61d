"""What a judge is shown of a battle, and how its outputs become a verdict.

``joint``      prompt and both answers in one sequence, three logits: the documents' way. A battle has two
               views, one per order, and each is a verdict of its own.
``pointwise``  prompt and one answer per sequence, two outputs: the answer's strength s and its pull
               towards ties t. A battle has two views, one per answer, and a model of paired comparison
               turns them into the three logits. Exchanging the answers exchanges the verdict by
               construction, so swap augmentation and both orders at test time have nothing to add.

With strengths s_a, s_b and the tie parameter log ν = t_a + t_b, which is learned and may differ from
battle to battle, the logits of (model_a, model_b, tie) are

``davidson``    (s_a, s_b, log ν + (s_a + s_b) / 2): R. R. Davidson 1970, On extending the Bradley-Terry
                model to accommodate ties, JASA 65(329);
``rao_kupper``  with d = s_a − s_b and the threshold η = log(1 + ν): P(a) = σ(d − η), P(b) = σ(−d − η),
                P(tie) = (e^2η − 1) P(a) P(b): P. V. Rao and L. L. Kupper 1967, Ties in
                paired-comparison experiments, JASA 62(317).

Either gives a tie a third where the strengths are equal and ν = 1, which is where a fresh head starts.

Both sequences of a pointwise judge read the prompt. To share it would spare some sixth of the tokens of
real battles (17 to 19 % between 192 and 2,000 tokens), which a CPU gains from; but flash attention has no
kernel for a tree of answers. ``benchmarks/shared_prompt.py`` runs both sides on battles of one's own.

Every later phase sees three logits per battle and order, whatever the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from arena_distill.config.judge import Head
from arena_distill.verdicts import CLASSES, ORDERS, Order, swap_classes

if TYPE_CHECKING:
    import torch

OUTPUTS = {"joint": CLASSES, "pointwise": ("strength", "tie")}
"""What a sequence's outputs are called, in their order."""


def verdicts(outputs: np.ndarray, head: Head, orders: Sequence[Order] = ORDERS) -> np.ndarray:
    """Logits in the canonical frame, from what a judge said of each view.

    Args:
        outputs: float32 (rows, views, outputs of the head).

    Returns:
        float32 (rows, orders, 3); the same in each order for a pointwise judge.
    """
    if head.kind == "joint":
        exchanged = [
            swap_classes(outputs[:, i]) if order == "BA" else outputs[:, i]
            for i, order in enumerate(orders)
        ]
        return np.stack(exchanged, axis=1)
    import torch

    logits = battle_logits(torch.from_numpy(np.ascontiguousarray(outputs)), head).numpy()
    return np.repeat(logits[:, None], len(orders), axis=1)


def battle_logits(outputs: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits of battles as shown, in float32.

    Args:
        outputs: (battles, sequences per battle, outputs): one sequence of three for a joint judge, two
            of two for a pointwise one.

    Returns:
        float32 (battles, 3).
    """
    import torch
    import torch.nn.functional as F

    outputs = outputs.float()
    if head.kind == "joint":
        return outputs[:, 0]
    (first, second), log_nu = outputs[..., 0].unbind(1), outputs[..., 1].sum(1)
    if head.ties == "davidson":
        return torch.stack([first, second, log_nu + (first + second) / 2], dim=-1)
    eta, difference = F.softplus(log_nu), first - second
    a, b = F.logsigmoid(difference - eta), F.logsigmoid(-difference - eta)
    return torch.stack([a, b, torch.log(torch.expm1(2 * eta)) + a + b], dim=-1)
